"""What a nat is worth: of each batch by itself, or by a running average over batches.

An objective of weight Σw has Σ w σ² terms' worth of it at the likelihoods' dispersions σ², so
ν = Σ w σ² / Σw is what a nat is worth per unit of weight: for squared error alone the noise
variance, for a mixture of losses the mean of their dispersions. It is free of the loss's scale.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, Literal, Protocol

import torch

from ngplugin.curvature.average import RunningAverage
from ngplugin.curvature.objective import ObjectiveWeight


class NatWorth(Protocol):
    """Says in which nats a step is measured."""

    noise_variance: float | Literal["auto"]  # by which a batch's weight is to be counted

    def see(self, weight: ObjectiveWeight) -> ObjectiveWeight:
        """Take in the weight of a step's batch, and return it in the nats of this worth."""

    def state_dict(self) -> dict[str, Any]:
        """Plain tensors and numbers."""

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over a saved state."""


class BatchNatWorth:
    """A step is measured in the nats of its own batch.

    Args:
        noise_variance: σ² of squared error, `"auto"` for the batch's mean squared error.
    """

    def __init__(self, noise_variance: float | Literal["auto"]) -> None:
        self.noise_variance = noise_variance

    def see(self, weight: ObjectiveWeight) -> ObjectiveWeight:
        """The weight as it is."""
        return weight

    def state_dict(self) -> dict[str, Any]:
        """Nothing is kept."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Nothing was kept."""


class RunningNatWorth:
    """A step is measured at the average of ν over this step and those before.

    The mean squared error of a small batch varies, and a radius in its nats varies with it. The
    average follows an error that falls more slowly than the batch does.

    Args:
        decay: β of the average.
    """

    noise_variance: float | Literal["auto"] = "auto"

    def __init__(self, decay: float) -> None:
        self._decay = decay
        self._average = RunningAverage()

    def see(self, weight: ObjectiveWeight) -> ObjectiveWeight:
        """Fold in the batch's ν; the weight at the average, its nll in the same nats."""
        worth = torch.tensor(weight.nats / weight.total, dtype=torch.float64)
        self._average.update(worth, self._decay)
        nats = weight.total * float(self._average.value)
        return replace(weight, nats=nats, nll=weight.nll * weight.nats / nats)

    def state_dict(self) -> dict[str, Any]:
        """The average."""
        return self._average.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over a saved average; one that was not kept starts anew."""
        self._average = RunningAverage()
        if state:
            self._average.load_state_dict(state, torch.zeros(()))
