"""Notices that the recognised losses are not what the objective is about."""

from __future__ import annotations

import warnings

_POOR_RATIO = 0.1
_POOR_STEPS = 5


class ObjectiveCheck:
    """Warns once when the recognised losses fall far less than the objective was predicted to.

    The slope of the quadratic model is that of the whole objective, its curvature that of the
    recognised losses alone. Where a term that is none of them has much of the gradient, nothing
    holds the steps back in the directions that only this term knows.
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
                f"ngplugin: on {_POOR_STEPS} measured steps in a row the recognised losses fell by "
                f"less than {_POOR_RATIO:g} of what the quadratic model of the objective says. "
                "Usual cause: much of the objective is no recognised loss (a penalty, the KL term "
                "of a variational autoencoder), and the Fisher knows nothing of its curvature. Try "
                "kl_radius=0.001, or damping_mode='absolute' with damping=1.",
                stacklevel=2,
            )
