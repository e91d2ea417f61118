"""Seconds of the pieces of a natural-gradient step, taken from outside by wrapping methods."""

from __future__ import annotations

import contextlib
import functools
import time
from collections.abc import Callable, Iterator
from typing import Any

from ngplugin.curvature.fisher import Fisher
from ngplugin.curvature.score_backward import ScoreBackward
from ngplugin.kl_measurement import KlMeasurement

#: What is timed, by the piece that it belongs to.
PIECES: dict[str, tuple[tuple[type, str], ...]] = {
    "statistics": ((ScoreBackward, "run"), (Fisher, "fold")),
    "refresh": ((Fisher, "refresh"),),
    "preconditioning": ((Fisher, "precondition"),),
    "KL": ((KlMeasurement, "measure"),),
    "condition numbers": ((Fisher, "spectra"),),
}


class Stopwatch:
    """Adds up the processor's seconds of each piece, those of pieces within it left out.

    Attributes:
        seconds: by piece, since it was last taken.
    """

    def __init__(self) -> None:
        self.seconds = dict.fromkeys(PIECES, 0.0)
        self._within: list[float] = []  # of each open piece, seconds of the pieces inside

    def taken(self) -> dict[str, float]:
        """The seconds so far; begins anew."""
        seconds, self.seconds = self.seconds, dict.fromkeys(PIECES, 0.0)
        return seconds

    @contextlib.contextmanager
    def running(self) -> Iterator[Stopwatch]:
        """Methods are wrapped inside this context."""
        kept = [(owner, name, getattr(owner, name)) for ms in PIECES.values() for owner, name in ms]
        for piece, methods in PIECES.items():
            for owner, name in methods:
                setattr(owner, name, self._timed(piece, getattr(owner, name)))
        try:
            yield self
        finally:
            for owner, name, method in kept:
                setattr(owner, name, method)

    def _timed(self, piece: str, method: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(method)
        def timed(*args: Any, **kwargs: Any) -> Any:
            self._within.append(0.0)
            started = time.process_time()
            try:
                return method(*args, **kwargs)
            finally:
                seconds = time.process_time() - started
                self.seconds[piece] += seconds - self._within.pop()
                if self._within:
                    self._within[-1] += seconds

        return timed
