"""The KL divergence of a step, measured by running the step's recorded forward pass again."""

from __future__ import annotations

import warnings
from collections.abc import Sequence

import torch

from ngplugin.curvature.observation import Observation
from ngplugin.curvature.ranks import all_ranks, mean_over_ranks


class KlMeasurement:
    """Measures KL(p_θ ‖ p_now) on the batch that was observed.

    That a replay gives the recorded predictions back is tried once, before the first measurement;
    where it does not, or where the forward pass cannot be recorded, one warning says so and the KL
    is only predicted from then on.

    Attributes:
        obstacle: why it cannot be measured; None while it can.
    """

    def __init__(self) -> None:
        self.obstacle: str | None = None
        self._tried = False

    def measure(self, observations: Sequence[Observation]) -> tuple[float, float]:
        """The KL, and how far the losses fell: Σ w KL and Σ w (nll_θ - nll_now), unit dispersion.

        Both are in units of the objective, and of several processes their mean.
        """
        pairs = [pair for observation in observations for pair in observation.replay()]
        kl = torch.stack([loss.kl(now) for loss, now in pairs]).sum()
        reduction = torch.stack([loss.reduction(now) for loss, now in pairs]).sum()
        total, fall = mean_over_ranks(torch.stack([kl, reduction])).tolist()
        return total, fall

    def _settle(self, observations: Sequence[Observation]) -> None:
        """Find an obstacle, in whatever process it is."""
        obstacle = next((o.tape.obstacle for o in observations if o.tape.obstacle), None)
        if not all_ranks(obstacle is None, observations[0].tape.device):
            self.obstacle = obstacle or "another process cannot run its forward pass again"

    def possible(self, observations: Sequence[Observation], negligible: float) -> bool:
        """Whether these observations can be measured.

        Args:
            observations: of the step, the parameters being still what they were.
            negligible: Σ w KL up to which a replay counts as giving the same prediction.
        """
        if self.obstacle is None:
            self._settle(observations)
            if self.obstacle is None and not self._tried:
                self._tried = True
                kl, _ = self.measure(observations)
                if not abs(kl) <= negligible:
                    self.obstacle = "running the recorded calls again gives another prediction"
            if self.obstacle is not None:
                warnings.warn(
                    "ngplugin: the KL of a step is predicted, not measured, and steps are shorter "
                    f"for it: {self.obstacle}. Lower kl_radius if the run is unstable all the "
                    "same, raise it if it is slow.",
                    stacklevel=2,
                )
        return self.obstacle is None
