"""Handwritten digits with DistributedDataParallel: P processes train what one process trains with the whole batch.

    pip install . scikit-learn
    python examples/train_ddp.py
    torchrun --nproc-per-node 2 examples/train_ddp.py

For several hosts see docs/launching.md.
"""

import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset, random_split

import syncbn

SEED, EPOCHS, BATCH = 0, 3, 32  # images a step, of all processes together

comm = syncbn.init()  # the world of torchrun, or alone
device = torch.device("cuda" if torch.cuda.is_available() else "cpu")  # of the GPUs, init has chosen ours
torch.manual_seed(SEED)  # the same split and the same first parameters on every rank

pixels, labels = load_digits(return_X_y=True)
images = torch.tensor(pixels / 16, dtype=torch.get_default_dtype()).view(-1, 1, 8, 8)
train_set, test_set = random_split(TensorDataset(images, torch.tensor(labels)), [0.8, 0.2])

# The sampler deals the samples out in turn, so the ranks' shares of a step are together the batch of one process.
if BATCH % comm.size:
    raise SystemExit(f"a batch of {BATCH} cannot be dealt out to {comm.size} processes: change BATCH or their number")
sampler = DistributedSampler(train_set, comm.size, comm.rank, seed=SEED, drop_last=True)
loader = DataLoader(train_set, BATCH // comm.size, sampler=sampler, drop_last=True)

model = nn.Sequential(
    nn.Conv2d(1, 16, 3, padding=1, bias=False),
    nn.BatchNorm2d(16),
    nn.ReLU(),
    nn.Conv2d(16, 32, 3, stride=2, padding=1, bias=False),
    nn.BatchNorm2d(32),
    nn.ReLU(),
    nn.Flatten(),
    nn.Linear(32 * 4 * 4, 10),
).to(device)
syncbn.convert_sync_batchnorm(model)  # in place, before DDP wraps the model

# forward_sync_buffers=False (before torch 2.13 broadcast_buffers=False) saves a broadcast: buffers are equal already.
parallel = DistributedDataParallel(model) if comm.size > 1 else model
optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)  # the learning rate of the whole batch


@torch.no_grad()
def accuracy() -> float:
    """Every rank takes a part of the test set. `model`, not `parallel`: in eval mode no layer needs its peers."""
    model.eval()
    x, y = (part.to(device) for part in test_set[comm.rank :: comm.size])
    right = (model(x).argmax(1) == y).double().sum()
    model.train()
    return syncbn.global_mean(right, len(y)).item()


for epoch in range(EPOCHS):
    sampler.set_epoch(epoch)  # or every epoch has the same order
    for x, y in loader:
        # The mean over all replicas' terms. With equal shares it has the gradient of each one's own mean; the value, of
        # the whole batch, is the same on every rank.
        total = F.cross_entropy(parallel(x.to(device)), y.to(device), reduction="sum")
        loss = syncbn.global_mean(total, len(y))
        optimizer.zero_grad()
        loss.backward()  # DDP averages the gradients
        optimizer.step()
    score = accuracy()
    if comm.rank == 0:
        print(f"epoch {epoch + 1}: loss {loss.item():.6f}, accuracy {score:.3f}", flush=True)
