"""One HTML page that needs nothing else, and the same pictures as PNG files."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any

import matplotlib as mpl
from jinja2 import Environment
from markupsafe import Markup
from matplotlib.figure import Figure

from ngplugin.diagnosis import Finding

#: The same page from the same run: no dates, no random names of elements.
_STYLE: Any = {
    "svg.hashsalt": "ngplugin",
    "svg.fonttype": "none",
    "font.size": 9,
    "figure.dpi": 150,
}


class Best(str):
    """A cell of a table that has won."""

    best = True


@dataclass(frozen=True)
class Table:
    """A table of a page.

    Attributes:
        title: above it.
        rows: cells; the first of each is a name.
        head: names of columns; none for none.
        caption: how to read it.
        folded: shown when it is asked for.
    """

    title: str
    rows: Sequence[Sequence[str]]
    head: Sequence[str] = ()
    caption: str = ""
    folded: bool = False


@dataclass(frozen=True)
class Shown:
    """A picture of a page.

    Attributes:
        name: of its file.
        title: above it.
        caption: how to read it.
        figure: it.
    """

    name: str
    title: str
    caption: str
    figure: Figure


@dataclass(frozen=True)
class Page:
    """What is on a page.

    Attributes:
        title: of it.
        subtitle: whose it is.
        findings: of a diagnosis.
        tables: first.
        pictures: below them.
        config: in the end, as text.
    """

    title: str
    subtitle: str
    findings: Sequence[Finding] = ()
    tables: Sequence[Table] = ()
    pictures: Sequence[Shown] = field(default_factory=tuple)
    config: str = ""

    def write(self, folder: Path) -> Path:
        """Write `report.html`, and a PNG for each picture into `pictures/`; returns the page.

        Args:
            folder: where to; made if it is not there.
        """
        images = folder / "pictures"
        images.mkdir(parents=True, exist_ok=True)
        shown = []
        with mpl.rc_context(_STYLE):
            for picture in self.pictures:
                picture.figure.savefig(images / f"{picture.name}.png")
                shown.append(
                    {
                        "title": picture.title,
                        "caption": picture.caption,
                        "svg": Markup(_svg(picture.figure, picture.title)),
                    }
                )
        text = resources.files(__package__).joinpath("run.html").read_text(encoding="utf-8")
        environment = Environment(autoescape=True, trim_blocks=True)
        environment.filters["sentence"] = lambda text: f"{text[:1].upper()}{text[1:]}."
        page = environment.from_string(text)
        path = folder / "report.html"
        path.write_text(page.render({**vars(self), "pictures": shown}), encoding="utf-8")
        return path


def _svg(figure: Figure, title: str) -> str:
    """The figure as an element of a page."""
    file = io.StringIO()
    figure.savefig(file, format="svg", metadata={"Date": None, "Title": title})
    text = file.getvalue()
    return text[text.index("<svg") :]
