"""Ranks that ask for different sums: the same error on every one, naming the layers, whatever connects them."""

from __future__ import annotations

import copy
import logging
import pickle
import socket
import threading
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import pytest
import torch
import torch.distributed as dist
from reference import SIGNATURE
from torch import nn

import syncbn
from syncbn import SyncBatchNorm, convert_sync_batchnorm
from syncbn._name_layers import layer_names
from syncbn.comm import Communicator, SharedMemory, TorchDistributed, _verdict, run_threads
from syncbn.comm import _carried as carried_module
from syncbn.comm._carried import Carrying
from syncbn.comm._place import Call, place
from syncbn.errors import CollectiveError, InputError, MismatchError, PeerLostError


class Added:
    """A communicator of a user's own: adds what it gets, as NCCL would, and says nothing."""

    def __init__(self, comm: Communicator) -> None:
        self._comm, self.rank, self.size = comm, comm.rank, comm.size
        self.lengths: list[int] = []

    def all_reduce(self, x: torch.Tensor) -> torch.Tensor:
        self.lengths.append(x.numel())
        return self._comm.all_reduce(x)


def model(comm: Any, width: int = 4) -> nn.Sequential:
    net = nn.Sequential(nn.BatchNorm1d(4), nn.BatchNorm1d(4), nn.BatchNorm1d(width))
    return convert_sync_batchnorm(net.double(), comm)


def raised(do: Callable[[], object]) -> str:
    with pytest.raises(MismatchError) as caught:
        do()
    return str(caught.value)


def forward(net: nn.Module, *order: int) -> torch.Tensor:
    y = torch.randn(6, 4, dtype=torch.float64, requires_grad=True)
    for layer in order:
        y = net[layer](y)  # type: ignore[index]
    return y


OTHER_ORDER = (
    "the ranks ask for different sums\n"
    "rank 0: layer '0', forward, call 1 (4 channels; 9 x float64)\n"
    "rank 1: layer '1', forward, call 1 (4 channels; 9 x float64)"
)


def one_width_another_order(comm: Any) -> str:
    net = model(comm)
    before = copy.deepcopy(net.state_dict())
    text = raised(lambda: forward(net, *((0, 1) if comm.rank == 0 else (1, 0))))
    torch.testing.assert_close(net.state_dict(), before, rtol=0, atol=0)  # nothing has moved
    return text


@pytest.mark.parametrize("own", [False, True], ids=["ours", "a user's"])
def test_two_layers_of_one_width_in_another_order(own: bool) -> None:
    texts = run_threads(2, lambda comm: one_width_another_order(Added(comm) if own else comm))
    assert texts == [OTHER_ORDER] * 2


def test_the_communicator_is_broken_for_good() -> None:
    def replica(comm: Communicator) -> None:
        one_width_another_order(comm)
        with pytest.raises(CollectiveError, match="out of step: the ranks ask for different sums"):
            comm.all_reduce(torch.ones(2))

    run_threads(2, replica)


def test_directions_are_told_apart() -> None:
    """Layers of C and of C' channels with 2C+1 = 2C' have no common length; a gradient of as many channels has."""

    def replica(comm: Communicator) -> str:
        net = model(comm)
        y = forward(net, 0)
        return raised(lambda: y.sum().backward() if comm.rank == 0 else forward(net, 0))

    first, second = run_threads(2, replica)
    assert first == second
    assert "rank 0: layer '0', backward, call 1 (4 channels; 8 x float64)" in first
    assert "rank 1: layer '0', forward, call 2 (4 channels; 9 x float64)" in first


def test_the_number_of_the_call_is_compared() -> None:
    """A rank that runs a layer once more, where another one of that width follows."""

    def replica(comm: Communicator) -> str:
        net = model(comm)
        forward(net, 0)
        if comm.rank == 0:
            return raised(lambda: forward(net, 0))
        return raised(lambda: forward(net, 1))

    assert "rank 0: layer '0', forward, call 2 (" in run_threads(2, replica)[0]


def test_a_rank_in_eval_is_seen_by_all() -> None:
    def replica(comm: Communicator) -> str:
        net = model(comm)
        net.train(comm.rank != 1)

        def step() -> None:
            forward(net, 0, 1, 2).sum().backward()
            syncbn.average_gradients(net, process_group=comm)

        return raised(step)

    texts = run_threads(3, replica)
    assert len(set(texts)) == 1
    assert "ranks 0, 2: layer '0', forward, call 1" in texts[0]
    assert "rank 1: comparison of parameters, call 1 (" in texts[0]


def test_together_names_all_layers() -> None:
    def replica(comm: Communicator) -> str:
        net = model(comm)
        xs = torch.randn(2, 6, 4, dtype=torch.float64)
        order = (0, 1) if comm.rank == 0 else (1, 0)

        def step() -> None:
            with syncbn.together():
                torch.cat([net[n](x) for n, x in zip(order, xs, strict=True)])

        return raised(step)

    assert "rank 1: layers '1', '0' together, forward, call 1 (8 channels; 18 x float64)" in run_threads(2, replica)[1]


# ---- whatever connects them


def _over(rank: int, size: int, hosts: str, sockets: bool, fault: str) -> str:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(socket, "gethostname", lambda: hosts[rank])
        patch.setenv("SYNCBN_SHARED_MEMORY", "0" if sockets else "1")
        comm = TorchDistributed(dist.new_group(), timeout=timedelta(seconds=10))
        comm.all_reduce(torch.ones(1))
        length = 1 + (rank == 1) if fault == "length" else 9000 * (1 + (rank == 1)) if fault == "long" else 3
        where = place(f"place {rank == 1}" if fault == "place" else "place")
        return raised(lambda: comm.all_reduce(torch.ones(length), where))


@pytest.mark.parametrize("fault", ["place", "length", "long"])
@pytest.mark.parametrize(
    ("hosts", "sockets"), [("aaa", False), ("aaa", True), ("aab", False), ("baa", False), ("aabb", False)]
)
def test_every_rank_hears_of_it(gloo: Callable[..., list[str]], hosts: str, sockets: bool, fault: str) -> None:
    """Rank 1 is the odd one: with a host of others, behind another host's first rank, or among sockets."""
    texts = gloo(len(hosts), _over, hosts, sockets, fault)
    assert len(set(texts)) == 1
    sent = {"place": ("place False", "place True", 3, 3), "length": ("place", "place", 1, 2)}
    same, odd, most, one = sent.get(fault, ("place", "place", 9000, 18000))
    assert f"rank 1: {odd}, call 1 ({one} x float32)" in texts[0]
    others = ", ".join(str(rank) for rank in range(len(hosts)) if rank != 1)
    assert f"ranks {others}: {same}, call 1 ({most} x float32)" in texts[0]


def _shared(rank: int, size: int) -> str:
    over = TorchDistributed(dist.new_group())
    comm = SharedMemory(over)
    return raised(lambda: comm.all_reduce(torch.ones(3), place(f"rank {rank}")))


def test_shared_memory_by_itself(gloo: Callable[..., list[str]]) -> None:
    assert len(set(gloo(3, _shared))) == 1


# ---- signatures that travel in the vector


def test_a_users_communicator_gets_three_numbers_more() -> None:
    def replica(comm: Communicator) -> list[int]:
        added = Added(comm)
        forward(model(added), 0).sum().backward()
        return added.lengths

    assert run_threads(2, replica) == [[9 + SIGNATURE, 8 + SIGNATURE]] * 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("size", [2, 3, 8])
def test_equal_signatures_agree_exactly_and_others_do_not(size: int, dtype: torch.dtype) -> None:
    """Also of ranks that send zeros, as those do that have joined: they take no part."""
    bits = _verdict.exact_bits(size, carried_module._MANTISSA[dtype])
    generator = torch.Generator().manual_seed(0)

    def sums(signatures: list[int]) -> torch.Tensor:
        return sum((torch.tensor([1, h, h * h], dtype=dtype) for h in signatures), torch.zeros(3, dtype=dtype))

    for _ in range(200):
        h = int(torch.randint(1 << bits, (1,), generator=generator))
        other = h ^ 1 << int(torch.randint(bits, (1,), generator=generator))
        assert carried_module.verdict_of(sums([h] * size)) == _verdict.AGREE
        assert carried_module.verdict_of(sums([h] * (size - 1))) == _verdict.AGREE
        assert carried_module.verdict_of(sums([h] * (size - 1) + [other])) == _verdict.OTHER_PLACE
    largest = (1 << bits) - 1
    assert carried_module.verdict_of(sums([largest] * size)) == _verdict.AGREE
    assert carried_module.verdict_of(sums([largest] * (size - 1) + [largest - 1])) == _verdict.OTHER_PLACE


@pytest.mark.parametrize("garbage", [[float("nan"), 1, 1], [float("inf"), 1, 1], [0.5, 1, 1]])
def test_what_is_no_signature_is_a_mismatch(garbage: list[float]) -> None:
    assert carried_module.verdict_of(torch.tensor(garbage)) == _verdict.OTHER_PLACE


@pytest.fixture
def check(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """`check("0")`: as SYNCBN_CHECK says, once `init` has been given nothing."""
    monkeypatch.setattr(_verdict, "_given", None)
    return lambda value: monkeypatch.setenv("SYNCBN_CHECK", value)


def test_checked_beforehand_lengths_are_seen_too(check: Callable[[str], None]) -> None:
    """Nothing else would see them: here the vectors would be added as they are."""
    check("1")

    class Blind(Carrying):
        transport = "blind"

        def __init__(self, comm: Any) -> None:
            super().__init__(comm.rank, comm.size)
            self.comm, self.lengths = comm, []

        def _add(self, x: torch.Tensor) -> torch.Tensor:
            self.lengths.append(x.numel())
            return self.comm.all_reduce(x)  # type: ignore[no-any-return]

    def replica(comm: Communicator) -> str:
        blind = Blind(comm)
        blind.all_reduce(torch.ones(5))
        assert blind.lengths == [SIGNATURE, 5 + SIGNATURE]
        return raised(lambda: blind.all_reduce(torch.ones(5 + comm.rank)))

    assert (
        run_threads(2, replica)
        == [
            "the ranks ask for different sums\n"
            "rank 0: all_reduce, call 2 (5 x float32)\n"
            "rank 1: all_reduce, call 2 (6 x float32)"
        ]
        * 2
    )


@pytest.mark.parametrize("own", [False, True], ids=["ours", "a user's"])
def test_check_0_warns_and_goes_on(own: bool, check: Callable[[str], None], caplog: pytest.LogCaptureFixture) -> None:
    check("0")

    def replica(comm: Communicator) -> torch.Tensor:
        net = model(Added(comm) if own else comm)
        return forward(net, *((0, 1) if comm.rank == 0 else (1, 0)))

    with caplog.at_level(logging.WARNING, "syncbn"):
        run_threads(2, replica)
    assert caplog.messages.count(OTHER_ORDER) == 2


def test_check_0_warns_ever_less_often(check: Callable[[str], None], caplog: pytest.LogCaptureFixture) -> None:
    check("0")
    with caplog.at_level(logging.WARNING, "syncbn"):
        run_threads(2, lambda comm: [comm.all_reduce(torch.ones(1), place(f"{comm.rank}")) for _ in range(20)])
    assert len(caplog.messages) == 2 * 5  # the 1st, 2nd, 4th, 8th, 16th, on each rank


def test_check_0_cannot_add_vectors_that_differ(check: Callable[[str], None]) -> None:
    check("0")
    run_threads(2, lambda comm: raised(lambda: comm.all_reduce(torch.ones(2 + comm.rank))))


@pytest.mark.parametrize("value", ["2", "yes"])
def test_an_unknown_setting_is_refused(value: str, check: Callable[[str], None]) -> None:
    check(value)
    with pytest.raises(InputError, match=f"SYNCBN_CHECK='{value}': expected 1, 0, or nothing"):
        syncbn.init()


# ---- on an accelerator: emulated, nothing here has run on a GPU


class Event:
    waited_for = False

    def synchronize(self) -> None:
        self.waited_for = True


def test_nobody_waits_for_a_verdict_until_the_place_comes_again() -> None:
    verdicts = carried_module.Verdicts()
    here, there = place("here"), place("there")
    good, bad = torch.tensor([2.0, 6, 18]), torch.tensor([2.0, 5, 13])
    events = [Event(), Event()]
    verdicts._waiting.extend([(Call(here, 1), good, events[0]), (Call(there, 1), bad, events[1])])
    verdicts.look(Call(place("elsewhere"), 1))
    assert not any(event.waited_for for event in events)
    verdicts.look(Call(here, 2))
    assert [event.waited_for for event in events] == [True, False]
    with pytest.raises(MismatchError, match="the ranks asked for different sums, this one for that in there, call 1"):
        verdicts.look(Call(there, 2))
    assert events[1].waited_for


def test_a_users_communicator_stays_broken_and_another_world_begins_anew() -> None:
    class Fails:
        rank, size = 0, 2

        def all_reduce(self, x: torch.Tensor) -> torch.Tensor:
            raise RuntimeError("cut")

    own = Fails()
    layer = SyncBatchNorm(2, process_group=own)
    with pytest.raises(PeerLostError, match=r"in sync_batch_norm, forward, call 1: .*cut"):
        layer(torch.randn(4, 2))
    with pytest.raises(CollectiveError, match=r"broken.*out of step"):
        layer(torch.randn(4, 2))
    own.size = 3
    with pytest.raises(PeerLostError, match=r"in sync_batch_norm, forward, call 1: .*cut"):
        layer(torch.randn(4, 2))


def _beside_the_users_own(rank: int, size: int) -> str:
    """Rank 1 has a sum of its own under way in the very group: the table must not meet it."""
    group = dist.new_group()
    comm = TorchDistributed(group, timeout=timedelta(seconds=10))
    comm.all_reduce(torch.ones(1))
    work = dist.all_reduce(torch.ones(1000), group=group, async_op=True) if rank == 1 else None
    text = raised(lambda: comm.all_reduce(torch.ones(3), place(f"place {rank}")))
    if work is None:
        dist.all_reduce(torch.ones(1000), group=group)
    else:
        work.wait()
    return text


def test_the_table_does_not_meet_other_sums_of_the_group(gloo: Callable[..., list[str]]) -> None:
    first, second = gloo(2, _beside_the_users_own)
    assert first == second


# ---- names


def test_errors_of_peers_name_the_layer() -> None:
    def replica(comm: Communicator) -> str:
        net = model(comm)
        if comm.rank == 1:
            raise RuntimeError("as a rank does")
        with pytest.raises(PeerLostError) as caught:
            forward(net, 0, 1)
        return str(caught.value)

    with pytest.raises(RuntimeError, match="as a rank does"):
        run_threads(2, replica)


def test_a_lost_peer_is_an_error_that_names_layer_and_direction() -> None:
    reached = threading.Event()

    def replica(comm: Any) -> str:
        net = model(comm)
        y = forward(net, 0, 1)
        if comm.rank == 1:
            reached.wait(20)
            comm._give_up()
            return ""
        reached.set()
        with pytest.raises(PeerLostError) as caught:
            y.sum().backward()
        return str(caught.value)

    text = run_threads(2, replica)[0]
    assert text.startswith("in layer '1', backward, call 1: all_reduce of 8 numbers failed on rank 0 of 2 (threads)")


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
        self.head = SyncBatchNorm(4)
        self.again = self.head


def names(net: nn.Module) -> list[str]:
    return [m._name.text for m in net.modules() if isinstance(m, SyncBatchNorm)]


def test_conversion_names_what_has_no_name() -> None:
    net = convert_sync_batchnorm(Net())
    assert names(net) == ["stem.1", "head"]
    assert names(convert_sync_batchnorm(nn.Sequential(net))) == ["stem.1", "head"]
    assert names(syncbn.name_layers(nn.Sequential(net))) == ["0.stem.1", "0.head"]
    assert list(layer_names(net)) == ["0.stem.1", "0.head"]


def test_two_layers_of_one_name_are_named_anew() -> None:
    """A part is converted first, and has the name that another layer of the whole has."""
    net = nn.ModuleDict({"backbone": nn.ModuleDict({"bn": nn.BatchNorm1d(2)}), "bn": nn.BatchNorm1d(2)})
    convert_sync_batchnorm(net["backbone"])
    assert names(convert_sync_batchnorm(net)) == ["backbone.bn", "bn"]


def test_wrappers_are_no_part_of_a_name() -> None:
    """As DDP, and torch.compile around it, hold a model."""
    wrapped = nn.ModuleDict({"_orig_mod": nn.ModuleDict({"module": Net()})})
    assert names(convert_sync_batchnorm(wrapped)) == ["stem.1", "head"]


def test_names_survive_copies_and_pickles_and_end_with_the_conversion() -> None:
    net = convert_sync_batchnorm(Net())
    assert names(copy.deepcopy(net)) == names(pickle.loads(pickle.dumps(net))) == ["stem.1", "head"]
    reverted = syncbn.reverted(net)
    assert "_name" not in vars(reverted.stem[1])


def test_names_that_clash_or_are_missing_are_refused() -> None:
    net = nn.ModuleList([convert_sync_batchnorm(nn.Sequential(nn.BatchNorm1d(2))) for _ in range(2)])
    with pytest.raises(InputError, match=r"the layer at '1\.0' is called '0', as another one is: call syncbn\.name"):
        layer_names(net)
    with pytest.raises(InputError, match="the layer at '0' has no name"):
        layer_names(nn.Sequential(SyncBatchNorm(2)))
    with pytest.raises(InputError, match="Sequential has no SyncBatchNorm: convert_sync_batchnorm"):
        syncbn.name_layers(nn.Sequential(nn.BatchNorm1d(2)))
