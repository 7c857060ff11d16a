"""Started by a real launcher: the first step of each layer is a compiled one, over every kind of group.

No group has been looked up before. Each rank makes all ranks' inputs, and compares with nn.BatchNorm1d on all of them.
"""

import sys
from pathlib import Path

import torch
from torch import nn

import syncbn

sys.path.insert(0, str(Path(__file__).parents[1]))
from reference import on_rows, random_batch


def check(group, backend, ranks):
    xs, gs = random_batch([(4 + rank, 3) for rank in range(comm.size)])
    leaves = [xs[rank].clone().requires_grad_() for rank in ranks]
    expected = on_rows(nn.BatchNorm1d(3).double(), leaves)
    sum((y * gs[rank]).sum() for y, rank in zip(expected, ranks, strict=True)).backward()
    layer = nn.Sequential(syncbn.SyncBatchNorm(3, process_group=group)).double()
    x = xs[comm.rank].clone().requires_grad_()
    y = torch.compile(layer, backend=backend, fullgraph=True)(x)
    (y * gs[comm.rank]).sum().backward()
    torch.testing.assert_close(y, expected[ranks.index(comm.rank)], rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(x.grad, leaves[ranks.index(comm.rank)].grad, rtol=1e-10, atol=1e-12)


comm = syncbn.init()
everybody = list(range(comm.size))
check("node", "aot_eager", everybody)
check(2, "aot_eager", [rank for rank in everybody if rank // 2 == comm.rank // 2])
check(None, "inductor", everybody)
comm.all_reduce(torch.zeros(1))  # a rank of Horovod that ends ends the others' collectives, too
sys.stdout.write(f"compiled: {type(comm).__name__} rank {comm.rank} of {comm.size}\n")  # in one piece
