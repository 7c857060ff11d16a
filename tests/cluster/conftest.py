"""Fixtures: hosts in namespaces, and jobs over several of them by the project's launch scripts."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path

import pytest
from cluster.lab import Host, lab, missing_tool

LAUNCHERS = ("torchrun", "mpirun", "horovodrun")


@pytest.fixture
def hosts(tmp_path: Path) -> Iterator[Callable[..., list[Host]]]:
    """`hosts(count, own_name=…)`: node1 ... node<count>, which end with the test. See `lab`."""
    reason = missing_tool()
    if reason is not None:
        pytest.skip(f"no hosts in namespaces: {reason}")
    with ExitStack() as stack:
        yield lambda count, **kwargs: stack.enter_context(lab(count, tmp_path / "lab", **kwargs))


class Launched:
    """A job over several hosts: one command, or, with torchrun, the same on each."""

    def __init__(self, launcher: str, on: Sequence[Host], script: Sequence[str], options: Sequence[str], seconds: int):
        if launcher == "torchrun":
            place = ["--nodes", str(len(on)), "--procs-per-node", "2", "--master", on[0].name]
        else:
            place = ["--hosts", ",".join(f"{host.name}:2" for host in on)]
        # timeout -k: a torchrun that is cut off is deaf to SIGTERM.
        limit = ["timeout", "-k", "5", str(seconds)]
        command = [*limit, "bash", f"launch/{launcher}.sh", *place, *options, "--", *script]
        self.hosts = on
        self.seconds = seconds
        self.jobs = [host.start(*command) for host in (on if launcher == "torchrun" else on[:1])]

    @property
    def stdout(self) -> str:
        """What was written so far, on all hosts."""
        return "".join(job.stdout for job in self.jobs)

    def wait_for(self, texts: Sequence[str], seconds: float = 60) -> None:
        """Wait until all of `texts` were written, by whichever host."""
        deadline = time.monotonic() + seconds
        while not all(text in self.stdout for text in texts):
            ended = [job.returncode for job in self.jobs if job.returncode is not None]
            if len(ended) == len(self.jobs) or time.monotonic() > deadline:
                pytest.fail(f"not all of {texts} were written:\n{self.stdout}", pytrace=False)
            time.sleep(0.05)

    def end(self) -> list[int]:
        """Wait until nothing of it is left on any host, and return the exit statuses."""
        deadline = time.monotonic() + self.seconds + 10
        for job in self.jobs:
            job.wait(deadline - time.monotonic())
        for host in self.hosts:
            host.wait_until_empty(deadline - time.monotonic())
        return [job.process.returncode for job in self.jobs]


@pytest.fixture(params=LAUNCHERS)
def launcher(request: pytest.FixtureRequest) -> str:
    """Each launcher by name."""
    return str(request.param)


@pytest.fixture
def launch() -> Callable[..., Launched]:
    """`launch(launcher, hosts, *script, options=…, seconds=…)`: start a job of 2 ranks on each host."""

    def start(
        launcher: str, on: Sequence[Host], *script: object, options: Sequence[str] = (), seconds: int = 60
    ) -> Launched:
        return Launched(launcher, on, [str(word) for word in script], options, seconds)

    return start
