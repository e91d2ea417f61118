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

import torch

from ngplugin.curvature.blocks import Block
from ngplugin.curvature.parameter_vector import Parts, dot, total

#: See `balance`.
LayerBalance = Literal["balanced", "natural", "orthogonal", "equal"]

_VECTOR = 0.1  # mean square of a vector's elements, where a matrix is semi-orthogonal


def balance(blocks: Sequence[Block], natural: Parts, curved: Parts, how: LayerBalance) -> None:
    """Rescale the natural gradient block by block, in place, keeping its predicted KL as a whole.

    With d the natural gradient of a block, q = dᵀFd, and r = √min(rows, columns) for a matrix and
    √(size/10) for a vector:

        "natural":     d as it is
        "orthogonal":  d · r/‖d‖, every block as long as a semi-orthogonal matrix
        "balanced":    d · (r/‖d‖)^½, the geometric mean of the two
        "equal":       d / √q, every block with the same share of the KL

    times one common factor, so that Σ q stays.

    Args:
        blocks: those of F.
        natural: d, by the id of each parameter.
        curved: Fd.
        how: see above.

    Source: the size of a semi-orthogonal step is that of Muon (Jordan et al. 2024); that weighing
    it against the natural scale pays was measured here, see `experiments/results/`.
    """
    parts = [[id(p) for p in block.parameters if id(p) in natural] for block in blocks]
    chosen = [(block, ids) for block, ids in zip(blocks, parts, strict=True) if ids]
    if how == "natural" or len(chosen) < 2:
        return
    # [blocks] each, and all on the device: nothing waits for the host.
    q = torch.stack([total(dot(natural[i], curved[i]) for i in ids) for _, ids in chosen])
    if how == "equal":
        sizes = q.clamp_min(0).rsqrt()
    else:
        squares = torch.stack(
            [total(dot(natural[i], natural[i]) for i in ids) for _, ids in chosen]
        )
        lengths = squares.new_tensor([_length(block) for block, _ in chosen])
        sizes = (lengths / squares.sqrt()) ** (1.0 if how == "orthogonal" else 0.5)
    # A block that does not move, or whose numbers overflow, stays as it is beside the others.
    sizes = torch.where(sizes.isfinite() & (sizes > 0), sizes, 0.0)
    common = (q.sum() / (sizes.square() * q).sum()).sqrt()
    factors = torch.where(sizes > 0, sizes * common, 1.0)
    factors = torch.where(factors.isfinite(), factors, 1.0)
    for factor, (_, ids) in zip(factors.unbind(), chosen, strict=True):
        for i in ids:
            natural[i].mul_(factor)
            curved[i].mul_(factor)


def _length(block: Block) -> float:
    """That of a semi-orthogonal step."""
    p = block.parameters[0]
    if p.dim() < 2:
        return math.sqrt(_VECTOR * sum(t.numel() for t in block.parameters))
    return math.sqrt(min(len(p), p.numel() // max(1, len(p))))
