"""The steps of a fit, as many of them as a picture can show."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Generic, TypeVar

from ngplugin.curvature.spectrum import BlockSpectrum
from ngplugin.report import StepReport

T = TypeVar("T")

_MOST_STEPS = 2000
_MOST_SPECTRA = 4000  # of single blocks, 5 KB each


class Thinned(Generic[T]):
    """Every one of what came in, then every second, every fourth, ..., so as to stay below `most`.

    Args:
        most: to keep, an even number.
    """

    def __init__(self, most: int) -> None:
        self.most = most
        self.kept: list[T] = []
        self._every = 1
        self._seen = 0

    def add(self, item: T) -> None:
        """Take in the next one, or pass it over."""
        if self._seen % self._every == 0:
            if len(self.kept) == self.most:
                del self.kept[1::2]
                self._every *= 2  # of which the present place is a multiple, since most is even
            self.kept.append(item)
        self._seen += 1


class History:
    """What was reported, thinned out: a run of any length takes a few megabytes.

    Attributes:
        last: the number of the last step; -1 before the first.
        spectra: of all blocks, with the steps on which they were computed.
    """

    def __init__(self) -> None:
        self.last = -1
        # Apart, since few steps are measured, at places that are no multiples of anything.
        self._measured: Thinned[StepReport] = Thinned(_MOST_STEPS)
        self._others: Thinned[StepReport] = Thinned(_MOST_STEPS)
        self.spectra: Thinned[tuple[int, Sequence[BlockSpectrum]]] = Thinned(2)

    def add(self, report: StepReport) -> None:
        """Take in one step."""
        self.last = report.step
        self.add_spectra(report.step, report.spectra)
        if report.spectra:  # of which there would be more than are kept
            report = dataclasses.replace(report, spectra=())
        (self._others if report.kl is None else self._measured).add(report)

    def add_spectra(self, step: int, spectra: Sequence[BlockSpectrum]) -> None:
        """Take in the spectra of a step; none if there are none."""
        if not spectra:
            return
        if not self.spectra.kept:
            self.spectra.most = max(16, 2 * (_MOST_SPECTRA // len(spectra) // 2))
        self.spectra.add((step, spectra))

    @property
    def reports(self) -> list[StepReport]:
        """Those that were kept, in order."""
        return sorted(self._measured.kept + self._others.kept, key=lambda report: report.step)
