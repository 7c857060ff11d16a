"""Several layers, one collective each way: `normalize_together`, and layers that wait in a block of `together`."""

from __future__ import annotations

import contextlib
import copy
import functools
import gc
import itertools
import operator
import weakref

import pytest
import torch
import vision
from reference import (
    WORLDS,
    Recording,
    Unreachable,
    assert_close,
    assert_tensor_close,
    outcome,
    random_batch,
    randomized,
    whole_batch,
)
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

import syncbn
from syncbn import SyncBatchNorm, convert_sync_batchnorm, fuse_activations, normalize_together, together
from syncbn._block import blocks
from syncbn._pending import Pending
from syncbn.comm import SingleProcess, run_threads
from syncbn.errors import GroupError, InputError
from syncbn.functional import sync_batch_norm

BOTH = pytest.mark.parametrize("path", ["compiled", "composed"], indirect=True)
LEVELS = [(3, (4, 4)), (5, (2,)), (3, ()), (7, (1, 2, 3))]  # channels and space of each layer


def in_block(layers, xs):
    with together():
        return [layer(x) for layer, x in zip(layers, xs, strict=True)]


def one_by_one(layers, xs):
    return [layer(x) for layer, x in zip(layers, xs, strict=True)]


def as_they_come(layers, xs):
    """The first output is used in place while the others wait."""
    with together():
        ys = one_by_one(layers, xs)
        ys[0] += 0
    return ys


HOW = {"function": normalize_together, "block": in_block, "in place": as_they_come}
how = pytest.mark.parametrize("how", HOW.values(), ids=HOW)


def levels(ns, seed=0, **options):
    """One batch for each of LEVELS; replica r has ns[r] samples."""
    return [
        random_batch([(n, channels, *space) for n in ns], seed=seed + number, **options)
        for number, (channels, space) in enumerate(LEVELS)
    ]


def trained(how, ns, *steps, wrap=lambda comm: comm, **options):
    """The outcome of each layer; `steps` are lists of batches, one a layer."""

    def replica(comm):
        comm = wrap(comm)
        layers = [randomized(SyncBatchNorm(channels, process_group=comm, **options)) for channels, _ in LEVELS]
        results = []
        for batches in steps:
            xs = [batch.xs[comm.rank].clone().requires_grad_() for batch in batches]
            ys = how(layers, xs)
            assert all(type(y) is torch.Tensor for y in ys)
            sum((y * batch.gs[comm.rank]).sum() for y, batch in zip(ys, batches, strict=True)).backward()
            results.append([(y.detach(), x.grad) for y, x in zip(ys, xs, strict=True)])
        return layers, results

    replicas = run_threads(len(ns), replica)
    for number in range(len(LEVELS)):
        pairs = [results[step][number] for step in range(len(steps)) for _, results in replicas]
        yield outcome([y for y, _ in pairs], [dx for _, dx in pairs], [layers[number] for layers, _ in replicas])


def assert_equals_whole_batch(how, ns, **options):
    steps = [levels(ns, seed=seed) for seed in (0, 10)]
    for number, actual in enumerate(trained(how, ns, *steps, **options)):
        assert_close(actual, whole_batch(*(batches[number] for batches in steps), **options))


# Equal to the whole batch


@BOTH
@how
@pytest.mark.parametrize("world", WORLDS)
def test_equal_to_the_whole_batch(how, world):
    assert_equals_whole_batch(how, [4] * world)


@BOTH
@pytest.mark.parametrize("ns", [[1, 4, 2], [3, 0], [0, 1, 0, 2]], ids=str)
def test_unequal_and_empty_replicas(ns):
    assert_equals_whole_batch(in_block, ns)


@BOTH
@pytest.mark.parametrize("options", [{"affine": False}, {"momentum": None}], ids=str)
def test_options(options):
    batches = levels([3, 2])
    ours, single = (list(trained(way, [3, 2], batches, **options)) for way in (in_block, one_by_one))
    for a, b in zip(ours, single, strict=True):
        for name in ("y", "dx", "running_mean", "running_var", "num_batches_tracked"):
            assert all(map(torch.equal, getattr(a, name), getattr(b, name)))


@BOTH
def test_bits_are_those_of_single_calls():
    """Nothing else is added up in another order, and no other number takes part."""
    batches = levels([3, 5], dtype=torch.float32)
    for a, b in zip(trained(in_block, [3, 5], batches), trained(one_by_one, [3, 5], batches), strict=True):
        assert all(torch.equal(x, y) for xs, ys in zip(a, b, strict=True) for x, y in zip(xs, ys, strict=True))


@BOTH
def test_dtypes_may_differ():
    def train(comm):
        layers = [SyncBatchNorm(3, process_group=comm) for _ in range(3)]
        dtypes = [torch.float64, torch.bfloat16, torch.float32]
        xs = [torch.randn(4, 3).to(dtype) for dtype in dtypes]
        ys = normalize_together(layers, xs)
        assert [y.dtype for y in ys] == dtypes
        assert all(map(torch.equal, ys, one_by_one(copy.deepcopy(layers), xs)))

    run_threads(1, train)


@BOTH
def test_derivative_of_the_backward():
    """A penalty on the input's gradient, as of a GAN's critic."""

    def penalties(comm, how):
        layers = [randomized(SyncBatchNorm(c, process_group=comm, activation="silu")).double() for c in (3, 4)]
        xs = [x.requires_grad_() for x in random_batch([(4, 3, 5), (4, 4, 5)], seed=comm.rank).xs]
        y = torch.cat(how(layers, xs), 1)
        dxs = torch.autograd.grad(y.pow(3).sum(), xs, create_graph=True)
        sum(dx.square().sum() for dx in dxs).backward()
        return [*(x.grad for x in xs), *(p.grad for layer in layers for p in layer.parameters())]

    ours, single = (run_threads(2, functools.partial(penalties, how=way)) for way in (in_block, one_by_one))
    for a, b in zip(itertools.chain(*ours), itertools.chain(*single), strict=True):
        assert_tensor_close(a, b)


def test_a_wrong_split_is_seen(monkeypatch):
    """Negative control: two layers of as many channels get each other's sums."""
    split = torch.split

    def mixed_up(total, sizes):
        parts = split(total, sizes)
        return parts if len(parts) < 4 else operator.itemgetter(2, 1, 0, 3)(parts)

    monkeypatch.setattr(torch, "split", mixed_up)
    with pytest.raises(AssertionError, match="y: "):
        assert_equals_whole_batch(in_block, [3, 2])


def test_residuals_and_activations():
    x, residual = torch.randn(4, 3, 2), torch.randn(4, 3, 2)
    layers = [SyncBatchNorm(3, activation="relu"), SyncBatchNorm(3)]
    ours = normalize_together(copy.deepcopy(layers), [x, x], [residual, None])
    assert torch.equal(ours[0], layers[0](x, residual))
    assert torch.equal(ours[1], layers[1](x))


@how
def test_layers_in_eval_are_called(how):
    def forward(comm):
        layers = [SyncBatchNorm(c, process_group=comm) for c, _ in LEVELS]
        layers[1].eval()
        xs = [torch.randn(4, c, *space) for c, space in LEVELS]
        assert all(map(torch.equal, how(layers, xs), one_by_one(copy.deepcopy(layers), xs)))

    run_threads(2, forward)


@BOTH
@how
def test_a_layer_that_occurs_twice(how):
    """Its running statistics move twice, in order."""

    def forward(comm):
        layer = SyncBatchNorm(3, process_group=comm)
        xs = [torch.randn(4, 3) + number for number in range(3)]
        twin = copy.deepcopy(layer)
        how([layer] * 3, xs)
        one_by_one([twin] * 3, xs)
        assert layer.num_batches_tracked == 3
        assert all(map(torch.equal, layer.buffers(), twin.buffers()))

    run_threads(2, forward)


# Collectives


def record(world, fn, *args):
    """What `fn(comm, *args)` had summed, the same on each replica: numbers of each call."""

    def replica(comm):
        recording = Recording(comm)
        fn(recording, *args)
        assert all(dtype == torch.float64 for _, dtype in recording.calls)
        return [numbers for numbers, _ in recording.calls]

    first, *others = run_threads(world, replica)
    assert all(calls == first for calls in others)
    return first


SUM = sum(channels for channels, _ in LEVELS)
FORWARD, BACKWARD = 2 * SUM + len(LEVELS), 2 * SUM


@how
@pytest.mark.parametrize("world", [2, 4])
def test_one_collective_each_way(how, world):
    def train(comm):
        layers = [SyncBatchNorm(channels, process_group=comm) for channels, _ in LEVELS]
        xs = [torch.randn(2 * comm.rank, c, *space, requires_grad=True) for c, space in LEVELS]
        torch.cat([y.flatten() for y in how(layers, xs)]).sum().backward()

    assert record(world, train) == [FORWARD, BACKWARD]


def test_inputs_without_gradient_send_nothing_back():
    def train(comm, needs):
        layers = [SyncBatchNorm(3, process_group=comm) for _ in needs]
        xs = [torch.randn(4, 3, requires_grad=need) for need in needs]
        sum(y.sum() for y in in_block(layers, xs)).backward()
        assert [x.grad is not None for x in xs] == needs
        assert all(layer.weight.grad is not None for layer in layers)

    assert record(2, train, [True, False, True]) == [21, 12]
    assert record(2, train, [False] * 3) == [21]


def test_one_layer_is_the_single_call():
    def train(comm):
        y = normalize_together([SyncBatchNorm(3, process_group=comm)], [torch.randn(4, 3, requires_grad=True)])[0]
        assert type(y.grad_fn).__name__ == "_SyncBatchNormBackward"
        y.sum().backward()

    assert record(2, train) == [7, 6]


def test_eval_and_nothing_send_nothing():
    def forward(comm):
        layers = [SyncBatchNorm(3, process_group=comm).eval() for _ in range(2)]
        xs = [torch.randn(4, 3) for _ in layers]
        normalize_together(layers, xs)
        in_block(layers, xs)
        assert normalize_together([], []) == []

    assert record(2, forward) == []


def test_masks():
    x, mask = torch.randn(4, 3, 5, dtype=torch.float64), torch.rand(4, 5) < 0.7

    def run(how):
        layers = [randomized(SyncBatchNorm(3, process_group=SingleProcess())).double() for _ in range(2)]
        leaf = x.clone().requires_grad_()
        first, second = how(layers, leaf)
        (first * x + second * x.square()).sum().backward()
        return [first, second, leaf.grad, *(t for layer in layers for t in (layer.weight.grad, layer.running_var))]

    def jointly(layers, leaf):
        with together():
            return [layers[0](leaf, mask=mask), layers[1](leaf)]

    for ours, theirs in zip(run(jointly), run(lambda ls, leaf: (ls[0](leaf, mask=mask), ls[1](leaf))), strict=True):
        assert_tensor_close(ours, theirs)


def test_layers_that_depend_on_each_other():
    def train(comm):
        first, second, third = (SyncBatchNorm(3, process_group=comm) for _ in range(3))
        x = torch.randn(4, 3)
        with together():
            beside = third(x)
            y = second(first(x))
            assert type(y) is Pending
            assert type(beside) is torch.Tensor

    assert record(2, train) == [14, 7]


def test_groups_share_what_is_theirs():
    """In a block each group has collectives of its own, when it needs them."""

    def train(comm):
        other = Recording(SingleProcess())
        a, b, c = (SyncBatchNorm(3, process_group=group) for group in (comm, other, comm))
        x = torch.randn(4, 3)
        with together():
            ya, yb, yc = a(x), b(x), c(x)
            ya.sum()
            assert [type(y) for y in (ya, yb, yc)] == [torch.Tensor, Pending, torch.Tensor]
        assert [numbers for numbers, _ in other.calls] == [7]

    assert record(2, train) == [14]


def test_outputs_that_only_some_replicas_use():
    """The others wait for nobody: no gradient counts as zeros."""
    batches = levels([3, 4])
    for batch in batches[1:]:
        batch.gs[0].zero_()

    def replica(comm):
        layers = [randomized(SyncBatchNorm(c, process_group=comm)) for c, _ in LEVELS]
        xs = [batch.xs[comm.rank].clone().requires_grad_() for batch in batches]
        losses = [(y * b.gs[comm.rank]).sum() for y, b in zip(in_block(layers, xs), batches, strict=True)]
        (losses[0] if comm.rank == 0 else sum(losses)).backward()
        return [x.grad for x in xs]

    grads = run_threads(2, replica)
    for number, batch in enumerate(batches):
        for dx, expected in zip((g[number] for g in grads), whole_batch(batch).dx, strict=True):
            assert_tensor_close(dx, expected)


def test_two_backwards_with_the_graph_kept():
    layers, xs = [SyncBatchNorm(3) for _ in range(2)], [torch.randn(4, 3, requires_grad=True) for _ in range(2)]
    gs = [torch.randn(4, 3) for _ in range(2)]
    first, second = in_block(layers, xs)
    (first * gs[0]).sum().backward(retain_graph=True)
    (second * gs[1]).sum().backward()
    twins = [x.detach().requires_grad_() for x in xs]
    for y, g in zip(one_by_one(layers, twins), gs, strict=True):
        (y * g).sum().backward()
    for x, twin in zip(xs, twins, strict=True):
        assert_tensor_close(x.grad, twin.grad)


# What waits, and what makes it be computed


@pytest.fixture
def waiting():
    """Two outputs in an open block."""
    with together():
        a, b = (SyncBatchNorm(3)(torch.randn(4, 3, requires_grad=True)) for _ in range(2))
        assert type(a) is type(b) is Pending
        yield a, b


KNOWN = {
    "shape": lambda y: y.shape == (4, 3),
    "size": lambda y: y.size() == (4, 3) and y.size(0) == 4,
    "dim": lambda y: y.dim() == y.ndim == y.ndimension() == 2,
    "numel": lambda y: y.numel() == y.nelement() == 12,
    "len": lambda y: len(y) == 4,
    "dtype": lambda y: y.dtype == torch.float32 and y.is_floating_point() and torch.is_floating_point(y),
    "device": lambda y: y.device.type == "cpu" and y.is_cpu and not y.is_cuda,
    "requires_grad": lambda y: y.requires_grad,
    "isinstance": lambda y: isinstance(y, torch.Tensor) and torch.is_tensor(y),
    "hash": lambda y: hash(y) == id(y) and y in {y},
}


@pytest.mark.parametrize("ask", KNOWN.values(), ids=KNOWN)
def test_known_before(waiting, ask):
    assert ask(waiting[0])
    assert [type(y) for y in waiting] == [Pending, Pending]
    waiting[1].sum()
    assert type(waiting[0]) is torch.Tensor
    assert ask(waiting[0])


def iadd(y):
    y += 1


def put(y):
    y[0] = 1


NEEDED = {
    "add": lambda y: y + 1,
    "reflected": lambda y: 1 - y,
    "other operand": lambda y: torch.ones(3) * y,
    "functional": nn.functional.relu,
    "module": nn.ReLU(inplace=True),
    "iadd": iadd,
    "relu_": torch.relu_,
    "setitem": put,
    "item": lambda y: y[0],
    "cat": lambda y: torch.cat([torch.ones(1, 3), y]),
    "nested": lambda y: torch.block_diag(*[y, y]),
    "keyword": lambda y: torch.add(input=y, other=1),
    "view": lambda y: y.view(-1),
    "iterate": list,
    "numpy": lambda y: y.detach().numpy(),
    "item()": lambda y: y.sum().item(),
    "format": lambda y: f"{y}",
    "grad_fn": lambda y: y.grad_fn,
    "is_leaf": lambda y: y.is_leaf,
    "stride": lambda y: y.stride(),
    "register_hook": lambda y: y.register_hook(lambda g: g),
    "retain_grad": lambda y: y.retain_grad(),
    "equality": lambda y: y == 0,
    "backward": lambda y: y.backward(torch.ones(4, 3)),
    "autograd.backward": lambda y: torch.autograd.backward(y, torch.ones(4, 3)),
    "autograd.grad": lambda y: torch.autograd.grad([y], [y], torch.ones(4, 3)),
    "data": lambda y: y.data,
    "like": torch.zeros_like,
    "detach": lambda y: y.detach_(),
    "pickle": lambda y: copy.deepcopy(y.detach()),
    "operator": torch.ops.aten.relu,
    "index": lambda y: torch.arange(12.0).view(4, 3)[y > 0],
}


@pytest.mark.parametrize("use", NEEDED.values(), ids=NEEDED)
def test_needed_now(waiting, use):
    use(waiting[0])
    assert [type(y) for y in waiting] == [torch.Tensor, torch.Tensor]


@pytest.mark.parametrize("training", [True, False])
def test_layers_and_the_function_take_what_waits(waiting, training):
    """As input and as residual."""
    y, z = waiting
    layer = SyncBatchNorm(3).train(training)
    sync_batch_norm(layer(torch.randn(4, 3), y), training=training)
    assert type(z) is torch.Tensor
    with together():
        y = SyncBatchNorm(3)(torch.randn(4, 3))
        assert type(sync_batch_norm(y, *([None] * 4), training)) is torch.Tensor
        z = SyncBatchNorm(3)(torch.randn(4, 3))
        layer(z)
        assert type(y) is type(z) is torch.Tensor


def changed(y, identity):
    """In-place operations, on the object and by what they return."""
    z = y
    y += identity
    y.mul_(2).add_(1)
    y[:, 0] = 3
    nn.functional.relu(y, inplace=True)
    return z


def test_in_place_operations_are_those_on_the_real_tensor():
    def train(wait):
        layers = [randomized(SyncBatchNorm(3)) for _ in range(2)]
        torch.manual_seed(0)
        x, g = torch.randn(4, 3, requires_grad=True), torch.randn(4, 3)
        with together() if wait else contextlib.nullcontext():
            y = changed(layers[0](x), layers[1](x))
        (y * g).sum().backward()
        return y.detach(), x.grad, layers[0].weight.grad

    assert all(map(torch.equal, train(True), train(False)))


def test_the_object_itself_becomes_the_tensor():
    """Also where it was kept, with what was put on it."""

    class Holder:
        pass

    layers = [SyncBatchNorm(3) for _ in range(2)]
    holder = Holder()
    with together():
        holder.y = layers[0](torch.randn(4, 3))
        kept = {"y": holder.y, "z": [layers[1](torch.randn(4, 3))]}
        holder.y.tag = "mine"
    assert holder.y is kept["y"]
    assert type(kept["z"][0]) is torch.Tensor
    assert holder.y.tag == "mine"
    assert vars(holder.y) == {"tag": "mine"}
    assert holder.y.grad_fn is kept["z"][0].grad_fn


def test_nothing_stays_behind():
    layer, x = SyncBatchNorm(3), torch.randn(4, 3, requires_grad=True)
    input_of = weakref.ref(x)
    y = in_block([layer, layer], [x, x])
    del x, y
    gc.collect()
    assert input_of() is None


def test_an_output_that_nobody_keeps_moves_the_running_statistics():
    layer = SyncBatchNorm(3)
    with together():
        layer(torch.randn(4, 3))
    assert layer.num_batches_tracked == 1


def test_the_layers_checks_come_at_the_call():
    first, second = two()
    with pytest.raises(InputError, match=r"weight of shape \(4,\)"):
        in_block([first, second], [torch.randn(4, 3), torch.randn(4, 4)])


# torch tells nobody of these


class Double(torch.autograd.Function):
    """As the activations of some libraries."""

    @staticmethod
    def forward(ctx, x, factor):
        ctx.save_for_backward(x)
        return x * x * factor

    @staticmethod
    def backward(ctx, g):
        (x,) = ctx.saved_tensors
        return 2 * g * x * 3, None


class Described(Double):
    """In the other form."""

    @staticmethod
    def forward(x, factor=3):
        return x * x * factor

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(inputs[0])


@pytest.mark.parametrize("function", [Double, Described])
def test_a_function_gets_the_real_tensor(function):
    def train(wait):
        layers = [randomized(SyncBatchNorm(3)) for _ in range(2)]
        torch.manual_seed(0)
        x = torch.randn(4, 3, requires_grad=True)
        with together() if wait else contextlib.nullcontext():
            y, z = (layer(x) for layer in layers)
            loss = function.apply(y, 3).sum() + z.sum()
        loss.backward()
        return x.grad

    assert torch.equal(train(True), train(False))


def test_functions_are_left_as_they_were():
    before = vars(torch.autograd.Function)["apply"]
    with together():
        assert vars(torch.autograd.Function)["apply"] is not before
        with together():
            pass
        assert vars(torch.autograd.Function)["apply"] is not before
    assert vars(torch.autograd.Function)["apply"] is before
    assert not blocks


def test_full_backward_hooks():
    layers, seen = [SyncBatchNorm(3) for _ in range(2)], []
    layers[0].register_full_backward_hook(lambda *args: seen.append(args[1][0]))
    x = torch.randn(4, 3, requires_grad=True)
    sum(y.square().sum() for y in in_block(layers, [x, x])).backward()
    assert seen[0].shape == (4, 3)


def test_code_that_torch_does_not_announce_is_refused():
    with together():
        y = SyncBatchNorm(3)(torch.randn(4, 3))
        with torch._C.DisableTorchFunctionSubclass(), pytest.raises(InputError, match=r"aten.relu.*y\.clone\(\)"):
            torch.relu(y)
        reference = weakref.ref(y)
        with pytest.raises(InputError, match="held by code"):
            y + 1
        del reference


# Other modes, regions, blocks, threads


def buffers_after(how):
    layer = SyncBatchNorm(3)
    torch.manual_seed(0)
    how(layer, lambda: torch.randn(4, 3, requires_grad=True))
    return list(layer.buffers())


MODES = {
    "no_grad": torch.no_grad,
    "inference": torch.inference_mode,
    "hooks": torch.autograd.graph.save_on_cpu,
}


@pytest.mark.parametrize("mode", MODES.values(), ids=MODES)
def test_a_layer_in_another_mode_does_not_wait(mode):
    """And what was called before it is computed before it."""

    def calls(layer, x):
        first = layer(x())
        with mode():
            second = layer(x())
        third = layer(x())
        return first, second, third

    def waiting(layer, x):
        with together():
            assert [type(y) for y in calls(layer, x)] == [torch.Tensor, torch.Tensor, Pending]

    assert all(map(torch.equal, buffers_after(waiting), buffers_after(calls)))


@pytest.mark.parametrize("mode", MODES.values(), ids=MODES)
def test_used_in_another_mode(mode):
    """The layers are computed as where they were called."""
    x = torch.randn(4, 3, requires_grad=True)
    layers = [SyncBatchNorm(3) for _ in range(2)]
    with together():
        y, z = (layer(x) for layer in layers)
        with mode():
            y + 1
    assert not y.is_inference()
    (y.square().sum() + (z * torch.randn(4, 3)).sum()).backward()
    assert x.grad.abs().sum() > 0


def test_what_is_saved_goes_where_the_block_is():
    """Not to the hooks of the region in which an output is used, nor into a graph that the block did not want."""
    layers, packed = [SyncBatchNorm(3) for _ in range(2)], []
    x = torch.randn(4, 3, requires_grad=True)
    with together():
        y, _ = (layer(x) for layer in layers)
        with torch.autograd.graph.saved_tensors_hooks(packed.append, lambda kept: kept):
            y.sum()
    assert packed == []
    with torch.no_grad(), together():
        y, _ = (layer(x) for layer in layers)
        with torch.enable_grad():
            y.sum()
    assert not y.requires_grad


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_a_block_in_a_mode(mode):
    layers, xs = [SyncBatchNorm(3) for _ in range(2)], [torch.randn(4, 3) for _ in range(2)]
    expected = one_by_one(copy.deepcopy(layers), xs)
    with mode():
        ours = in_block(layers, xs)
        assert not any(y.requires_grad for y in ours)
    assert all(map(torch.equal, ours, expected))


def test_autocast_changes_nothing():
    layers = [SyncBatchNorm(3) for _ in range(2)]
    x = torch.randn(4, 3)
    expected = one_by_one(copy.deepcopy(layers), [x, x])
    with together():
        ours = one_by_one(layers, [x, x])
        with torch.autocast("cpu", torch.bfloat16):
            ours[0].sum()
    assert all(map(torch.equal, ours, expected))


def branches(comm):
    """Two branches, and what comes before and behind them."""
    net = nn.ModuleList([nn.Linear(3, 3), nn.Linear(3, 4), nn.Linear(3, 5), nn.Linear(9, 3)]).double()
    for number, linear in enumerate(net):
        linear.weight.data = random_batch([linear.weight.shape], seed=number).xs[0]
        nn.init.ones_(linear.bias)
    norms = nn.ModuleList([randomized(SyncBatchNorm(c, process_group=comm)) for c in (4, 5)]).double()
    return net, norms


def through(model, x):
    (before, a, b, behind), (norm_a, norm_b) = model
    x = before(x)
    return behind(torch.cat([norm_a(a(x)), norm_b(b(x))], 1).tanh())


def through_block(model, x):
    with together():
        return through(model, x)


REGIONS = {
    "no region": through_block,
    "block in region": lambda model, x: checkpoint(through_block, model, x, use_reentrant=False),
    "block in reentrant region": lambda model, x: checkpoint(through_block, model, x, use_reentrant=True),
    "region in block": lambda model, x: around(model, x, use_reentrant=False),
    "reentrant region in block": lambda model, x: around(model, x, use_reentrant=True),
    "block in both": lambda model, x: around(model, x, through_block, use_reentrant=False),
}
COUNTS = {
    "no region": [20, 18],
    "block in region": [20, 20, 18],
    "block in reentrant region": [20, 20, 18],
    "region in block": [9, 11, 9, 11, 10, 8],
    "reentrant region in block": [9, 11, 9, 11, 10, 8],
    "block in both": [20, 20, 18],
}


def around(model, x, inner=through, **options):
    with together():
        return checkpoint(inner, model, x, **options)


@BOTH
@pytest.mark.parametrize("region", REGIONS)
def test_checkpoint(region):
    """Equal results, statistics moved once, and the collectives that were said."""

    def train(comm, wrap, record):
        recording = Recording(comm)
        model = branches(recording)
        for seed in range(2):
            (x,), (g,) = random_batch([(4, 3)], seed=10 * seed + comm.rank)
            x.requires_grad_()
            recording.calls.clear()
            (wrap(model, x) * g).sum().backward()
            record.append([numbers for numbers, _ in recording.calls])
        return [x.grad, *(t for part in model for p in part.parameters() for t in (p, p.grad)), *model[1].buffers()]

    single, ours = [], []
    expected = run_threads(2, functools.partial(train, wrap=through, record=single))
    actual = run_threads(2, functools.partial(train, wrap=REGIONS[region], record=ours))
    for a, e in zip(itertools.chain(*actual), itertools.chain(*expected), strict=True):
        assert_tensor_close(a, e)
    assert ours == [COUNTS[region]] * 4


@pytest.mark.parametrize("tracked", [True, False])
def test_what_waits_outside_is_not_saved_for_a_region(tracked):
    """A region needs what waits around it; the region's own layer is the only one that it keeps."""
    x, g = torch.randn(4, 3, 5, dtype=torch.float64), torch.randn(4, 3, 5, dtype=torch.float64)

    def run(region, block):
        options = {"track_running_stats": tracked, "process_group": SingleProcess()}
        first, second = (randomized(SyncBatchNorm(3, **options)).double() for _ in range(2))
        leaf = x.clone().requires_grad_()
        with block:
            y = first(leaf)
            z = region(lambda t, held: second(held[0] * t + 1).sin(), leaf, [y]) * 1
        (z * g).sum().backward()
        return z, leaf.grad, first.weight.grad, second.weight.grad

    def saved(function, *args):
        return checkpoint(function, *args, use_reentrant=False, context_fn=syncbn.saved_statistics)

    plain = run(lambda function, *args: function(*args), contextlib.nullcontext())
    for ours, theirs in zip(run(saved, together()), plain, strict=True):
        assert_tensor_close(ours, theirs)


def test_a_region_is_recomputed_in_a_block():
    """What waits meanwhile takes no sums of the region's."""
    layer, other, x = *(SyncBatchNorm(3).double() for _ in range(2)), torch.randn(4, 3, dtype=torch.float64)
    leaf = x.clone().requires_grad_()
    z = checkpoint(lambda t: layer(t).sin(), leaf, use_reentrant=False, context_fn=syncbn.saved_statistics)
    with together():
        y = other(x * 2)
        z.sum().backward()
    assert_tensor_close(y, copy.deepcopy(other)(x * 2))


@pytest.mark.parametrize("read", ["eval", "function", "training function"])
def test_statistics_that_a_waiting_layer_moves_are_moved_before_they_are_read(read):
    x, z = torch.randn(4, 3), torch.randn(4, 3)

    def run(block):
        layer = SyncBatchNorm(3)
        with block:
            layer(x)
            statistics = layer.running_mean, layer.running_var
            if read == "eval":
                return layer.eval()(z)
            sync_batch_norm(z, *statistics, training=read == "training function")
        return layer.running_mean

    assert torch.equal(run(together()), run(contextlib.nullcontext()))


def test_under_a_transform_of_torch_func():
    layer, x = SyncBatchNorm(3), torch.randn(4, 3)
    with together():
        y = layer(x)
        with pytest.raises(InputError, match=r"torch\.func"):
            torch.func.grad(lambda t: (t * y).sum())(torch.ones(4, 3))
        assert type(y + 0) is torch.Tensor
        assert y.requires_grad


def test_a_failure_is_told_to_all_that_waited():
    comm = SingleProcess()
    layers = [SyncBatchNorm(3, process_group=comm) for _ in range(2)]
    with together():
        for y in layers[0](torch.randn(4, 3)), layers[1](torch.randn(1, 3)):
            with pytest.raises(InputError, match="more than 1 value per channel"):
                y + 0


def test_a_patch_of_apply_that_came_later_stays(monkeypatch):
    theirs = classmethod(lambda cls, *args: None)
    monkeypatch.setattr(torch.autograd.Function, "apply", theirs)
    with together():
        pass
    assert vars(torch.autograd.Function)["apply"] is theirs


def test_a_nested_block_comes_after_what_waits_outside():
    def nested(layer, x):
        with together():
            y = layer(x() + 1)
            with together():
                assert type(y) is torch.Tensor
                z = layer(x())
                assert type(z) is Pending
            assert type(z) is torch.Tensor
            assert type(layer(x() - 1)) is Pending

    def single(layer, x):
        layer(x() + 1), layer(x()), layer(x() - 1)

    assert all(map(torch.equal, buffers_after(nested), buffers_after(single)))


def test_a_block_is_its_threads():
    """Replicas on threads open and close blocks as they like."""

    def forward(comm):
        layers = [SyncBatchNorm(3, process_group=comm) for _ in range(2)]
        for step in range(20):
            ys = (in_block if (step + comm.rank) % 2 else normalize_together)(layers, [torch.randn(4, 3)] * 2)
            assert all(type(y) is torch.Tensor for y in ys)
        return layers[0].running_mean

    first, *others = run_threads(4, forward)
    assert all(torch.equal(first, other) for other in others)


def test_an_exception_drops_what_waits():
    layers, kept = two(), []

    def interrupted():
        with together():
            kept.extend(layer(torch.randn(4, 3)) for layer in layers)
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        interrupted()
    assert not blocks
    assert layers[0].num_batches_tracked == 0
    with pytest.raises(InputError, match="the block was left by an exception"):
        kept[0] + 1
    assert kept[1].shape == (4, 3)


def test_it_decorates_a_forward():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.norms = nn.ModuleList(SyncBatchNorm(3) for _ in range(2))

        @together()
        def forward(self, x):
            return [norm(x) for norm in self.norms]

    y, z = Net()(torch.randn(4, 3))
    assert y.grad_fn is z.grad_fn


# What is refused


def two():
    nobody = Unreachable()
    return [SyncBatchNorm(3, process_group=nobody) for _ in range(2)]


X = torch.randn(4, 3)
BAD = {
    "inputs": (lambda: normalize_together(two(), [X]), InputError, "expected 2 inputs"),
    "residuals": (lambda: normalize_together(two(), [X, X], [None]), InputError, "expected 2 residuals"),
    "layer": (lambda: normalize_together([nn.BatchNorm1d(3)], [X]), InputError, r"layers\[0\] is a BatchNorm1d"),
    "devices": (
        lambda: normalize_together(two(), [X, X.to("meta")]),
        InputError,
        "`inputs` on one device, got cpu, meta",
    ),
    "groups": (lambda: normalize_together([*two(), SyncBatchNorm(3)], [X] * 3), GroupError, "`layers` of one process"),
    "shape": (lambda: normalize_together(two(), [X, X[0]]), InputError, "expected 2D or more"),
    "channels": (lambda: normalize_together(two(), [X, X.T]), InputError, "weight of shape"),
    "residual": (lambda: normalize_together(two(), [X, X], [X, X[:1]]), InputError, "expected residual"),
}


@pytest.mark.parametrize(("call", "error", "message"), BAD.values(), ids=BAD)
def test_refused_before_any_collective(call, error, message):
    with pytest.raises(error, match=message):
        call()
    assert not blocks


@pytest.mark.parametrize("name", ["input", "weight", "bias", "residual"])
def test_changed_while_it_waits(name):
    layers, x, residual = two(), torch.randn(4, 3), torch.randn(4, 3)
    tensors = {"input": x, "residual": residual, "weight": layers[1].weight, "bias": layers[1].bias}

    @together()
    def change():
        layers[0](x.clone())
        layers[1](x, residual)
        with torch.no_grad():
            tensors[name].mul_(2)

    with pytest.raises(InputError, match=rf"^{name} of SyncBatchNorm\(3.*was changed in place"):
        change()


def test_freed_while_it_waits():
    layer = two()[0]

    @together()
    def free():
        layer(torch.randn(4, 3))
        layer.weight.untyped_storage().resize_(0)

    with pytest.raises(InputError, match=r"memory of weight .* was freed"):
        free()


def test_one_value_in_the_world():
    with pytest.raises(InputError, match="more than 1 value"):
        in_block([SyncBatchNorm(3), SyncBatchNorm(3)], [torch.randn(4, 3), torch.randn(1, 3)])


def under_func(layers, x):
    return torch.func.grad(lambda x: sum(y.sum() for y in in_block(layers, [x, x])))(x)


def under_trace(layers, x):
    return torch.jit.trace(lambda x: in_block(layers, [x, x])[0], x)


def compiled_inside(layers, x):
    with together():
        return torch.compile(layers[0], backend="eager", fullgraph=True)(x)


def compiled_block(layers, x):
    return torch.compile(lambda x: in_block(layers, [x, x]), backend="eager", fullgraph=True)(x)


@pytest.mark.filterwarnings("ignore:.*torch.jit")
@pytest.mark.parametrize("follow", [under_func, under_trace, compiled_inside, compiled_block], ids=lambda f: f.__name__)
def test_what_follows_operations_is_refused(follow):
    torch.compiler.reset()
    hidden = "|Observed exception"  # by the compiler of torch 2.8
    with pytest.raises(Exception, match=r"together\(\)" + (hidden if torch.__version__ < "2.10" else "")):
        follow(two(), torch.randn(4, 3))
    assert not blocks


def test_compiled_layers_do_not_mind_that_there_are_blocks():
    """One graph before and after a block, without another compilation."""
    torch.compiler.reset()
    layer, x = SyncBatchNorm(3), torch.randn(4, 3)
    compiled = torch.compile(layer, backend="eager", fullgraph=True)
    with torch._dynamo.config.patch(error_on_recompile=False):
        compiled(x)
    in_block([layer, layer], [x, x])
    with torch._dynamo.config.patch(error_on_recompile=True):
        compiled(x)
    assert layer.num_batches_tracked == 4


# Models that know nothing of this


def aspp():
    """DeepLabV3's head for several scales: five branches, concatenated, and a projection."""
    models = vision.load("torchvision.models.segmentation.deeplabv3")
    net = models.ASPP(3, [1, 2, 3], 6)
    net.project[3] = nn.Identity()  # dropout
    return net


def resnet(block, *depths):
    def make():
        models = vision.load("torchvision.models")
        return models.ResNet(getattr(models.resnet, block), depths, num_classes=3)

    return make


MODELS = {  # how it is made; norm layers; forward collectives, with activations fused
    "aspp": (aspp, 6, 6, 2),  # its branches end in an activation
    "resnet18": (resnet("BasicBlock", 2, 2, 2, 2), 20, 17, 20),
    "bottlenecks": (resnet("Bottleneck", 1, 1, 1, 1), 17, 13, 17),  # fused, the shortcut is added in the last norm
}


def seeded(make):
    """The same in every replica; outside of threads, as there is one generator."""
    torch.manual_seed(0)
    net = make().double()
    for norm in net.modules():
        if isinstance(norm, nn.BatchNorm2d):
            nn.init.uniform_(norm.weight, 0.5, 1.5)
            nn.init.normal_(norm.bias)
    return net


@pytest.mark.timeout(120)
@pytest.mark.parametrize(
    ("name", "fuse"),
    [("aspp", False), ("aspp", True), ("resnet18", False), ("bottlenecks", False), ("bottlenecks", True)],
)
def test_a_model_trains_like_the_whole_batch(name, fuse):
    make, norms, *forwards = MODELS[name]
    ns = [3, 1]
    net = seeded(make)
    assert sum(isinstance(m, nn.BatchNorm2d) for m in net.modules()) == norms
    xs = random_batch([(n, 3, 33, 33) for n in ns]).xs

    def train(comm):
        recording = Recording(comm)
        model = convert_sync_batchnorm(copy.deepcopy(net), recording)
        if fuse:
            assert fuse_activations(model)
        with together():
            y = model(xs[comm.rank])
        (y * gs[comm.rank]).sum().backward()
        assert len(recording.calls) == 2 * forwards[fuse]
        return y.detach(), model

    reference = copy.deepcopy(net)
    y = reference(torch.cat(xs))
    gs = random_batch([part.shape for part in y.split(ns)], seed=1).gs
    (y * torch.cat(gs)).sum().backward()
    ys, models = zip(*run_threads(len(ns), train), strict=True)
    assert relative(torch.cat(ys), y) < 1e-9
    for parameters in zip(reference.parameters(), *(model.parameters() for model in models), strict=True):
        expected, *ours = (parameter.grad for parameter in parameters)
        assert relative(sum(ours), expected) < 1e-9
    for expected, ours in zip(reference.buffers(), models[0].buffers(), strict=True):
        assert relative(ours, expected) < 1e-12


def relative(actual, expected):
    return ((actual - expected).abs().max() / expected.abs().max()).item()


class Branches(nn.Module):
    """Two branches, and a norm layer at the end."""

    def __init__(self, where):
        super().__init__()
        self.where = where
        self.a, self.b = (nn.Sequential(nn.Conv2d(3, 4, size), nn.BatchNorm2d(4)) for size in (1, 3))
        self.last = nn.Sequential(nn.Conv2d(4, 3, 1), nn.BatchNorm2d(3))

    def forward(self, x):
        with together() if self.where == "inside" else contextlib.nullcontext():
            a, b = self.a(x), self.b(x)
            return self.last(a[..., 1:-1, 1:-1].relu_() + b)


def ddp_batches(world):
    return [random_batch([(rank + 1, 3, 5, 5) for rank in range(world)], seed=seed) for seed in range(3)]


def train_ddp(rank, world, where, unused):
    net = seeded(lambda: Branches(where))
    comm = Recording(syncbn.world())
    model = DistributedDataParallel(convert_sync_batchnorm(net, comm), find_unused_parameters=unused)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for batch in ddp_batches(world):
        with together() if where == "outside" else contextlib.nullcontext():
            y = model(batch.xs[rank])
            loss = (y * batch.gs[rank][:, :, 1:-1, 1:-1]).sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert [numbers for numbers, _ in comm.calls] == [18, 7, 6, 16] * 3
    return [t.detach() for t in net.state_dict().values()]


@pytest.mark.parametrize("where", ["inside", "outside"])
@pytest.mark.parametrize("world", [2, 3])
def test_under_ddp(gloo, world, where):
    net = seeded(lambda: Branches(None))
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    for batch in ddp_batches(world):
        optimizer.zero_grad()
        y = net(torch.cat(batch.xs))
        (y * torch.cat(batch.gs)[:, :, 1:-1, 1:-1]).sum().div(world).backward()
        optimizer.step()
    for state in gloo(world, train_ddp, where, where == "inside"):
        for ours, expected in zip(state, net.state_dict().values(), strict=True):
            assert_tensor_close(ours, expected)
