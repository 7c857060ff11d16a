"""Started by a real launcher: takes steps with a synchronised layer until something happens. Arguments: SECONDS STEPS.

SECONDS is the timeout of `syncbn.init`.
"""

import socket
import sys
import time
from datetime import timedelta

import torch

import syncbn

seconds, steps = float(sys.argv[1]), int(sys.argv[2])
comm = syncbn.init(timeout=timedelta(seconds=seconds))
layer = syncbn.SyncBatchNorm(2)
for step in range(steps):
    layer(torch.randn(4, 2, requires_grad=True)).square().sum().backward()
    if step == 3:
        sys.stdout.write(f"rank {comm.rank} of {comm.size} trains on {socket.gethostname()}\n")  # in one piece
        sys.stdout.flush()
    time.sleep(0.05)
sys.stdout.write(f"rank {comm.rank} is done\n")
sys.stdout.flush()
