"""Fixtures: hosts in namespaces, for jobs over several of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
from cluster.lab import Host, lab, missing_tool


@pytest.fixture
def hosts(tmp_path: Path) -> Iterator[Callable[..., list[Host]]]:
    """`hosts(count, own_name=…)`: node1 ... node<count>, which end with the test. See `lab`."""
    reason = missing_tool()
    if reason is not None:
        pytest.skip(f"no hosts in namespaces: {reason}")
    with ExitStack() as stack:
        yield lambda count, **kwargs: stack.enter_context(lab(count, tmp_path / "lab", **kwargs))
