"""`uneven`: ranks whose batches end early let the others go on."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from ._alike import check_alike, check_plain, device_of, facts_of
from ._layer import Synchronised
from ._name_layers import layer_names
from ._optimizer_state import send_state
from ._parallel import send_parameters
from .comm._groups import ProcessGroup, communicator, device_for, key_of
from .comm._horovod import Horovod
from .comm._protocol import BaseCommunicator
from .comm._roll_call import RollCall
from .errors import GroupError, InputError


@contextmanager
def uneven(
    model: nn.Module, *joinables: Any, optimizer: Optimizer | None = None, process_group: ProcessGroup = None
) -> Iterator[None]:
    """Let the ranks have different numbers of batches, none included, in the training loop within.

    A rank whose loop has ended waits at the end of the block and adds zeros to whatever the others sum: the layers'
    statistics both ways, `average_gradients`, `global_mean`. So statistics and gradients count the samples that there
    are; gradients are divided by the number of all ranks (as DDP does), so that with `global_mean` they are those of
    the whole batch. At the end every rank takes parameters and buffers from one that took the last step.

    A step begins with the model's forward in training mode. Micro-batches are steps too: ranks may differ by whole
    optimizer steps, since gradients that a rank has gathered when its loop ends are left out.

    Under Horovod the waiting ranks call `hvd.join()`, which also answers `hvd.DistributedOptimizer`.

    Args:
        model: the module with the layers; of a DDP `ddp.module`. Wrapped by torch.compile or not, as it is called.
        joinables: what takes part with collectives of its own, as torch's Join knows it: DDP, ZeroRedundancyOptimizer.
        optimizer: whose state the ranks take from the same rank. Without it momentum stays that of each rank's own last
            step, and ranks that go on with it afterwards come apart; likewise with torch's Join. Schedulers are yours.
        process_group: the ranks, see `SyncBatchNorm`; the layers' groups are parts of it.

    Raises:
        InputError: before any collective: the model has no layers of ours, or norm layers that are not synchronised, or
            layers without names or with one name, or is in eval mode, or wrapped in a DDP that was not given; one of
            `joinables` is none, or a DDP of another model; another `uneven` is open. After one collective, on every
            rank: the models differ, or one of the ranks is not in a layer's group.
        GroupError: one of `joinables` is over another group; a layer's group is larger than `process_group`, or under
            Horovod another one, or, after that collective, does not hold this rank.
        DTypeError: a parameter or buffer is not plain memory, see `broadcast_parameters`.
        MismatchError: those that have batches left ask for different sums; on every rank, but under Horovod not on the
            waiting ones, which find Horovod ended (PeerLostError).
        PeerLostError: on the others, where a rank has left the block by an exception: it waits for nobody.

    Collectives: one of 3P numbers among P ranks at the start; one of ten numbers before each step, and once a rank has
    finished also before each sum; at the end one of P numbers and those of `broadcast_parameters`, and of the
    optimizer's state one and one for each 12.5 MB. Sums over groups other than `process_group` and the layers' are not
    answered: make them outside.
    With NCCL alone (no Gloo beside it) every step waits for the device. Not run on a GPU.

    Source: torch.distributed.algorithms.join, whose Join drives `joinables` here; Horovod's `hvd.join`.

    Example:
        >>> import syncbn
        >>> model = syncbn.convert_sync_batchnorm(nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3)))
        >>> with uneven(model):
        ...     for batch in torch.randn(4, 8, 2):
        ...         loss = syncbn.global_mean(model(batch).square().sum(), batch.shape[0])
        ...         loss.backward()
        ...         syncbn.average_gradients(model)
    """
    _check(model, joinables)
    key = key_of(process_group)
    comm = communicator(key)
    others, failure = _others(model, key)
    members = list({id(member): member for member in (comm, *others)}.values())
    _check_groups(comm, members, joinables)
    named = [*model.named_parameters(), *model.named_buffers()]
    device = device_of(named)
    if comm.size > 1:  # the others have to hear of a failure
        check_alike([f"groups: {failure or 'all hold this rank'}", *facts_of(named)], comm, "models", device)
    if failure is not None:
        raise failure
    if comm.size == 1:
        yield
        return
    with _attending(model, comm, members, device) as finish, _joined(joinables) as join:
        yield
        source = join(finish)
    send_parameters(model, comm, source)
    if optimizer is not None:
        send_state(optimizer, comm, source, device_for(comm))


@contextmanager
def _attending(
    model: nn.Module, comm: BaseCommunicator, members: Sequence[BaseCommunicator], device: torch.device
) -> Iterator[Callable[[], int]]:
    """Tell the other ranks of each step; yield what is called after the last, and returns who took the last of all."""
    if isinstance(comm, Horovod):  # where nobody needs to be told
        comm.tell(lambda *_: None)  # only so that another block is noticed
        try:
            yield comm.join
        finally:
            comm.tell(None)
        return
    calls = RollCall(comm, members, device, torch.empty(0, device=device_for(comm)).device)

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def begin(module: nn.Module, _: Any) -> None:
        if module.training:
            calls.step()

    hook = model.register_forward_pre_hook(begin)
    try:
        yield calls.answer
    finally:
        hook.remove()
        calls.close()


@contextmanager
def _joined(joinables: Sequence[Any]) -> Iterator[Callable[[Callable[[], int]], int]]:
    """Have torch's Join around `joinables`; yield what ends it while another thread does ours, so neither waits."""
    if not joinables:
        yield lambda finish: finish()
        return
    from torch.distributed.algorithms.join import Join

    before = [joinable._join_config for joinable in joinables]
    join = Join(list(joinables))

    def end(finish: Callable[[], int]) -> int:
        with ThreadPoolExecutor(1, "uneven") as thread, warnings.catch_warnings():  # Join sets a filter
            source = thread.submit(finish)
            try:
                join.__exit__(None, None, None)
            except RuntimeError as error:  # of torch's, which knows no more than that a peer left
                raise source.exception() or error from error
            return source.result()

    try:
        yield end
    finally:  # Join leaves it switched on
        for joinable, config in zip(joinables, before, strict=True):
            joinable._join_config = config


# What is checked


def _others(model: nn.Module, key: str) -> tuple[list[BaseCommunicator], GroupError | None]:
    """Return the communicators of the layers' groups but for `key`, and the first error, perhaps of this rank alone."""
    names: dict[str, str] = {}
    for name, layer in layer_names(model).items():
        names.setdefault(layer._group.key, name)
    found, failure = [], None
    for other in filter(key.__ne__, names):
        try:
            found.append(communicator(other))
        except GroupError as error:  # go on: making the next may need every rank
            failure = failure or GroupError(f"layer {names[other]!r}: {error}")
    return found, failure


def _check(model: nn.Module, joinables: Sequence[Any]) -> None:
    if not layer_names(model):
        raise InputError(f"{type(model).__name__} has no SyncBatchNorm: convert_sync_batchnorm(model) first")
    if not model.training:
        raise InputError(f"{type(model).__name__} is in eval mode, where no step begins: call model.train() first")
    for path, module in model.named_modules():
        if isinstance(module, _BatchNorm) and not isinstance(module, Synchronised) and module.training:
            raise InputError(
                f"{path}, a {type(module).__name__}, is not synchronised, so its statistics would be those of the "
                "rank's own batches: convert_sync_batchnorm(model) first, or put it into eval mode"
            )
        if isinstance(module, DistributedDataParallel):
            raise InputError(
                f"{path or 'model'} is a DistributedDataParallel, whose collectives would find no answer: give both, "
                "the module with the layers first, uneven(ddp.module, ddp)"
            )
    check_plain([*model.named_parameters(), *model.named_buffers()])
    for joinable in joinables:
        if not hasattr(joinable, "join_hook"):
            raise InputError(
                f"expected a torch.distributed.algorithms.join.Joinable (DDP, for one), got a "
                f"{type(joinable).__name__}; an optimizer is given as uneven(model, optimizer=...)"
            )
        if isinstance(joinable, DistributedDataParallel) and all(model is not part for part in joinable.modules()):
            raise InputError(
                f"the DistributedDataParallel does not hold the {type(model).__name__}: give the module that it wraps, "
                "uneven(ddp.module, ddp)"
            )


def _check_groups(comm: BaseCommunicator, members: Sequence[BaseCommunicator], joinables: Sequence[Any]) -> None:
    if any(member.before is not None for member in members):
        raise InputError("an uneven block is open around this one: leave out one of the two")
    if any(member.size > comm.size for member in members):
        raise GroupError(f"a layer's group is larger than {comm!r}: give uneven the whole, process_group=...")
    if isinstance(comm, Horovod) and (len(members) > 1 or comm.process_set.process_set_id != 0):
        raise GroupError("hvd.join() knows the global process set only: give layers process_group=None")
    for joinable in joinables:
        group = joinable.join_process_group
        there = torch.distributed.get_rank(group), torch.distributed.get_world_size(group)
        if there != (comm.rank, comm.size):
            raise GroupError(
                f"the {type(joinable).__name__} is over another group: there this is rank {there[0]} of {there[1]}, "
                f"in {comm!r} it is {comm.rank} of {comm.size}: give uneven the same, process_group=..."
            )
