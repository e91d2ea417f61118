"""The site of the documentation: it is built without a warning, whole, and from here alone."""

from __future__ import annotations

import functools
import html.parser
import http.server
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import unquote

import pytest

import ngplugin
from tests.browser import needs_chromium, opened
from tests.environment import REPOSITORY

DOCS = REPOSITORY / "docs"
ELSEWHERE = re.compile(r"^(\w+:)?//")
#: In a style sheet.
FETCHED = re.compile(r"(?:url\(|@import)\s*['\"]?\s*((?:\w+:)?//[^'\")\s]+)")


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As `make docs` builds it; `mkdocs.yml` has warnings of links and names count as errors."""
    folder = tmp_path_factory.mktemp("site")
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--site-dir", folder],
        cwd=REPOSITORY, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return folder


class Elements(html.parser.HTMLParser):
    """Every element of a page with its attributes."""

    def __init__(self, page: Path) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str]]] = []
        self.feed(page.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, {name: value or "" for name, value in attributes}))

    def ids(self) -> set[str]:
        return {attributes["id"] for _, attributes in self.found if "id" in attributes}


@functools.cache
def elements(page: Path) -> Elements:
    return Elements(page)


def pages(site: Path) -> list[Path]:
    return sorted(site.rglob("*.html"))


def test_every_page_is_there(site: Path) -> None:
    ours = {path.relative_to(DOCS).with_suffix("") for path in DOCS.rglob("*.md")}
    ours |= {path.relative_to(DOCS).with_suffix("") for path in DOCS.rglob("*.ipynb")}
    ours |= {Path("CONTRIBUTING"), Path("CHANGELOG"), Path("404")}
    assert {page.relative_to(site).with_suffix("") for page in pages(site)} == ours
    assert not list(site.rglob("*.py"))


def test_nothing_is_loaded_from_elsewhere(site: Path) -> None:
    for page in pages(site):
        for tag, attributes in elements(page).found:
            if tag != "a":
                loaded = [v for n, v in attributes.items() if n != "xmlns" and ELSEWHERE.match(v)]
                assert not loaded, f"{page.name}: <{tag}> loads {loaded[0]}"
    for sheet in [*site.rglob("*.css"), *pages(site)]:
        assert not FETCHED.search(sheet.read_text(encoding="utf-8")), sheet.name


def test_every_picture_and_link_is_in_the_site(site: Path) -> None:
    seen = 0
    for page in pages(site):
        if page.name == "404.html":  # its links begin at the root, wherever the site will be
            continue
        for tag, attributes in elements(page).found:
            link = attributes.get("href" if tag == "a" else "src", "")
            if not link or ELSEWHERE.match(link) or link.startswith("data:"):
                continue
            path, _, anchor = link.partition("#")
            target = (page.parent / unquote(path)).resolve() if path else page
            assert target.is_file(), f"{page.name}: {link}"
            if anchor and tag == "a" and anchor != "__skip":
                assert unquote(anchor) in elements(target).ids() | {""}, f"{page.name}: {link}"
            seen += tag == "img"
    assert seen >= 10


def test_what_is_no_page_is_named_and_not_linked(site: Path) -> None:
    text = (site / "support.html").read_text(encoding="utf-8")
    assert "<code>test_compile</code>" in text
    assert "test_compile.py" not in text


def test_every_public_name_is_in_the_api(site: Path) -> None:
    ids = elements(site / "api.html").ids()
    missing = [name for name in ngplugin.__all__ if not any(i.endswith(f".{name}") for i in ids)]
    assert not missing
    assert "ngplugin.NaturalGradientOptimizer.wrap" in ids


def test_formulas_are_drawn_by_the_browser_itself(site: Path) -> None:
    text = (site / "natural-gradient.html").read_text(encoding="utf-8")
    source = (DOCS / "natural-gradient.md").read_text(encoding="utf-8")
    alone = len(re.findall(r"^\$\$", source, re.MULTILINE))
    assert text.count('<math display="block"') == alone > 0
    assert text.count("<math") > alone
    assert "$" not in re.sub(r"<script.*?</script>", "", text, flags=re.DOTALL)


@pytest.fixture
def served(site: Path) -> Iterator[str]:
    """The address of the site on this machine."""
    handler = functools.partial(_Quiet, directory=str(site))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


class _Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *_: object) -> None:
        pass


FRAMES = """<!doctype html><title>all pages</title><body>{frames}<script>
onload = () => {{
  for (const frame of document.querySelectorAll("iframe")) {{
    const page = frame.contentDocument;
    const parts = [page.querySelector("h1"), page.querySelector("[data-md-component=search]")];
    document.body.append(`${{frame.src.split("/").pop()}}: ${{parts.every(Boolean)}}; `);
  }}
}}</script>"""


@needs_chromium
def test_a_browser_shows_every_page_without_complaint(
    site: Path, served: str, tmp_path: Path
) -> None:
    """All in frames of one page: a browser for each would take a minute."""
    names = [page.name for page in pages(site)]
    frames = "".join(f'<iframe src="{name}"></iframe>' for name in names)
    (site / "frames.htm").write_text(FRAMES.format(frames=frames))
    shown = opened(f"{served}/frames.htm", tmp_path)
    for name in names:
        assert f"{name}: true; " in shown


@needs_chromium
def test_a_browser_shows_the_site_from_its_folder_too(site: Path, tmp_path: Path) -> None:
    shown = opened((site / "natural-gradient.html").as_uri(), tmp_path)
    assert "<math" in shown
