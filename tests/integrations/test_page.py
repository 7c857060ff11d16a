"""docs/integrations.md shows code that was run."""

from __future__ import annotations

from pathlib import Path

import pytest
from integrations.page import code_of, package_of

FILES = [path for path in sorted(Path(__file__).parent.glob("test_*.py")) if path != Path(__file__)]


@pytest.mark.parametrize("file", FILES, ids=package_of)
def test_every_line_of_the_section_stands_in_the_test(file: Path) -> None:
    shown = [line for block in code_of(package_of(file)) for line in block]
    assert shown, f"docs/integrations.md has no code under ## {package_of(file)}"
    tested = [line.strip() for line in file.read_text().splitlines()]
    assert [line for line in shown if line not in tested] == []
