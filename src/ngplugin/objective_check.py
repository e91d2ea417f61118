"""Notices that the objective does not fall as its quadratic model says."""

from __future__ import annotations

import warnings

_POOR_RATIO = 0.1
_POOR_STEPS = 5


class ObjectiveCheck:
    """Warns once when measured steps gain far less than they were predicted to.

    Then the curvature is not the objective's: a part of it is hidden from the observer, or its
    outputs meet in ways that no block of F shows.
    """

    def __init__(self) -> None:
        self._poor = 0  # measured steps in a row
        self._warned = False

    def see(self, reduction_ratio: float | None) -> None:
        """Take in one step's reduction ratio, None if it was not measured."""
        if reduction_ratio is None:
            return
        self._poor = self._poor + 1 if reduction_ratio < _POOR_RATIO else 0
        if self._poor >= _POOR_STEPS and not self._warned:
            self._warned = True
            warnings.warn(
                f"ngplugin: on {_POOR_STEPS} measured steps in a row the objective fell by less "
                f"than {_POOR_RATIO:g} of what its quadratic model says. Usual causes: the run is "
                "at its noise floor, or a part of the objective is computed where it cannot be "
                "seen (a custom autograd.Function). Try a smaller kl_radius, such as 0.003, a "
                "learning-rate schedule that falls, or damping=1.",
                stacklevel=2,
            )
