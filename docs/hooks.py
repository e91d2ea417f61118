"""Makes a site of pages that are read in the repository too; `mkdocs.yml` names it.

In the repository pages link to whatever is there: pictures in `experiments/`, sources,
`CONTRIBUTING.md`. The site gets the pictures that are linked, pages for what is Markdown, and the
names of the rest as text. A notebook becomes a page with the outputs that it was committed with.
"""

from __future__ import annotations

import html
import posixpath
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from math_core import LatexToMathML
from mkdocs.structure.files import File, Files
from nbconvert import MarkdownExporter

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
#: Where the site has pages that are not in docs/.
BESIDE = {"README.md": "index.md", **{n: n for n in ("CONTRIBUTING.md", "CHANGELOG.md")}}
LINK = re.compile(r"\[([^\]]*)\]\(([^)\s#]+)(#[^)\s]+)?\)")
TO_MATHML = LatexToMathML()
FORMULA = re.compile(r'<(span|div) class="arithmatex">\\[(\[](.*?)\\[)\]]</\1>', re.DOTALL)


def on_files(files: Files, config: Any) -> Files:
    """Add notebooks, the pages beside docs/, and the pictures that pages show."""
    for path in sorted(DOCS.rglob("*.ipynb")):
        place = path.relative_to(DOCS)
        text, made = MarkdownExporter().from_filename(str(path), {"unique_key": place.stem})
        files.append(File.generated(config, place.with_suffix(".md").as_posix(), content=text))
        for name, picture in made["outputs"].items():
            at = (place.parent / name).as_posix()
            files.append(File.generated(config, at, content=picture))
    for name, at in BESIDE.items():
        if files.get_file_from_path(at) is None:
            files.append(File.generated(config, at, abs_src_path=str(ROOT / name)))
    for page in [*files.documentation_pages()]:
        for path in _linked(page):
            at = _place(path)
            shown = path.suffix == ".png" and path.exists()
            if shown and at and files.get_file_from_path(at) is None:
                files.append(File.generated(config, at, abs_src_path=str(path)))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Files) -> str:
    """Have links lead to where the site has things; what it has not is named."""

    def link(found: re.Match[str]) -> str:
        path = _path(page.file, found[2])
        if not path.exists():  # an address, or a mistake that mkdocs will tell
            return found[0]
        at = _place(path)
        if at is None:
            return f"`{found[1].strip('`')}`"
        near = posixpath.relpath(at, posixpath.dirname(page.file.src_uri) or ".")
        return f"[{found[1]}]({near}{found[3] or ''})"

    return LINK.sub(link, markdown)


def on_page_content(content: str, page: Any, config: Any, files: Files) -> str:
    """Formulas as MathML, which browsers draw by themselves; what has no form in it is an error."""

    def formula(found: re.Match[str]) -> str:
        latex, alone = html.unescape(found[2]), found[1] == "div"
        return TO_MATHML.convert_with_local_state(latex, displaystyle=alone)

    return FORMULA.sub(formula, content)


def _linked(page: File) -> Iterator[Path]:
    return (_path(page, found[2]) for found in LINK.finditer(page.content_string))


def _path(page: File, link: str) -> Path:
    """Where a link of a page leads in the repository."""
    home = ROOT if page.src_uri in BESIDE else (DOCS / page.src_uri).parent
    return (home / link).resolve()


def _place(path: Path) -> str | None:
    """Where the site has a file of the repository; None if it has not."""
    if path.is_relative_to(DOCS):
        at = path.relative_to(DOCS)
        return (at.with_suffix(".md") if at.suffix == ".ipynb" else at).as_posix()
    inside = path.relative_to(ROOT).as_posix() if path.is_relative_to(ROOT) else ""
    return BESIDE.get(inside) or (inside if path.suffix == ".png" else None)
