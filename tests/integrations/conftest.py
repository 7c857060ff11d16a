"""What the tests of the integrations share: the comparison, its negative control, and the table of results.

A file `test_<package>.py` tests one package, and the section `## <package>` of docs/integrations.md shows the lines
that a user adds: every line of its code stands in the test file too, so what is shown was run.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
from integrations.comparison import with_local_statistics
from integrations.page import code_of, package_of

BOUND = 1e-9  # of the relative difference to one process with the whole batch, in float64
SECONDS = 120  # importing a large package takes long on a machine that others use, too
TABLE = ["| package | version | lines | tested | largest relative difference | result |", "|---|---|---|---|---|---|"]
_rows = pytest.StashKey[list[str]]()
_found = pytest.StashKey[float]()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--table", type=Path, help="write the results into the table of this file, if all passed")


def pytest_configure(config: pytest.Config) -> None:
    config.stash[_rows] = []
    config.addinivalue_line("filterwarnings", "default")  # other packages warn of each other


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        item.add_marker(pytest.mark.timeout(3 * SECONDS))


@pytest.fixture
def note(request: pytest.FixtureRequest) -> Callable[[float], None]:
    """`note(difference)`: for the table."""
    return lambda difference: request.node.stash.__setitem__(_found, difference)


@pytest.fixture
def agrees(gloo: Callable[..., list[Any]], note: Callable[[float], None]) -> Callable[..., None]:
    """`agrees(job, *args)`: `job(rank, size, *args)`, on two processes, returns a difference that is small.

    With `control`, the same job differs where the layers keep their local statistics.
    """

    def run(job: Callable[..., float], *args: Any, control: bool = True) -> None:
        found = max(gloo(2, job, *args, seconds=SECONDS))
        note(found)
        assert found <= BOUND
        if control:
            assert max(gloo(2, with_local_statistics, job, *args, seconds=SECONDS)) > 1e3 * BOUND

    return run


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> Any:
    report = yield
    if report.when == "call" and "note" in getattr(item, "fixturenames", ()):
        found = item.stash.get(_found, None)
        difference = "" if found is None else f"{found:.0e}"
        package = package_of(item.path)
        tested = item.name.removeprefix("test_").replace("[_", "[").replace("_", " ")
        lines = len(next(iter(code_of(package)), []))
        cells = [package, metadata.version(package), str(lines), tested, difference, report.outcome]
        item.config.stash[_rows].append(f"| {' | '.join(cells)} |")
    return report


def pytest_terminal_summary(terminalreporter: Any, exitstatus: int, config: pytest.Config) -> None:
    table = "\n".join([*TABLE, *config.stash[_rows]])
    terminalreporter.write_line(table)
    page: Path | None = config.getoption("--table")
    if page is not None and exitstatus == pytest.ExitCode.OK:
        head = re.escape(TABLE[0])
        page.write_text(re.sub(rf"{head}\n(\|.*\n)*", lambda _: table + "\n", page.read_text()))
