"""A small search on a grid that goes on while the best of it is at its edge."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

Place = tuple[int, ...]
Setting = dict[str, float]


@dataclass(frozen=True)
class Axis:
    """Values of one option: `middle * ratio**k` for whole numbers k."""

    middle: float
    ratio: float = 10**0.5

    def __getitem__(self, k: int) -> float:
        return float(f"{self.middle * self.ratio**k:.3g}")


Axes = Mapping[str, Axis]


def setting(axes: Axes, place: Place) -> Setting:
    """The options at a place of the grid."""
    return {name: axis[k] for (name, axis), k in zip(axes.items(), place, strict=True)}


def first_places(dimensions: int) -> list[Place]:
    """Five places: on a line, or in the middle and beside it along both axes."""
    if dimensions == 1:
        return [(k,) for k in (0, -1, 1, -2, 2)]
    return [(0, 0), *neighbours((0, 0))]


def neighbours(place: Place) -> Iterator[Place]:
    """Those a step away along one axis."""
    for axis in range(len(place)):
        for step in (-1, 1):
            yield (*place[:axis], place[axis] + step, *place[axis + 1 :])


def search(
    dimensions: int, judge: Callable[[Place], float], first: int = 5, more: int = 3
) -> dict[Place, float]:
    """Judge the first places, then neighbours of the best while there are untried ones.

    Args:
        dimensions: axes of the grid, 1 or 2.
        judge: the smaller the better; inf for failures.
        first: how many of the first five places.
        more: than these, at most.

    Returns:
        What was judged, in order.
    """
    found = {place: judge(place) for place in first_places(dimensions)[:first]}
    for _ in range(more):
        best = min(found, key=found.__getitem__)
        untried = [place for place in neighbours(best) if place not in found]
        if not untried:
            break
        found[untried[0]] = judge(untried[0])
    return found
