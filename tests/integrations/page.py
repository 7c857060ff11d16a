"""docs/integrations.md: what it shows of a package."""

from __future__ import annotations

import re
from pathlib import Path

PAGE = Path(__file__).parents[2] / "docs/integrations.md"


def package_of(test_file: Path) -> str:
    return test_file.stem.removeprefix("test_").replace("_", "-")


def code_of(package: str) -> list[list[str]]:
    """Return the blocks of code in the section of this package, their lines stripped; the first is what a user adds."""
    section = re.search(rf"^## {package}\n(.*?)(?=^## |\Z)", PAGE.read_text(), re.MULTILINE | re.DOTALL)
    if section is None:
        return []
    blocks = re.findall(r"^```python\n(.*?)^```", section[1], re.MULTILINE | re.DOTALL)
    return [[line.strip() for line in block.splitlines() if line.strip()] for block in blocks]
