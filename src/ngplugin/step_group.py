"""What a parameter group says of one step: an optimizer's side of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class StepGroup:
    """Parameters that share their settings in one step.

    Attributes:
        parameters: those without a gradient stay where they are.
        lr: the step's upper limit, in units of the natural gradient.
        decay: the share of θ that a full step takes away.
        momentum: μ.
        schedule: the learning rate over its peak.
    """

    parameters: Sequence[Tensor]
    lr: float
    decay: float
    momentum: float
    schedule: float


def make_dense(groups: Sequence[StepGroup]) -> None:
    """Write out the sparse gradients that embeddings may have: a natural gradient is dense."""
    for p in (p for group in groups for p in group.parameters):
        if p.grad is not None and p.grad.is_sparse:
            p.grad = p.grad.to_dense()
