"""Several processes that train copies of one model: what is measured is averaged over them."""

from __future__ import annotations

import torch.distributed as dist
from torch import Tensor


def several_ranks() -> bool:
    """Whether this process is one of several."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def mean_over_ranks(t: Tensor) -> Tensor:
    """The mean of every process's tensor, the same in each; every process has to call it.

    Data parallelism averages gradients, so the objective is the mean of the processes' losses; with
    it go F, Σw, the KL and how far the loss fell. A number that is not finite in one process is
    not in any, so that all take the same decision.
    """
    if not several_ranks():
        return t
    t = t.contiguous()
    dist.all_reduce(t)
    return t / dist.get_world_size()
