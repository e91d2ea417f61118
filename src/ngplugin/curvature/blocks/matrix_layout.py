"""Parameters as a matrix of outputs by inputs."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from ngplugin.curvature.taps import Dimensions, as_matrices, as_weight

_EVEN = 16  # numbers that processors multiply together
_SMALL = 64  # a product over so few is soon done in any case


class MatrixLayout:
    """A weight, and maybe a bias as its last input, as matrices `[group, out, in]`.

    Args:
        weight: in memory order `[group, out, in]`, or `[group, in, out]` if `inputs_first`.
        bias: one element an output.
        groups: number of matrices.
        inputs_first: see `weight`.
        dims: its dimensions by their part in the map, where it is in neither order.

    Attributes:
        outputs: rows of a matrix.
        inputs: columns of a matrix, that of the bias included.
        columns: those of a padded matrix.
    """

    def __init__(
        self,
        weight: Tensor,
        bias: Tensor | None = None,
        groups: int = 1,
        inputs_first: bool = False,
        dims: Dimensions | None = None,
    ) -> None:
        self.groups = groups
        self.inputs_first = inputs_first
        self.dims = dims
        self._with_bias = bias is not None
        sizes = weight.shape[0] // groups, weight.numel() // max(1, weight.shape[0])
        self.outputs, self.inputs = sizes[::-1] if inputs_first else sizes
        if dims is not None:
            self.outputs, self.inputs = (math.prod(weight.shape[d] for d in p) for p in dims[1:])
        self.inputs += self._with_bias
        # A bias makes a width that is odd, for which products take up to twice the time.
        pad = -self.inputs % _EVEN if self._with_bias and self.inputs > _SMALL else 0
        self.columns = self.inputs + pad

    def oversized(self, max_factor: int) -> str:
        """Which sides are larger than a factor may be, for the coverage table; maybe none."""
        sides = (("inputs", self.inputs), ("outputs", self.outputs))
        return "".join(
            f"; {name} {size:,} > max_factor: kept diagonal"
            for name, size in sides
            if size > max_factor
        )

    def matrix(self, tensors: Sequence[Tensor], dtype: torch.dtype, padded: bool = False) -> Tensor:
        """Tensors of the parameters' shapes to `[group, out, in]`, or `[group, out, columns]`."""
        layout = self.groups, self.outputs, self.inputs_first, self.dims
        columns = [as_matrices(tensors[0], *layout)]
        if self._with_bias:
            columns.append(tensors[1].reshape(self.groups, self.outputs, 1))
        if padded and self.columns > self.inputs:
            more = self.columns - self.inputs
            columns.append(columns[0].new_zeros(self.groups, self.outputs, more))
        return (torch.cat(columns, 2) if len(columns) > 1 else columns[0]).to(dtype)

    def parts(self, matrix: Tensor, like: Sequence[Tensor]) -> list[Tensor]:
        """Back from `matrix`, padded or not, in the dtypes of `like`."""
        weight = matrix[:, :, : self.inputs - 1] if self._with_bias else matrix
        parts = [as_weight(weight, like[0].shape, self.inputs_first, self.dims)]
        if self._with_bias:
            parts.append(matrix[:, :, self.inputs - 1])
        return [
            part.reshape(t.shape).to(t.dtype).contiguous()
            for part, t in zip(parts, like, strict=True)
        ]
