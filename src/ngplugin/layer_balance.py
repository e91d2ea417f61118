"""How a step is shared out among the blocks of the Fisher matrix.

A block-diagonal F does not know that layers move the prediction together, so the length that the
natural gradient gives each layer beside the others is its weakest word: where the layers above
shrink a layer's scores, its block is small and its step long, and the other way round. The
direction within a block is kept here, and the blocks' lengths are weighed against a second opinion:
a step of a matrix is as long as a semi-orthogonal one, ‖D‖ = √min(rows, columns), which changes
what the layer passes on by the same share whatever its scores are.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

from ngplugin.curvature.blocks import Block

#: See `balance`.
LayerBalance = Literal["balanced", "natural", "orthogonal", "equal"]

_VECTOR = 0.1  # mean square of a vector's elements, where a matrix is semi-orthogonal


def balance(
    lengths: Sequence[float], squares: Sequence[float], q: Sequence[float], how: LayerBalance
) -> list[float]:
    """What each block's natural gradient is to be multiplied by.

    With d the natural gradient of a block, q = dᵀ(F + damping)d, its damped KL, and
    r = √min(rows, columns) for a matrix and √(size/10) for a vector:

        "natural":     d as it is
        "orthogonal":  d · r/‖d‖, every block as long as a semi-orthogonal matrix
        "balanced":    d · (r/‖d‖)^½, the geometric mean of the two
        "equal":       d / √q, every block with the same share

    times one common factor, so that Σ q stays.

    Args:
        lengths: r of each block, see `semi_orthogonal_length`.
        squares: ‖d‖².
        q: dᵀ(F + damping)d, which is the gradient's product with d.
        how: see above.

    Source: the size of a semi-orthogonal step is that of Muon (Jordan et al. 2024); that weighing
    it against the natural scale pays was measured here, see `experiments/race/`.
    """
    if how == "natural" or len(lengths) < 2:
        return [1.0] * len(lengths)
    if how == "equal":
        sizes = [_power(x, -0.5) for x in q]
    else:
        power = 1.0 if how == "orthogonal" else 0.5
        sizes = [_power(r * _power(x, -0.5), power) for r, x in zip(lengths, squares, strict=True)]
    # A block that does not move, or whose numbers overflow, stays as it is beside the others.
    moved = [i for i, x in enumerate(q) if sizes[i] > 0 and math.isfinite(x)]
    before, after = sum(q[i] for i in moved), sum(sizes[i] ** 2 * q[i] for i in moved)
    common = math.sqrt(before / after) if before > 0 and 0 < after < math.inf else 0.0
    shares = [size * common for size in sizes]
    return [share if 0 < share < math.inf else 1.0 for share in shares]


def semi_orthogonal_length(block: Block) -> float:
    """√min(rows, columns) for a matrix, √(size/10) for a vector."""
    p = block.parameters[0]
    if p.dim() < 2:
        return math.sqrt(_VECTOR * sum(t.numel() for t in block.parameters))
    return math.sqrt(min(len(p), p.numel() // max(1, len(p))))


def _power(x: float, power: float) -> float:
    """X to a power; zero where x is no positive number."""
    return float(x**power) if 0 < x < math.inf else 0.0
