"""Started by torchrun, mpirun or horovodrun: makes and ends worlds. Prints what is left after the 2nd and the last.

Arguments: CYCLES.
"""

import gc
import os
import sys
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

import syncbn
from syncbn.comm._groups import resolve
from syncbn.errors import GroupError

cycles = int(sys.argv[1])
dist_is_below = "TORCHELASTIC_RUN_ID" in os.environ
rank = None


def left() -> str:
    gc.collect()
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
    comm = syncbn.init(timeout=timedelta(seconds=30))
    rank, size = comm.rank, comm.size
    parts = [resolve("node"), resolve(1)]
    assert total(comm) == size
    assert total(resolve("node")) == size
    layer(torch.randn(4, 2))
    held, by_user = [], cycle % 2 == 1 and dist_is_below
    if dist_is_below:
        group = dist.new_group()
        held = [resolve(group)]
        assert total(held[0]) == size
        if cycle % 3 == 0:
            del group
    dist.destroy_process_group() if by_user else syncbn.world().close()
    assert isinstance(syncbn.world(), syncbn.comm.SingleProcess)
    layer(torch.randn(4, 2))  # follows
    for old in (comm, *parts, *held):
        try:
            old.all_reduce(torch.ones(3))
        except GroupError:
            continue
        raise AssertionError(f"{old} outlived its world")
    comm = parts = held = old = group = None
    after[cycle] = left()
sys.stdout.write(f"rank {rank} of {size}: after 2: {after[1]}; after {cycles}: {after[cycles - 1]}\n")
