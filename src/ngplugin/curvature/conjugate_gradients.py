"""Preconditioned conjugate gradients: A x = b from products with A alone."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from ngplugin.curvature.parameter_vector import Parts, combined, inner

_Map = Callable[[Parts], Parts]


@dataclass(frozen=True)
class Solution:
    """What was found.

    Attributes:
        x: the best so far.
        product: A x.
        error: √(rᵀM⁻¹r / bᵀM⁻¹b) with r = b - A x.
        iterations: how many products it took, that with the start not counted.
    """

    x: Parts
    product: Parts
    error: float
    iterations: int


def conjugate_gradients(
    multiply: _Map,
    b: Parts,
    precondition: _Map,
    iterations: int,
    tolerance: float,
    start: Parts | None = None,
) -> Solution:
    """Minimize the quadratic φ(x) = ½xᵀAx - bᵀx, over one more direction each iteration.

    It ends when √(rᵀM⁻¹r) ≤ tolerance · √(bᵀM⁻¹b). With A in the place of M that were a bound on
    the share of φ's whole fall that is still to come, φ(x) - min φ = ½rᵀA⁻¹r: what Martens 2010
    watches, in a number that does not depend on how the parameters are scaled either.

    Args:
        multiply: v to A v, symmetric and positive definite.
        b: the right-hand side.
        precondition: v to M⁻¹v, symmetric, positive definite, near A⁻¹.
        iterations: the most products with A, one more with `start`.
        tolerance: see above.
        start: its best multiple, by φ, is where the search begins; None to begin at zero.

    Source: Hestenes & Stiefel 1952; Nocedal & Wright 2006, algorithm 5.3; Martens 2010, Deep
    Learning via Hessian-free Optimization, for starting from the last step's solution.
    """
    zero = {key: part.new_zeros(part.shape) for key, part in b.items()}
    x, Ax = zero, zero
    if start is not None:
        image = multiply(start)
        curvature, slope = inner(start, image), inner(start, b)
        if float(curvature) > 0:
            x, Ax = (
                combined(zero, slope / curvature, start),
                combined(zero, slope / curvature, image),
            )
    r = combined(b, -1.0, Ax)
    scale = float(inner(b, precondition(b)))
    z = precondition(r)
    rz = inner(r, z)
    p = z
    done = 0
    while done < iterations and float(rz) > tolerance**2 * scale:
        Ap = multiply(p)
        pAp = inner(p, Ap)
        if not float(pAp) > 0:
            break  # rounding has used up what A is in this direction
        done += 1
        alpha = rz / pAp
        x, Ax, r = combined(x, alpha, p), combined(Ax, alpha, Ap), combined(r, -alpha, Ap)
        z = precondition(r)
        rz, before = inner(r, z), rz
        p = combined(z, rz / before, p)
    error = math.sqrt(max(float(rz), 0.0) / scale) if scale > 0 else 0.0
    return Solution(x, Ax, error, done)
