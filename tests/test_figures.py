"""The drawn figures of docs/how-it-works.md are those of docs/figures.py, and the house is the one that is imported."""

import importlib.util
from pathlib import Path

import pytest
from test_architecture import SOURCES, own_imports

DOCS = Path(__file__).parents[1] / "docs"
spec = importlib.util.spec_from_file_location("figures", DOCS / "figures.py")
figures = importlib.util.module_from_spec(spec)
spec.loader.exec_module(figures)

# Who lives on each floor of the house, modules or whole packages, from the roof down.
FLOORS = [
    {"cli", "__main__"},
    {"cluster"},
    {"", "_alike", "_buckets", "_in_sync", "_launcher", "_optimizer_state", "_parallel", "_population", "_together"}
    | {"_uneven"},
    {"_conversion_report", "_convert", "_fusion", "_name_layers", "_own_forward", "_synchronised_class"}
    | {"_torch_conversion"},
    {"_layer"},
    {"functional"},
    {"_autograd", "_block", "_joint", "_operators", "_pending"},
    {"_checks", "_dtensor", "_names", "_recomputation", "_saved"},
    {"comm"},
    {"kernels"},
    {"_epilogue", "_mask", "_statistics"},
    {"errors", "_compiled", "_generated", "_plain", "cluster._addresses"},
]
HEIGHT = {module: -n for n, floor in enumerate(FLOORS) for module in floor}


def height(module):
    """How high the module's room is: its own, or that of its package."""
    return HEIGHT[module] if module in HEIGHT else HEIGHT[module.partition(".")[0]]


def upstairs(name, source):
    """What a module imports from a floor above its own."""
    return {module for module in own_imports(name, source) if height(module) > height(name)}


@pytest.mark.parametrize("name", figures.drawn())
def test_the_files_are_what_is_drawn(name):
    """After a change: python docs/figures.py."""
    assert DOCS.joinpath("images", name).read_text(encoding="utf-8") == figures.drawn()[name]


@pytest.mark.parametrize("name", SOURCES)
def test_nobody_looks_upstairs(name):
    assert not upstairs(name, SOURCES[name])


def test_who_does_is_seen():
    """Negative control."""
    assert upstairs("comm._mpi", "from syncbn._layer import SyncBatchNorm") == {"_layer"}


def test_the_floors_are_those_that_are_drawn():
    assert len(FLOORS) == len(figures.FLOORS)
    assert set(HEIGHT) <= set(SOURCES) | {name.partition(".")[0] for name in SOURCES}
