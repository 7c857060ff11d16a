"""Started by a real launcher: compiled layers and models over every communicator, from the first step on.

No group has been looked up before. Each rank makes all ranks' inputs, and compares with nn.BatchNorm on all of them. At
the end it prints how often the compiler gave up, and how many graphs it made beyond those that nn.BatchNorm needs.
"""

import sys
from pathlib import Path

import torch
from torch import nn
from torch._dynamo.utils import counters

import syncbn

sys.path.insert(0, str(Path(__file__).parents[1]))
from reference import on_rows, random_batch, randomized

TIGHT = {"rtol": 1e-10, "atol": 1e-12}


def check(group, backend, ranks):
    xs, gs = random_batch([(4 + rank, 3) for rank in range(comm.size)])
    leaves = [xs[rank].clone().requires_grad_() for rank in ranks]
    expected = on_rows(nn.BatchNorm1d(3).double(), leaves)
    sum((y * gs[rank]).sum() for y, rank in zip(expected, ranks, strict=True)).backward()
    layer = nn.Sequential(syncbn.SyncBatchNorm(3, process_group=group)).double()
    x = xs[comm.rank].clone().requires_grad_()
    y = torch.compile(layer, backend=backend, fullgraph=True)(x)
    (y * gs[comm.rank]).sum().backward()
    torch.testing.assert_close(y, expected[ranks.index(comm.rank)], **TIGHT)
    torch.testing.assert_close(x.grad, leaves[ranks.index(comm.rank)].grad, **TIGHT)


def model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(2, 3, 3), randomized(nn.BatchNorm2d(3)), nn.ReLU(), nn.BatchNorm2d(3)).double()


SITUATIONS = [(True, 2), (True, 3), (False, 2), (True, 5), (False, 3)]  # training, images


def graphs(net, dynamic, reference=None):
    """Train and evaluate `net`, compiled, on other batch sizes; return how many graphs that took."""
    torch._dynamo.reset()
    counters["stats"].clear()
    backend = "aot_eager" if reference else "eager"  # as many graphs either way
    run = torch.compile(net, backend=backend, dynamic=dynamic)  # not fullgraph: a break would be counted
    for seed, (training, images) in enumerate(SITUATIONS):
        net.train(training)
        xs, _ = random_batch([(images, 2, 5, 5)] * comm.size, seed=seed)
        x = xs[comm.rank].clone().requires_grad_()
        y = run(x)
        (y * y).sum().backward()
        if reference is not None:
            whole = torch.cat(xs).requires_grad_()
            expected = reference.train(training)(whole)
            expected.square().sum().backward()
            here = slice(images * comm.rank, images * (comm.rank + 1))
            torch.testing.assert_close(y, expected[here], **TIGHT)
            torch.testing.assert_close(x.grad, whole.grad[here], **TIGHT)
    for ours, theirs in zip(net.buffers(), reference.buffers() if reference else net.buffers(), strict=True):
        torch.testing.assert_close(ours, theirs, **TIGHT)
    return counters["stats"]["unique_graphs"]


comm = syncbn.init()
everybody = list(range(comm.size))
counters["graph_break"].clear()
check("node", "aot_eager", everybody)
check(2, "aot_eager", [rank for rank in everybody if rank // 2 == comm.rank // 2])
check(None, "inductor", everybody)
fused = syncbn.convert_sync_batchnorm(model())
assert syncbn.fuse_activations(fused)
beyond = [
    graphs(net, dynamic, model()) - graphs(model(), dynamic)
    for net, dynamic in ((syncbn.convert_sync_batchnorm(model()), None), (fused, True))
]
breaks = sum(counters["graph_break"].values())
comm.all_reduce(torch.zeros(1))  # a rank of Horovod that ends ends the others' collectives, too
counts = f"graph breaks: {breaks}, graphs beyond: {beyond}"
sys.stdout.write(f"compiled: {type(comm).__name__} rank {comm.rank} of {comm.size}, {counts}\n")  # in one piece
