"""Train three norm layers over the launcher's world; in step 8 something happens on rank 1.

    fault_job.py FAULT [--timeout SECONDS] [--marker FILE]

FAULT is one of ENDS, by itself between two steps, else where it says (`kill:forward`, `kill:backward`), or one of
OTHERWISE. When it happens rank 1 makes the marker file. A rank that comes to the end prints `done`.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import torch
from torch import Tensor, nn

import syncbn

STEPS, AT = 20, 8


def _raise() -> None:
    raise ValueError("the fault of this test")


ENDS: dict[str, Callable[[], object]] = {
    "raise": _raise,
    "kill": lambda: os.kill(os.getpid(), signal.SIGKILL),
    "stop": lambda: os.kill(os.getpid(), signal.SIGSTOP),
    "sys-exit": lambda: sys.exit(0),
    "os-exit": lambda: os._exit(0),
    "sleep": lambda: time.sleep(3600),
}
OTHERWISE = ("skip", "order", "eval", "fewer")  # what rank 1 does in that step, otherwise than the others


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.third = nn.BatchNorm1d(8), nn.BatchNorm1d(8), nn.BatchNorm1d(16)
        self.widen = nn.Linear(8, 16)

    def forward(self, x: Tensor, fault: str = "") -> Tensor:
        what, _, where = fault.partition(":")
        for layer in (self.second, self.first) if fault == "order" else (self.first, self.second):
            x = layer(x)
        if where == "forward":
            ENDS[what]()
        if where == "backward":
            x.register_hook(lambda _: ENDS[what]())
        x = self.widen(x)
        return x if fault == "skip" else self.third(x)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("fault")
    parser.add_argument("--timeout", type=float, default=6)
    parser.add_argument("--marker", type=Path)
    args = parser.parse_args()
    torch.manual_seed(0)
    torch.set_num_threads(1)
    comm = syncbn.init(timeout=timedelta(seconds=args.timeout))
    net = syncbn.convert_sync_batchnorm(Net().double())
    optimizer = torch.optim.SGD(net.parameters(), 0.01)
    if comm.rank == 0:
        print(f"{type(comm).__name__}: {comm.size} ranks", flush=True)
    for step in range(STEPS):
        fault = args.fault if step == AT and comm.rank == 1 else ""
        if fault and args.marker is not None:
            args.marker.touch()
        if fault == "fewer":
            break
        if fault in ENDS:
            ENDS[fault]()
        net.train(fault != "eval")
        optimizer.zero_grad()
        net(torch.randn(4, 8, dtype=torch.float64), fault).square().mean().backward()
        syncbn.average_gradients(net)
        optimizer.step()
        time.sleep(0.02)
    print(f"rank {comm.rank}: done", flush=True)


if __name__ == "__main__":
    main()
