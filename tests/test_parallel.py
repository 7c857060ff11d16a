"""broadcast_parameters, average_gradients, global_mean: data-parallel training through one verb."""

import pytest
import torch
from reference import Recording, Unreachable, random_batch
from torch import nn

import syncbn
from syncbn import SyncBatchNorm, average_gradients, broadcast_parameters, convert_sync_batchnorm, global_mean
from syncbn.comm import SingleProcess, run_threads
from syncbn.errors import DTypeError, InputError


class Everything(nn.Module):
    """Parameters and buffers of every dtype and shape, some of them tied or empty."""

    def __init__(self, fill):
        super().__init__()
        for dtype in (torch.float32, torch.float64, torch.float16, torch.bfloat16):
            self.register_parameter(
                f"of_{dtype}".replace("torch.", ""), nn.Parameter(torch.full((2, 3), fill, dtype=dtype))
            )
        self.tied = self.of_float32
        self.register_buffer("scalar", torch.tensor(fill))
        self.register_buffer("integers", torch.full((4,), int(fill)))
        self.register_buffer("mask", torch.tensor([fill > 0, True]))
        self.register_buffer("hidden", torch.full((2,), fill), persistent=False)
        self.register_buffer("empty", torch.empty(0))
        self.frozen = nn.Parameter(torch.full((3, 2), fill).t(), requires_grad=False)  # not contiguous


def all_tensors(module):
    return [*module.parameters(), *module.buffers()]


# broadcast_parameters


@pytest.mark.parametrize("world", [1, 2, 4])
def test_broadcast_gives_everybody_what_rank_0_has(world):
    def replica(comm):
        module = Everything(-float(comm.rank) or 1.5)
        before = list(map(id, all_tensors(module)))
        broadcast_parameters(module, process_group=comm)
        assert list(map(id, all_tensors(module))) == before
        assert module.tied is module.of_float32
        return all_tensors(module)

    expected = all_tensors(Everything(1.5))
    for tensors in run_threads(world, replica):
        assert all(torch.equal(a, b) and a.dtype == b.dtype for a, b in zip(tensors, expected, strict=True))


def test_broadcast_is_exact_and_overwrites_nan():
    values = torch.tensor([1e38, -1e-40, torch.pi, float("inf")])

    def replica(comm):
        layer = nn.Linear(4, 1)
        with torch.no_grad():
            layer.weight.copy_(torch.full((4,), float("nan")) if comm.rank else values)
        broadcast_parameters(layer, process_group=comm)
        return layer.weight[0].detach()

    assert all(torch.equal(weight, values) for weight in run_threads(3, replica))


def test_broadcast_keeps_leaves_that_require_grad():
    def replica(comm):
        layer = nn.Linear(2, 2)
        broadcast_parameters(layer, process_group=comm)
        layer(torch.ones(1, 2)).sum().backward()
        return layer.weight.is_leaf and layer.weight.requires_grad

    assert all(run_threads(2, replica))


DIFFERENT = {
    "shape": lambda rank: nn.Linear(2, 2 + rank),
    "number": lambda rank: nn.Linear(2, 2, bias=not rank),
    "dtype": lambda rank: nn.Linear(2, 2, dtype=[torch.float32, torch.float64][rank]),
    "order": lambda rank: nn.Sequential(*[nn.Linear(2, 3), nn.Linear(3, 2)][:: 1 - 2 * rank]),
    "none": lambda rank: nn.ReLU() if rank else nn.Linear(2, 2),
}


@pytest.mark.parametrize("function", [broadcast_parameters, average_gradients])
@pytest.mark.parametrize("make", DIFFERENT.values(), ids=DIFFERENT)
def test_different_models_are_an_error_on_every_replica(make, function):
    def replica(comm):
        module = make(comm.rank)
        before = [p.detach().clone() for p in module.parameters()]
        with pytest.raises(InputError, match=r"differ in number, shape, dtype or layout.*same model on every rank"):
            function(module, process_group=comm)
        return all(torch.equal(a, b) for a, b in zip(before, module.parameters(), strict=True))

    assert run_threads(2, replica, timeout=2) == [True, True]


def test_large_models_go_in_pieces(monkeypatch):
    monkeypatch.setattr(syncbn._parallel, "BUCKET_BYTES", 4 * 6)

    def replica(comm):
        recording = Recording(comm)
        model = nn.Sequential(*[nn.Linear(4, 1) for _ in range(3)], nn.Linear(1, 1).double())
        broadcast_parameters(model, process_group=recording)
        return [p.sum().item() for p in model.parameters()], recording.calls

    (first, calls), (second, _) = run_threads(2, replica)
    assert first == second
    assert calls[1:] == [(9, torch.float32), (6, torch.float32), (2, torch.float64)]


# average_gradients


def test_average_is_the_mean():
    gradients = torch.randn(3, 2, 2)

    def replica(comm):
        layer = nn.Linear(2, 2, bias=False)
        layer.weight.grad = gradients[comm.rank].clone()
        average_gradients(layer, process_group=comm)
        return layer.weight.grad

    for grad in run_threads(3, replica):
        torch.testing.assert_close(grad, gradients.mean(0))


def test_gradients_that_only_some_replicas_have():
    def replica(comm):
        module = nn.ParameterDict({name: nn.Parameter(torch.ones(2)) for name in ("all", "first", "none", "frozen")})
        module["frozen"].requires_grad = False
        module["all"].grad = torch.full((2,), 3.0 * comm.rank)
        if comm.rank == 0:
            module["first"].grad = torch.full((2,), 6.0)
        average_gradients(module, process_group=comm)
        return {name: p.grad if p.grad is None else p.grad[0].item() for name, p in module.items()}

    assert run_threads(3, replica) == [{"all": 3.0, "first": 2.0, "none": None, "frozen": None}] * 3


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_gradients_are_summed_in_float32(dtype):
    """3e4 + 3e4 + 3e4 is infinite in half; 256 + 1 + 1 is 256 in bfloat16."""
    values = {torch.float16: [3e4, 3e4, 3e4], torch.bfloat16: [256, 1, 1]}[dtype]

    def replica(comm):
        layer = nn.Linear(1, 1, bias=False, dtype=dtype)
        layer.weight.grad = torch.full((1, 1), values[comm.rank], dtype=dtype)
        average_gradients(layer, process_group=comm)
        return layer.weight.grad

    for grad in run_threads(3, replica):
        assert grad.dtype == dtype
        assert torch.equal(grad, torch.full((1, 1), sum(values) / 3, dtype=dtype))


@pytest.mark.parametrize(
    ("sparse_on", "error"), [((0, 1), "sparse"), ((1,), "differ in number, shape, dtype or layout")]
)
def test_sparse_gradients_are_refused_by_every_replica(sparse_on, error):
    def replica(comm):
        layer = nn.Embedding(3, 2, sparse=comm.rank in sparse_on)
        layer(torch.tensor([1])).sum().backward()
        with pytest.raises((DTypeError, InputError), match=error):
            average_gradients(layer, process_group=comm)

    run_threads(2, replica)


def test_complex_parameters_are_refused():
    def replica(comm):
        with pytest.raises(DTypeError, match="complex64"):
            broadcast_parameters(nn.Linear(2, 2, dtype=torch.complex64), process_group=comm)

    run_threads(2, replica)


@pytest.mark.parametrize("function", [broadcast_parameters, average_gradients])
def test_a_world_of_one_changes_nothing(function):
    layer = nn.Linear(2, 2)
    layer(torch.ones(1, 2)).sum().backward()
    before = [p.detach().clone() for p in layer.parameters()], [p.grad.clone() for p in layer.parameters()]
    function(layer)
    assert all(map(torch.equal, layer.parameters(), before[0]))
    assert all(torch.equal(p.grad, grad) for p, grad in zip(layer.parameters(), before[1], strict=True))


# global_mean


def test_global_mean_is_the_mean_of_all_terms_with_its_gradient():
    """Averaged over the replicas, the gradient is that of the whole batch's loss, whoever holds how many terms."""
    parts = [torch.randn(n, dtype=torch.float64) for n in (5, 0, 2)]
    weight = torch.tensor(2.0, dtype=torch.float64, requires_grad=True)
    whole = (torch.cat(parts) * weight).sin().mean()
    whole.backward()

    def replica(comm):
        mine = weight.detach().clone().requires_grad_()
        loss = global_mean((parts[comm.rank] * mine).sin().sum(), parts[comm.rank].numel(), process_group=comm)
        loss.backward()
        return loss.detach(), mine.grad

    losses, grads = zip(*run_threads(3, replica), strict=True)
    for loss in losses:
        torch.testing.assert_close(loss, whole.detach(), rtol=1e-12, atol=0)
    torch.testing.assert_close(sum(grads) / 3, weight.grad, rtol=1e-12, atol=0)


def test_the_mean_of_means_is_another_number():
    """Negative control of the test above."""
    parts = [torch.tensor([1.0, 1.0, 1.0]), torch.tensor([5.0])]
    assert torch.stack([part.mean() for part in parts]).mean() == 3
    assert run_threads(
        2, lambda comm: global_mean(parts[comm.rank].sum(), len(parts[comm.rank]), process_group=comm)
    ) == [2, 2]


@pytest.mark.parametrize(
    "totals", [torch.rand(3, 100) * 7, torch.tensor([[3e8], [-3e8 + 32], [0.0]])], ids=["bits", "far"]
)
def test_global_mean_is_the_same_on_every_replica(totals):
    results = run_threads(3, lambda comm: global_mean(totals[comm.rank], 2, process_group=comm))
    assert all(torch.equal(result, results[0]) for result in results)
    torch.testing.assert_close(results[0], (totals.double().sum(0) / 6).float())


def test_global_mean_of_nothing_is_zero():
    def replica(comm):
        x = torch.randn(3, requires_grad=True)
        loss = global_mean(x[:0].sum(), 0, process_group=comm)
        loss.backward()
        return loss.item(), x.grad.any().item()

    assert run_threads(2, replica) == [(0.0, False)] * 2


@pytest.mark.parametrize("count", [4, 4.0, torch.tensor(4), torch.tensor([4.0]), torch.tensor(4.0, requires_grad=True)])
def test_counts_of_any_kind(count):
    assert global_mean(torch.tensor(6.0), count, process_group=SingleProcess()) == 1.5


def test_global_mean_is_elementwise_and_keeps_shape_and_dtype():
    def replica(comm):
        total = torch.full((2, 1), float(comm.rank), dtype=torch.bfloat16, requires_grad=True)
        mean = global_mean(total, 1, process_group=comm)
        mean.sum().backward()
        return mean.shape, mean.dtype, mean[0, 0].item(), total.grad[0, 0].item()

    assert run_threads(2, replica) == [((2, 1), torch.bfloat16, 0.5, 1.0)] * 2


def test_global_mean_of_integers_is_refused():
    with pytest.raises(DTypeError, match=r"floating-point total, got torch\.int64"):
        global_mean(torch.tensor(3), 1, process_group=Unreachable())


@pytest.mark.parametrize("grad", [True, False])
def test_global_mean_is_one_collective(grad):
    def replica(comm):
        recording = Recording(comm)
        with torch.set_grad_enabled(grad):
            loss = global_mean(torch.ones(2, requires_grad=True), 1, process_group=recording).sum()
            if grad:
                loss.backward()
        return recording.calls

    assert run_threads(2, replica) == [[(3, torch.float64)]] * 2


# All of it


def classifier():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(1), nn.Linear(16, 3)).double()


def train(model, parts, loss_of, reduce):
    """Five steps of SGD with momentum; return the losses and the state."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    losses = []
    for x, target in parts:
        optimizer.zero_grad()
        loss = loss_of(nn.functional.cross_entropy(model(x), target, reduction="sum"), len(x))
        loss.backward()
        reduce(model)
        optimizer.step()
        losses.append(loss.detach())
    return torch.stack(losses), model.state_dict()


@pytest.mark.parametrize("sizes", [[4, 4], [5, 1, 2], [3, 0, 4, 1]], ids=str)
def test_training_on_replicas_is_training_on_one(sizes):
    inputs = [random_batch([(sum(sizes), 2, 4, 4)], seed=seed).xs[0] for seed in range(5)]
    steps = [(x, torch.arange(len(x)) % 3) for x in inputs]
    whole_losses, whole_state = train(classifier(), steps, lambda total, n: total / n, lambda model: None)
    models = [classifier() for _ in sizes]  # not in the threads: the seed is global

    def replica(comm):
        model = convert_sync_batchnorm(models[comm.rank], process_group=comm)
        if comm.rank:
            nn.init.zeros_(model[0].weight)
        broadcast_parameters(model, process_group=comm)
        parts = [(x.split(sizes)[comm.rank], target.split(sizes)[comm.rank]) for x, target in steps]
        return train(
            model,
            parts,
            lambda total, n: global_mean(total, n, process_group=comm),
            lambda model: average_gradients(model, process_group=comm),
        )

    for losses, state in run_threads(len(sizes), replica):
        torch.testing.assert_close(losses, whole_losses, rtol=1e-10, atol=1e-10)
        for key, value in state.items():
            torch.testing.assert_close(value, whole_state[key], rtol=1e-10, atol=1e-10)


def test_training_with_local_statistics_is_not():
    """Negative control of the test above."""
    x = random_batch([(8, 2, 4, 4)]).xs[0]
    with pytest.raises(AssertionError):
        torch.testing.assert_close(classifier()(x)[:4], classifier()(x[:4]), rtol=1e-10, atol=1e-10)
    assert isinstance(convert_sync_batchnorm(classifier())[1], SyncBatchNorm)
