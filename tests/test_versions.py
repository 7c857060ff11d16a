"""launch/test-versions.sh: what it refuses before it makes anything, and the table that it writes."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
from versions import table_of, with_rows

ROOT = Path(__file__).parents[1]
HEAD = "| torch | Python | tests |"
PAGE = (
    f"text\n\n{HEAD}\n|---|---|---|\n| 2.8.0 | 3.10 | 1 failed |\n| 2.15.0 | 3.13 | 5 passed |\n\n| another | one |\n"
)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["2.8"], "expected a RELEASE as 2.8.0:3.10, got '2.8'"),
        (["2.8.0:3.10", "latest:3.13"], "got 'latest:3.13'"),
        (["--mpi", "4.1.2:impi==2021.19"], "expected a RELEASE as 4.1.2:mpich==5.0.2"),
        (["--table"], "expected --table FILE with a file that is there, got ''"),
        (["--table", "nowhere.md"], "got 'nowhere.md'"),
        (["--keeps"], "unknown option --keeps"),
    ],
)
def test_bad_arguments(tmp_path: Path, arguments: list[str], message: str) -> None:
    command = ["env", f"SYNCBN_VERSIONS_FOLDER={tmp_path}/made", "bash", "launch/test-versions.sh", *arguments]
    done = subprocess.run(command, check=False, cwd=ROOT, text=True, capture_output=True, timeout=30)
    assert done.returncode == 2
    assert message in done.stderr
    assert not (tmp_path / "made").exists()


def test_a_row_takes_the_place_of_that_of_the_same_releases() -> None:
    written = with_rows(PAGE, HEAD, ["| 2.8.0 | 3.10 | 5 passed |", "| 2.8.0 | 3.12 | 5 passed |"])
    rows = ["| 2.8.0 | 3.10 | 5 passed |", "| 2.8.0 | 3.12 | 5 passed |", "| 2.15.0 | 3.13 | 5 passed |"]
    assert written == PAGE.replace("| 2.8.0 | 3.10 | 1 failed |\n| 2.15.0 | 3.13 | 5 passed |", "\n".join(rows))


def test_the_numbers_of_a_release_are_numbers() -> None:
    rows = ["| 2.10.0 | 3.9 |", "| 2.8.0+cu128 | 3.10 |", "| 2.8.0+cu128 | 3.9 |", "| 2.8.0 | 3.9 |"]
    assert table_of("| a | b |", rows).splitlines()[2:] == [rows[3], rows[2], rows[1], rows[0]]


def test_a_page_without_the_table() -> None:
    with pytest.raises(ValueError, match="expected a table with the head"):
        with_rows("no table", HEAD, [])
