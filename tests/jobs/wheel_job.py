"""Two steps of training on every rank, compared with one process that has the whole batch: launch/test-wheel.sh."""

import os
import time
from pathlib import Path

import torch
from torch import nn

import syncbn


def trained(model: nn.Module, images: torch.Tensor) -> nn.Module:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for step in range(2):
        optimizer.zero_grad()
        out = model(images)
        syncbn.global_mean((out**3).sum(), out.numel()).backward()
        syncbn.average_gradients(model)
        optimizer.step()
        if step == 0 and syncbn.world().rank == 0:
            print(f"first synchronised step after {time.time() - float(os.environ['STARTED']):.0f} s", flush=True)
    return model


def make() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 36, 4)).double()


comm = syncbn.init()
assert comm.size == 2
model, whole = syncbn.convert_sync_batchnorm(make()), make()
batch = torch.randn(4, 3, 8, 8, dtype=torch.float64) * torch.arange(1.0, 5).view(4, 1, 1, 1)
trained(model, batch[2 * comm.rank : 2 * comm.rank + 2])
optimizer = torch.optim.SGD(whole.parameters(), lr=0.1)
for _ in range(2):
    optimizer.zero_grad()
    (whole(batch) ** 3).mean().backward()
    optimizer.step()
torch.testing.assert_close(model.state_dict(), whole.state_dict(), rtol=1e-9, atol=1e-12)

# One OpenMP, torch's: a second would have threads of its own.
libraries = {line.split()[-1] for line in Path("/proc/self/maps").read_text().splitlines() if "libgomp" in line}
assert len(libraries) <= 1, libraries
if comm.rank == 0:
    print(f"equal to the whole batch: {comm}, {syncbn.__file__}, {sorted(libraries)}")
comm.close()
