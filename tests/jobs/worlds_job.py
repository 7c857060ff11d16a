"""Started by torchrun, mpirun or horovodrun: makes and ends worlds. Prints what is left after the 2nd and the last.

Arguments: CYCLES FILE. Under mpirun with MASTER_ADDR and MASTER_PORT the worlds are Gloo's and MPI's in turn; under
torchrun the user makes a smaller one too, which meets in FILE.
"""

import gc
import os
import sys
import time
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

import syncbn
from syncbn._launch import detect
from syncbn.comm._groups import communicator, resolve
from syncbn.errors import GroupError

cycles = int(sys.argv[1])
launcher = detect(os.environ).launcher
rank = None


def left() -> str:
    gc.collect()
    time.sleep(2)  # what the others close, the server of the store on rank 0 closes after them
    links = [
        os.readlink(f"/proc/self/fd/{fd}")
        for fd in os.listdir("/proc/self/fd")
        if os.path.exists(f"/proc/self/fd/{fd}")
    ]
    sockets = sum(link.startswith("socket:") for link in links)
    memory = Path("/proc/self/maps").read_text().count("memfd:syncbn")
    return f"{len(links)} files, {len(os.listdir('/proc/self/task'))} threads, {sockets} sockets, {memory} memories"


def total(comm: syncbn.comm.Communicator) -> float:
    return comm.all_reduce(torch.ones(3))[0].item()


layer = syncbn.SyncBatchNorm(2)
after = {}
for cycle in range(cycles):
    backend = ("gloo", "mpi")[cycle % 2] if launcher == "mpirun" else None
    comm = syncbn.init(backend, timeout=timedelta(seconds=30))
    rank, size = comm.rank, comm.size
    parts = [resolve("node"), resolve(1)]
    assert total(comm) == size
    assert total(resolve("node")) == size
    layer(torch.randn(4, 2))
    held, by_user = [], cycle % 4 == 2 and launcher != "horovodrun"
    if dist.is_initialized():
        group = dist.new_group()
        held = [resolve(group)]
        assert total(held[0]) == size
        if cycle % 3 == 0:
            del group
    kept = dist.group.WORLD if dist.is_initialized() else None
    dist.destroy_process_group() if by_user else syncbn.world().close()
    assert isinstance(syncbn.world(), syncbn.comm.SingleProcess)
    assert "memfd:syncbn" not in Path("/proc/self/maps").read_text()  # at once, whoever holds what
    layer(torch.randn(4, 2))  # follows
    for old in (comm, *parts, *held):
        try:
            old.all_reduce(torch.ones(3))
        except GroupError:
            continue
        raise AssertionError(f"{old} outlived its world")
    comm = parts = held = old = group = kept = None
    if cycle in (1, cycles - 1):
        after[cycle] = left()
if launcher == "torchrun" and rank < size - 1:
    dist.init_process_group("gloo", init_method=f"file://{sys.argv[2]}", rank=rank, world_size=size - 1)
    layer(torch.randn(4, 2))
    assert total(syncbn.world()) == total(communicator(layer._group.key)) == size - 1
    dist.destroy_process_group()
assert total(syncbn.init()) == size
sys.stdout.write(f"rank {rank} of {size}: after 2: {after[1]}; after {cycles}: {after[cycles - 1]}\n")
