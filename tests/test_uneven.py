"""Ranks with different numbers of batches: against one process with the samples of each step, and what is refused."""

from __future__ import annotations

import re
import threading
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from unequal import FEATURES, batch, largest_difference, loss_of, made, momentum_of, reference

import syncbn
from syncbn import _optimizer_state, _parallel
from syncbn.comm import Communicator, run_threads
from syncbn.comm._verdict import table
from syncbn.errors import DTypeError, GroupError, InputError, MismatchError

CLOSE = 1e-9


def train_epoch(
    model: nn.Module, optimizer: Any, comm: Communicator, epoch: int, count: int, *, state: bool = True
) -> None:
    with syncbn.uneven(model, optimizer=optimizer if state else None, process_group=comm):
        for step in range(count):
            x = batch(epoch, step, comm.rank)
            optimizer.zero_grad()
            syncbn.global_mean(loss_of(model(x)), len(x), process_group=comm).backward()
            syncbn.average_gradients(model, process_group=comm)
            optimizer.step()


def trained(comm: Communicator, epochs: Sequence[Sequence[int]], *, state: bool = True) -> nn.Module:
    model = syncbn.convert_sync_batchnorm(made(), process_group=comm)
    optimizer = momentum_of(model)
    for epoch, counts in enumerate(epochs):
        train_epoch(model, optimizer, comm, epoch, counts[comm.rank], state=state)
    assert not model._forward_pre_hooks
    assert comm.before is None  # type: ignore[attr-defined]
    return model


@pytest.mark.parametrize(
    "epochs", [[[5, 3]], [[1, 4], [4, 0]], [[5, 3, 2]], [[2, 0, 3], [0, 1, 4]], [[3, 3, 3]], [[0, 0]], [[4, 1, 0, 6]]]
)
def test_trains_like_one_process(epochs: list[list[int]]) -> None:
    expected = reference(epochs) if max(epochs[0]) else made()
    for model in run_threads(len(epochs[0]), lambda comm: trained(comm, epochs)):
        assert largest_difference(model, expected) < CLOSE


def test_without_the_optimizer_its_state_stays() -> None:
    """The control of the argument: momentum is not the same everywhere, and the next epoch shows it."""
    epochs = [[5, 3], [2, 2]]
    first, second = run_threads(2, lambda comm: trained(comm, epochs, state=False))
    assert largest_difference(first, second) == 0
    assert largest_difference(first, reference(epochs)) > 1e-3


class Recorder:
    """A communicator of the user's own: knows `all_reduce` alone."""

    def __init__(self, comm: Communicator) -> None:
        self.comm, self.rank, self.size = comm, comm.rank, comm.size
        self.lengths: list[int] = []

    def all_reduce(self, x: torch.Tensor) -> torch.Tensor:
        self.lengths.append(x.numel())
        return self.comm.all_reduce(x)


@pytest.mark.parametrize(("counts", "more"), [([3, 3], 0), ([3, 2], 7), ([1, 3], 14)])
def test_collectives(counts: list[int], more: int) -> None:
    """One before each step, and where a rank has finished one before each of the step's seven."""

    def replica(comm: Communicator) -> tuple[nn.Module, list[int]]:
        own = Recorder(comm)
        model = syncbn.convert_sync_batchnorm(made(), process_group=own)
        train_epoch(model, momentum_of(model), own, 0, counts[comm.rank], state=False)
        return model, own.lengths

    step = 1 + 2 + 1 + 2 + 2  # the message, forward, loss, backward, gradients
    at_the_end = 1 + 1 + 1 + 2  # the message, who took the last step, comparison, parameters and num_batches_tracked
    for model, lengths in run_threads(2, replica):
        assert largest_difference(model, reference([counts])) < CLOSE
        assert len(lengths) == 1 + max(counts) * step + more + at_the_end


def test_layers_over_parts_of_the_ranks() -> None:
    """The ranks of a part, of two and of one, share statistics; one that has finished answers in its part."""

    def replica(comm: Any) -> nn.Module:
        part = comm.split([[0, 1], [2]])
        model = syncbn.convert_sync_batchnorm(made(), process_group=part)
        train_epoch(model, momentum_of(model), comm, 0, [3, 1, 4][comm.rank])
        return model

    first, *others = run_threads(3, replica)
    for other in others:
        assert largest_difference(first, other) == 0
    assert first[1].num_batches_tracked == 4  # rank 2's, the last


def test_accumulated_gradients_and_layers_that_change_from_step_to_step() -> None:
    """Nothing is replayed: what the others do is answered, whatever it is."""

    def replica(comm: Communicator) -> nn.Module:
        model = syncbn.convert_sync_batchnorm(made(), process_group=comm)
        rare = syncbn.SyncBatchNorm(FEATURES, process_group=comm).double()
        model = syncbn.name_layers(nn.ModuleDict({"rare": rare, "usual": model}))
        model.forward = lambda x, step: model["usual"](model["rare"](x) if step % 3 == 2 else x)  # type: ignore[assignment]
        with syncbn.uneven(model, process_group=comm):
            for step in range([2, 6][comm.rank]):
                x = batch(0, step, comm.rank)
                syncbn.global_mean(loss_of(model(x, step)), len(x), process_group=comm).backward()
                if step % 2:
                    syncbn.average_gradients(model, process_group=comm)
                    model.zero_grad()
        return model

    first, second = run_threads(2, replica)
    assert largest_difference(first, second) == 0
    assert (first["rare"].num_batches_tracked, first["usual"][1].num_batches_tracked) == (2, 6)


def test_a_forward_in_eval_is_no_step() -> None:
    def replica(comm: Communicator) -> int:
        model = syncbn.convert_sync_batchnorm(made(), process_group=comm)
        with syncbn.uneven(model, process_group=comm):
            for step in range(2 + comm.rank):
                model.train()(batch(0, step, comm.rank))
                if comm.rank == 1:
                    model.eval()(batch(0, step, comm.rank))
        return int(model[1].num_batches_tracked)

    assert run_threads(2, replica) == [3, 3]


def test_the_optimizers_state_goes_in_pieces_and_to_the_cpu_first(monkeypatch: pytest.MonkeyPatch) -> None:
    pieces, devices = [], []

    def send(*args: Any) -> torch.Tensor:
        pieces.append(len(args[0]))
        return _parallel.send(*args)

    def load(file: Any, map_location: str, **kwargs: Any) -> Any:
        devices.append(map_location)
        return torch_load(file, map_location=map_location, **kwargs)

    torch_load = torch.load
    monkeypatch.setattr(torch, "load", load)
    monkeypatch.setattr(_optimizer_state, "send", send)
    monkeypatch.setattr(_optimizer_state, "BUCKET_BYTES", 1000)
    test_trains_like_one_process([[1, 3], [2, 2]])
    assert max(pieces) == 500
    assert len(pieces) > 8
    assert set(devices) == {"cpu"}  # the device of the rank that sent it may be another's


# Ranks that do not agree


def each(size: int, replica: Callable[[Communicator], Any]) -> list[Exception | None]:
    """Return the error of every rank."""

    def caught(comm: Communicator) -> Exception | None:
        try:
            replica(comm)
        except Exception as error:
            return error
        return None

    return run_threads(size, caught, timeout=5)


def test_ranks_that_disagree_are_told_and_so_is_the_one_that_finished() -> None:
    def replica(comm: Communicator) -> None:
        model = syncbn.convert_sync_batchnorm(made(), process_group=comm)
        with syncbn.uneven(model, process_group=comm):
            for step in range([1, 3, 3][comm.rank]):
                model(batch(0, step, comm.rank))
                if step and comm.rank == 2:
                    model[4](torch.randn(2, 3).double())

    errors = each(3, replica)
    assert {type(error) for error in errors} == {MismatchError}
    assert len({str(error) for error in errors}) == 1
    lines = str(errors[0]).splitlines()
    assert lines[1].startswith("rank 0: uneven inputs, no batch left")
    assert lines[2].startswith("rank 1: uneven inputs, the next batch")
    assert lines[3].startswith("rank 2: layer '4', forward, call 3 (3 channels; 7 x float64)")


def test_a_rank_that_leaves_by_an_exception_waits_for_nobody() -> None:
    models = {}

    def replica(comm: Communicator) -> None:
        model = models[comm.rank] = syncbn.convert_sync_batchnorm(made(), process_group=comm)
        with syncbn.uneven(model, process_group=comm):
            for step in range(3):
                if (comm.rank, step) == (0, 1):
                    raise KeyError("a fault of the user's")
                model(batch(0, step, comm.rank))

    with pytest.raises(KeyError, match="a fault of the user's"):
        run_threads(2, replica)
    assert not any(model._forward_pre_hooks for model in models.values())


def test_parameters_are_not_sent_from_a_rank_that_adds_zeros() -> None:
    def replica(comm: Communicator) -> None:
        model = syncbn.convert_sync_batchnorm(made(), process_group=comm)
        with syncbn.uneven(model, process_group=comm):
            for step in range([0, 2, 2][comm.rank]):
                model(batch(0, step, comm.rank))
                syncbn.broadcast_parameters(model, process_group=comm)

    errors = each(3, replica)
    assert isinstance(errors[1], InputError)
    assert isinstance(errors[2], InputError)
    assert "rank 0 has no batch left and adds zeros" in str(errors[1])


def test_models_that_differ() -> None:
    def replica(comm: Communicator) -> None:
        model = syncbn.convert_sync_batchnorm(made(), process_group=comm)
        with syncbn.uneven(model if comm.rank else model[:2], process_group=comm):
            raise AssertionError

    errors = each(2, replica)
    assert [type(error) for error in errors] == [InputError, InputError]
    assert "the replicas' models differ" in str(errors[0])


def test_the_table_has_a_line_for_ranks_that_horovod_answers_for() -> None:
    text = table([[""], ["layer 'a', forward", "9", "64 channels", "129 x float64"]])
    assert "rank 0: adds zeros (hvd.join)\nrank 1: layer 'a'" in text


# What is refused, before any collective


class Silent:
    """A communicator that nobody may use."""

    rank, size = 0, 2

    def all_reduce(self, x: torch.Tensor) -> torch.Tensor:
        raise AssertionError("a collective")


def converted(group: Any = None) -> nn.Module:
    return syncbn.convert_sync_batchnorm(made(), process_group=Silent() if group is None else group)


def unconverted() -> nn.Module:
    return nn.Sequential(converted(), nn.BatchNorm1d(2))


def unnamed() -> nn.Module:
    return nn.Sequential(syncbn.SyncBatchNorm(2))


def clashing() -> nn.Module:
    return nn.Sequential(converted(), converted())


REFUSED = {
    "no layers": (made()[:1], (), InputError, "has no SyncBatchNorm: convert_sync_batchnorm"),
    "not converted": (unconverted(), (), InputError, "1, a BatchNorm1d, is not synchronised.*convert_sync_batchnorm"),
    "no name": (unnamed(), (), InputError, r"has no name: call syncbn.name_layers\(model\)"),
    "names clash": (clashing(), (), InputError, r"as another one is: call syncbn.name_layers\(model\)"),
    "eval": (converted().eval(), (), InputError, r"eval mode.*call model.train\(\)"),
    "meta": (converted().to("meta"), (), DTypeError, "on the meta device"),
    "an optimizer": (converted(), (momentum_of(made()),), InputError, r"got a SGD.*uneven\(model, optimizer=...\)"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused(name: str) -> None:
    model, joinables, error, message = REFUSED[name]
    with pytest.raises(error, match=message), syncbn.uneven(model, *joinables, process_group=Silent()):
        raise AssertionError("the block was entered")


def test_norm_layers_in_eval_may_stay_as_they_are() -> None:
    model = nn.Sequential(syncbn.convert_sync_batchnorm(made()), nn.BatchNorm1d(2).double())
    model[1].eval()
    with syncbn.uneven(model):
        model(batch(0, 0, 0))


def test_nested() -> None:
    def replica(comm: Communicator) -> None:
        model = converted(comm)
        with syncbn.uneven(model, process_group=comm):
            with pytest.raises(InputError, match="open around this one"), syncbn.uneven(model, process_group=comm):
                raise AssertionError
            model(batch(0, 0, comm.rank))

    run_threads(2, replica)


def test_layers_over_more_than_the_ranks() -> None:
    def replica(comm: Any) -> None:
        part = comm.split([[0], [1]])
        with pytest.raises(GroupError, match="larger than"), syncbn.uneven(converted(comm), process_group=part):
            raise AssertionError

    run_threads(2, replica)


def test_every_rank_is_told_of_one_that_is_not_in_a_layers_group() -> None:
    def replica(comm: Any) -> None:
        group = dist.GroupMember.NON_GROUP_MEMBER if comm.rank else comm
        with syncbn.uneven(converted(group), process_group=comm):
            raise AssertionError

    errors = each(2, replica)
    assert [type(error) for error in errors] == [InputError, InputError]
    for error in errors:
        assert re.search(r"rank 1 has 'groups: layer '\d': this rank is not in the process group", str(error))


def test_all_ranks_outside_a_layers_group() -> None:
    def replica(comm: Any) -> None:
        with syncbn.uneven(converted(dist.GroupMember.NON_GROUP_MEMBER), process_group=comm):
            raise AssertionError

    for error in each(2, replica):
        assert isinstance(error, GroupError)
        assert "is not in the process group" in str(error)


# With DDP, and compiled


def _with_ddp(rank: int, size: int, broadcast: bool) -> None:
    model = syncbn.convert_sync_batchnorm(made())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("warnings.warn", lambda *_, **__: None)  # torch 2.13 deprecates broadcast_buffers
        ddp = DistributedDataParallel(model, broadcast_buffers=broadcast)
    other = DistributedDataParallel(made())
    part = dist.new_group([0])
    for wrong, message in [
        ((ddp, ddp), "model is a DistributedDataParallel"),
        ((nn.Sequential(ddp),), "0 is a DistributedDataParallel"),
        ((model, other), r"does not hold the Sequential.*uneven\(ddp.module, ddp\)"),
    ]:
        with pytest.raises(InputError, match=message), syncbn.uneven(*wrong):
            raise AssertionError
    if rank == 0:
        smaller = DistributedDataParallel(model, process_group=part)
        with pytest.raises(GroupError, match="over another group: there this is rank 0 of 1"):
            syncbn.uneven(model, smaller).__enter__()
    optimizer = momentum_of(model)
    before = ddp._join_config
    epochs = [[1, 3], [4, 2]]
    for epoch, counts in enumerate(epochs):
        with syncbn.uneven(model, ddp, optimizer=optimizer):
            for step in range(counts[rank]):
                x = batch(epoch, step, rank)
                optimizer.zero_grad()
                syncbn.global_mean(loss_of(ddp(x)), len(x)).backward()
                optimizer.step()
        assert ddp._join_config is before
    assert threading.active_count() == 1 or not any(t.name.startswith("uneven") for t in threading.enumerate())
    assert largest_difference(model, reference(epochs)) < CLOSE


@pytest.mark.parametrize("broadcast", [True, False])
def test_with_ddp(gloo: Callable[..., Any], broadcast: bool) -> None:
    gloo(2, _with_ddp, broadcast)


def _disagree_with_ddp(rank: int, size: int) -> None:
    model = syncbn.convert_sync_batchnorm(made())
    ddp = DistributedDataParallel(model)
    try:
        with syncbn.uneven(model, ddp):
            for step in range([1, 3, 3][rank]):
                model[4].train(step == 0 or rank < 2)
                ddp(batch(0, step, rank)).sum().backward()
    finally:  # as at the end of the process: the finished rank waits in DDP's all-reduce
        dist.destroy_process_group()


def test_a_mismatch_with_ddp_is_told_on_every_rank(gloo: Callable[..., Any]) -> None:
    with pytest.raises(pytest.fail.Exception) as caught:
        gloo(3, _disagree_with_ddp)
    text = str(caught.value)
    assert text.count("\nsyncbn.errors.MismatchError: the ranks ask for different sums\nrank 0: uneven inputs, no") == 3


def _compiled(rank: int, size: int, how: str) -> None:
    torch._dynamo.reset()
    model = syncbn.convert_sync_batchnorm(made())
    called: Any = model
    if how == "in place":
        model.compile(backend="eager")
    else:
        called = torch.compile(model, backend="eager", fullgraph=how == "fullgraph")
    optimizer = momentum_of(model)
    with syncbn.uneven(called if how == "fullgraph" else model):
        for step in range([3, 1][rank]):
            x = batch(0, step, rank)
            optimizer.zero_grad()
            syncbn.global_mean(loss_of(called(x)), len(x)).backward()
            syncbn.average_gradients(model)
            optimizer.step()
    assert largest_difference(model, reference([[3, 1]])) < CLOSE


@pytest.mark.parametrize("how", ["around", "fullgraph", "in place"])
def test_compiled(gloo: Callable[..., Any], how: str) -> None:
    gloo(2, _compiled, how)


# Started by the real launchers


HOW = {"torchrun": ["ddp", "ddp-broadcasts", "average"], "mpirun": ["average"], "horovodrun": ["horovod", "average"]}


@pytest.mark.launcher
@pytest.mark.timeout(400)
@pytest.mark.parametrize("counts", [["5,3", "2,3"], ["5,3,2", "0,3,2"]], ids=["2 ranks", "3 ranks"])
def test_started_by(launch: Any, counts: list[str]) -> None:
    for how in HOW[launch.launcher]:
        job = launch(counts[0].count(",") + 1, "tests/jobs/uneven_job.py", how, *counts, seconds=130)
        assert job.returncode == 0, job.stdout
        assert job.stdout.count("largest difference") == counts[0].count(",") + 1
