"""Where a step goes: the natural gradient in its pieces, before they are weighed and bounded."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor

from ngplugin.curvature.parameter_vector import Parts


@dataclass(frozen=True)
class Piece:
    """What keeps its shape when a step is shared out: a block's part of a direction.

    Attributes:
        ids: of its parameters.
        along: |vᵀd| over these, a scalar.
        curvature: dᵀFd/Σw.
        length: that of a semi-orthogonal step.
    """

    ids: list[int]
    along: Tensor
    curvature: Tensor
    length: float


@dataclass(frozen=True)
class Direction:
    """D = (F/Σw + damping)⁻¹ v, for some vector v.

    Attributes:
        natural: d, by the id of each parameter.
        products: F/Σw d, of the parameters of which it was formed.
        pieces: those of d; without any, nothing is known of its curvature.
    """

    natural: Parts
    products: Parts = field(default_factory=dict)
    pieces: list[Piece] = field(default_factory=list)
