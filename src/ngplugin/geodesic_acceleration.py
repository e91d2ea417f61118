"""The second-order part of a step: what the prediction's own curvature along it calls for.

A Gauss-Newton step v takes the prediction for linear in the parameters. To second order it moves by
J v + ½ f'' with f'' = d²f(θ+tv)/dt², so the step that undoes the second term is

    a = -½ (JᵀHJ + λ)⁻¹ Jᵀ H f'',   θ ← θ + v + a

with the same matrix as v itself. In a narrow valley that bends, v alone leaves it and is refused
until damping has made it short; v + a follows the bend. f'' is a difference quotient along v, one
more run of the recorded forward pass, and a one more solve: little beside the matrix.

Source: Transtrum & Sethna 2012 (arXiv:1201.5885) §4, with their step h = 0.1 and bound on a.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from ngplugin.curvature.blocks import ExactBlock
from ngplugin.curvature.exact_rows import root_products
from ngplugin.curvature.observation import Observation
from ngplugin.move import Move, move, restore

_H = 0.1  # share of the step at which the prediction is looked at
_LONGEST = 0.75  # 2‖a‖/‖v‖ up to which the series is trusted


def accelerated(
    moves: Sequence[Move], scale: float, taped: Sequence[Observation], block: ExactBlock
) -> list[Move]:
    """The moves whose `scale` is v + a; as they are where a is too long to be trusted.

    Args:
        moves: `scale` of them is v. The parameters are where they were.
        scale: share of the step that is to be made.
        taped: what was observed of this step, as far as it can be computed again.
        block: holds the rows √(wH) J of all of it, and solves with their matrix.
    """
    held = {id(p) for p in block.parameters}
    if scale == 0 or not held <= {id(m.parameter) for m in moves}:
        return [*moves]
    move_of = {id(m.parameter): m for m in moves}
    own = [move_of[id(p)] for p in block.parameters]
    v = [m.direction * (-m.lr * scale) for m in own]
    before = [m.parameter.clone() for m in moves]
    move(moves, _H * scale)
    products: list[Tensor] | None = []
    for observation in taped:
        now = {id(loss): predictions for loss, predictions in observation.replay()}
        for loss in observation.scored:
            then = loss.call.predictions
            difference = [(p - q) / _H for p, q in zip(now[id(loss)], then, strict=True)]
            products = root_products(loss.call, loss.weights, difference, products)
    restore(moves, before)
    slope = block.rows_times(v)  # √(wH) J v
    if products is None or sum(map(len, products)) != len(slope):
        return [*moves]  # rows that the block does not have, or has by other names
    # Beyond its linear part a difference quotient over h has ½ h f''.
    bend = (torch.cat(products).to(slope.dtype) / math.sqrt(block.total_weight) - slope) * (2 / _H)
    a = [part * -0.5 for part in block.solve_rows(bend)]
    lengths = torch.stack([torch.cat([t.reshape(-1) for t in x]).norm() for x in (a, v)]).tolist()
    if not 2 * lengths[0] <= _LONGEST * lengths[1]:
        return [*moves]
    added = {id(m.parameter): part for m, part in zip(own, a, strict=True)}
    return [
        _along(m, m.direction - added[id(m.parameter)] / (m.lr * scale))
        if id(m.parameter) in added
        else m
        for m in moves
    ]


def _along(m: Move, direction: Tensor) -> Move:
    """A move by a direction that has its decay's part."""
    return replace(m, vector=direction, share=1.0, decay=0.0)
