"""Started by a real launcher: the conformance suite, the groups and the layer over this launcher's communicator."""

import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))  # the launchers start this file from anywhere

import torch
from conformance import conformance, states
from torch import nn

import syncbn
from syncbn.comm._groups import consecutive, resolve

comm = syncbn.init()
checks = conformance(comm)

for per_group in range(1, comm.size + 1):
    group = resolve(per_group)
    ranks = next(part for part in consecutive(comm.size, per_group) if comm.rank in part)
    assert (group.rank, group.size) == (ranks.index(comm.rank), len(ranks))
    assert group.all_reduce(torch.tensor([1.0 + comm.rank])).item() == sum(1 + r for r in ranks)
    assert resolve(per_group) is group  # made once
assert resolve("node").size == comm.size  # one host
conformance(resolve(max(1, comm.size - 1)))

# The layer against nn.BatchNorm2d on the whole batch, forward, backward and buffers.
torch.manual_seed(0)
whole, g = torch.randn(2 * comm.size, 3, 5, 4).double(), torch.randn(2 * comm.size, 3, 5, 4).double()
mine = slice(2 * comm.rank, 2 * comm.rank + 2)
plain, sync = nn.BatchNorm2d(3).double(), syncbn.SyncBatchNorm(3).double()
x, x_mine = whole.clone().requires_grad_(), whole[mine].clone().requires_grad_()
y, y_mine = plain(x), sync(x_mine)
(y * g).sum().backward()
(y_mine * g[mine]).sum().backward()
for ours, theirs in (
    (y_mine, y[mine]),
    (x_mine.grad, x.grad[mine]),
    (comm.all_reduce(sync.weight.grad), plain.weight.grad),
    (comm.all_reduce(sync.bias.grad), plain.bias.grad),
    (sync.running_mean, plain.running_mean),
    (sync.running_var, plain.running_var),
):
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)

# Native handles: of everybody, of the first two ranks, and of nobody here.
native, outside = [], []
if isinstance(comm, syncbn.comm.MPI):
    from mpi4py import MPI

    native = [MPI.COMM_WORLD, MPI.COMM_WORLD.Split(comm.rank < 2)]
    outside = [MPI.COMM_NULL]
elif isinstance(comm, syncbn.comm.Horovod):
    import horovod.torch as hvd

    pair = hvd.global_process_set if comm.size < 3 else resolve(2).process_set
    native = [hvd.global_process_set, pair]
    outside = [hvd.ProcessSet([0])]  # not registered
else:
    import torch.distributed as dist

    pair = dist.new_group([0, 1])
    native = [dist.group.WORLD, *([pair] if comm.rank < 2 else [])]
    outside = [] if comm.rank < 2 else [pair]
for handle in native:
    assert resolve(handle).size in (comm.size, min(2, comm.size), comm.size - 2)
    conformance(resolve(handle))
for handle in outside:
    try:
        syncbn.SyncBatchNorm(3, process_group=handle)(torch.randn(4, 3))
    except syncbn.errors.GroupError:
        continue
    raise AssertionError(f"{handle} was taken for a group")


def make(timeout):
    """A communicator of its own; for Horovod, which ends as a whole, the world anew."""
    if isinstance(comm, syncbn.comm.MPI):
        return syncbn.comm.MPI(timeout=timeout)
    if isinstance(comm, syncbn.comm.Horovod):
        syncbn.world().close()
        os.environ.pop("HOROVOD_STALL_CHECK_TIME_SECONDS", None)
        os.environ.pop("HOROVOD_STALL_SHUTDOWN_TIME_SECONDS", None)
        return syncbn.init(timeout=timeout)
    return syncbn.comm.TorchDistributed(dist.new_group(timeout=timeout))


comm.all_reduce(torch.zeros(1))  # a rank that ends Horovod ends the others' collectives, too
passed = states(make)
if isinstance(comm, syncbn.comm.MPI) and comm.rank < comm.size - 1:
    assert syncbn.comm._mpi._written_to  # the vectors of the waits that were given up: MPI may still write to them
if isinstance(comm, syncbn.comm.Horovod):
    syncbn.init()
syncbn.world().all_reduce(torch.zeros(1))  # a rank of Horovod that ends ends the others' collectives, too
line = (
    f"conformance: {type(comm).__name__} rank {comm.rank} of {comm.size}: {checks} checks and {passed} states passed\n"
)
sys.stdout.write(line)  # in one piece: the ranks share the pipe
