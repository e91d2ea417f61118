"""Small changes of a source file, one at a time.

Comparisons, arithmetic, numbers, truth values, `min` for `max`, methods left out, results and
statements left out. No strings: what a message says is for its reader. A mutation of what raises,
warns or annotates is none of the program's behaviour either, except that it no longer does.
"""

from __future__ import annotations

import ast
import copy
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from types import CodeType
from typing import Any

_OPERATORS: dict[type[ast.AST], tuple[type[ast.AST], ...]] = {
    ast.Lt: (ast.LtE, ast.GtE),
    ast.LtE: (ast.Lt, ast.Gt),
    ast.Gt: (ast.GtE, ast.LtE),
    ast.GtE: (ast.Gt, ast.Lt),
    ast.Eq: (ast.NotEq,),
    ast.NotEq: (ast.Eq,),
    ast.Is: (ast.IsNot,),
    ast.IsNot: (ast.Is,),
    ast.In: (ast.NotIn,),
    ast.NotIn: (ast.In,),
    ast.And: (ast.Or,),
    ast.Or: (ast.And,),
    ast.Add: (ast.Sub,),
    ast.Sub: (ast.Add,),
    ast.Mult: (ast.Div,),
    ast.Div: (ast.Mult,),
    ast.FloorDiv: (ast.Mult,),
    ast.Mod: (ast.Mult,),
    ast.Pow: (ast.Mult,),
    ast.BitAnd: (ast.BitOr,),
    ast.BitOr: (ast.BitAnd,),
}
_PAIRS = (("min", "max"), ("minimum", "maximum"), ("clamp_min", "clamp_max"), ("amin", "amax"),
          ("any", "all"), ("zeros_like", "ones_like"))  # fmt: skip
_NAMES = {a: b for pair in _PAIRS for a, b in (pair, pair[::-1])}
_SILENT = {"detach", "contiguous"}  # methods that change no number
_SKIPPED = {"annotation", "returns", "decorator_list", "type_params", "ctx", "op", "ops"}
_KEYWORDS = {"strict", "stacklevel"}  # of a second check, and of a message
_TESTS = (ast.If, ast.IfExp, ast.While, ast.BoolOp, ast.comprehension)


@dataclass(frozen=True)
class Mutant:
    """One change.

    Attributes:
        name: the function, and the statement with `[what was⇒what is]`; unique in a file.
        lines: of the statement, from the first to the last.
        code: compiles the whole file with it.
    """

    name: str
    lines: tuple[int, int]
    code: Callable[[str], CodeType]


def mutants(source: str) -> Iterator[Mutant]:
    """All of a source file, in its order."""
    seen: Counter[str] = Counter()
    tree = ast.parse(source)
    for scope, statement, parent, field, index, node in _places(tree, "", None):
        before = _head(statement)
        for new in _changed(node, parent, field):
            _put(parent, field, index, new)
            after = _head(new if node is statement else statement)
            name = f"{scope or 'module'}: {_difference(before, after)}"
            seen[name] += 1
            if seen[name] > 1:
                name += f" #{seen[name]}"
            _put(parent, field, index, node)
            change = partial(_compiled, tree, (parent, field, index, new))
            yield Mutant(name, _lines(statement), change)


def _compiled(tree: ast.Module, change: tuple[Any, ...], path: str) -> CodeType:
    """Where the change is made for good: in a process of its own."""
    _put(*change)
    return compile(ast.fix_missing_locations(tree), path, "exec")


def _lines(statement: ast.stmt) -> tuple[int, int]:
    """Without what is indented below it."""
    body = getattr(statement, "body", None)
    end = body[0].lineno - 1 if body else statement.end_lineno
    return statement.lineno, max(statement.lineno, end or 0)


def _places(node: ast.AST, scope: str, statement: ast.stmt | None) -> Iterator[tuple]:
    """Every node that may be changed, with the function and the statement that it is in."""
    if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
        scope = f"{scope}.{node.name}".lstrip(".")
    for field, value in ast.iter_fields(node):
        if field in _SKIPPED:
            continue
        for index, child in enumerate(value if isinstance(value, list) else [value]):
            own = child if isinstance(child, ast.stmt) else statement
            if not isinstance(child, ast.AST) or isinstance(child, (ast.JoinedStr, ast.Import)):
                continue
            if isinstance(child, ast.keyword) and child.arg in _KEYWORDS:
                continue
            if "abstractmethod" in map(ast.unparse, getattr(child, "decorator_list", ())):
                continue
            if any("Enum" in ast.unparse(base) for base in getattr(child, "bases", ())):
                continue
            yield scope, own, node, field, index if isinstance(value, list) else None, child
            silent = isinstance(child, ast.Raise) or "warn" in ast.unparse(child).split("(")[0]
            negative = isinstance(child, ast.UnaryOp) and isinstance(child.operand, ast.Constant)
            if not (silent and isinstance(child, (ast.Raise, ast.Expr))) and not negative:
                yield from _places(child, scope, own)


def _changed(node: ast.AST, parent: ast.AST, field: str) -> Iterator[ast.AST]:
    """What may stand in a node's place."""
    if isinstance(node, (ast.BinOp, ast.AugAssign, ast.BoolOp)):
        for other in _OPERATORS.get(type(node.op), ()):
            yield _with(node, op=other())
    if isinstance(node, ast.Compare):
        for i, op in enumerate(node.ops):
            for other in _OPERATORS[type(op)]:
                yield _with(node, ops=[*node.ops[:i], other(), *node.ops[i + 1 :]])
    if isinstance(node, ast.UnaryOp):
        if isinstance(node.operand, ast.Constant):  # -1 for the last: 1 is often the same
            yield from (_with(node, operand=new) for new in _number(node.operand))
        else:
            yield node.operand
    if isinstance(node, ast.Constant):
        yield from _number(node)
    truth = isinstance(parent, _TESTS) and field in ("test", "values", "ifs")
    if truth and not isinstance(node, (ast.Compare, ast.BoolOp, ast.UnaryOp)):
        yield ast.UnaryOp(ast.Not(), node)
    if isinstance(node, ast.Name) and node.id in _NAMES and isinstance(node.ctx, ast.Load):
        yield _with(node, id=_NAMES[node.id])
    if isinstance(node, ast.Attribute) and node.attr in _NAMES:
        yield _with(node, attr=_NAMES[node.attr])
    if isinstance(node, ast.Attribute) and node.attr == "mT":
        yield node.value
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and not node.args:
        owned = isinstance(node.func.value, ast.Call) and ast.unparse(node.func.value) == "super()"
        if node.func.attr not in _SILENT and not owned:
            yield node.func.value
    if (
        isinstance(node, ast.Return)
        and node.value
        and ast.unparse(node.value) not in ("None", "False")
    ):
        yield _with(node, value=ast.Constant(None))
    if _left_out(node):
        yield ast.copy_location(ast.Pass(), node)


def _number(node: ast.Constant) -> Iterator[ast.Constant]:
    if isinstance(node.value, bool):
        yield _with(node, value=not node.value)
    elif isinstance(node.value, int):
        yield _with(node, value=node.value + 1)
    elif isinstance(node.value, float):
        yield _with(node, value=2 * node.value if node.value else 1.0)


def _left_out(node: ast.AST) -> bool:
    """Whether it can be without this statement, and would not fail for want of a name."""
    if isinstance(node, ast.Assign):
        names = [n for n in ast.walk(node) if isinstance(n, ast.Name)]
        made, used = ({n.id for n in names if isinstance(n.ctx, c)} for c in (ast.Store, ast.Load))
        return made <= used
    called = isinstance(node, ast.Expr) and not isinstance(node.value, (ast.Constant, ast.Yield))
    return called or isinstance(node, (ast.AugAssign, ast.Raise, ast.Continue, ast.Break))


def _with(node: ast.AST, **fields: object) -> ast.AST:
    """A copy that differs."""
    new = copy.copy(node)
    for name, value in fields.items():
        setattr(new, name, value)
    return new


def _put(parent: ast.AST, field: str, index: int | None, node: ast.AST) -> None:
    if index is None:
        setattr(parent, field, node)
    else:
        getattr(parent, field)[index] = node


def _head(statement: ast.AST) -> str:
    """A statement without what is indented below it."""
    parts = {name: [] for name in ("body", "orelse", "finalbody", "handlers", "decorator_list")}
    own = {name: value for name, value in parts.items() if hasattr(statement, name)}
    return ast.unparse(ast.fix_missing_locations(_with(statement, **own)))


def _difference(was: str, now: str) -> str:
    """`self._next = step [+⇒-] self._interval`."""
    shorter = min(len(was), len(now))
    start = next((i for i in range(shorter) if was[i] != now[i]), shorter)
    rest = shorter - start
    end = next((i for i in range(rest) if was[-1 - i] != now[-1 - i]), rest)
    head, tail = was[:start], was[len(was) - end :]
    head = head if len(head) <= 60 else "…" + head[-60:]
    tail = tail if len(tail) <= 40 else tail[:40] + "…"
    return f"{head}[{was[start : len(was) - end]}⇒{now[start : len(now) - end]}]{tail}"
