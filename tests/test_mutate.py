"""The mutants that tests/mutate.py draws from, and what is left alone."""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict
from pathlib import Path

import mutate
import pytest
from mutants import Mutant, mutants_of

ROOT = Path(__file__).parents[1]


def changes(source: str) -> set[str]:
    return {m.change for m in mutants_of("x.py", source.encode())}


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("f(a < b)", {"a < b  ->  a <= b", "f(a < b)  ->  pass"}),
        ("f(a < b == c)", {"a < b == c  ->  a <= b == c", "a < b == c  ->  a < b != c", "f(a < b == c)  ->  pass"}),
        ("x = a and b", {"a and b  ->  a or b", "x = a and b  ->  pass"}),
        ("x += 1", {"x += 1  ->  x -= 1", "x += 1  ->  pass", "1  ->  2", "1  ->  0"}),
        ("x = True", {"x = True  ->  pass", "True  ->  False"}),
        ("x: int = y", {"x: int = y  ->  pass"}),
        ("def f():\n    return x", {"return x  ->  return None"}),
        ("if a: pass", {"a  ->  not a"}),
        ("x = b if a else c", {"a  ->  not a", "x = b if a else c  ->  pass"}),
        ("f([x for x in y if z])", {"z  ->  not z", "f([x for x in y if z])  ->  pass"}),
        ("x = -y", {"-y  ->  y", "x = -y  ->  pass"}),
        ("raise InputError(f'{a + b} and {1}')", {"raise InputError(f'{a + b} and {1}')  ->  pass"}),
        ("def f(x: int = 3) -> int | None: pass", {"3  ->  4", "3  ->  2"}),
        ("def f(*, x=None, y=0.5): pass", {"0.5  ->  1.5", "0.5  ->  -0.5"}),
    ],
)
def test_what_is_changed(source: str, expected: set[str]) -> None:
    assert changes(source) == expected


@pytest.mark.parametrize(
    "source",
    [
        '"""A docstring 1 + 2."""',
        "__all__ = ['a']",
        "M = TypeVar('M', bound=int)",
        "import a",
        "x: int | None",
        "def f(x: Literal[1, 2]) -> A | B: pass",
        "logger.debug('%s', a + b)",
        "_log.info(1)",
        "@functools.lru_cache(3)\ndef f(): pass",
        "class A(B, n=1): pass",
        "def f():\n    return",
        "def f():\n    return None",
        "if TYPE_CHECKING:\n    x = 1",
    ],
)
def test_what_is_left_alone(source: str) -> None:
    assert changes(source) == set()


def test_only_the_call_of_a_warning_can_go() -> None:
    assert changes("warnings.warn(f'{a}', stacklevel=2)") == {"warnings.warn(f'{a}', stacklevel=2)  ->  pass"}


def test_the_change_is_made_in_its_place() -> None:
    source = 'é = "ü"; x = (a  -  # why\n     b) * c\n'.encode()
    (swap,) = (m for m in mutants_of("x.py", source) if m.change == "a - b  ->  a + b")
    assert swap.apply(source).decode() == 'é = "ü"; x = ((a + b)) * c\n'
    assert (swap.line, swap.text) == (1, 'é = "ü"; x = (a  -  # why')


def test_every_file_of_the_core_has_tests() -> None:
    files = mutate.core(ROOT)
    assert {"syncbn/functional.py", "syncbn/comm/_groups.py", "syncbn/kernels/_cpu.py"} <= set(files)
    assert all(mutate.modules_of(file, ROOT) for file in files)
    with pytest.raises(SystemExit, match="tell AREAS"):
        mutate.modules_of("syncbn/_new.py", ROOT)


def test_survivors_are_found_again_by_their_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    moved = mutants_of("x.py", b"\n\nx = a + b\n")
    earlier = [
        {**asdict(moved[0]), "start": 0, "line": 1, "state": "survived"},
        {**asdict(moved[1]), "state": "killed"},
        {**asdict(Mutant("x.py", 9, "gone", "1  ->  2", 0, 1, "2")), "state": "survived"},
    ]
    (tmp_path / "earlier.json").write_text(json.dumps({"mutants": earlier}))
    arguments = argparse.Namespace(only_survivors=tmp_path / "earlier.json", files=[])
    assert mutate.draw(moved, arguments) == [moved[0]]
    assert "gone: x.py: gone" in capsys.readouterr().out
