"""An optimizer's state goes from one rank to the others, whatever it holds."""

from __future__ import annotations

import io

import torch
from torch.optim import Optimizer

from ._parallel import BUCKET_BYTES, send
from .comm._place import place
from .comm._protocol import BaseCommunicator

_LENGTH = place("optimizer state")


def send_state(optimizer: Optimizer, comm: BaseCommunicator, source: int, device: str) -> None:
    """Give every rank the state_dict of rank `source`, bit for bit; two sums, one more for each further 12.5 MB.

    As bytes, since a rank that took no step has no state of the same structure.
    """
    file = io.BytesIO()
    if comm.rank == source:
        torch.save(optimizer.state_dict(), file)
    length = torch.tensor([file.getbuffer().nbytes], dtype=torch.float64, device=device)
    numel = int(comm.all_reduce(length, _LENGTH).item())
    state = bytearray(file.getvalue() or numel)
    for piece in torch.split(torch.frombuffer(state, dtype=torch.uint8), BUCKET_BYTES // 2):
        piece.copy_(send(piece.to(device), comm, source))
    if comm.rank != source:
        optimizer.load_state_dict(torch.load(io.BytesIO(state), map_location="cpu", weights_only=True))
