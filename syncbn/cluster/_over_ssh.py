"""The options of the launchers that reach the other hosts by ssh."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from ._addresses import HostError
from ._command import threads_each
from ._hosts import Hosts, ask_all
from ._options import WAIT, JobOptions, at_least, option, ranks_by_host


@dataclass(frozen=True, kw_only=True)
class OverSsh(JobOptions):
    """Those of mpirun and horovodrun."""

    procs_per_node: int | None = option("ranks to start on this host alone", None, metavar="N", convert=at_least(1))
    hosts: Mapping[str, int] | None = option(
        "the hosts, each with its number of ranks", None, metavar="HOST:N,...", convert=ranks_by_host
    )
    timeout: int = option(WAIT, 300, metavar="SECONDS", convert=at_least(1))

    def ask(self) -> tuple[int, int, Hosts | None]:
        """Return the number of ranks, the threads of each, and what the hosts say, if there are others."""
        if (self.hosts is None) == (self.procs_per_node is None):
            raise HostError("expected either --procs-per-node N, or --hosts HOST:N,..., which says how many each has")
        if self.procs_per_node is not None:
            return self.procs_per_node, threads_each(self.procs_per_node), None
        assert self.hosts is not None
        answer = ask_all(self.hosts, self.timeout, self.interface)
        return sum(self.hosts.values()), answer.threads, answer
