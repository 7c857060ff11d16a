"""fuse_activations: what is fused and what is not, that nothing else changes, and the way back."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.distributed as dist
import vision
from modules import COPIES, snapshot
from reference import Recording, Unreachable, assert_tensor_close
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import parametrize

from syncbn import SyncBatchNorm, convert_sync_batchnorm, fuse_activations, revert_sync_batchnorm
from syncbn._fusion import FusedActivation, FusedBlock
from syncbn.comm import run_threads
from syncbn.errors import ConversionError


class Derived(nn.Sequential):
    """With the forward of nn.Sequential, like torchvision's Conv2dNormActivation."""


class Skipping(nn.Sequential):
    """With a forward of its own."""

    def forward(self, x):
        return self[1](self[0](x)) + x.mean()


class Backwards(nn.Sequential):
    """Runs in another order."""

    def __iter__(self):
        return reversed(self._modules.values())


class Branches(nn.Module):
    """One activation object in many places, some of them where nobody can tell what comes before."""

    def __init__(self):
        super().__init__()
        self.relu = nn.ReLU()
        self.first = nn.Sequential(nn.Conv2d(3, 4, 1), SyncBatchNorm(4), self.relu)
        self.second = nn.Sequential(nn.Conv2d(3, 4, 1), SyncBatchNorm(4), self.relu)
        self.norm = SyncBatchNorm(4)

    def forward(self, x):
        return self.relu(self.norm(self.first(x) - self.second(x)))


class Doubling(SyncBatchNorm):
    """A layer of ours with a forward of its own."""

    def forward(self, x):
        return 2 * super().forward(x)


class Steep(nn.ReLU):
    """A subclass may do anything."""


class Exponential(nn.Module):
    """A parametrization."""

    def forward(self, x):
        return x.exp()


def plain():
    """The norm layer [0][1] and the activation [2][0], with all between them that can be."""
    first = nn.Sequential(nn.Conv2d(3, 4, 1), SyncBatchNorm(4))
    return nn.Sequential(first, nn.Identity(), nn.Sequential(nn.LeakyReLU(0.2), nn.Conv2d(4, 4, 1)))


def varied():
    """Every kind of place and of activation, and norm layers that stay as they are."""
    torch.manual_seed(0)
    shared = nn.ReLU(inplace=True)
    net = nn.Sequential(
        nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)),
        nn.LeakyReLU(0.1, inplace=True),
        Derived(nn.Conv2d(4, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4), nn.Hardswish()),
        nn.Conv2d(4, 5, 1, bias=False),
        nn.BatchNorm2d(5),
        nn.Sequential(nn.Identity(), nn.Sequential(shared, nn.Conv2d(5, 4, 1))),
        nn.BatchNorm2d(4),
        shared,
        nn.Conv2d(4, 4, 1, bias=False),
        nn.BatchNorm2d(4),
        nn.GELU(),
        nn.BatchNorm2d(4, affine=False),
        nn.SiLU(),
        nn.Conv2d(4, 4, 1, bias=False),
        nn.BatchNorm2d(4, track_running_stats=False),
    ).double()
    for norm in net.modules():
        if isinstance(norm, nn.BatchNorm2d) and norm.affine:
            nn.init.uniform_(norm.weight, 0.5, 1.5)
            nn.init.normal_(norm.bias)
    return net


PLACES = [("0.1", "1"), ("2.1", "2.2"), ("4", "5.1.0"), ("6", "7"), ("11", "12")]
FUNCTIONS = ["leaky_relu(0.1)", "hardswish", "relu", "relu", "silu"]


def fused(model, group=None):
    convert_sync_batchnorm(model, group)
    assert fuse_activations(model)
    return model


def images(count, seed=0):
    return torch.randn(count, 3, 6, 6, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# What is fused


def test_the_report():
    report = fuse_activations(convert_sync_batchnorm(varied()))
    assert [(fusion.norm, fusion.activation) for fusion in report] == PLACES
    assert [str(fusion.function) for fusion in report] == FUNCTIONS
    assert not any(fusion.residual for fusion in report)


def test_each_layer_applies_what_was_behind_it():
    model = varied()
    before = dict(model.named_modules(remove_duplicate=False))
    fused(model)
    after = dict(model.named_modules(remove_duplicate=False))
    assert list(after) == list(before)
    for (norm, place), function in zip(PLACES, FUNCTIONS, strict=True):
        assert str(after[norm].activation) == function
        assert repr(after[place]) == f"FusedActivation({function}, by the norm layer in front)"
    places = {place for _, place in PLACES}
    assert all(after[path] is before[path] for path in before if path not in places)


def test_one_activation_object_in_many_places():
    model = Branches()
    assert [fusion.norm for fusion in fuse_activations(model)] == ["first.1", "second.1"]
    assert type(model.relu) is nn.ReLU
    assert type(model.first[2]) is type(model.second[2]) is FusedActivation


def test_twice_is_once():
    model = fused(varied())
    before = snapshot(model)
    assert fuse_activations(model) == []
    assert snapshot(model) == before


def test_nothing_to_fuse():
    assert fuse_activations(nn.ReLU()) == []
    assert fuse_activations(SyncBatchNorm(3)) == []
    assert fuse_activations(nn.Sequential()) == []


def test_hooks_that_see_no_difference_do_not_hinder():
    model = plain()
    model.register_forward_hook(lambda *_: None)
    model[0][0].register_forward_hook(lambda *_: None)
    model[2][1].register_forward_pre_hook(lambda *_: None)
    assert len(fuse_activations(model)) == 1


# What is left as it is

WITHIN = {"norm": "0.1", "its Sequential": "0", "Identity": "1", "the other Sequential": "2", "activation": "2.0"}
HOOKS = ["forward_pre_hook", "forward_hook", "full_backward_pre_hook", "full_backward_hook"]


def hooked(path, kind):
    return lambda model: getattr(model.get_submodule(path), f"register_{kind}")(lambda *_: None)


def replaced(path):
    def replace(model):
        module = model.get_submodule(path)
        module.forward = type(module).forward.__get__(module)  # as accelerate does

    return replace


def put(path, module):
    parent, _, name = path.rpartition(".")
    return lambda model: setattr(model.get_submodule(parent), name, module())


OBSTACLES = {
    **{f"{kind} on {name}": hooked(path, kind) for name, path in WITHIN.items() for kind in HOOKS},
    **{f"forward of {name} replaced": replaced(path) for name, path in WITHIN.items()},
    "norm in two places": lambda model: model.append(model[0][1]),
    "norm twice in one Sequential": lambda model: model[0].insert(0, model[0][1]),
    "its Sequential in two places": lambda model: model.append(model[0]),
    "the other Sequential in two places": lambda model: model.append(model[2]),
    "another activation": put("2.0", nn.GELU),
    "an activation with a limit": put("2.0", nn.ReLU6),
    "an activation of unknown kind": put("2.0", Steep),
    "no activation": put("2.0", nn.Identity),
    "dropout between": put("1", nn.Dropout),
    "a convolution between": put("1", lambda: nn.Conv2d(4, 4, 1)),
    "an Identity of unknown kind": put("1", type("Own", (nn.Identity,), {})),
    "a norm that is not ours": put("0.1", lambda: nn.BatchNorm2d(4)),
    "a norm with its own forward": put("0.1", lambda: Doubling(4)),
    "a norm that activates": put("0.1", lambda: SyncBatchNorm(4, activation="silu")),
    "a Sequential with its own forward": put("0", lambda: Skipping(nn.Conv2d(3, 4, 1), SyncBatchNorm(4))),
    "a Sequential with its own order": put("0", lambda: Backwards(nn.Conv2d(3, 4, 1), SyncBatchNorm(3))),
    "its Sequential is another module": put("0", lambda: nn.ModuleList([nn.Conv2d(3, 4, 1), SyncBatchNorm(4)])),
}


def test_without_an_obstacle_it_is_fused():
    assert [fusion[:2] for fusion in fuse_activations(plain())] == [("0.1", "2.0")]


@pytest.mark.parametrize("obstacle", OBSTACLES.values(), ids=OBSTACLES)
def test_what_might_change_is_left_as_it_is(obstacle):
    model = plain()
    obstacle(model)
    before = snapshot(model)
    assert fuse_activations(model) == []
    assert snapshot(model) == before


def test_a_norm_before_a_sequential_in_two_places():
    inner = nn.Sequential(nn.ReLU(), nn.Conv2d(4, 4, 1))
    assert fuse_activations(nn.Sequential(SyncBatchNorm(4), inner, SyncBatchNorm(4), inner)) == []


@pytest.mark.parametrize("kind", [Skipping, Backwards])
def test_an_outer_sequential_that_does_something_else(kind):
    assert fuse_activations(kind(SyncBatchNorm(4), nn.ReLU())) == []


def test_an_outer_sequential_whose_forward_was_replaced():
    model = nn.Sequential(SyncBatchNorm(4), nn.ReLU())
    model.forward = lambda x: model[0](x).exp()
    assert fuse_activations(model) == []


# That nothing else changes


def train_on(model, share, steps=2):
    """Return the outputs and input gradients of some steps on a share of the whole batch of 4 images."""
    outcome = []
    for step in range(steps):
        x = images(4, seed=step)[share].requires_grad_()
        y = model(x)
        g = torch.randn((4, *y.shape[1:]), generator=torch.Generator().manual_seed(9), dtype=y.dtype)[share]
        (y * g).sum().backward()
        outcome += [y.detach(), x.grad]
    return outcome


def assert_trains_as_whole_batch(make):
    """Compare two replicas of the converted and fused model with one of the original on the whole batch."""
    whole, *models = [make() for _ in range(3)]  # not in the threads, which share the random numbers
    expected = train_on(whole, slice(None))

    def replica(comm):
        model = fused(models[comm.rank], comm)
        return model, train_on(model, slice(2 * comm.rank, 2 * comm.rank + 2))

    (first, _), (second, _) = results = run_threads(2, replica)
    for got, want in zip(zip(*(outcome for _, outcome in results), strict=True), expected, strict=True):
        assert_tensor_close(torch.cat(got), want, 10)
    for name, parameter in whole.named_parameters():
        total = first.get_parameter(name).grad + second.get_parameter(name).grad
        assert_tensor_close(total, parameter.grad, 50, name)
    assert list(first.state_dict()) == list(whole.state_dict())
    for name, buffer in whole.named_buffers():
        assert_tensor_close(first.get_buffer(name), buffer, 10, name)
        assert torch.equal(first.get_buffer(name), second.get_buffer(name))
    x = images(3, seed=7)
    whole.load_state_dict(first.state_dict())
    assert_tensor_close(first.eval()(x), whole.eval()(x))


def test_two_replicas_train_like_the_whole_batch():
    assert_trains_as_whole_batch(varied)


def test_one_process_trains_as_before():
    whole, model = varied(), fused(varied())
    for got, want in zip(train_on(model, slice(None)), train_on(whole, slice(None)), strict=True):
        assert_tensor_close(got, want, 10)
    for ours, theirs in zip(model.parameters(), whole.parameters(), strict=True):
        assert_tensor_close(ours.grad, theirs.grad, 50)


def test_the_comparison_sees_a_lost_activation():
    """Negative control of the tests above."""

    def lost():
        model = varied()
        model.register_forward_pre_hook(lambda *_: setattr(model[11], "activation", None))
        return model

    with pytest.raises(AssertionError, match="not close"):
        assert_trains_as_whole_batch(lost)


def test_the_collectives_are_the_same():
    def calls(change):
        def replica(comm):
            recording = Recording(comm)
            change(convert_sync_batchnorm(models[comm.rank], recording))
            train_on(models[comm.rank], slice(2 * comm.rank, 2 * comm.rank + 2))
            return recording.calls

        models = [varied(), varied()]
        return run_threads(2, replica)

    assert calls(fuse_activations) == calls(lambda model: None)


def test_fusing_calls_no_peer():
    model = fused(varied(), Unreachable())
    revert_sync_batchnorm(model)


def test_a_forward_hook_on_the_norm_sees_the_activated_output():
    """As the docstring says."""
    model = fused(varied())
    seen = []
    model[4].register_forward_hook(lambda module, args, y: seen.append(y))
    model(images(2))
    assert seen[0].min() == 0


def test_checkpoints_go_both_ways():
    model, other = fused(varied()), varied()
    train_on(model, slice(None))
    other.load_state_dict(model.state_dict(), strict=True)
    x = images(2)
    assert_tensor_close(other.eval()(x), model.eval()(x))
    fused(varied()).load_state_dict(other.state_dict(), strict=True)


# With what else is done to models


@pytest.mark.parametrize("copied", COPIES.values(), ids=COPIES)
def test_copies_are_fused_and_revert(copied):
    model = fused(varied())
    other = copied(model)
    modules = dict(other.named_modules(remove_duplicate=False))
    for norm, place in PLACES:
        assert modules[place].remembered[0] is modules[norm]
    x = images(2)
    assert torch.equal(other(x), model(x))
    revert_sync_batchnorm(other)
    assert [type(m) for m in other.modules()] == [type(m) for m in varied().modules()]
    assert type(model[7]) is FusedActivation


def test_a_traced_model():
    model = fused(varied())
    x = images(2)
    assert torch.equal(torch.fx.symbolic_trace(copy.deepcopy(model))(x), model(x))


@pytest.mark.filterwarnings("ignore")  # torch's own, of nn.functional.batch_norm
def test_a_model_traced_by_jit():
    model = fused(varied()).eval()
    x = images(2)
    assert_tensor_close(torch.jit.trace(model, x)(x), model(x))


def _ddp(rank: int, size: int, backend: str) -> None:
    torch._dynamo.reset()
    whole = varied()
    expected = train_on(whole, slice(None))
    net = DistributedDataParallel(fused(varied()), broadcast_buffers=False)
    run = torch.compile(net, backend=backend, fullgraph=True) if backend else net
    share = slice(2 * rank, 2 * rank + 2)
    for got, want in zip(train_on(run, share), expected, strict=True):
        torch.testing.assert_close(got, want[share], rtol=1e-9, atol=1e-11)
    for ours, theirs in zip(net.module.parameters(), whole.parameters(), strict=True):
        torch.testing.assert_close(ours.grad * size, theirs.grad, rtol=1e-9, atol=1e-10)


def test_ddp(gloo) -> None:
    gloo(2, _ddp, "")


def _compiled(rank: int, size: int, make) -> None:
    torch._dynamo.reset()
    whole, net = make(), fused(make())
    run = torch.compile(net, backend="aot_eager", fullgraph=True)
    share = slice(2 * rank, 2 * rank + 2)
    expected = train_on(whole, slice(None))
    for got, want in zip(train_on(run, share), expected, strict=True):
        torch.testing.assert_close(got, want[share], rtol=1e-9, atol=1e-11)
    for ours, theirs in zip(net.parameters(), whole.parameters(), strict=True):
        total = ours.grad.clone()
        dist.all_reduce(total)
        torch.testing.assert_close(total, theirs.grad, rtol=1e-9, atol=1e-10)


def test_compiled_without_a_graph_break(gloo) -> None:
    gloo(2, _compiled, varied)


def test_converting_a_fused_model_to_another_group():
    model = fused(varied(), "node")
    model.append(nn.BatchNorm2d(4).double())
    convert_sync_batchnorm(model, "world")
    assert {norm.process_group for norm in model.modules() if isinstance(norm, SyncBatchNorm)} == {"world"}
    assert str(model[4].activation) == "relu"
    model.append(nn.SiLU())
    assert [fusion.norm for fusion in fuse_activations(model)] == ["15"]
    assert not any(isinstance(m, SyncBatchNorm | FusedActivation) for m in revert_sync_batchnorm(model).modules())


# And back


def test_revert_is_the_inverse():
    model = varied()
    before = snapshot(model)
    fused(model)
    assert snapshot(model) != before
    assert revert_sync_batchnorm(model) is model
    assert snapshot(model) == before


def test_revert_gives_back_the_activation_of_layers_that_were_made_as_ours():
    model = nn.Sequential(SyncBatchNorm(4), nn.ReLU(), SyncBatchNorm(4, activation="silu"), nn.ReLU())
    before = snapshot(model)
    assert [fusion.norm for fusion in fuse_activations(model)] == ["0"]
    revert_sync_batchnorm(model)
    assert snapshot(model) == before
    assert str(model[2].activation) == "silu"


def test_the_mode_of_the_activation_is_that_of_its_place():
    model = fused(varied().eval())
    assert not model[12].training
    model[12].train()
    assert revert_sync_batchnorm(model)[12].training


HINDRANCES = {
    "a hook in the activation's place": (hooked("7", "forward_hook"), "would be lost: take them off"),
    "a forward in the activation's place": (replaced("7"), "would be lost: take them off"),
    "the activation changed": (lambda model: setattr(model[6], "activation", "silu"), "changed since"),
    "the activation taken off": (lambda model: setattr(model[6], "activation", None), "changed since"),
    "the norm replaced": (put("6", lambda: nn.BatchNorm2d(4)), "not part of what is to be reverted"),
    "the norm reverted": (lambda model: setattr(model[6], "__class__", nn.BatchNorm2d), "changed since"),
    "an activation by hand": (
        lambda model: setattr(model[14], "activation", "relu"),
        "applies relu, which BatchNorm2d cannot",
    ),
    "the place taken out": (lambda model: setattr(model, "7", nn.ReLU()), "applies relu, which BatchNorm2d cannot"),
    "a parametrization": (
        lambda model: parametrize.register_parametrization(model[6], "weight", Exponential()),
        "undo that first",
    ),
}


def test_half_of_a_fusion_is_not_reverted():
    model = fused(varied())
    for part, message in [(model[7:], "not part of what"), (model[:7], "BatchNorm2d cannot"), (model[7], "not part")]:
        with pytest.raises(ConversionError, match=message):
            revert_sync_batchnorm(part)
    revert_sync_batchnorm(model)


# torchvision's ResNets


class BasicBlock(nn.Module):
    """Another library's, of the same name."""

    def __init__(self):
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 1)
        self.bn1, self.bn2, self.relu, self.downsample = SyncBatchNorm(4), SyncBatchNorm(4), nn.ReLU(), None

    def forward(self, x):
        return self.relu(self.bn2(self.conv2(self.bn1(self.conv1(x)))) + x)


def test_a_block_of_another_library():
    assert fuse_activations(BasicBlock()) == []


def resnet(block="BasicBlock", *, stride=1):
    """A small one: the stem, a block with a convolution in its shortcut and one without."""
    models = vision.load("torchvision.models")
    torch.manual_seed(0)
    kind = getattr(models.resnet, block)
    net = models.ResNet(kind, [2, 1, 0, 0], num_classes=3, width_per_group=64)
    net.layer3 = net.layer4 = nn.Identity()
    net.fc = nn.Linear(128 * kind.expansion, 3)
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias)
    return net.double()


BLOCKS = {"BasicBlock": ["bn1", "bn2"], "Bottleneck": ["bn1", "bn2", "bn3"]}


@pytest.mark.parametrize("block", BLOCKS)
def test_the_report_of_a_resnet(block):
    report = fuse_activations(convert_sync_batchnorm(resnet(block)))
    paths = [f"{path}.{norm}" for path in ("layer1.0", "layer1.1", "layer2.0") for norm in BLOCKS[block]]
    assert [fusion.norm for fusion in report] == ["bn1", *paths]
    assert [fusion.activation for fusion in report] == ["relu", *(f"{p.rpartition('.')[0]}.relu" for p in paths)]
    assert [fusion.norm for fusion in report if fusion.residual] == [p for p in paths if p.endswith(BLOCKS[block][-1])]
    assert {str(fusion.function) for fusion in report} == {"relu"}


@pytest.mark.parametrize("block", BLOCKS)
def test_a_resnet_trains_like_the_whole_batch(block):
    assert_trains_as_whole_batch(lambda: resnet(block))


@pytest.mark.parametrize("block", BLOCKS)
def test_a_resnet_reverts(block):
    model = resnet(block)
    before = snapshot(model)
    fused(model)
    assert type(model.layer1[0]).__name__ == f"Fused{block}"
    assert isinstance(model.layer1[0], type(resnet(block).layer1[0]))
    assert fuse_activations(model) == []
    revert_sync_batchnorm(model)
    assert snapshot(model) == before


def test_a_block_alone():
    block = resnet().layer1[0]
    fused(block)
    assert [fusion.activation for fusion in fuse_activations(revert_sync_batchnorm(block))] == []
    convert_sync_batchnorm(block)
    assert [fusion[:2] for fusion in fuse_activations(block)] == [("bn1", "relu"), ("bn2", "relu")]


def test_the_report_is_in_the_order_of_the_model():
    model = nn.ModuleList([resnet().layer1[0], nn.Sequential(SyncBatchNorm(4), nn.ReLU())])
    report = fuse_activations(convert_sync_batchnorm(model))
    assert [fusion.norm for fusion in report] == ["0.bn1", "0.bn2", "1.0"]


@pytest.mark.parametrize("copied", COPIES.values(), ids=COPIES)
def test_copies_of_a_resnet(copied):
    model = fused(resnet("Bottleneck"))
    other = copied(model)
    assert [type(m) for m in other.modules()] == [type(m) for m in model.modules()]
    x = images(2)
    assert torch.equal(other(x), model(x))
    revert_sync_batchnorm(other)
    assert [type(m) for m in other.modules()] == [type(m) for m in resnet("Bottleneck").modules()]


def test_a_traced_resnet():
    model = fused(resnet())
    x = images(2)
    assert torch.equal(torch.fx.symbolic_trace(copy.deepcopy(model))(x), model(x))


@pytest.mark.timeout(120)
def test_a_compiled_resnet(gloo) -> None:
    vision.load("torchvision.models")
    gloo(2, _compiled, resnet, seconds=100)


def test_what_a_block_adds_is_brought_to_shape_and_dtype():
    """As its in-place addition does: under autocast the first of these, where channels differ the second."""
    models = vision.load("torchvision.models")
    torch.manual_seed(0)
    for inputs, x, context in [
        (4, torch.randn(2, 4, 5, 5), torch.autocast("cpu", torch.bfloat16)),
        (1, torch.randn(2, 1, 5, 5), torch.autocast("cpu", enabled=False)),
    ]:
        block = models.resnet.BasicBlock(inputs, 4)
        with context:
            expected = copy.deepcopy(block)(x)
            y = fused(block)(x)
        assert y.dtype == expected.dtype
        assert_tensor_close(y, expected)


def own_class(block):
    block.__class__ = type("BasicBlock", (type(block),), {})


def own_forward_of_its_class(block):
    original = type(block)

    def forward(self, x):
        return original.forward(self, x)

    namespace = {"__module__": original.__module__, "forward": forward}
    block.__class__ = type("BasicBlock", (original,), namespace)


RESNET_OBSTACLES = {
    "hook on bn1": hooked("layer1.0.bn1", "forward_hook"),
    "hook on bn2": hooked("layer1.0.bn2", "forward_pre_hook"),
    "hook on relu": hooked("layer1.0.relu", "forward_hook"),
    "forward of relu replaced": replaced("layer1.0.relu"),
    "forward of the block replaced": replaced("layer1.0"),
    "another activation": put("layer1.0.relu", nn.GELU),
    "a norm that is not ours": put("layer1.0.bn2", lambda: nn.BatchNorm2d(64).double()),
    "a norm that activates": lambda model: setattr(model.layer1[0].bn1, "activation", "silu"),
    "a norm in two places": lambda model: setattr(model, "again", model.layer1[0].bn1),
    "the block in two places": lambda model: setattr(model, "again", model.layer1[0]),
    "a class of its own": lambda model: own_class(model.layer1[0]),
    "a forward of its own": lambda model: own_forward_of_its_class(model.layer1[0]),
}


@pytest.mark.parametrize("obstacle", RESNET_OBSTACLES.values(), ids=RESNET_OBSTACLES)
def test_a_block_that_might_change_is_left_as_it_is(obstacle):
    model = convert_sync_batchnorm(resnet())
    obstacle(model)
    kind, before = type(model.layer1[0]), snapshot(model.layer1[0])
    x = images(2)
    expected = copy.deepcopy(model)(x)
    report = fuse_activations(model)
    assert [fusion.norm for fusion in report] == ["bn1", *(f"layer{i}.bn{j}" for i in ("1.1", "2.0") for j in (1, 2))]
    assert type(model.layer1[0]) is kind
    assert snapshot(model.layer1[0]) == before
    assert_tensor_close(model(x), expected)


STEM_OBSTACLES = {
    "hook on bn1": hooked("bn1", "forward_hook"),
    "hook on relu": hooked("relu", "forward_hook"),
    "another activation": put("relu", nn.GELU),
    "forward replaced": replaced(""),
    "a forward_impl put on the object": lambda model: setattr(model, "_forward_impl", model._forward_impl),
    "a class of its own": lambda model: setattr(model, "__class__", type("ResNet", (type(model),), {})),
    "in two places": lambda model: setattr(model, "again", model.bn1),
}


@pytest.mark.parametrize("obstacle", STEM_OBSTACLES.values(), ids=STEM_OBSTACLES)
def test_a_stem_that_might_change_is_left_as_it_is(obstacle):
    model = convert_sync_batchnorm(resnet())
    obstacle(model)
    report = fuse_activations(model)
    assert [fusion.norm for fusion in report][:2] == ["layer1.0.bn1", "layer1.0.bn2"]
    assert type(model.relu) is not FusedActivation


RESNET_HINDRANCES = {
    "relu replaced": (put("layer1.0.relu", nn.SiLU), "changed since"),
    "bn2 replaced": (put("layer1.0.bn2", lambda: nn.BatchNorm2d(64)), "changed since"),
    "bn1's activation taken off": (lambda model: setattr(model.layer1[0].bn1, "activation", None), "changed since"),
    "another class": (
        lambda model: setattr(model.layer1[0], "__class__", type("FSDP", (type(model.layer1[0]),), {})),
        "FSDP was made from a fused block: undo that first",
    ),
}


ALL_HINDRANCES = {
    f"{make.__name__}: {what}": (make, *hindrance)
    for make, hindrances in ((varied, HINDRANCES), (resnet, RESNET_HINDRANCES))
    for what, hindrance in hindrances.items()
}


@pytest.mark.parametrize(("make", "hinder", "message"), ALL_HINDRANCES.values(), ids=ALL_HINDRANCES)
def test_what_stands_in_the_way_is_an_error_before_anything_changes(make, hinder, message):
    model = fused(make())
    hinder(model)
    before = snapshot(model)
    with pytest.raises(ConversionError, match=message):
        revert_sync_batchnorm(model)
    assert snapshot(model) == before


def test_a_fused_block_refuses_what_the_block_refuses():
    block = vision.load("torchvision.models").resnet.BasicBlock(4, 4, stride=2)
    with pytest.raises(RuntimeError, match="expand"):
        fused(block)(torch.randn(2, 4, 6, 6))
    assert isinstance(block, FusedBlock)
