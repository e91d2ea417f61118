"""Which rank inverts which block."""

from __future__ import annotations

import heapq
from collections.abc import Sequence


def longest_first(costs: Sequence[float], ranks: int) -> list[int]:
    """The rank of each job: the longest job left goes to the rank with the least to do.

    The last rank to be done is so after at most 4/3 - 1/(3 ranks) of the shortest possible time.

    Source: Graham 1969, Bounds on multiprocessing timing anomalies.
    """
    owner = [0] * len(costs)
    waiting = [(0.0, rank) for rank in range(ranks)]
    for job in sorted(range(len(costs)), key=lambda i: -costs[i]):
        load, rank = waiting[0]
        owner[job] = rank
        heapq.heapreplace(waiting, (load + costs[job], rank))
    return owner


def makespan(costs: Sequence[float], owner: Sequence[int]) -> float:
    """What the rank with the most to do has to do."""
    loads: dict[int, float] = {}
    for cost, rank in zip(costs, owner, strict=True):
        loads[rank] = loads.get(rank, 0.0) + cost
    return max(loads.values(), default=0.0)
