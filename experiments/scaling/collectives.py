"""How long collective operations take: bandwidth within and between nodes, and latency."""

from __future__ import annotations

import math

from experiments.scaling.devices import Device


def all_reduce(sent: float, ranks: int, device: Device) -> float:
    """Seconds until every rank has the sum of all ranks' `sent` bytes.

    Within a node a reduce-scatter, after which each of its g ranks has the node's sum of a g-th;
    all-reduces of these between the N nodes, each by a network adapter of its own; an all-gather
    within. A rank of R sends and receives 2 (R-1)/R of its bytes in an optimal all-reduce (Thakur,
    Rabenseifner & Gropp 2005, Optimization of collective communication operations in MPICH). The
    latency is that of trees up and down.
    """
    g, nodes = _shape(ranks, device)
    return 2 * (
        _spread(sent, g, device.link_inside, device.latency_inside, device)
        + _spread(sent / g, nodes, device.link_between, device.latency_between, device)
    )


def broadcasts(sent: float, count: int, ranks: int, device: Device) -> float:
    """Seconds until every rank has `sent` bytes in all that belong to `count` owners' blocks.

    With owners spread evenly this is an all-gather, half an all-reduce; each broadcast has the
    latency of a tree of its own.
    """
    g, nodes = _shape(ranks, device)
    hops = _depth(g) * device.latency_inside + _depth(nodes) * device.latency_between
    return (
        _spread(sent, g, device.link_inside, 0.0, device)
        + _spread(sent / g, nodes, device.link_between, 0.0, device)
        + count * hops
    )


def _shape(ranks: int, device: Device) -> tuple[int, int]:
    """Ranks of a node, and nodes."""
    return min(ranks, device.per_node), math.ceil(ranks / device.per_node)


def _depth(members: int) -> int:
    return math.ceil(math.log2(members))


def _spread(sent: float, members: int, link: float, latency: float, device: Device) -> float:
    """Seconds of a reduce-scatter or an all-gather among `members`; none with itself."""
    share = (members - 1) / members
    return share * sent / (link * device.link_efficiency) + _depth(members) * latency
