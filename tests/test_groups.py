"""Group specifications over real processes, and what is not a group."""

from __future__ import annotations

import copy
import os
import pickle
import signal
import warnings
import weakref
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh

import syncbn
from syncbn.comm import SingleProcess, TorchDistributed
from syncbn.comm._groups import Group, communicator, consecutive, hosts, key_of, resolve
from syncbn.comm._groups import _keys as keys_by_id
from syncbn.comm._pairs import Pairs
from syncbn.comm._protocol import LostGroup
from syncbn.errors import CollectiveError, GroupError, LaunchError


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
        "same": resolve(2) is pair and communicator(layers[0]._group.key) is communicator(layers[1]._group.key),
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


# ---- the registry


def memories() -> int:
    return Path("/proc/self/maps").read_text().count("memfd:syncbn")


def _twice(rank: int, size: int) -> tuple[int, int, int]:
    """What a group costs that 53 layers and 20 function calls are given: its set-up once."""
    sums, before = [], memories()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Pairs, "_sum", lambda comm, x, s, real=Pairs._sum: sums.append(x.numel()) or real(comm, x, s))
        handle = dist.new_group()
        layers = [syncbn.SyncBatchNorm(1, process_group=handle) for _ in range(53)]
        for layer in layers:
            layer(torch.randn(4, 1))
        for _ in range(20):
            syncbn.functional.sync_batch_norm(torch.randn(4, 1), process_group=handle)
    return len(sums), memories() - before, len({id(communicator(layer._group.key)) for layer in layers})


def test_a_handle_given_many_times_is_one_communicator(gloo) -> None:
    assert gloo(2, _twice) == [(3, 1, 1)] * 2


def _destroyed(rank: int, size: int, held: bool) -> str:
    group, before = dist.new_group(), memories()
    layer, comm = syncbn.SyncBatchNorm(1, process_group=group), resolve(group)
    layer(torch.randn(4, 1))
    assert memories() == before + 1
    dist.destroy_process_group(group)
    alive = weakref.ref(group)
    group = group if held else None
    if not held:
        assert alive() is None  # neither layer nor registry keeps it, nor Gloo's threads and sockets
        assert memories() == before
        assert layer.process_group == LostGroup("ProcessGroup that was destroyed")
        assert "destroyed" in repr(layer)
    with pytest.raises(GroupError, match="destroyed"):
        comm.all_reduce(torch.ones(3))
    assert memories() == before
    with pytest.raises(GroupError) as caught:
        layer(torch.randn(4, 1))
    return str(caught.value)


def test_a_destroyed_group_is_an_error_and_leaves_nothing(gloo) -> None:
    assert all("destroyed" in text for text in gloo(2, _destroyed, True))
    assert all("does not exist any more" in text for text in gloo(2, _destroyed, False))


def _keys(rank: int, size: int) -> None:
    group = dist.new_group()
    own = _Opaque()
    mesh = init_device_mesh("cpu", (size,))
    specs = [None, "world", "node", 2, group, own, syncbn.world(), mesh]
    assert [key_of(spec) for spec in specs] == [key_of(spec) for spec in specs]
    assert key_of(None) == key_of("world") == key_of(dist.group.WORLD) == "world"
    assert key_of(mesh) == key_of(mesh.get_group())
    assert key_of(group).startswith("ProcessGroup ")
    assert len({key_of(spec) for spec in (None, "node", 2, group, own, syncbn.world())}) == 6
    specs.remove(own)
    assert all(communicator(key_of(spec)) is resolve(spec) for spec in specs)
    assert resolve(own).comm is own  # made for each use: `own` is not kept
    assert resolve(dist.group.WORLD) is syncbn.world()
    of_own, identity = key_of(own), id(own)
    del own, specs
    assert identity not in keys_by_id  # the next object there is another group
    with pytest.raises(GroupError, match="does not exist any more"):
        communicator(of_own)
    with pytest.raises(GroupError, match="no collectives for meta tensors"):
        syncbn.world().all_reduce(torch.empty(3, device="meta"))
    with pytest.raises(GroupError, match=r"1-D DeviceMesh, got 2 dimensions.*mesh\['name'\]"):
        syncbn.SyncBatchNorm(1, process_group=init_device_mesh("cpu", (size, 1), mesh_dim_names=("a", "b")))


def test_keys(gloo) -> None:
    gloo(2, _keys)


def _apart(rank: int, size: int) -> list[list[int]]:
    """A backend that is not Gloo, pretended: the world's sums take a group of their own, a given group's do not."""
    asked: list[dict[str, object]] = []
    with pytest.MonkeyPatch.context() as patch:
        new_group = dist.new_group
        patch.setattr(dist, "new_group", lambda **kwargs: asked.append(kwargs) or new_group())
        used: list[object] = []
        all_reduce = dist.all_reduce
        patch.setattr(dist, "all_reduce", lambda x, group: used.append(group) or all_reduce(x, group=group))
        by_hand, world = TorchDistributed(), TorchDistributed(own_group=True)
        for comm in (by_hand, world, world):
            comm._backends = {"cpu": "nccl"}
            assert comm.all_reduce(torch.ones(3))[0] == size
    assert asked == [{"backend": "nccl", "timeout": None}]
    assert used[0] is dist.group.WORLD
    assert used[1] is used[2] is not dist.group.WORLD
    made = used[1]
    world.close()
    assert made not in dist.distributed_c10d._world.pg_map
    assert dist.group.WORLD in dist.distributed_c10d._world.pg_map
    return [dist.get_process_group_ranks(dist.group.WORLD)]


def test_other_backends_get_a_group_of_their_own(gloo) -> None:
    gloo(2, _apart)


def _forked(rank: int, size: int) -> str:
    comm, single = syncbn.world(), SingleProcess()
    comm.all_reduce(torch.ones(3))
    read, write = os.pipe()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Python warns of forks beside threads
        child = os.fork()
    if child == 0:
        signal.alarm(10)
        try:
            single.all_reduce(torch.ones(3))
            syncbn.world().all_reduce(torch.ones(3))
        except CollectiveError as error:
            comm.close()  # releases nothing of the parent's
            os.write(write, str(error).encode())
        os._exit(0)
    os.waitpid(child, 0)
    assert comm.all_reduce(torch.ones(3))[0] == size
    message = os.read(read, 10_000).decode()
    os.close(read)
    os.close(write)
    return message


def test_a_forked_child_cannot_act_for_its_parent(gloo) -> None:
    assert all("was forked" in message for message in gloo(2, _forked))


def _closed_world(rank: int, size: int) -> None:
    layer = syncbn.SyncBatchNorm(1)
    first, part = syncbn.world(), resolve(1)
    layer(torch.randn(4, 1))
    first.close()
    assert dist.is_initialized()  # the user's, who made it
    assert syncbn.world() is not first
    layer(torch.randn(4, 1))  # goes on with the new one
    for old in (first, part):
        with pytest.raises(GroupError, match="closed"):
            old.all_reduce(torch.ones(3))
    assert resolve(1) is not part


def test_closing_the_users_world_ends_what_is_ours(gloo) -> None:
    gloo(2, _closed_world)


def _other_backend(rank: int, size: int) -> None:
    assert syncbn.init() is syncbn.init("gloo") is syncbn.world()
    for backend in ("mpi", "horovod", "nccl"):
        with pytest.raises(LaunchError, match=rf"init\('{backend}'\), but .* in a world of gloo already"):
            syncbn.init(backend)


def test_init_refuses_another_backend_than_the_worlds(gloo) -> None:
    gloo(2, _other_backend)


def _other_device(rank: int, size: int) -> float:
    torch.set_default_device("meta")
    try:
        comm = TorchDistributed(dist.new_group())
        return comm.all_reduce(torch.ones(3, device="cpu"))[0].item() + resolve(1).size
    finally:
        torch.set_default_device(None)


def test_the_default_device_does_not_matter(gloo) -> None:
    assert gloo(2, _other_device) == [3, 3]


def test_a_lost_group_stays_lost() -> None:
    lost = pickle.loads(pickle.dumps(Group(_Opaque())))
    assert "Opaque" in repr(pickle.loads(pickle.dumps(lost)).spec)


class _Opaque:
    rank = 0
    size = 1

    def all_reduce(self, x: torch.Tensor) -> torch.Tensor:
        return x
