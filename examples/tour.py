# %% [markdown]
# # Why batch statistics should be those of the whole batch
#
# On one machine, without a launcher: `syncbn.comm.run_threads(P, fn)` runs `fn(comm)` on P threads, each one replica.
# As a script, `python examples/tour.py` draws the pictures into runs/tour; the cells open in VS Code and, through
# jupytext, in Jupyter. Needs `pip install . matplotlib scikit-learn`.

# %%
from itertools import product
from pathlib import Path

import matplotlib.pyplot as plt
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional as F

import syncbn
from syncbn.comm import Communicator, run_threads

OUTPUT = Path("runs/tour")
OUTPUT.mkdir(parents=True, exist_ok=True)
WHOLE, LOCAL, SYNC = "0.45", "tab:orange", "tab:green"  # colours
torch.set_default_dtype(torch.float64)
torch.set_num_threads(1)  # of each replica

pixels, labels = load_digits(return_X_y=True)
images, labels = torch.tensor(pixels / 16).view(-1, 1, 8, 8), torch.tensor(labels)
images = (images - images.mean()) / images.std()
random = torch.Generator().manual_seed(0)
lit = images + 4 * torch.randn(len(images), 1, 1, 1, generator=random)  # each in a light of its own
train, test = torch.randperm(len(images), generator=random).split([1437, 360])

# %% [markdown]
# ## 1. What a replica measures depends on what it happens to hold
#
# A batch of 1024 images is dealt out to replicas. Each measures mean and variance of its own share. In a small share
# they are far from those of the batch: so far, roughly, as one image is from another, divided by the root of n.

# %%
batch = images[train[:1024]]
figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.2), layout="constrained", sharex=True)
for n in (1, 2, 4, 8, 16, 32, 64):
    shares = batch.view(-1, n * 64)
    x = n * 2 ** torch.linspace(-0.3, 0.3, len(shares))
    left.plot(x, (shares.mean(1) - batch.mean()) / batch.std(), ".", color=LOCAL, alpha=0.4, markersize=4)
    right.plot(x, shares.var(1) / batch.var(), ".", color=LOCAL, alpha=0.4, markersize=4)
left.axhline(0, color=SYNC)
right.axhline(1, color=SYNC, label="the batch of 1024, which every replica gets from syncbn")
right.plot([], [], ".", color=LOCAL, label="a replica by itself")
left.set(title="Mean, in standard deviations of the batch", xscale="log", xlabel="images per replica")
right.set(title="Variance, as a part of the batch's", xlabel="images per replica")
right.set_xticks([1, 2, 4, 8, 16, 32, 64], ["1", "2", "4", "8", "16", "32", "64"])
right.minorticks_off()
figure.legend(loc="outside lower center", ncols=2)
figure.savefig(OUTPUT / "spread.png", dpi=120)

# %% [markdown]
# ## 2. The output of an image depends on its company
#
# The same 16 images, each in a light of its own (as films, scanners and days differ), dealt out to 8 replicas in four
# ways. We look at one of them. By itself its replica normalises it with whatever image lies beside it; synchronised, it
# comes out the same four times.


# %%
def normalised(batch: Tensor, replicas: int, synchronised: bool) -> Tensor:
    """Return the batch normalised in training mode by so many replicas, each with its share."""

    def replica(comm: Communicator) -> Tensor:
        norm: nn.Module = nn.BatchNorm2d(1, affine=False)
        if synchronised:
            norm = syncbn.convert_sync_batchnorm(norm, process_group=comm)
        return norm(batch.chunk(comm.size)[comm.rank])

    return torch.cat(run_threads(replicas, replica))


batch = lit[train[:16]]
companions = (1, 5, 9, 10)
orders = [[0, other, *(i for i in range(1, 16) if i != other)] for other in companions]
local, synchronised = ([normalised(batch[order], 8, flag)[0, 0] for order in orders] for flag in (False, True))
figure, grid = plt.subplots(3, 4, figsize=(9.5, 7), layout="constrained", height_ratios=(0.55, 1, 1))
for axes, other in zip(grid[0], companions, strict=True):
    held = axes.imshow(torch.cat([batch[0, 0], batch[other, 0]], 1), cmap="gray", vmin=-9, vmax=9)
    axes.set_title(f"beside image {other}")
for line, outputs in zip(grid[1:], (local, synchronised), strict=True):
    for axes, output in zip(line, outputs, strict=True):
        shown = axes.imshow(output, cmap="RdBu_r", vmin=-2.5, vmax=2.5)
        axes.set_xlabel(f"largest difference {(output - outputs[0]).abs().max():.1g}")
    line[0].set_xlabel("the first, compared with:")
for axes, name in zip(grid[:, 0], ("its replica holds", "nn.BatchNorm2d", "with syncbn"), strict=True):
    axes.set_ylabel(name, fontsize=12)
for axes in grid.flat:
    axes.set(xticks=[], yticks=[])
figure.colorbar(held, ax=grid[0], label="pixel")
figure.colorbar(shown, ax=grid[1:], label="normalised pixel", shrink=0.7)
figure.suptitle("The left image of each pair, normalised; the same 16 images on 8 replicas every time")
figure.savefig(OUTPUT / "company.png", dpi=120)

# %% [markdown]
# ## 3. Testing uses what training never saw
#
# At test time the layers use running statistics: those of rank 0, as usual. What a replica adds to the running variance
# is the spread within its own share; that from share to share is missing. Where images are alike, it is not missed.
# Where each has a light of its own and a replica holds one, nearly all of it is missing, and the test fails. With two
# and more the network copes, and is even a little better here: a small share that is normalised by itself loses some of
# its light. (One seed: a point or two of accuracy is noise.)

# %%
EPOCHS, BATCH = 2, 32
shares = [32, 16, 8, 4, 2, 1]  # images per replica
data = {"images as they are": (images, "o-"), "each in a light of its own": (lit, "s--")}
norms = {"nn.BatchNorm2d": (False, LOCAL), "with syncbn": (True, SYNC)}
batches = train[: 1437 // BATCH * BATCH].view(-1, BATCH)


def running_variance(inputs: Tensor, replicas: int, synchronised: bool) -> float:
    """Return rank 0's after an epoch, as a part of the variance of all training images."""

    def replica(comm: Communicator) -> float:
        norm: nn.Module = nn.BatchNorm2d(1, momentum=None)  # the plain average over the batches
        if synchronised:
            norm = syncbn.convert_sync_batchnorm(norm, process_group=comm)
        for batch in batches:
            norm(inputs[batch.chunk(comm.size)[comm.rank]])
        return (norm.running_var / inputs[train].var()).item()

    return run_threads(replicas, replica)[0]


def classifier() -> nn.Module:
    torch.manual_seed(0)
    first = [nn.Conv2d(1, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU()]
    second = [nn.Conv2d(8, 16, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU()]
    return nn.Sequential(*first, *second, nn.Flatten(), nn.Linear(256, 10))


def accuracy(inputs: Tensor, replicas: int, synchronised: bool) -> float:
    """Train a classifier for some epochs, and return how often that of rank 0 is right on the test images."""
    models = [classifier() for _ in range(replicas)]  # here: `manual_seed` is for all threads

    def replica(comm: Communicator) -> float:
        model = models[comm.rank]
        if synchronised:
            syncbn.convert_sync_batchnorm(model, process_group=comm)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
        for batch in batches.repeat(EPOCHS, 1):
            mine = batch.chunk(comm.size)[comm.rank]
            optimizer.zero_grad()
            F.cross_entropy(model(inputs[mine]), labels[mine]).backward()
            syncbn.average_gradients(model, process_group=comm)
            optimizer.step()
        return (model.eval()(inputs[test]).argmax(1) == labels[test]).double().mean().item()

    return run_threads(replicas, replica)[0]


figure, panels = plt.subplots(1, 2, figsize=(11, 4.6), layout="constrained")
for axes, measure in zip(panels, (running_variance, accuracy), strict=True):
    for (inputs_name, (inputs, style)), (name, (flag, colour)) in product(data.items(), norms.items()):
        found = [measure(inputs, BATCH // n, flag) for n in shares]
        print(f"{measure.__name__}, {inputs_name}, {name}: {', '.join(f'{value:.3f}' for value in found)}")
        axes.plot(shares, found, style, color=colour, label=f"{name}, {inputs_name}")
    axes.set(xscale="log", xlabel="images per replica, of 32 in a batch", ylim=(0, 1.05))
    axes.set_xticks(shares, [str(n) for n in shares])
    axes.minorticks_off()
    axes.invert_xaxis()
    axes.grid(alpha=0.3)
panels[0].set(title="Running variance / variance of the images")
panels[1].set(title=f"Accuracy on test images after {EPOCHS} epochs")
figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=2)
figure.savefig(OUTPUT / "training.png", dpi=120)

# %% [markdown]
# ## 4. P replicas are one batch
#
# Output, input gradient, weight gradients (summed over the replicas) and running variance of P replicas, against
# `nn.BatchNorm2d` with the whole batch, in float64. The loss weighs the outputs at random: their plain sum has no
# gradient. What is left is rounding, most of it of the reference: it does not grow with the number of replicas.


# %%
def results(batch: Tensor, weights: Tensor, replicas: int, synchronised: bool) -> dict[str, Tensor]:
    """Return what a forward and a backward of one layer give, put together from all replicas."""

    def replica(comm: Communicator) -> tuple[Tensor, ...]:
        norm = nn.BatchNorm2d(8)
        if synchronised:
            norm = syncbn.convert_sync_batchnorm(norm, process_group=comm)
        x, w = (whole.chunk(comm.size)[comm.rank].clone() for whole in (batch, weights))
        y = norm(x.requires_grad_())
        (y * w).sum().backward()
        return y.detach(), x.grad, norm.weight.grad, norm.running_var

    outputs, inputs, parameters, variances = zip(*run_threads(replicas, replica), strict=True)
    gradients = {"input gradient": torch.cat(inputs), "weight gradient": torch.stack(parameters).sum(0)}
    return {"output": torch.cat(outputs), **gradients, "running variance": variances[0]}


with torch.no_grad():
    batch = classifier()[0](images[train[:64]])
weights = torch.randn_like(batch)
reference = results(batch, weights, 1, synchronised=False)
worlds = [2, 4, 8, 16, 32, 64]
figure, panels = plt.subplots(1, 4, figsize=(13, 3.8), layout="constrained", sharey=True)
for axes, (name, expected) in zip(panels, reference.items(), strict=True):
    for label, (flag, colour) in norms.items():
        found = [results(batch, weights, size, flag)[name] for size in worlds]
        errors = [((ours - expected).abs().max() / expected.abs().max()).item() for ours in found]
        print(f"{name}, {label}: {', '.join(f'{error:.0e}' for error in errors)}")
        axes.plot(worlds, errors, "o-", color=colour, label=label)
    axes.axhline(2**-53, color=WHOLE, linestyle=":", label="rounding of one number")
    axes.set(title=name, xscale="log", yscale="log", ylim=(1e-17, 10), xlabel="replicas, 64 images in all")
    axes.set_xticks(worlds, [str(size) for size in worlds])
    axes.minorticks_off()
    axes.grid(alpha=0.3)
panels[0].set(ylabel="largest difference, relative")
panels[0].legend(loc="center right")
figure.savefig(OUTPUT / "equal.png", dpi=120)
