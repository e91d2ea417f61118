"""The page of what is supported, made from the tests' own markers: `python -m tests.support`."""

from __future__ import annotations

import contextlib
import io
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest

REPOSITORY = Path(__file__).parents[1]
PAGE = REPOSITORY / "docs" / "support.md"
_HEAD = """\
# What is supported

Every line is held by tests that run on every change; `make support` writes this page from their
markers, and a test fails if it was not. *Works*: the test trains under that setting and looks at
the result. *Refused*: an error says so where training starts, and what to do instead.

The tests run on a CPU, those of several processes over gloo. Nothing here needs one: but no GPU was
at hand, and nothing was run on one.
"""

Cell = tuple[str, str, bool]  # area, what, whether it works


def cells(items: Iterable[pytest.Item]) -> dict[Cell, set[str]]:
    """Each cell of the matrix with the files of its tests, by their markers."""
    found: dict[Cell, set[str]] = defaultdict(set)
    for item in items:
        for name in ("supports", "refuses"):
            for marker in item.iter_markers(name):
                area, what = marker.args
                found[area, what, name == "supports"].add(item.location[0])
    return found


class _Collected:
    """Every test that pytest finds."""

    def pytest_collection_finish(self, session: pytest.Session) -> None:
        self.items = session.items


def collected() -> dict[Cell, set[str]]:
    """The cells of all tests there are."""
    finder = _Collected()
    options = ["--collect-only", "-q", "-p", "no:xdist"]
    with contextlib.redirect_stdout(io.StringIO()):
        code = pytest.main([*options, str(REPOSITORY / "tests")], plugins=[finder])
    if code != pytest.ExitCode.OK:
        raise RuntimeError(f"pytest --collect-only ended with {code!r}")
    return cells(finder.items)


def page(found: dict[Cell, set[str]]) -> str:
    """The page in Markdown."""
    lines = [_HEAD]
    for area in sorted({area for area, _, _ in found}):
        lines += [f"## {area}", "", "| | | tests |", "|---|---|---|"]
        rows: Iterable[Any] = sorted(
            (not works, what, files) for (of, what, works), files in found.items() if of == area
        )
        for refused, what, files in rows:
            links = ", ".join(f"[{Path(f).stem}](../{f})" for f in sorted(files))
            lines.append(f"| {what} | {'refused' if refused else 'works'} | {links} |")
        lines.append("")
    return "\n".join(lines)


if __name__ == "__main__":
    PAGE.write_text(page(collected()), encoding="utf-8")
