"""An optimizer's state goes from one rank to the others, whatever it holds."""

from __future__ import annotations

import io

import torch
from torch.optim import Optimizer

from ._parallel import send
from .comm._place import place
from .comm._protocol import BaseCommunicator

_LENGTH = place("optimizer state")


def send_state(optimizer: Optimizer, comm: BaseCommunicator, source: int, device: str) -> None:
    """Give every rank the state_dict of rank `source`, bit for bit; two sums.

    As bytes, since a rank that took no step has no state of the same structure.
    """
    file = io.BytesIO()
    if comm.rank == source:
        torch.save(optimizer.state_dict(), file)
    here = torch.frombuffer(bytearray(file.getvalue() or b"\0"), dtype=torch.uint8)
    length = torch.zeros(1, dtype=torch.float64, device=device)
    length[0] = len(here) if comm.rank == source else 0
    numel = int(comm.all_reduce(length, _LENGTH).item())
    mine = here if comm.rank == source else torch.zeros(numel, dtype=torch.uint8, device="cpu")
    received = send(mine.to(device), comm, source).cpu()
    if comm.rank != source:
        optimizer.load_state_dict(torch.load(io.BytesIO(bytes(received.tolist())), weights_only=True))
