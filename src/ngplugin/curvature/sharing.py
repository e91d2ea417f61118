"""What several processes do together for the blocks: agree on them, average them, share the work.

Each process takes statistics of its own batches, and averages them over steps, by itself. At a
refresh the averages of all are averaged, in one message; then every block is inverted by one
process alone, the work being spread evenly, and its inverse is sent to the others. So all have the
same inverses, bit for bit, whatever their devices make of rounding.

Everything here has to be called by every process.
"""

from __future__ import annotations

import hashlib
import heapq
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ngplugin.curvature.block_choice import BlockChoice
from ngplugin.curvature.blocks import BLOCKS, AveragedBlock, BlockDamping
from ngplugin.curvature.blocks.averaged import Inversion
from ngplugin.curvature.factorization import Remedy
from ngplugin.curvature.ranks import alike, all_ranks, mean_over_ranks_, rank, ranks

Statistic = dict[str, Tensor] | None  # None: not finite; empty: nothing was added


@dataclass(frozen=True)
class _Offer:
    """A block of one process, and what it has to fold; plain values."""

    places: tuple[int, ...]  # of its parameters, in the optimizer's order
    kind: str
    layout: dict[str, Any]
    reasons: tuple[str, ...]
    memory: dict[str, float]  # the weight of each of its averages
    inverted: bool
    finite: bool
    shapes: dict[str, tuple[int, ...]]  # of its statistic, empty if nothing was added


def agree(
    choice: BlockChoice, statistics: Mapping[AveragedBlock, Statistic]
) -> dict[AveragedBlock, Statistic]:
    """Have the same blocks fold in every process.

    A block that some process has not seen, its batch having gone through other parts of the model,
    is made there as it is elsewhere, and what it has not added counts as zero. A statistic that is
    not finite in one process is dropped in all.

    Args:
        choice: has the blocks.
        statistics: of those whose parameters are among the present ones.

    Returns:
        The blocks in the order of their parameters, each with what is to be folded.
    """
    place = {id(p): i for i, p in enumerate(choice.parameters)}
    device = choice.parameters[0].device
    mine = sorted(
        (_offer(choice, block, statistic, place) for block, statistic in statistics.items()),
        key=lambda offer: offer.places,
    )
    block_at = {tuple(place[id(p)] for p in block.parameters): block for block in statistics}
    if _same_everywhere(mine, device):
        choice.arrange()
        return {block_at[o.places]: statistics[block_at[o.places]] for o in mine}
    offers: list[list[_Offer]] = [[] for _ in range(ranks())]
    dist.all_gather_object(offers, mine)
    agreed: dict[tuple[int, ...], dict[int, _Offer]] = {}  # by process, of those that agree
    taken: dict[int, tuple[int, ...]] = {}  # place of a parameter -> those of its block
    for process, offer in ((r, offer) for r, of_one in enumerate(offers) for offer in of_one):
        if any(taken.get(i, offer.places) != offer.places for i in offer.places):
            continue  # another process, asked earlier, has its parameters in another block
        taken.update(dict.fromkeys(offer.places, offer.places))
        same = agreed.setdefault(offer.places, {})
        first = next(iter(same.values()), offer)
        if (first.kind, first.layout) == (offer.kind, offer.layout):
            same[process] = offer
    result: dict[AveragedBlock, Statistic] = {}
    for places, same in sorted(agreed.items()):
        block = block_at.get(places)
        if block is None or rank() not in same:
            block = _made(choice, next(iter(same.values())))
        _align(block, same)
        result[block] = _filled(block, statistics.get(block, {}), [*same.values()])
    choice.drop([block for block in choice.blocks if block in statistics and block not in result])
    choice.arrange()
    return result


def average(blocks: Sequence[AveragedBlock]) -> None:
    """Put the mean over all processes into the running averages of some blocks."""
    mean_over_ranks_([t for block in blocks for t in block.sums()])


def means(blocks: Sequence[AveragedBlock]) -> list[dict[str, Tensor]]:
    """`AveragedBlock.means` of the averages over all processes."""
    found = [block.means() for block in blocks]
    mean_over_ranks_([t for of_block in found for t in of_block.values()])
    return found


def refresh(blocks: Sequence[AveragedBlock], damping: BlockDamping) -> list[Remedy]:
    """Average some blocks, invert each in one process, and tell the others.

    Returns:
        What each took.
    """
    average(blocks)
    owners = _owners(blocks)
    mine = [i for i, owner in enumerate(owners) if owner == rank()]
    inverted = {i: blocks[i].invert(damping) for i in mine}
    shared = _shared(blocks, inverted, owners)
    return [block.take(inversion) for block, inversion in zip(blocks, shared, strict=True)]


def own(blocks: Sequence[AveragedBlock]) -> list[AveragedBlock]:
    """Those on which it is this process that does some work of the size of inverting them."""
    owners = _owners(blocks)
    return [block for block, owner in zip(blocks, owners, strict=True) if owner == rank()]


def _owners(blocks: Sequence[AveragedBlock]) -> list[int]:
    return assigned([work(block) for block in blocks], ranks())


def work(block: AveragedBlock) -> int:
    """What inverting a block takes, in multiplications up to a factor: Σ d³ of its matrices."""
    shapes = [t.shape for t in block.sums()]
    return sum(shape[0] * int(shape[-1]) ** (3 if len(shape) == 3 else 1) for shape in shapes)


def assigned(works: Sequence[int], processes: int) -> list[int]:
    """Who does what: the largest piece first, each to the process with the least to do so far.

    The longest process takes at most 4/3 of the shortest time possible (Graham 1969, Bounds on
    multiprocessing timing anomalies).

    Args:
        works: of each piece.
        processes: how many there are.

    Returns:
        A process for each piece.
    """
    loads, owners = [(0, r) for r in range(processes)], [0] * len(works)
    for i in sorted(range(len(works)), key=lambda i: -works[i]):
        load, owners[i] = loads[0]
        heapq.heapreplace(loads, (load + works[i], owners[i]))
    return owners


def _offer(
    choice: BlockChoice, block: AveragedBlock, statistic: Statistic, place: Mapping[int, int]
) -> _Offer:
    return _Offer(
        tuple(place[id(p)] for p in block.parameters),
        block.kind,
        block.layout(),
        tuple(choice.reason(p) for p in block.parameters),
        block.memory(),
        block.inverted,
        statistic is not None,
        {name: tuple(t.shape) for name, t in (statistic or {}).items()},
    )


def _same_everywhere(offers: Sequence[_Offer], device: torch.device) -> bool:
    digest = hashlib.sha256(repr(offers).encode()).digest()
    own = torch.tensor([int.from_bytes(digest[:7], "big")], device=device)
    least = own.clone()
    dist.all_reduce(least, dist.ReduceOp.MIN)
    return all_ranks(bool(least == own), device)


def _made(choice: BlockChoice, offer: _Offer) -> AveragedBlock:
    parameters = [choice.parameters[i] for i in offer.places]
    choice.drop([*{b: None for p in parameters if (b := choice.block(p)) is not None}])
    block = BLOCKS[offer.kind].made(parameters, offer.layout)
    assert isinstance(block, AveragedBlock)
    choice.settle(block, offer.reasons)
    return block


def _align(block: AveragedBlock, offers: Mapping[int, _Offer]) -> None:
    """Have a block in every process that has the same past; the longest, if they differ."""
    pasts = [(offer.memory, offer.inverted) for offer in offers.values()]
    if len(offers) == ranks() and all(past == pasts[0] for past in pasts):
        return
    source = max(offers, key=lambda r: (sum(offers[r].memory.values()), offers[r].inverted))
    if not offers[source].memory:
        return  # a new one
    file = io.BytesIO()
    if rank() == source:
        torch.save(block.state_dict(), file)
    told: list[Any] = [file.getvalue()]
    dist.broadcast_object_list(told, source)
    if rank() != source:
        device = block.parameters[0].device
        state = torch.load(io.BytesIO(told[0]), map_location=device, weights_only=True)
        block.load_state_dict(state)


def _filled(block: AveragedBlock, statistic: Statistic, offers: Sequence[_Offer]) -> Statistic:
    """A statistic with zeros where only other processes have any."""
    if not all(offer.finite for offer in offers):
        return None
    statistic = dict(statistic or {})
    for name, shape in ((n, s) for offer in offers for n, s in offer.shapes.items()):
        if name not in statistic:
            statistic[name] = block.zeros(shape)
    return statistic


def _shared(
    blocks: Sequence[AveragedBlock], inverted: Mapping[int, Inversion], owners: Sequence[int]
) -> list[Inversion]:
    """Every block's inversion, from whoever made it."""
    made = {
        i: (int(found.remedy), [(n, t.shape, t.dtype) for n, t in found.tensors.items()])
        for i, found in inverted.items()
    }
    gathered: list[dict[int, Any]] = [{} for _ in range(ranks())]
    dist.all_gather_object(gathered, made)
    told = {i: of_block for of_one in gathered for i, of_block in of_one.items()}
    result = [Inversion({}, Remedy(told[i][0])) for i in range(len(owners))]
    waiting = []
    for owner in sorted(set(owners)):
        pieces = [
            (i, name, torch.Size(shape), dtype, blocks[i].parameters[0].device)
            for i in range(len(owners))
            if owners[i] == owner
            for name, shape, dtype in told[i][1]
        ]
        for same in alike([piece[3:] for piece in pieces]):
            chosen = [pieces[k] for k in same]
            sizes = [shape.numel() for _, _, shape, _, _ in chosen]
            if owner == rank():
                flat = torch.cat([inverted[i].tensors[n].reshape(-1) for i, n, *_ in chosen])
            else:
                _, _, _, dtype, device = chosen[0]
                flat = torch.empty(sum(sizes), dtype=dtype, device=device)
            waiting.append(dist.broadcast(flat, owner, async_op=True))
            for (i, name, shape, _, _), part in zip(chosen, flat.split(sizes), strict=True):
                result[i].tensors[name] = part.view(shape)
    for message in waiting:
        message.wait()
    return result
