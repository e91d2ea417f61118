"""What the pictures have in common: how they look, and the plane of a Gaussian."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from matplotlib.figure import Figure

#: Okabe & Ito's colours, which people with any colour vision can tell apart.
BLUE, ORANGE, GREEN, RED, PINK = "#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7"


@dataclass(frozen=True)
class Picture:
    """A picture of the page.

    Attributes:
        name: of its file, and of its caption's place in the page.
        measure: computes what it shows.
        draw: draws that.
        caption: says it, with its numbers.
    """

    name: str
    measure: Callable[[], Any]
    draw: Callable[[Any], Figure]
    caption: Callable[[Any], str]


def panels(count: int, height: float = 3.4) -> tuple[Figure, Any]:
    """Axes in a row, without pyplot: no window, nothing global."""
    figure = Figure((9.0, height), layout="constrained")
    axes = figure.subplots(1, count, squeeze=False)[0]
    for axis in axes:
        axis.spines[["top", "right"]].set_visible(False)
        axis.tick_params(labelsize=8)
    return figure, axes
