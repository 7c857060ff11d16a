"""A communicator that a user wrote, which knows `all_reduce(x)` and no more, as one of ours."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from ._carried import Carrying, Verdicts
from ._place import Place
from ._protocol import Communicator


class Memory:
    """What is kept of a user's communicator between two uses: it is not kept itself."""

    def __init__(self) -> None:
        self.calls: dict[int, int] = {}
        self.verdicts = Verdicts()
        self.before: Callable[[Tensor, Place], None] | None = None


class Foreign(Carrying):
    """Does for a user's communicator what ours do by themselves: names calls in errors, and compares them."""

    def __init__(self, comm: Communicator, memory: Memory) -> None:
        super().__init__(comm.rank, comm.size)
        self.comm = comm
        self.transport = type(comm).__name__
        self._memory = memory
        self._calls, self._verdicts, self.before = memory.calls, memory.verdicts, memory.before

    def tell(self, before: Callable[[Tensor, Place], None] | None) -> None:
        """Have `before(x, place)` called before each sum, whichever object of this class is asked for it."""
        self.before = self._memory.before = before

    def _add(self, x: Tensor) -> Tensor:
        return self.comm.all_reduce(x)
