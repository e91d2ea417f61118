"""Finds the parameters of today in a state that was saved of those of yesterday."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from difflib import SequenceMatcher
from typing import Any


@dataclass(frozen=True)
class Places:
    """Where each of today's parameters was when a state was saved.

    Attributes:
        of: for each parameter its place in the state, None if it was not there.
        new: names of those that were not there.
        gone: names of those that are there no more.
    """

    of: tuple[int | None, ...]
    new: tuple[str, ...]
    gone: tuple[str, ...]

    @staticmethod
    def find(
        shapes: Sequence[Sequence[int]],
        names: Sequence[str] | None,
        saved_shapes: Sequence[Sequence[int]],
        saved_names: Sequence[str] | None,
    ) -> Places:
        """By name where both sides have them, else by the order of the shapes.

        By shapes, all that is equal from the front counts first, then all from the back.

        A parameter that has another shape by now is another one.
        """
        now, then = ([tuple(shape) for shape in s] for s in (shapes, saved_shapes))
        if names is not None and saved_names is not None:
            place = {name: i for i, name in enumerate(saved_names)}
            of = [place.get(name) for name in names]
            of = [i if i is None or then[i] == now[j] else None for j, i in enumerate(of)]
        else:
            of = _aligned(now, then)
        known = {i for i in of if i is not None}

        def named(i: int, all_names: Sequence[str] | None, shape: Sequence[int]) -> str:
            return all_names[i] if all_names is not None else f"no. {i}, {tuple(shape)}"

        return Places(
            tuple(of),
            tuple(named(j, names, now[j]) for j, i in enumerate(of) if i is None),
            tuple(named(i, saved_names, then[i]) for i in range(len(then)) if i not in known),
        )

    @property
    def same(self) -> bool:
        """Whether nothing has changed."""
        return not self.gone and self.of == tuple(range(len(self.of)))

    def rearranged(self, values: Sequence[Any]) -> list[Any]:
        """What was saved for each parameter, None for a new one."""
        return [None if i is None else values[i] for i in self.of]

    def renumbered(self, blocks: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
        """The saved blocks of whose parameters all are still there, under their new numbers."""
        now = {i: j for j, i in enumerate(self.of) if i is not None}
        return [
            {**block, "parameters": [now[i] for i in block["parameters"]]}
            for block in blocks
            if all(i in now for i in block["parameters"])
        ]


def _aligned(now: Sequence[Any], then: Sequence[Any]) -> list[int | None]:
    """For each of `now` an equal one of `then`, in order."""
    of: list[int | None] = [None] * len(now)
    shorter = min(len(now), len(then))
    front = next((i for i in range(shorter) if now[i] != then[i]), shorter)
    left = shorter - front
    back = next((i for i in range(left) if now[-1 - i] != then[-1 - i]), left)
    of[:front] = range(front)
    of[len(now) - back :] = range(len(then) - back, len(then))
    middle = SequenceMatcher(
        None, then[front : len(then) - back], now[front : len(now) - back], autojunk=False
    )
    for a, b, size in middle.get_matching_blocks():
        of[front + b : front + b + size] = range(front + a, front + a + size)
    return of
