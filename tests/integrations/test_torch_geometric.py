"""PyTorch Geometric: statistics over the nodes of all ranks, which hold different numbers of them."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from integrations.comparison import made, random_images
from integrations.training import train_both
from torch import Tensor, nn

import syncbn
from syncbn.comm import Communicator, run_threads
from syncbn.errors import CollectiveError

pytest.importorskip("torch_geometric")
from torch_geometric.data import Batch, Data
from torch_geometric.nn import BatchNorm, HeteroBatchNorm, models


def graph(seed: int, nodes: int) -> Data:
    """A ring; a node alone has no edge."""
    ring = torch.arange(nodes if nodes > 1 else 0)
    x = random_images(seed, nodes, 5)
    return Data(x=x, y=x[:, :3].cos(), edge_index=torch.stack([ring, ring.roll(1)]))


def batch(step: int, *nodes: int) -> Batch:
    return Batch.from_data_list([graph(10 * step + i, n) for i, n in enumerate(nodes)])


def join(parts: Sequence[Batch]) -> Batch:
    return Batch.from_data_list([graph for part in parts for graph in part.to_data_list()])


def loss(net: nn.Module, graphs: Batch) -> tuple[Tensor, int]:
    return (net(graphs.x, graphs.edge_index) - graphs.y).square().sum(), graphs.y.numel()


def _train(rank: int, size: int, name: str, nodes: int) -> float:
    def build() -> nn.Module:
        return getattr(models, name)(5, hidden_channels=8, num_layers=3, out_channels=3, norm="BatchNorm")  # type: ignore[no-any-return]

    model = made(build)
    model = syncbn.convert_sync_batchnorm(model)
    steps = [[batch(2 * step, 6, 4), batch(2 * step + 1, nodes)] for step in range(3)]
    return train_both(rank, model, made(build), steps, loss, join)


@pytest.mark.parametrize("name", ["GCN", "GIN"])
@pytest.mark.parametrize("nodes", [1, 3])
def test_unequal_nodes(agrees, name: str, nodes: int) -> None:
    agrees(_train, name, nodes, control=nodes > 1)  # nn.BatchNorm refuses a node alone


def test_single_elements_are_named_and_end_at_the_deadline() -> None:
    """A replica with one node skips the layer, for which the other one waits."""

    def replica(comm: Communicator) -> Tensor:
        layer = syncbn.convert_sync_batchnorm(BatchNorm(5, allow_single_element=True), comm)
        return layer(graph(0, 1 + comm.rank).x.float())  # type: ignore[no-any-return]

    plan = syncbn.convert_sync_batchnorm(BatchNorm(5, allow_single_element=True), dry_run=True)
    assert "allow_single_element=False" in plan.left[""]
    with pytest.raises(CollectiveError, match="did not call"):
        run_threads(2, replica, timeout=0.5)


def test_hetero_batch_norm_is_no_batch_norm_of_torch() -> None:
    net = syncbn.convert_sync_batchnorm(nn.ModuleList([BatchNorm(4), HeteroBatchNorm(4, num_types=2)]))
    assert [name for name, m in net.named_modules() if isinstance(m, syncbn.SyncBatchNorm)] == ["0.module"]
