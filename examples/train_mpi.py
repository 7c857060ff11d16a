"""Handwritten digits on CPUs under MPI, without DistributedDataParallel, which has no MPI.

    pip install ".[mpi]" scikit-learn
    python examples/train_mpi.py
    syncbn launch mpirun --procs-per-node 2 -- examples/train_mpi.py

The same script runs under torchrun and horovodrun, too.
"""

import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.nn import functional as F

import syncbn

SEED, EPOCHS, BATCH = 0, 3, 32  # images a step, of all processes together; they may be divided unequally

comm = syncbn.init()  # the world of mpirun, or alone
torch.manual_seed(SEED)  # of the first parameters

pixels, labels = load_digits(return_X_y=True)
pixels, labels = torch.tensor(pixels / 16, dtype=torch.get_default_dtype()), torch.tensor(labels)
shuffle = torch.Generator().manual_seed(SEED)  # the same on every rank
train, test = torch.randperm(len(pixels), generator=shuffle).split([1437, 360])

model = nn.Sequential(
    nn.Linear(64, 64, bias=False),
    nn.BatchNorm1d(64),
    nn.ReLU(),
    nn.Linear(64, 32, bias=False),
    nn.BatchNorm1d(32),
    nn.ReLU(),
    nn.Linear(32, 10),
)
syncbn.convert_sync_batchnorm(model)
syncbn.broadcast_parameters(model)  # surely the same ones on every rank
optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)  # the learning rate of the whole batch


def share(batch: torch.Tensor) -> torch.Tensor:
    """Return the indices of this rank's images. The last batch has 29 images: one rank of two gets 15, the other 14."""
    return batch[comm.rank :: comm.size]


@torch.no_grad()
def accuracy() -> float:
    """Every rank takes a part of the test set."""
    model.eval()
    mine = share(test)
    right = (model(pixels[mine]).argmax(1) == labels[mine]).double().sum()
    model.train()
    return syncbn.global_mean(right, len(mine)).item()


for epoch in range(EPOCHS):
    for batch in train[torch.randperm(len(train), generator=shuffle)].split(BATCH):
        mine = share(batch)
        total = F.cross_entropy(model(pixels[mine]), labels[mine], reduction="sum")
        loss = syncbn.global_mean(total, len(mine))  # of the whole batch: shares are not equal, so neither are weights
        optimizer.zero_grad()
        loss.backward()
        syncbn.average_gradients(model)
        optimizer.step()
    score = accuracy()
    if comm.rank == 0:
        print(f"epoch {epoch + 1}: loss {loss.item():.6f}, accuracy {score:.3f}", flush=True)
