"""A step before its length is decided: where every parameter goes, and its quadratic model."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ngplugin.curvature.blocks.block import curvature_dtype, rounding
from ngplugin.curvature.objective import ObjectiveWeight
from ngplugin.curvature.parameter_vector import Parts, dot, total
from ngplugin.curvature.ranks import mean_over_ranks
from ngplugin.direction import Direction
from ngplugin.layer_balance import LayerBalance, balance
from ngplugin.move import Move
from ngplugin.solver import Metric
from ngplugin.step_group import StepGroup


@dataclass(frozen=True)
class Model:
    """A full step's quadratic model and the vectors' sizes, on the host."""

    q: float = 0.0  # ½ΔᵀFΔ, nats per term
    slope: float = 0.0  # -gᵀΔ, in units of the objective
    gg: float = 0.0  # inner products of the gradient g and the natural gradient d
    dd: float = 0.0
    gd: float = 0.0
    nats: float = 1.0  # what a KL of 1 a term is in units of the objective
    rounding: float = 0.0  # nats per term: differences of losses below this say nothing

    def finite(self) -> bool:
        """Whether the step is made of numbers."""
        return all(map(math.isfinite, (self.q, self.slope, self.gg, self.dd, self.gd)))

    def expected(self, scale: float) -> float:
        """How far the objective falls, for `scale` of the full step."""
        return scale * self.slope - scale**2 * self.q * self.nats


class Proposals:
    """Makes a step of a direction: shares it out among the blocks, and says what it will do.

    Where F d is not known, ½ΔᵀFΔ is by what each block's curvature was when it was. What weight
    decay, and rates that differ within a block, add to that is kept as one factor from then too.

    Args:
        layer_balance: see `balance`.
    """

    def __init__(self, layer_balance: LayerBalance) -> None:
        self._layer_balance = layer_balance
        self.beside = 1.0  # ½ΔᵀFΔ over what the blocks' pieces say of it, at the last step with F d

    def made(
        self,
        groups: Sequence[StepGroup],
        direction: Direction,
        metric: Metric,
        weight: ObjectiveWeight,
        units: dict[int, float],
        squares: dict[int, Tensor],
    ) -> tuple[list[Move], Model]:
        """The step Δ = -lr (d + decay/lr θ) at full length, and its model.

        Args:
            groups: what moves, and at what rate.
            direction: d.
            metric: F.
            weight: of the step's objective.
            units: what d is to be multiplied by to be that of the gradient over Σw, by the ids of
                parameters; 1 for others.
            squares: gᵀg of each parameter.
        """
        natural = direction.natural
        moved = [
            (p, p.grad, group)
            for group in groups
            for p in group.parameters
            if id(p) in natural and p.grad is not None and group.lr > 0
        ]
        if not moved:
            return [], Model()
        decaying = [(p, g, group.decay) for p, g, group in moved if group.decay]
        # All that the host has to know, in one transfer.
        numbers = mean_over_ranks(
            torch.stack(
                [
                    *(piece.along for piece in direction.pieces),
                    *(piece.curvature for piece in direction.pieces),
                    *(dot(d, d) for d in natural.values()),
                    *(squares[id(p)] for p, _, _ in moved),
                    *(dot(g, natural[id(p)]) for p, g, _ in moved),
                    *(dot(g, p) for p, g, _ in decaying),
                ]
            )
        ).tolist()
        pieces = len(direction.pieces)
        sizes = pieces, pieces, len(natural), len(moved), len(moved), len(decaying)
        alongs, curvatures, dd, gg, gd, gp = _split(numbers, sizes)
        lengths = dict(zip(natural, dd, strict=True))
        shares = balance(
            [piece.length for piece in direction.pieces],
            [sum(lengths[i] for i in piece.ids) for piece in direction.pieces],
            alongs,
            self._layer_balance,
        )
        share_of = {i: units.get(i, 1.0) for i in natural}
        for piece, share in zip(direction.pieces, shares, strict=True):
            share_of.update((i, share * share_of[i]) for i in piece.ids)
        moves = [
            Move(p, natural[id(p)], share_of[id(p)], group.lr, group.decay) for p, _, group in moved
        ]
        curvatures = [
            share_of[piece.ids[0]] ** 2 * c
            for piece, c in zip(direction.pieces, curvatures, strict=True)
        ]
        q = self._curvature(moves, direction, metric, curvatures)
        along = [m.share * x for m, x in zip(moves, gd, strict=True)]
        model = Model(
            # F is kept per Σw; a nat per term is ½ΔᵀFΔ over the weight in nats.
            q=0.5 * q * (weight.total / weight.nats),
            slope=sum(m.lr * x for m, x in zip(moves, along, strict=True))
            + sum(decay * x for (_, _, decay), x in zip(decaying, gp, strict=True)),
            gg=sum(gg),
            dd=sum(m.share**2 * lengths[id(m.parameter)] for m in moves),
            gd=sum(along),
            nats=weight.nats,
            rounding=rounding(curvature_dtype(moves[0].parameter)),
        )
        return moves, model

    def _curvature(
        self,
        moves: Sequence[Move],
        direction: Direction,
        metric: Metric,
        curvatures: Sequence[float],
    ) -> float:
        """ΔᵀFΔ/Σw of the step at full length, from dᵀFd of each piece."""
        lr = {id(m.parameter): m.lr for m in moves}
        rates = [{lr.get(i, 0.0) for i in piece.ids} for piece in direction.pieces]
        by_pieces = sum(max(r) ** 2 * c for r, c in zip(rates, curvatures, strict=True))
        plain = bool(rates) and all(len(r) == 1 for r in rates) and not any(m.decay for m in moves)
        if plain:
            return by_pieces
        known = all(id(m.parameter) in direction.products for m in moves)
        if rates and not known:
            return by_pieces * self.beside
        whole = float(mean_over_ranks(_product(moves, direction.products if known else {}, metric)))
        self.beside = whole / by_pieces if by_pieces > 0 and math.isfinite(whole) else 1.0
        return whole


def _product(moves: Sequence[Move], products: Parts, metric: Metric) -> Tensor:
    """ΔᵀFΔ/Σw, a scalar."""
    delta = {id(m.parameter): m.direction * m.lr for m in moves}
    if len({m.lr for m in moves}) > 1 or not products:
        product = metric.product(delta)
    else:  # then F d is at hand, and F Δ differs from it by what decays
        product = {id(m.parameter): products[id(m.parameter)] * (m.lr * m.share) for m in moves}
        # All of them: a weight's decay curves its bias too.
        decayed = {id(m.parameter): m.parameter * m.decay for m in moves}
        for key, part in metric.product(decayed).items():
            product[key] = product[key] + part
    zero = torch.zeros((), device=moves[0].vector.device)
    return total([zero, *(dot(delta[key], part) for key, part in product.items())])


def _split(numbers: Sequence[float], sizes: Sequence[int]) -> list[Sequence[float]]:
    parts, start = [], 0
    for size in sizes:
        parts.append(numbers[start : start + size])
        start += size
    return parts
