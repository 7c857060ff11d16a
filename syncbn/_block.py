"""`together`: layers whose outputs nobody has used yet wait for each other, and share their collectives.

In a block a layer returns a `Pending`. The first operation that needs its values computes all layers of the group that
wait, and each Pending, the very object, then is the ordinary tensor that the layer would have returned.
"""

from __future__ import annotations

import contextlib
import threading
import weakref
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import Function

from . import _joint, _saved
from ._checks import check, is_traced
from ._joint import Call
from ._pending import UNSEEN, Pending, finish
from ._plain import TYPES
from .comm._groups import communicator
from .errors import InputError

blocks: dict[int, _Block] = {}  # the innermost open one of each thread; a layer looks whether there is any


@contextlib.contextmanager
def together() -> Iterator[None]:
    """Let the layers of ours that are called in this block share collectives, in training.

    A layer waits until its output is needed. Then all that wait are computed, those of one process group and device
    with one all-reduce forward (Σ(2C+1) numbers) and one backward (Σ2C), instead of one each. So do layers that do not
    depend on each other: the branches of an ASPP, the levels of a feature pyramid, the last norm of a residual block
    and that of its shortcut. Outputs, gradients and running statistics are those of the layers called one by one.

    Shape, dtype and device are known at once; every other operation, in-place ones too, the end of the block, and an
    `autograd.Function` need the values. Then the output, the same object, becomes the ordinary tensor.

    The program's order says what is summed together. So it must be the same on every rank: an output that one rank
    alone looks at (a print, a hook) is a collective that the others meet elsewhere.

    A layer does not wait where its input depends on one that waits; in eval; nor under another grad mode, inference
    mode or saved-tensor hooks than those at the beginning of the block: so not in a checkpointed region, unless the
    block is in the region, too; nor with a forward of its own (timm's) or a DTensor. A block in another one is a block
    of its own.

    Running statistics move when the layers are computed. Layers that shared an all-reduce are one node of the
    graph: its backward runs once, when all gradients of its outputs are there, and an output without one counts as if
    it had zeros. Two `backward` through two of them need `retain_graph=True`.

    Raises:
        InputError: at its use, an output is asked for after the block was left by an exception; what a layer was given
            was changed in place, or freed, while it waited; or jit.trace, torch.func, or code that torch does not
            announce (an extension in C++, a checkpoint of its arguments) is given a layer or an output that waits.
            torch.compile refuses both in its own words, and layers in other threads, too, while a block is open.

    Example:
        >>> import syncbn
        >>> first, second = syncbn.SyncBatchNorm(3), syncbn.SyncBatchNorm(5)
        >>> with syncbn.together():
        ...     outputs = first(torch.randn(2, 3, 4)), second(torch.randn(2, 5, 4))
        ...     y = torch.cat(outputs, dim=1)  # both layers are computed here
        >>> y.shape
        torch.Size([2, 8, 4])
    """
    with block():
        yield


@contextlib.contextmanager
def block() -> Iterator[_Block]:
    """Open a block in this thread; close it with all computed, or after an exception with nothing."""
    if torch.compiler.is_compiling():
        raise InputError("syncbn.together() cannot be compiled: open it around the compiled model's eager parts only")
    thread = threading.get_ident()
    outer = blocks.get(thread)
    if outer is not None:
        outer.run()  # the same layer may be called in this block
    inner = _Block()
    _open(thread, inner)
    try:
        yield inner
        inner.run()
    finally:
        inner.batches.clear()
        _open(thread, outer)


_lock = threading.Lock()


def _open(thread: int, block: _Block | None) -> None:
    """Make `block` the innermost one of `thread`. While there is any, autograd.Functions take no tensor that waits.

    torch tells subclasses of every operation but that: the Function would have no edge to what computes the tensor.
    """
    global _theirs
    with _lock:
        before = bool(blocks)
        if block is None:
            blocks.pop(thread, None)
        else:
            blocks[thread] = block
        if blocks and not before:
            _theirs = vars(Function)["apply"]
            Function.apply = classmethod(_apply)  # type: ignore[assignment, method-assign]
        elif before and not blocks:
            Function.apply = _theirs  # type: ignore[method-assign]


# What stood there before the first block was opened. It stays when the last one is closed: another thread may be about
# to call it.
_theirs: Any = vars(Function)["apply"]


def _apply(cls: Any, *args: Any, **kwargs: Any) -> Any:
    """Stand for `Function.apply`."""
    finish(args)
    return _theirs.__get__(None, cls)(*args, **kwargs)


class _Mode(NamedTuple):
    """What autograd does at a place of the program."""

    grad: bool
    inference: bool
    hooks: tuple[Callable[..., Any], Callable[..., Any]] | None
    backward: int
    saved: int  # how many contexts of `saved_statistics`

    @classmethod
    def here(cls) -> _Mode:
        return cls(
            torch.is_grad_enabled(),
            torch.is_inference_mode_enabled(),
            _hooks(),
            torch._C._current_graph_task_id(),
            _saved.depth(),
        )

    @contextlib.contextmanager
    def again(self) -> Iterator[None]:
        """Compute as at that place, which is further out; hooks and contexts of a region within are set aside."""
        if _Mode.here() == self:
            yield
            return
        within = []
        while (hooks := _hooks()) is not None and hooks != self.hooks:
            within.append(hooks)
            torch._C._autograd._pop_saved_tensors_default_hooks()
        try:
            with torch.inference_mode(self.inference), torch.set_grad_enabled(self.grad), _saved.only(self.saved):
                yield
        finally:
            for hooks in reversed(within):
                torch._C._autograd._push_saved_tensors_default_hooks(*hooks)


def _hooks() -> Any:
    return torch._C._autograd._top_saved_tensors_default_hooks(False)


class _Block:
    """What waits, by group and device."""

    def __init__(self) -> None:
        self.mode = _Mode.here()
        self.batches: dict[tuple[str, torch.device], _Batch] = {}

    def run(self) -> None:
        """Compute all that waits."""
        for batch in list(self.batches.values()):
            batch.run()

    def add(self, layer: object, call: Call, group: str) -> Pending:
        """Let a call of `layer` wait."""
        key = group, call.x.device
        batch = self.batches.get(key)
        if batch is None:
            batch = self.batches[key] = _Batch(self, key)
        return batch.add(layer, call)


class _Waiting(NamedTuple):
    """One call that waits, with the versions of its tensors."""

    output: Pending
    layer: object
    call: Call
    versions: list[int | None]


class _Batch:
    """Calls that are computed at once."""

    def __init__(self, block: _Block, key: tuple[str, torch.device]) -> None:
        self._block, self._key = block, key
        self._waiting: list[_Waiting] = []
        self._failed: BaseException | None = None

    def moves(self, running_mean: Tensor) -> bool:
        """Tell whether a call that waits will move these statistics."""
        return any(waiting.call.running.mean is running_mean for waiting in self._waiting)

    def add(self, layer: object, call: Call) -> Pending:
        requires_grad = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in call.tensors)
        output = Pending.like(call.x, self, requires_grad=requires_grad)
        self._waiting.append(_Waiting(output, layer, call, [_version(t) for t in (*call.tensors, call.mask)]))
        return output

    def run(self) -> None:
        """Compute them, and make their outputs what they stand for."""
        if torch._C._are_functorch_transforms_active():
            raise InputError(_FOLLOWED)
        if self._failed is not None:
            raise InputError(
                f"the output of a layer in syncbn.together() has no values: {self._failed}"
            ) from self._failed
        if self._block.batches.get(self._key) is not self:
            raise InputError(
                "the output of a layer in syncbn.together() has no values, as the block was left by an exception "
                "before they were needed: run the model again"
            )
        del self._block.batches[self._key]
        try:
            for waiting in self._waiting:
                _check_unchanged(waiting)
            with self._block.mode.again():
                ys = _joint.sync_batch_norms([waiting.call for waiting in self._waiting], communicator(self._key[0]))
        except BaseException as error:
            self._failed = error
            raise
        for waiting, y in zip(self._waiting, ys, strict=True):
            waiting.output.become(y)


def _version(tensor: Tensor | None) -> int | None:
    return None if tensor is None or tensor.is_inference() else tensor._version


def _check_unchanged(waiting: _Waiting) -> None:
    """Refuse what the single call, at its place, would have seen otherwise; before any collective."""
    tensors = *waiting.call.tensors, waiting.call.mask
    for name, tensor, version in zip(_NAMES, tensors, waiting.versions, strict=True):
        if _version(tensor) != version:
            raise InputError(
                f"{name} of {waiting.layer} was changed in place while the layer waited in syncbn.together(): change "
                "it after the layer's output was used, or call this layer outside of the block"
            )
        if tensor is not None and tensor.numel() and not tensor.untyped_storage().nbytes():
            raise InputError(
                f"the memory of {name} of {waiting.layer} was freed while the layer waited in syncbn.together(), as "
                "FSDP does: open the block inside of the module that is wrapped"
            )
    output: Any = waiting.output
    if weakref.getweakrefs(output) or output._use_count() > 1:
        raise InputError(f"the output of {waiting.layer}, which waits in syncbn.together(), is held by {UNSEEN}")


_NAMES = ("input", "weight", "bias", "residual", "mask")


def settle(running_mean: Tensor | None, *tensors: Tensor | None) -> None:
    """Compute what waits in this thread and will move these running statistics, or is one of `tensors`."""
    if torch.compiler.is_compiling():
        return
    finish(tensors)
    block = blocks.get(threading.get_ident())
    if block is not None and running_mean is not None:
        for batch in list(block.batches.values()):
            if batch.moves(running_mean):
                batch.run()


def wait(layer: object, call: Call, group: str) -> Tensor | None:
    """Let a call of `layer` wait for others, if there is a block in this thread and it may; None if not.

    What cannot be computed is refused here, as `functional.train` does.
    """
    if torch.compiler.is_compiling():
        raise InputError(_FOLLOWED)
    block = blocks.get(threading.get_ident())
    if block is None:
        return None
    tensors = *call.tensors, call.mask
    finish(tensors)
    if is_traced(call.x) or torch._C._are_functorch_transforms_active():
        raise InputError(_FOLLOWED)
    if block.mode != _Mode.here() or any(t is not None and type(t) not in TYPES for t in tensors):
        block.run()  # the order in which running statistics move
        return None
    check(call.x, call.epilogue, call.running.mean, call.running.var, call.mask)
    return block.add(layer, call, group)


_FOLLOWED = (
    "a layer cannot wait in syncbn.together() while torch.compile, torch.jit.trace, torch.func or a dispatch mode "
    "follows its operations: call what is compiled outside of the block, or open no block"
)
