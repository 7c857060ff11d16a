"""Three layers, three steps; in the second, rank 1 does what the argument says, in place of the second layer."""

import os
import signal
import sys
import time
from datetime import timedelta

import torch
from torch import nn

import syncbn

fault, watchdog, timeout = sys.argv[1], *map(float, sys.argv[2:4])


def elsewhere():
    time.sleep(60)


FAULTS = {
    "sleep": elsewhere,
    "nap": lambda: time.sleep(4.5),
    "stop": lambda: os.kill(os.getpid(), signal.SIGSTOP),
    "kill": lambda: os.kill(os.getpid(), signal.SIGKILL),
    "exit": lambda: sys.exit(0),
    "raise": lambda: 1 / 0,
    "skip": lambda: None,
}
comm = syncbn.init(timeout=timedelta(seconds=timeout), watchdog=timedelta(seconds=watchdog))
model = nn.Sequential(*(syncbn.SyncBatchNorm(channels) for channels in (4, 4, 8)))
syncbn.name_layers(model)
bad = int(sys.argv[4]) if len(sys.argv) > 4 else 1
for step in range(3):
    x = torch.randn(4, 4, requires_grad=True)
    for number, layer in enumerate(model):
        faulty = comm.rank == bad and step == 1 and number == 1
        if faulty:
            print(f"fault at {time.time()}", flush=True)
            FAULTS[fault]()
        if not (faulty and fault == "skip"):
            x = layer(torch.cat([x, x], 1) if number == 2 else x)
    x.sum().backward()
print(f"rank {comm.rank} is done", flush=True)
