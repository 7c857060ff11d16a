"""Group specifications over real processes, and what is not a group."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
import torch.distributed as dist

import syncbn
from syncbn.comm import SingleProcess
from syncbn.comm._groups import Group, consecutive, hosts, resolve
from syncbn.errors import GroupError


def test_sizes_that_do_not_divide_the_world() -> None:
    assert consecutive(9, 4) == [[0, 1, 2, 3], [4, 5, 6, 7], [8]]
    assert consecutive(2, 4) == [[0, 1]]


@pytest.mark.parametrize("spec", ["nodes", 0, -1, 2.5, True, object(), [0, 1]])
def test_what_is_no_group_is_refused_where_it_is_given(spec: object) -> None:
    with pytest.raises(GroupError):
        syncbn.SyncBatchNorm(3, process_group=spec)
    with pytest.raises(GroupError):
        syncbn.convert_sync_batchnorm(torch.nn.BatchNorm2d(3), process_group=spec)


def _groups(rank: int, size: int) -> dict[str, object]:
    pair = resolve(2)
    native = dist.new_group([0, 1])
    layers = [syncbn.SyncBatchNorm(1, process_group=2, dtype=torch.float64) for _ in range(2)]
    x = torch.tensor([[float(rank)], [float(rank)]], dtype=torch.float64)  # mean of a pair: its ranks' mean
    for layer in layers:
        for _ in range(5):
            layer(x)
    return {
        "size": pair.size,
        "sum": pair.all_reduce(torch.tensor([float(rank)])).item(),
        "same": resolve(2) is pair and layers[0]._group.communicator() is layers[1]._group.communicator(),
        "node": resolve("node").size,
        "hosts": hosts(syncbn.world()),
        "world": resolve(None) is resolve("world") is syncbn.world(),
        "running_mean": layers[0].running_mean,
        "outside": _outside(native),
        "bits": layers[0].running_var,
    }


def _outside(group: object) -> str:
    """Run a layer over `group`: an error where this rank is not in it, never silent local statistics."""
    layer = syncbn.SyncBatchNorm(1, process_group=group)
    before = copy.deepcopy(layer.state_dict())
    try:
        layer(torch.randn(4, 1))
    except GroupError as error:
        assert all(torch.equal(before[k], v) for k, v in layer.state_dict().items())
        layer.eval()(torch.randn(4, 1))  # eval needs no group
        return str(error)
    return ""


def test_groups_of_a_world_of_three(gloo) -> None:
    results = gloo(3, _groups)
    assert [r["size"] for r in results] == [2, 2, 1]
    assert [r["sum"] for r in results] == [1, 1, 2]
    assert all(r["same"] and r["world"] and r["node"] == 3 and r["hosts"] == [[0, 1, 2]] for r in results)
    decay = 1 - 0.9**5
    assert [r["running_mean"].item() for r in results] == pytest.approx([0.5 * decay, 0.5 * decay, 2 * decay])
    assert torch.equal(results[0]["bits"], results[1]["bits"])
    assert [bool(r["outside"]) for r in results] == [False, False, True]
    assert "not in the process group" in results[2]["outside"]


def _portable(rank: int, size: int) -> list[object]:
    handles = [None, "world", "node", 2, SingleProcess(), dist.group.WORLD, dist.new_group([0, 1])]
    layers = [syncbn.SyncBatchNorm(1, process_group=handle) for handle in handles]
    copies = [copy.deepcopy(layer) for layer in layers]
    assert all(a.process_group is b.process_group for a, b in zip(layers, copies, strict=True))
    revived = [pickle.loads(pickle.dumps(layer)) for layer in layers]
    with pytest.raises(GroupError, match=r"was not saved with it.*set layer.process_group"):
        revived[-1](torch.randn(4, 1))
    revived[-1].eval()(torch.randn(4, 1))
    revived[-1].process_group = None
    revived[-1].train()(torch.randn(4, 1))
    return [type(layer.process_group).__name__ for layer in revived[:-1]] + [revived[5].process_group]


def test_copies_share_the_group_and_pickles_keep_what_means_the_same_elsewhere(gloo) -> None:
    assert gloo(2, _portable)[0] == ["NoneType", "str", "str", "int", "SingleProcess", "str", "world"]


def _made_again(rank: int, size: int) -> bool:
    layer = syncbn.SyncBatchNorm(1)
    layer(torch.randn(4, 1))
    first = layer._group.communicator()
    syncbn.comm._groups.set_world(SingleProcess())
    try:
        return layer._group.communicator() is not first
    finally:
        syncbn.comm._groups.set_world(None)


def test_a_new_world_is_noticed(gloo) -> None:
    assert gloo(2, _made_again) == [True, True]


def test_a_lost_group_stays_lost() -> None:
    lost = pickle.loads(pickle.dumps(Group(_Opaque())))
    assert "Opaque" in repr(pickle.loads(pickle.dumps(lost)).spec)


class _Opaque:
    rank = 0
    size = 1

    def all_reduce(self, x: torch.Tensor) -> torch.Tensor:
        return x
