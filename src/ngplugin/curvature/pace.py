"""How often the Fisher matrix is seen and inverted, so that it costs no more than it may."""

from __future__ import annotations

import math
from dataclasses import astuple, dataclass

import torch

from ngplugin.curvature.ranks import mean_over_ranks

_MOST = 10  # times as rare as asked for: then a matrix is of another place than where it is used
# Multiplications in the time that the calls for a map take in any case: half a millisecond forward,
# backward and in the update, at 40 a nanosecond. Without them small networks, of which nobody can
# measure what is multiplied, would be seen too rarely.
_CALLS = 2**24


@dataclass(frozen=True)
class Work:
    """Multiplications, counted and not timed, so that a run can be repeated.

    Attributes:
        passing: of a step's forward and backward pass through the maps that are known: for a matrix
            three for each of its elements and each row.
        statistics: of one statistic.
        inversion: of one inversion.
        maps: how many there are.
    """

    passing: float = 0.0
    statistics: float = 0.0
    inversion: float = 0.0
    maps: float = 0.0

    def __add__(self, other: Work) -> Work:
        return Work(
            self.passing + other.passing,
            self.statistics + other.statistics,
            self.inversion + other.inversion,
            self.maps + other.maps,
        )

    def over_ranks(self, device: torch.device) -> Work:
        """The mean over all processes, the same in each."""
        numbers = torch.tensor(astuple(self), device=device)
        return Work(*mean_over_ranks(numbers).tolist())


@dataclass(frozen=True)
class Pace:
    """Steps between two statistics, and between two inversions of a block."""

    statistics_every: int
    refresh_every: int

    def within(self, work: Work, share: float) -> Pace:
        """The same, or rarer, by up to a factor of ten.

        Statistics, and inversions, are to take no more than a share each of the passes. Where no
        map is known nothing is.

        Args:
            work: of all blocks.
            share: of the passes.
        """
        if work.passing == 0:
            return self
        room = share * (work.passing + _CALLS * work.maps)
        return Pace(
            _rarer(self.statistics_every, work.statistics, room),
            _rarer(self.refresh_every, work.inversion, room),
        )


def _rarer(every: int, work: float, room: float) -> int:
    most = _MOST * every
    return most if work >= most * room else max(every, math.ceil(work / room))
