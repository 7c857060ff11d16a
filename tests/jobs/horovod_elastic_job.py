"""Started by horovodrun with --host-discovery-script: trains while a worker is killed, or while one more comes.

Arguments: "killed" or "more", MARK (made where it has happened), HOSTS (what the discovery script prints). Each worker
prints the worlds that it was in, and the sum of all parameters' and buffers' magnitudes at the end.
"""

import os
import signal
import sys
import time
from datetime import timedelta
from pathlib import Path

import horovod.torch as hvd
import torch
from horovod.common.exceptions import HorovodInternalError
from torch import nn

import syncbn
from syncbn.errors import CollectiveError

event, mark, hosts = sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3])
syncbn.init(timeout=timedelta(seconds=60))
torch.manual_seed(0)
network = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2)).double()
model = syncbn.convert_sync_batchnorm(network)
optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
worlds = []


def happen() -> None:
    if event == "killed" and hvd.rank() == 1:
        mark.touch()
        os.kill(os.getpid(), signal.SIGKILL)
    if event == "more":
        mark.touch()
        hosts.write_text("localhost:1\n127.0.0.1:1\n")


def backward(step: int) -> None:
    draw = torch.Generator().manual_seed(step)
    x, weights = (torch.randn(6, width, generator=draw, dtype=torch.float64) for width in (3, 2))
    mine = slice(hvd.rank(), None, hvd.size())
    (model(x[mine]) * weights[mine]).sum().div(len(x[mine])).backward()
    syncbn.average_gradients(model)


def train_step(step: int) -> None:
    optimizer.zero_grad()
    try:
        backward(step)
    except CollectiveError as error:  # a peer is lost: leave its world, and let hvd.elastic make another
        syncbn.world().close()
        raise HorovodInternalError(str(error)) from error
    optimizer.step()


@hvd.elastic.run
def train(state: hvd.elastic.TorchState) -> None:
    worlds.append(hvd.size())
    while state.step < 20:
        if state.step == 8 and not mark.exists():
            happen()
        if mark.exists() and hvd.size() == 1 and event == "more":
            time.sleep(0.5)  # Horovod looks for hosts once a second
        train_step(state.step)
        state.step += 1
        state.commit()


train(hvd.elastic.TorchState(model=model, optimizer=optimizer, step=0))
total = sum(tensor.double().abs().sum().item() for tensor in model.state_dict().values())
sys.stdout.write(f"worlds {worlds}, in the end rank {hvd.rank()} of {hvd.size()}: {total:.12f}\n")
