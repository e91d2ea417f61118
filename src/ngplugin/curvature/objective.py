"""What an observed objective weighs, in its own units and in nats."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch

from ngplugin.curvature.observation import ScoredLoss
from ngplugin.curvature.ranks import mean_over_ranks, several_ranks


@dataclass(frozen=True)
class ObjectiveWeight:
    """Sums over the terms of all scored losses of a step.

    Attributes:
        total: Σw. F/Σw does not depend on how the loss was scaled.
        nats: Σ w σ², with σ² each likelihood's dispersion: what a sum of KLs at unit dispersion is
            divided by to be in nats per term.
        squares: Σw².
        nll: KL(data ‖ p_θ), nats per term.
    """

    total: float
    nats: float
    squares: float
    nll: float

    @staticmethod
    def of(
        scored: Sequence[ScoredLoss],
        noise_variance: float | Literal["auto"],
        device: torch.device | None = None,
    ) -> ObjectiveWeight | None:
        """Add up, averaged over processes; None if the losses weigh nothing or are not finite.

        Args:
            scored: of this process; may be none where there are several.
            noise_variance: σ² of squared errors.
            device: where messages between processes are made.
        """
        sums = torch.zeros(4, device=device)
        if scored:
            weights = torch.stack([loss.weights.sum() for loss in scored])
            dispersions = torch.stack([loss.dispersion(noise_variance) for loss in scored])
            squares = torch.stack([loss.weights.square().sum() for loss in scored])
            nlls = torch.stack([loss.nll() for loss in scored])
            # No term, no dispersion: of an empty batch it may be anything.
            nats = torch.where(weights != 0, weights * dispersions, 0.0).sum()
            sums = torch.stack([weights.sum(), nats, squares.sum(), nlls.sum()])
        if several_ranks():  # that have to talk of one type
            sums = mean_over_ranks(sums.double())
        total, nats, square, nll = sums.tolist()  # the one transfer to the host
        if not (total > 0 and math.isfinite(nats) and math.isfinite(nll)):
            return None
        # Squared error that is exactly zero has no estimated variance and no step either.
        nats = max(nats, torch.finfo(torch.float32).tiny)
        # No divergence is negative, but what rounding leaves of one that has vanished.
        return ObjectiveWeight(total, nats, square, max(nll, 0.0) / nats)
