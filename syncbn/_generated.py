"""Classes that are made from others at run time, and whose instances pickle and copy all the same."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any


class Generated:
    """Marks the generated classes. Their instances pickle by the original class, which can be imported.

    Attributes:
        _original_class: what the class was made from.
        _made_by: the function that made it, and makes it again where a pickle is read.
        _made_from: what that function was given.
    """

    _original_class: Any
    _made_by: Callable[..., Any]
    _made_from: tuple[Any, ...]

    def __reduce_ex__(self, protocol: Any) -> Any:
        state: Any = object.__reduce_ex__(self, protocol)[2:]
        return _new, (type(self)._made_by, *self._made_from), *state


def _new(made_by: Callable[..., Any], *made_from: Any) -> Any:
    cls = made_by(*made_from)
    return cls.__new__(cls)
