"""Several processes that train copies of one model, as data parallelism has them.

It averages gradients, so the objective is the mean of the processes' losses; with it go F, Σw, the
KL and how far the loss fell. Whatever decides about a step is taken from numbers that are the same
in every process, bit for bit, so that the copies stay copies.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel


def ranks() -> int:
    """How many processes there are."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def several_ranks() -> bool:
    """Whether this process is one of several."""
    return ranks() > 1


def rank() -> int:
    """Which of them it is."""
    return dist.get_rank() if several_ranks() else 0


def mean_over_ranks(t: Tensor) -> Tensor:
    """The mean of every process's tensor, the same in each; every process has to call it.

    A number that is not finite in one process is not in any; one that is in all stays so.
    """
    if not several_ranks():
        return t
    t = (t / ranks()).contiguous()  # before they are added up, which may overflow
    dist.all_reduce(t)
    return t


def mean_over_ranks_(tensors: Sequence[Tensor]) -> None:
    """The same of several tensors, in place; one message for each kind, however many there are."""
    if not several_ranks():
        return
    for same in alike([(t.dtype, t.device) for t in tensors]):
        flat = mean_over_ranks(torch.cat([tensors[i].reshape(-1) for i in same]))
        parts = flat.split([tensors[i].numel() for i in same])
        for i, part in zip(same, parts, strict=True):
            tensors[i].copy_(part.view_as(tensors[i]))


def largest_over_ranks(t: Tensor) -> Tensor:
    """The largest of every process's tensor, element by element; every process has to call it."""
    if several_ranks():
        t = t.clone()
        dist.all_reduce(t, dist.ReduceOp.MAX)
    return t


def all_ranks(holds: bool, device: torch.device) -> bool:
    """Whether something holds in every process; every process has to call it."""
    if not several_ranks():
        return holds
    flag = torch.tensor(float(holds), device=device)
    dist.all_reduce(flag, dist.ReduceOp.MIN)
    return bool(flag)


def joined() -> bool:
    """Whether this is a forward pass of `DistributedDataParallel` under `Join`.

    Not where the processes all end with the first whose batches do.
    """
    model = getattr(DistributedDataParallel, "_active_ddp_module", None)
    config = getattr(model, "_join_config", None)
    return config is not None and config.enable and not config.throw_on_early_termination


def alike(kinds: Sequence[object]) -> list[list[int]]:
    """The places of equal ones together, in the order of the first of each."""
    found: dict[object, list[int]] = {}
    for i, kind in enumerate(kinds):
        found.setdefault(kind, []).append(i)
    return list(found.values())
