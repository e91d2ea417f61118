"""The documentation: links lead somewhere, code runs."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = [
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")),
    *sorted([*DOCS.rglob("*.md"), *DOCS.rglob("*.ipynb")]),
]
BLOCK = re.compile(r"^```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")


def text(page: Path) -> str:
    """Markdown; of a notebook that of its cells, whose code `test_notebook.py` runs."""
    if page.suffix == ".md":
        return page.read_text()
    cells = json.loads(page.read_text())["cells"]
    return "\n".join("".join(c["source"]) for c in cells if c["cell_type"] == "markdown")


def context() -> dict[str, Any]:
    """What a reader of an example is assumed to have."""
    torch.manual_seed(0)
    x = torch.randn(32, 4)
    return {
        "model": nn.Linear(4, 3),
        "criterion": nn.CrossEntropyLoss(),
        "batches": [(x, x[:, :3].argmax(1))] * 3,
    }


def with_code() -> list[Path]:
    return [page for page in PAGES if BLOCK.search(text(page))]


@pytest.mark.parametrize("page", with_code(), ids=lambda page: page.name)
def test_code_runs(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From top to bottom, as it is read."""
    monkeypatch.chdir(tmp_path)
    names = context()
    for block in BLOCK.findall(text(page)):
        exec(compile(block, page.name, "exec"), names)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    for link in LINK.findall(text(page)):
        if link.startswith(("http://", "https://")):
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), link
        if anchor:
            assert anchor in _anchors(target), link


def _anchors(page: Path) -> set[str]:
    titles = re.findall(r"^#+ (.+)$", text(page), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title).strip().lower().replace(" ", "-") for title in titles}


def test_every_page_is_linked_from_another() -> None:
    linked = {
        (page.parent / link.partition("#")[0]).resolve()
        for page in PAGES
        for link in LINK.findall(text(page))
    }
    assert {page for page in PAGES if page.name not in ("README.md", "index.md")} <= linked


def test_the_files_that_a_step_goes_through_are_there() -> None:
    """With what is in brackets behind them."""
    step = text(DOCS / "inside.md")
    named = re.findall(r"`([\w/]+(?:\.py|/))`(?:\s+\(`(\w+)`\))?", step)
    assert len(named) > 30
    for path, function in named:
        file = ROOT / "src/ngplugin" / path
        assert file.exists(), path
        assert not function or f"def {function}(" in file.read_text(), f"{path}: {function}"


def test_the_first_screen_of_the_readme_has_the_line_and_the_commands() -> None:
    lines = (ROOT / "README.md").read_text().splitlines()
    assert len(lines) <= 120
    first = "\n".join(lines[:20])
    for wanted in ("callbacks=[NaturalGradient()]", "make train", "make test", "race.png"):
        assert wanted in first
