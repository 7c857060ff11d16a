"""Are the replicas' tensors alike, and can they be sent? An answer that is the same on every rank."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from itertools import zip_longest

import torch
from torch import Tensor, nn

from ._buckets import repeats, without_repeats
from .comm._place import place
from .comm._protocol import BaseCommunicator
from .errors import DTypeError, InputError

Named = Sequence[tuple[str, Tensor]]

_REMEDIES = {
    "DTensor": "FSDP2 averages gradients itself and knows no whole parameters: call broadcast_parameters before "
    "fully_shard, and average_gradients not at all. Statistics are measured and compared of ordinary tensors",
    "UninitializedParameter": "it has no shape yet: run one forward first",
    "UninitializedBuffer": "it has no shape yet: run one forward first",
}


def problem_with(tensor: Tensor) -> str:
    """Say why a tensor's values cannot be sent, in words that are the same on every rank; "" if they can."""
    kind = type(tensor)
    if kind not in (Tensor, nn.Parameter):
        remedy = _REMEDIES.get(
            kind.__name__, "a subclass of torch.Tensor may keep its values elsewhere: use a plain one"
        )
        return f"a {kind.__name__}; {remedy}"
    if tensor.layout is not torch.strided or tensor.is_nested:
        return f"a {'nested' if tensor.is_nested else tensor.layout} tensor: use a dense one"
    if tensor.is_quantized:
        return f"a quantised tensor ({tensor.dtype}): quantise after training"
    if tensor.is_meta:
        return "on the meta device, without values: call module.to_empty(device=...) first"
    if tensor.is_inference() and not torch.is_inference_mode_enabled():
        return "made in inference_mode, so it cannot be written to: make it outside"
    return ""


def check_plain(named: Named) -> None:
    """Raise DTypeError at the first tensor with a problem; after `check_alike`, that is on every rank."""
    for name, tensor in named:
        if problem := problem_with(tensor):
            raise DTypeError(f"expected plain tensors, but {name} is {problem}")


def facts_of(named: Named) -> list[str]:
    """Describe tensors, one line each, by all that has to be alike on the replicas."""
    return [f"{name.replace('_orig_mod.', '')}: {problem_with(t) or _fact(t)}" for name, t in named]  # compiled or not


def _fact(tensor: Tensor) -> str:
    expanded = f" expanded from {tuple(without_repeats(tensor).shape)}" if repeats(tensor) else ""
    trained = ", requires grad" if tensor.requires_grad else ""
    return f"{tensor.dtype} {tuple(tensor.shape)}{expanded} on {tensor.device.type}{trained}"


def check_alike(
    facts: Sequence[str],
    comm: BaseCommunicator,
    what: str,
    device: torch.device,
    also: Sequence[int] = (),
    needed: int | None = None,
) -> bool:
    """Raise InputError on every rank if the replicas' `facts` differ; else tell whether `also`, bytes, is alike.

    Only digests are compared; where they differ, the lines of the first rank and of the first unlike it are sent. A
    rank that adds zeros, since it has no batch left (see `uneven`), has nothing to compare.

    Args:
        facts: what is to be alike, a line each.
        comm: the replicas.
        what: names the facts.
        device: of the vectors that are sent.
        also: bytes.
        needed: a rank whose values are to be sent, so it has to have some.
    """
    text = "\n".join(facts).encode()
    rows = torch.zeros(comm.size, 3, dtype=torch.float64, device=device)
    rows[comm.rank] = torch.tensor([_digest(text), len(text), _digest(bytes(also))], dtype=torch.float64, device=device)
    told = comm.all_reduce(rows.flatten(), place(f"comparison of {what}")).view(-1, 3).tolist()
    present = {rank: row for rank, row in enumerate(told) if any(row)}
    if needed is not None and needed not in present:
        raise InputError(f"rank {needed} has no batch left and adds zeros: send its {what} after syncbn.uneven")
    first, (*same, also_same) = next(iter(present.items()))
    for rank, row in present.items():
        if row[:2] != same:
            lengths = {first: int(same[1]), rank: int(row[1])}
            raise InputError(f"the replicas' {what} differ: {_difference(_texts(text, lengths, comm, device))}")
    return all(row[2] == also_same for row in present.values())


def _digest(text: bytes) -> int:
    return int.from_bytes(hashlib.sha256(text).digest()[:6], "big")  # float64 holds 48 bits exactly


def _texts(text: bytes, lengths: dict[int, int], comm: BaseCommunicator, device: torch.device) -> dict[int, str]:
    """Return the texts of some ranks, on every rank; one all-reduce."""
    parts = [torch.zeros(length, dtype=torch.float64, device=device) for length in lengths.values()]
    for rank, part in zip(lengths, parts, strict=True):
        if rank == comm.rank:
            part.copy_(torch.tensor(list(text), dtype=torch.float64, device=device))
    received = torch.split(comm.all_reduce(torch.cat(parts), place("what differs")), list(lengths.values()))
    return {rank: bytes(part.int().tolist()).decode() for rank, part in zip(lengths, received, strict=True)}


def _difference(texts: dict[int, str]) -> str:
    (rank, ours), (other, theirs) = ((rank, text.splitlines()) for rank, text in texts.items())
    pairs = zip_longest(ours, theirs, fillvalue="no more")
    a, b = next((a, b) for a, b in pairs if a != b)
    reordered = " (they have the same, in another order)" if sorted(ours) == sorted(theirs) else ""
    return (
        f"rank {rank} has '{a}' where rank {other} has '{b}'{reordered}: build the same model, in the same order, on "
        "every rank"
    )


def device_of(named: Named) -> torch.device:
    """Return the device on which the replicas speak about these tensors: the first that has memory."""
    return next((tensor.device for _, tensor in named if not tensor.is_meta), torch.device("cpu"))
