"""Started by a launcher: DDP, where a branch with synchronised layers is unused on rank 1, without shared memory."""

import sys

import torch
import torch.distributed as dist
from torch import nn

import syncbn

comm = syncbn.init()
torch.manual_seed(0)


class Branches(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8))
        self.head = nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8), nn.Linear(8, 1))
        # Last here, first in the forward: DDP sums its bucket before all others, and so these after the layers' sums
        # where the branch is used, and between them where it is not.
        self.extra = nn.Linear(8, 8)

    def forward(self, x, use):
        return self.head(self.stem(x + self.extra(x) if use else x))


model = syncbn.convert_sync_batchnorm(Branches())
ddp = nn.parallel.DistributedDataParallel(
    model, find_unused_parameters=True, bucket_cap_mb=1e-4, broadcast_buffers=False
)
optimizer = torch.optim.SGD(ddp.parameters(), 0.1)
for _ in range(10):
    optimizer.zero_grad()
    y = ddp(torch.randn(4, 8), use=comm.rank == 0)
    (y * torch.randn_like(y)).sum().backward()
    optimizer.step()
weights = torch.cat([p.detach().flatten() for p in model.parameters()])
total = comm.all_reduce(weights.double())
assert torch.equal(total, comm.size * weights.double()), "the ranks' weights differ"
sys.stdout.write(f"rank {comm.rank} trained over {comm.transport}\n")
dist.barrier()
