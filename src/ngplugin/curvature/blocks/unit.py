"""The unit-wise block: a 2x2 matrix for the scale and the offset of each normalized feature."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from ngplugin.curvature.blocks.averaged import AveragedBlock, Inversion
from ngplugin.curvature.blocks.block import BlockDamping, GradientBlock
from ngplugin.curvature.blocks.factor import Factor, damped_factor
from ngplugin.curvature.blocks.low_rank_factor import read_factor
from ngplugin.curvature.blocks.symmetric import diagonal_of, mean_eigenvalue
from ngplugin.curvature.spectrum import Spectrum, spectrum


class UnitBlock(AveragedBlock, GradientBlock):
    """F/Σw of a scale γ and an offset β, for each feature c a matrix over (γ_c, β_c).

    (g_γc, g_βc)(g_γc, g_βc)ᵀ is an unbiased estimate of the matrix, whatever the examples and
    positions that share the feature, and in batch normalization too, where examples meet. It needs
    no normalized input, which could not be had from the output where γ_c = 0.

    A single draw gives a matrix of rank one, which is why the damping counts statistics.

    Source: Osawa et al. 2019 (arXiv:1811.12019) §3.4.
    """

    kind = "unit-wise"

    def __init__(self, scale: Tensor, offset: Tensor) -> None:
        super().__init__([scale, offset])

    def add_gradient_scores(self, scores: Sequence[Tensor], share: float) -> None:
        """Add `share` of ggᵀ, feature by feature."""
        g = self._columns(scores)  # [feature, 2, 1]
        self._add("F", (g @ g.mT).mul_(share))

    def _statistic(self, added: dict[str, Tensor], total_weight: float) -> dict[str, Tensor]:
        """ggᵀ/Σw."""
        return {"F": added["F"] / total_weight}

    def scale(self, means: Mapping[str, Tensor]) -> Tensor:
        """Of all features."""
        return means["F"].mean()

    def _invert(self, damping: BlockDamping, diagonal: bool) -> Inversion | None:
        """Damp each feature's matrix and invert it.

        `"relative"`: λ times the mean eigenvalue of all features, or the floor, and to each
        feature's γ 2/n times its own mean eigenvalue, with n the number of statistics in the
        average: what `KroneckerBlock` does with a factor of size 2 and as many rows.
        """
        F = self.average("F")
        own = mean_eigenvalue(F)  # [feature, 1, 1]
        if damping.mode == "relative":
            mean = own.mean().clamp_min(damping.floor)
            n = max(1.0, self.effective_count("F"))
            added = damping.value * mean + damping.sampling * 2 / n * own
        else:
            added = torch.full_like(own, damping.value)
        factor, remedy = damped_factor(diagonal_of(F) if diagonal else F, added)
        return None if factor is None else Inversion(factor.named("F"), remedy)

    def precondition(
        self, gradients: Sequence[Tensor], curved: bool = True
    ) -> tuple[list[Tensor], list[Tensor]]:
        """(F + damping)⁻¹ g feature by feature, and F times it."""
        factor = self._factor()
        direction = factor.solve(self._columns(gradients))
        directions = self._as_parameters(direction, gradients)
        if not curved:
            return directions, []
        product = self._growth * factor.times(direction)
        return directions, self._as_parameters(product, gradients)

    def product(self, vectors: Sequence[Tensor]) -> list[Tensor]:
        """F v feature by feature."""
        product = self._growth * self._factor().times(self._columns(vectors))
        return self._as_parameters(product, vectors)

    def spectrum(self) -> Spectrum:
        """Of all features' matrices."""
        factor = self._factor()
        values, _ = factor.eigenvalues()  # [feature, 2]
        damped = values + factor.damping[:, 0]
        return spectrum(values, (*values.aminmax(), *damped.aminmax()))

    def _factor(self) -> Factor:
        assert self.inverted, "refresh() comes first"
        return read_factor(self._refreshed, "F", 2)

    def _columns(self, tensors: Sequence[Tensor]) -> Tensor:
        """Scale and offset to `[feature, 2, 1]`."""
        return torch.stack([t.reshape(-1) for t in tensors], 1)[:, :, None].to(self._dtype)

    @staticmethod
    def _as_parameters(columns: Tensor, like: Sequence[Tensor]) -> list[Tensor]:
        return [columns[:, i, 0].reshape(t.shape).to(t.dtype) for i, t in enumerate(like)]
