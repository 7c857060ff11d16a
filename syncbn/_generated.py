"""Classes that are made from others at run time, and whose instances pickle and copy all the same."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any


class Generated:
    """Marks the generated classes. Their instances pickle by the original class, which can be imported.

    Attributes:
        _original_class: what the class was made from.
        _made_by: the function that made it, and makes it again where a pickle is read.
    """

    _original_class: Any
    _made_by: Callable[[Any], Any]

    def __reduce_ex__(self, protocol: Any) -> Any:
        state: Any = object.__reduce_ex__(self, protocol)[2:]
        return _new, (type(self)._made_by, self._original_class), *state


def _new(made_by: Callable[[Any], Any], original: Any) -> Any:
    cls = made_by(original)
    return cls.__new__(cls)
