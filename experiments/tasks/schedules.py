"""Learning rates over a run, as shares of each parameter group's own learning rate."""

from __future__ import annotations

import math

from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR


def constant(optimizer: Optimizer, steps: float) -> LambdaLR:
    """Always the full learning rate."""
    return LambdaLR(optimizer, lambda step: 1.0)


def cosine(optimizer: Optimizer, steps: float, warmup: int = 0, floor: float = 0.0) -> LambdaLR:
    """Up on a straight line, then down on half a cosine wave.

    Args:
        optimizer: whose learning rates to schedule.
        steps: of the whole run.
        warmup: steps until the full learning rate is reached, from near 0.
        floor: share of the learning rate that is left at the end, in [0, 1].

    Raises:
        ValueError: `warmup` or `floor` is out of range.
        MisconfigurationException: the run has no last step.
    """
    if math.isinf(steps):
        raise MisconfigurationException(
            "schedule=cosine: has to know where the run ends, but trainer.max_epochs and "
            "trainer.max_steps are -1; give one of them, or schedule=constant"
        )
    if warmup < 0 or not 0 <= floor <= 1:
        raise ValueError(
            f"warmup={warmup}, floor={floor}: expected a number of steps and a share in [0, 1]"
        )

    def share(step: int) -> float:
        if step < warmup:
            return (step + 1) / (warmup + 1)
        done = min((step - warmup) / max(steps - warmup, 1), 1.0)
        return floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * done))

    return LambdaLR(optimizer, share)
