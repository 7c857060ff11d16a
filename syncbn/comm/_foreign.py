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
        self.before: Callable[[Tensor, Place], None] | None = None
        self.begin((0, 0))

    def begin(self, world: tuple[int, int]) -> None:
        """Forget a world of another rank or size."""
        self.world = world  # rank and size
        self.calls: dict[int, int] = {}
        self.verdicts = Verdicts()
        self.reason = ""  # why it is broken


class Foreign(Carrying):
    """Does for a user's communicator what ours do by themselves: names calls in errors, and compares them."""

    def __init__(self, comm: Communicator, memory: Memory) -> None:
        super().__init__(comm.rank, comm.size)
        self.comm = comm
        self.transport = type(comm).__name__
        if memory.world != (self.rank, self.size):
            memory.begin((self.rank, self.size))
        if memory.reason:
            self.state, self._reason = "broken", memory.reason
        self._memory = memory
        self._calls, self._verdicts, self.before = memory.calls, memory.verdicts, memory.before

    def fail(self, reason: str, *, peers_know: bool = False) -> None:
        """Break, for all later uses of the user's communicator."""
        super().fail(reason, peers_know=peers_know)
        self._memory.reason = reason

    def tell(self, before: Callable[[Tensor, Place], None] | None) -> None:
        """Have `before(x, place)` called before each sum, whichever object of this class is asked for it."""
        self.before = self._memory.before = before

    def _add(self, x: Tensor) -> Tensor:
        return self.comm.all_reduce(x)
