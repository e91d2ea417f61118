"""Fits c nᵏ to what was measured by size."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class PowerLaw:
    """Y ≈ c nᵏ.

    Attributes:
        coefficient: c.
        exponent: k.
    """

    coefficient: float
    exponent: float

    @staticmethod
    def fit(sizes: Sequence[float], values: Sequence[float]) -> PowerLaw:
        """With the least squares of log y.

        Raises:
            ValueError: fewer than two sizes, or a number that is not positive.
        """
        if len(set(sizes)) < 2 or min(*sizes, *values) <= 0:
            raise ValueError(f"sizes {[*sizes]}, values {[*values]}: expected two or more, all > 0")
        exponent, logarithm = np.polyfit(np.log(sizes), np.log(values), 1)
        return PowerLaw(float(np.exp(logarithm)), float(exponent))

    def __call__(self, size: float) -> float:
        """C nᵏ."""
        return float(self.coefficient * size**self.exponent)
