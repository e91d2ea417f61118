"""The diagonal block: one Fisher entry an element, where there is nothing better to be had."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ngplugin.curvature.blocks.averaged import AveragedBlock, Inversion
from ngplugin.curvature.blocks.block import (
    BlockDamping,
    GradientBlock,
    as_parameter,
    as_real,
    rounding,
)
from ngplugin.curvature.blocks.factor import DiagonalFactor
from ngplugin.curvature.factorization import Remedy
from ngplugin.curvature.spectrum import Spectrum, spectrum


class DiagonalBlock(AveragedBlock, GradientBlock):
    """diag(F)/Σw of one parameter; a complex one is its real and imaginary parts.

    Args:
        parameter: the parameter.
        empirical: the scores will be gradients of the data's own labels, so that this is the
            empirical Fisher.
    """

    kind = "diagonal"
    redampable = True

    def __init__(self, parameter: Tensor, empirical: bool = False) -> None:
        super().__init__([parameter])
        self.empirical = empirical
        if empirical:
            self.kind = "empirical diagonal"

    def layout(self) -> dict[str, Any]:
        """Whether it is the empirical Fisher."""
        return {"empirical": self.empirical}

    def add_gradient_scores(self, scores: Sequence[Tensor], share: float) -> None:
        """Add `share` of g²."""
        g = as_real(scores[0]).to(self._dtype).reshape(1, -1)
        self._add("F", g.square().mul_(share))

    def _statistic(self, added: dict[str, Tensor], total_weight: float) -> dict[str, Tensor]:
        """g²/Σw."""
        return {"F": added["F"] / total_weight}

    def scale(self, means: Mapping[str, Tensor]) -> Tensor:
        """Of the diagonal."""
        return means["F"].mean()

    def _invert(self, damping: BlockDamping, diagonal: bool) -> Inversion:
        """Take over the average, and damp it, which cannot fail.

        `"relative"`: (λ + γ/n) max(mean(diag F), floor), with n the number of statistics in the
        average: the square of a single draw is near zero by chance for many an element, which must
        not be taken for a flat direction. Where no element is above the floor, the parameter does
        not count and its gradient is made of rounding errors: then λ is in units of the largest
        block, and it stays where it is. `"absolute"`: λ.
        """
        F = self.average("F")  # [1, elements]
        if damping.mode == "relative":
            n = max(1.0, self.effective_count("F"))
            largest = damping.floor / rounding(self._dtype) ** 2
            unit = F.mean().clamp_min(damping.floor)
            unit = torch.where(F.amax() < damping.floor, largest, unit)
            added = (damping.value + damping.sampling / n) * unit
        else:
            added = damping.value * F.new_ones(())
        return Inversion(DiagonalFactor(F, added.reshape(1, 1, 1), F.shape[1]).named("F"))

    def redamp(self, damping: BlockDamping) -> bool:
        """A diagonal has no factorization to save."""
        return self.refresh(damping) is Remedy.NONE

    def precondition(
        self, gradients: Sequence[Tensor], curved: bool = True
    ) -> tuple[list[Tensor], list[Tensor]]:
        """g / (diag F + λ), and diag(F) times it."""
        factor, (g,) = self._factor(), gradients
        real = as_real(g)
        direction = factor.solve(real.to(self._dtype).reshape(1, -1, 1))
        directions = [as_parameter(direction.reshape(real.shape), g)]
        if not curved:
            return directions, []
        product = self._growth * factor.times(direction)
        return directions, [as_parameter(product.reshape(real.shape), g)]

    def product(self, vectors: Sequence[Tensor]) -> list[Tensor]:
        """diag(F) v."""
        (v,) = vectors
        real = as_real(v)
        product = self._growth * self._factor().times(real.to(self._dtype).reshape(1, -1, 1))
        return [as_parameter(product.reshape(real.shape), v)]

    def spectrum(self) -> Spectrum:
        """The elements."""
        factor = self._factor()
        values, damping = factor.matrix[0], factor.damping.reshape(())
        low, high = values.aminmax()
        return spectrum(values, (low, high, low + damping, high + damping))

    def _factor(self) -> DiagonalFactor:
        assert self.inverted, "refresh() comes first"
        F = self._refreshed["F"]
        return DiagonalFactor(F, self._refreshed["F_damping"], F.shape[1])
