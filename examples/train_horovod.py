"""Handwritten digits with Horovod's DistributedOptimizer, which averages the gradients while backward still runs.

    pip install . scikit-learn && syncbn install-horovod
    python examples/train_horovod.py
    syncbn launch horovodrun --procs-per-node 2 -- examples/train_horovod.py

The layers' sums go through Horovod, too.
"""

import horovod.torch as hvd
import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.nn import functional as F

import syncbn

SEED, EPOCHS, BATCH = 0, 3, 32  # images a step, of all processes together; they may be divided unequally

hvd.init()
comm = syncbn.init(backend="horovod")  # also where horovodrun did not start us
device = torch.device("cuda" if torch.cuda.is_available() else "cpu")  # of the GPUs, init has chosen ours
torch.manual_seed(SEED)  # of the first parameters

pixels, labels = load_digits(return_X_y=True)
images = torch.tensor(pixels / 16, dtype=torch.get_default_dtype(), device=device).view(-1, 1, 8, 8)
labels = torch.tensor(labels, device=device)
shuffle = torch.Generator().manual_seed(SEED)  # the same on every rank
train, test = torch.randperm(len(images), generator=shuffle).split([1437, 360])


class Block(nn.Module):
    """A residual block."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.first, self.second = (nn.Conv2d(channels, channels, 3, padding=1, bias=False) for _ in range(2))
        self.norm1, self.norm2 = nn.BatchNorm2d(channels), nn.BatchNorm2d(channels)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.relu(self.norm2(self.second(F.relu(self.norm1(self.first(x))))) + x)


stem = nn.Conv2d(1, 16, 3, padding=1, bias=False)
model = nn.Sequential(stem, nn.BatchNorm2d(16), nn.ReLU(), Block(16), nn.Flatten(), nn.Linear(16 * 64, 10)).to(device)
syncbn.convert_sync_batchnorm(model)
hvd.broadcast_parameters(model.state_dict(), root_rank=0)
optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)  # the learning rate of the whole batch
optimizer = hvd.DistributedOptimizer(optimizer, named_parameters=model.named_parameters())


@torch.no_grad()
def accuracy() -> float:
    """Every rank takes a part of the test set."""
    model.eval()
    mine = test[comm.rank :: comm.size]
    right = (model(images[mine]).argmax(1) == labels[mine]).double().sum()
    model.train()
    return syncbn.global_mean(right, len(mine)).item()


for epoch in range(EPOCHS):
    for batch in train[torch.randperm(len(train), generator=shuffle)].split(BATCH):
        mine = batch[comm.rank :: comm.size]
        total = F.cross_entropy(model(images[mine]), labels[mine], reduction="sum")
        loss = syncbn.global_mean(total, len(mine))  # the mean of the replicas' gradients is the whole batch's then
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()  # waits for the averages
    score = accuracy()
    if comm.rank == 0:
        print(f"epoch {epoch + 1}: loss {loss.item():.6f}, accuracy {score:.3f}", flush=True)
