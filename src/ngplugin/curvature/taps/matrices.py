"""Linear layers and matrix products as linear maps of feature vectors.

The matrix need not be the parameter itself. Packed weights are applied piece by piece (the query,
key and value of attention), tied ones transposed; such a view is traced back to its parameter.
"""

from __future__ import annotations

import math

from torch import Tensor

from ngplugin.curvature.taps.map_call import MapCall

_MOST_PIECES = 16  # of a packed weight: each piece has factors of its own
_LARGEST_BILINEAR = 4096  # products of two features, whose second moments are to be kept


def linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> MapCall | None:
    """Reads `F.linear`."""
    return _product("linear", input, weight, bias)


def matmul(input: Tensor, other: Tensor) -> MapCall | None:
    """Reads `x @ W`, `torch.matmul`, `torch.mm`, with the weight on the right."""
    return _product("matmul", input, other.mT, None) if other.dim() == 2 else None


def addmm(
    input: Tensor, mat1: Tensor, mat2: Tensor, *, beta: float = 1, alpha: float = 1
) -> MapCall | None:
    """Reads `torch.addmm`, input + mat1 @ mat2."""
    if alpha != 1 or beta != 1:
        return None
    return _product("addmm", mat1, mat2.mT, input if input.dim() == 1 else None)


def bilinear(
    input1: Tensor, input2: Tensor, weight: Tensor, bias: Tensor | None = None
) -> MapCall | None:
    """Reads `F.bilinear`: linear in the products of the one's features with the other's."""
    if weight.shape[1:].numel() > _LARGEST_BILINEAR:
        return None
    x, y = input1.detach(), input2.detach()

    def input_rows() -> Tensor:
        return feature_rows((x[..., :, None] * y[..., None, :]).flatten(-2))

    return MapCall("bilinear", weight, bias, 1, input_rows, feature_rows)


def feature_rows(t: Tensor) -> Tensor:
    """`[..., feature]` to `[1, example, shared, feature]`."""
    if t.dim() == 1:
        return t.reshape(1, 1, 1, -1)
    return t.reshape(1, t.shape[0], -1, t.shape[-1])


def _product(kind: str, input: Tensor, matrix: Tensor, bias: Tensor | None) -> MapCall | None:
    """input · matrixᵀ + bias, with a matrix `[out, in]`."""
    if matrix.dim() != 2:  # a vector is allowed as weight; it is no matrix to factorize
        return None
    x = input.detach()
    weight = _origin(matrix)
    if weight.dim() != 2 or not weight.is_contiguous():
        return None
    stride = weight.shape[1]
    offset = int(matrix.storage_offset() - weight.storage_offset())
    start, rest = divmod(offset, max(1, stride))
    transposed = matrix.shape == weight.shape[::-1] and matrix.stride() == (1, stride)
    if transposed and matrix.stride() != weight.stride():
        return MapCall(kind, weight, bias, 1, lambda: feature_rows(x), feature_rows, True)
    if rest or matrix.shape[1] != stride or matrix.stride() != weight.stride():
        return None
    size = math.gcd(start, matrix.shape[0], weight.shape[0])
    groups, covered = weight.shape[0] // size, matrix.shape[0] // size
    if groups > _MOST_PIECES:
        return None
    if bias is not None:
        added = _origin(bias)
        first = bias.storage_offset() - added.storage_offset()
        if added.shape == weight.shape[:1] and bias.is_contiguous() and first == start:
            bias = added
    joins = bias is None or bias.shape == weight.shape[:1]

    def input_rows() -> Tensor:
        rows = feature_rows(x)
        return rows.expand(covered, *rows.shape[1:])

    def score_rows(score: Tensor) -> Tensor:
        pieces: Tensor = feature_rows(score).unflatten(-1, (covered, size))
        return pieces[0].movedim(2, 0)

    return MapCall(kind, weight, bias, groups, input_rows, score_rows, False, joins, start // size)


def _origin(t: Tensor) -> Tensor:
    """What a tensor is a differentiable view of, or the tensor itself."""
    base = t._base
    if base is None or t.is_leaf:
        return t
    return base
