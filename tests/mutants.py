"""What tests/mutate.py can change in a Python file: an operator, constant, condition, result or statement at a time."""

from __future__ import annotations

import ast
import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

SWAPS: dict[type[ast.AST], type[ast.AST]] = {
    ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE, ast.GtE: ast.Gt, ast.Eq: ast.NotEq, ast.NotEq: ast.Eq,
    ast.Is: ast.IsNot, ast.IsNot: ast.Is, ast.In: ast.NotIn, ast.NotIn: ast.In, ast.And: ast.Or, ast.Or: ast.And,
    ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Div, ast.Div: ast.Mult, ast.FloorDiv: ast.Div, ast.Mod: ast.Mult,
    ast.Pow: ast.Mult, ast.MatMult: ast.Mult, ast.LShift: ast.RShift, ast.RShift: ast.LShift, ast.BitAnd: ast.BitOr,
    ast.BitOr: ast.BitAnd, ast.BitXor: ast.BitOr,
}  # fmt: skip


@dataclass(frozen=True)
class Mutant:
    """One change: `replacement` for the bytes `start` to `end` of `file`."""

    file: str
    line: int
    text: str
    change: str
    start: int
    end: int
    replacement: str

    def key(self) -> tuple[str, str, str]:
        """What it is called in another version of the tree."""
        return self.file, self.text, self.change

    def apply(self, source: bytes) -> bytes:
        return source[: self.start] + self.replacement.encode() + source[self.end :]


def mutants_of(file: str, source: bytes) -> list[Mutant]:
    """Return every mutant of a file, in the order of its lines."""
    lines = source.splitlines(keepends=True)
    starts = [0]
    for line in lines:
        starts.append(starts[-1] + len(line))
    original = ast.dump(ast.parse(source))
    found = []
    for node, new in changes(ast.parse(source)):
        start, end = (starts[line - 1] + column for line, column in _span(node))
        statement = isinstance(new, ast.stmt)
        change = f"{_one_line(node)}  ->  {_one_line(new)}"
        replacement = ast.unparse(new) if statement else f"({ast.unparse(new)})"
        text = lines[node.lineno - 1].decode().strip()
        mutant = Mutant(file, node.lineno, text, change, start, end, replacement)
        try:
            mutated = ast.dump(ast.parse(mutant.apply(source)))
        except SyntaxError:
            continue
        if mutated != original:
            found.append(mutant)
    return sorted(found, key=lambda m: (m.start, m.end, m.change))


def _span(node: Any) -> tuple[tuple[int, int], tuple[int, int]]:
    return (node.lineno, node.col_offset), (node.end_lineno, node.end_col_offset)


def _one_line(node: ast.AST) -> str:
    return " ".join(ast.unparse(node).split())


def changes(node: ast.AST) -> Iterator[tuple[Any, Any]]:
    """Yield (node, what to put in its place) for `node` and all below it."""
    if _is_left_alone(node):
        return
    yield from _changes_of(node)
    for child in _children(node):
        yield from changes(child)


def _is_left_alone(node: ast.AST) -> bool:
    """Tell what is not behaviour that a test should pin: texts, logging, annotations, imports."""
    if isinstance(node, (ast.JoinedStr, ast.Import, ast.ImportFrom)):
        return True
    if isinstance(node, ast.Assign):
        names = {target.id for target in node.targets if isinstance(target, ast.Name)}
        return "__all__" in names or _callee(node.value) == "TypeVar"
    if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
        return True
    if isinstance(node, ast.Expr):
        return isinstance(node.value, ast.Constant) or "log" in _callee(node.value).partition(".")[0].lower()
    return isinstance(node, ast.Call) and _callee(node).endswith("Error")


def _callee(node: ast.AST) -> str:
    return ast.unparse(node.func) if isinstance(node, ast.Call) else ""


def _children(node: ast.AST) -> Iterator[ast.AST]:
    if isinstance(node, ast.Raise) or _callee(node) == "warnings.warn":
        return  # the text of a message
    if isinstance(node, ast.arguments):
        yield from (default for default in [*node.defaults, *node.kw_defaults] if default is not None)
        return
    skipped = {"annotation", "returns", "decorator_list", "bases", "keywords" if isinstance(node, ast.ClassDef) else ""}
    for name, value in ast.iter_fields(node):
        if name not in skipped:
            yield from (v for v in (value if isinstance(value, list) else [value]) if isinstance(v, ast.AST))


def _changes_of(node: Any) -> Iterator[tuple[Any, Any]]:
    if isinstance(node, ast.Constant) and not isinstance(node.value, (str, bytes, complex)):
        yield from ((node, ast.Constant(value)) for value in _other_values(node.value))
    elif isinstance(node, ast.Compare):
        for i, op in enumerate(node.ops):
            yield node, _with(node, lambda new, i=i, op=op: new.ops.__setitem__(i, SWAPS[type(op)]()))
    elif isinstance(node, (ast.BinOp, ast.BoolOp, ast.AugAssign)) and type(node.op) in SWAPS:
        yield node, _with(node, lambda new: setattr(new, "op", SWAPS[type(node.op)]()))
    elif isinstance(node, ast.UnaryOp):
        yield node, node.operand
    elif isinstance(node, ast.Return) and not (node.value is None or _is_none(node.value)):
        yield node, ast.Return(ast.Constant(None))
    if isinstance(node, (ast.If, ast.While, ast.IfExp, ast.Assert)):
        yield node.test, ast.UnaryOp(ast.Not(), node.test)
    if isinstance(node, ast.comprehension):
        yield from ((test, ast.UnaryOp(ast.Not(), test)) for test in node.ifs)
    if _is_removable(node):
        yield node, ast.Pass()


def _with(node: ast.AST, edit: Callable[[Any], object]) -> ast.AST:
    new = copy.deepcopy(node)
    edit(new)
    return new


def _other_values(value: object) -> list[object]:
    if isinstance(value, bool):
        return [not value]
    return [value + 1, value - 1] if isinstance(value, (int, float)) else []


def _is_none(node: ast.AST) -> bool:
    return isinstance(node, ast.Constant) and node.value is None


def _is_removable(node: ast.AST) -> bool:
    if isinstance(node, ast.Expr):
        return isinstance(node.value, (ast.Call, ast.Await))
    if isinstance(node, ast.AnnAssign):
        return node.value is not None
    return isinstance(node, (ast.Raise, ast.Assign, ast.AugAssign, ast.Delete))
