"""The activation behind a norm layer becomes the layer's own: one pass over memory for both."""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Iterator
from typing import Any, NamedTuple, TypeAlias

from torch import Tensor, nn

from ._epilogue import Activation, known_activation
from ._generated import Generated
from ._layer import Synchronised
from ._own_forward import OwnForward, catches
from .errors import ConversionError


class Fusion(NamedTuple):
    """A norm layer that has got the activation behind it.

    Attributes:
        norm: dotted path of the layer.
        activation: dotted path of the module whose work it does now.
        function: what it applies.
        residual: whether it does the addition before that, too.
    """

    norm: str
    activation: str
    function: Activation
    residual: bool = False


def fuse_activations(model: nn.Module) -> list[Fusion]:
    """Let each norm layer of ours apply the activation behind it, in place, wherever nothing else changes by that.

    The layer then normalises, adds and activates in one pass over memory (see `sync_batch_norm`). Outputs, gradients
    and running statistics stay what they were, to rounding; parameters, buffers, state_dict and the paths of all
    modules exactly. Issues no collective.

    Fused are the activations that `SyncBatchNorm` takes, in these places:

    - directly behind a norm layer in an nn.Sequential, or in a subclass that has its forward. Sequentials within
      Sequentials count as one, and an nn.Identity between the two as nothing;
    - in the blocks of torchvision's ResNets, together with the addition, and behind the first norm layer of such a net;
    - within timm's BatchNormAct2d: its `act`, where its `drop` does nothing.

    Left as they are: a layer that is in two places of the model, has an activation already or a forward of its own; and
    what has hooks, or a forward put on the object, anywhere between the normalisation and the activation.

    Convert first, and do both on every replica: a fused block calls the norm layer of its shortcut before its own last
    one, not after it. `revert_sync_batchnorm` undoes both.

    Who looks into the model sees a difference. A forward hook on a norm layer gets the activated output; so does who
    calls the members of an nn.Sequential one by one, or takes a part of it. In the activation's place is a module that
    does nothing, and a hook that is put on the `relu` of a ResNet block later is not called. What takes norm layers
    away (torch.nn.utils.fusion, quantisation, torch's own convert_sync_batchnorm) loses the activation: revert first.

    Args:
        model: with layers that were made as `SyncBatchNorm`, or converted.

    Returns:
        What was fused, in the order of the norm layers in the model; nothing the second time.

    Example:
        >>> import syncbn
        >>> model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.LeakyReLU(0.1))
        >>> fuse_activations(syncbn.convert_sync_batchnorm(model))
        [Fusion(norm='1', activation='2', function=Activation(name='leaky_relu', slope=0.1), residual=False)]
        >>> model[2]
        FusedActivation(leaky_relu(0.1), by the norm layer in front)
    """
    paths = Counter(module for _, module in model.named_modules(remove_duplicate=False))
    pairs = [*_pairs_in_sequentials(model, paths), *_pairs_in_resnets(model, paths), *_pairs_in_timm(model, paths)]
    blocks = list(_blocks(model, paths))
    done = []
    for path, norm, activation in pairs:
        function = known_activation(activation.module)
        assert function is not None  # or it were no pair
        norm._activation = function
        activation.parent._modules[activation.name] = FusedActivation(norm, activation.module)
        done.append(Fusion(path, activation.path, function))
    for path, block in blocks:
        names, function = _NORMS[type(block).__name__], known_activation(block.relu)
        assert function is not None
        for name in names:
            getattr(block, name)._activation = function
            done.append(Fusion(_join(path, name), _join(path, "relu"), function, name == names[-1]))
        block.__class__ = _fused_class(block.__class__)
    order = {path: number for number, (path, _) in enumerate(model.named_modules())}
    return sorted(done, key=lambda fusion: order[fusion.norm])


# Where an activation follows a norm layer


class _Place(NamedTuple):
    """A child of a module."""

    parent: nn.Module
    name: str
    path: str

    @property
    def module(self) -> Any:
        return self.parent._modules[self.name]


_Pair: TypeAlias = tuple[str, Any, _Place]  # path of a norm layer, the layer, and the place of its activation


def _join(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name


def is_bare(module: nn.Module) -> bool:
    """Whether a call of this object is its class's forward and nothing else: no hooks, no forward of its own."""
    hooks = module._forward_pre_hooks, module._forward_hooks, module._backward_pre_hooks, module._backward_hooks
    return "forward" not in vars(module) and not any(hooks)


def _takes_activation(norm: Any, paths: Counter[nn.Module]) -> bool:
    return type(norm).forward is Synchronised.forward and _is_free(norm, paths)


def _is_free(norm: Any, paths: Counter[nn.Module]) -> bool:
    """Whether it is a layer of ours that can be given an activation, which nobody else would see."""
    return isinstance(norm, Synchronised) and norm._activation is None and is_bare(norm) and paths[norm] == 1


def _gives_activation(module: nn.Module) -> bool:
    return known_activation(module) is not None and is_bare(module)


def _is_sequential(module: object) -> bool:
    """Whether it is one whose call runs its children one after the other."""
    if not isinstance(module, nn.Sequential) or "forward" in vars(module):
        return False
    cls = type(module)
    return all(getattr(cls, name) is getattr(nn.Sequential, name) for name in ("__call__", "forward", "__iter__"))


def _flattened(path: str, sequential: nn.Module) -> Iterator[_Place]:
    """Yield the places in `sequential` as they are run; a Sequential among them before and after its own."""
    for name, child in sequential._modules.items():
        place = _Place(sequential, name, _join(path, name))
        yield place
        if _is_sequential(child):
            assert child is not None
            yield from _flattened(place.path, child)
            yield place


def _pairs_in_sequentials(model: nn.Module, paths: Counter[nn.Module]) -> Iterator[_Pair]:
    sequentials = {path: module for path, module in model.named_modules() if _is_sequential(module)}
    inner = {child for sequential in sequentials.values() for child in sequential.children()}
    for path, sequential in sequentials.items():
        norm: _Place | None = None  # the last one, while nothing has been done to its output
        for place in _flattened(path, sequential) if sequential not in inner else ():
            module = place.module
            if norm and _gives_activation(module) and paths[place.parent] == 1:
                yield norm.path, norm.module, place
            elif norm and (type(module) is nn.Identity or _is_sequential(module)) and is_bare(module):
                continue
            norm = place if _takes_activation(module, paths) else None


# torchvision's ResNets

_NORMS = {"BasicBlock": ("bn1", "bn2"), "Bottleneck": ("bn1", "bn2", "bn3")}


def _is_torchvisions(module: nn.Module, methods: tuple[str, ...]) -> bool:
    """Whether these methods of it, a ResNet or a block of one, are what torchvision made them."""
    cls = type(module)
    return cls.__module__ == "torchvision.models.resnet" and all(
        name in vars(cls) and vars(cls)[name].__qualname__ == f"{cls.__name__}.{name}" and name not in vars(module)
        for name in methods
    )


def _pairs_in_resnets(model: nn.Module, paths: Counter[nn.Module]) -> Iterator[_Pair]:
    for path, net in model.named_modules():
        if type(net).__name__ == "ResNet" and _is_torchvisions(net, ("forward", "_forward_impl")):
            norm, activation = (_Place(net, name, _join(path, name)) for name in ("bn1", "relu"))
            if _takes_activation(norm.module, paths) and _gives_activation(activation.module):
                yield norm.path, norm.module, activation


def _blocks(model: nn.Module, paths: Counter[nn.Module]) -> Iterator[tuple[str, Any]]:
    for path, module in model.named_modules():
        block: Any = module
        names = _NORMS.get(type(block).__name__)
        if names is None or not _is_torchvisions(block, ("forward",)) or not _gives_activation(block.relu):
            continue
        if all(_takes_activation(getattr(block, name), paths) for name in names):
            yield path, block


# timm's BatchNormAct2d: y = act(drop(norm(x))), where `act` and `drop` are children of the layer


def _pairs_in_timm(model: nn.Module, paths: Counter[nn.Module]) -> Iterator[_Pair]:
    for path, module in model.named_modules():
        if _has_forward_of_timm(module) and _is_free(module, paths):
            act, drop = (_Place(module, name, _join(path, name)) for name in ("act", "drop"))
            if _gives_activation(act.module) and type(drop.module) is nn.Identity and is_bare(drop.module):
                yield path, module, act


def _has_forward_of_timm(module: nn.Module) -> bool:
    """Whether it runs timm's forward, as timm wrote it."""
    original: Any = getattr(module, "_original_class", object)
    return any(
        (base.__module__, base.__name__) == ("timm.layers.norm_act", "BatchNormAct2d")
        and vars(base).get("forward") is original.forward
        and original.forward.__qualname__ == "BatchNormAct2d.forward"
        for base in original.__mro__
    )


class FusedBlock(Generated):
    """Marks the generated classes of blocks whose norm layers add and activate."""


@functools.cache
def _fused_class(original: Any) -> Any:
    """Return the class `Fused<Original>(Original)`, made once."""
    namespace = {
        "__doc__": f"{original.__name__} whose norm layers add and activate.",
        "__module__": __name__,
        "_original_class": original,
        "_made_by": staticmethod(_fused_class),
        "_made_from": (original,),
        "forward": {"BasicBlock": _basic_block, "Bottleneck": _bottleneck}[original.__name__],
    }
    return type(f"Fused{original.__name__}", (FusedBlock, original), namespace)


def _basic_block(self: Any, x: Tensor) -> Tensor:
    y = self.conv2(self.bn1(self.conv1(x)))
    return self.bn2(y, _shortcut(self, x, y))  # type: ignore[no-any-return]


def _bottleneck(self: Any, x: Tensor) -> Tensor:
    y = self.conv2(self.bn1(self.conv1(x)))
    y = self.conv3(self.bn2(y))
    return self.bn3(y, _shortcut(self, x, y))  # type: ignore[no-any-return]


def _shortcut(block: Any, x: Tensor, y: Tensor) -> Tensor:
    """Return what is added to `y`, of its shape and dtype: torchvision adds in place, which brings it to these, too."""
    identity = x if block.downsample is None else block.downsample(x)
    return identity.to(y.dtype).expand_as(y)


# And back


class FusedActivation(nn.Identity):
    """Stands where an activation was that the norm layer in front applies now; remembers both.

    Where that is in the layer's own forward, whose batch_norm is caught in training only, it still activates else.
    """

    def __init__(self, norm: Synchronised, original: nn.Module) -> None:
        super().__init__()
        self.train(original.training)
        self.remembered = (norm, original)  # in a tuple, or nn.Module would register them

    def forward(self, input: Tensor) -> Tensor:
        """Return `input`, activated if it was not yet."""
        norm, original = self.remembered
        if isinstance(norm, OwnForward) and not catches(norm):
            return original(input)  # type: ignore[no-any-return]
        return input

    def extra_repr(self) -> str:
        """Name what the norm layer applies."""
        return f"{self.remembered[0]._activation}, by the norm layer in front"


def fused_norms(model: nn.Module) -> set[nn.Module]:
    """Return the norm layers in `model` from which `undo_fusions` takes the activation.

    Raises:
        ConversionError: something is not as `fuse_activations` left it.
    """
    inside = set(model.modules())
    found: set[nn.Module] = set()
    for module in model.modules():
        norms, original = _fused_in(module)
        for norm in norms:
            if norm not in inside:
                raise ConversionError(
                    f"the norm layer that applies {known_activation(original)} for this {type(module).__name__} is not "
                    "part of what is to be reverted: revert the whole model, or put the layer back"
                )
            if not isinstance(norm, Synchronised) or norm._activation != known_activation(original):
                raise ConversionError(
                    f"{norm} had the activation of {original} when it was fused, and either was changed since: change "
                    "it back, then revert"
                )
        found.update(norms)
    return found


def _fused_in(module: Any) -> tuple[list[nn.Module], nn.Module | None]:
    """Return the norm layers that do the work of this module's activation, and that activation; ([], None) if none."""
    if isinstance(module, FusedActivation):
        norm, original = module.remembered
        if not is_bare(module):
            raise ConversionError(
                f"hooks, or a forward, were put where {original} was and would be lost: take them off, then revert"
            )
        return [norm], original
    if isinstance(module, FusedBlock):
        if "_original_class" not in vars(type(module)):
            raise ConversionError(
                f"{type(module).__name__} was made from a fused block: undo that first (unwrap the model), then revert"
            )
        block: Any = module
        return [getattr(block, name) for name in _NORMS[block._original_class.__name__]], block.relu
    return [], None


def undo_fusions(model: nn.Module, norms: set[nn.Module]) -> None:
    """Give the activations back to the modules that they were taken from; `norms` is what `fused_norms` returned."""
    for norm in norms:
        norm._activation = None  # type: ignore[assignment]
    for module in list(model.modules()):
        for name, child in module._modules.items():
            if isinstance(child, FusedActivation):
                module._modules[name] = child.remembered[1].train(child.training)
        if isinstance(module, FusedBlock):
            module.__class__ = module._original_class
