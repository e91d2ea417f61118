"""Parameters as a matrix of outputs by inputs."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


class MatrixLayout:
    """A weight, and maybe a bias as its last input, as matrices `[group, out, in]`.

    Args:
        weight: in memory order `[group, out, in]`, or `[group, in, out]` if `inputs_first`.
        bias: one element an output.
        groups: number of matrices.
        inputs_first: see `weight`.
    """

    def __init__(
        self,
        weight: Tensor,
        bias: Tensor | None = None,
        groups: int = 1,
        inputs_first: bool = False,
    ) -> None:
        self.groups = groups
        self.inputs_first = inputs_first
        self._with_bias = bias is not None
        sizes = weight.shape[0] // groups, weight.numel() // max(1, weight.shape[0])
        self.outputs, self.inputs = sizes[::-1] if inputs_first else sizes
        self.inputs += self._with_bias

    def oversized(self, max_factor: int) -> str:
        """Which sides are larger than a factor may be, for the coverage table; maybe none."""
        sides = (("inputs", self.inputs), ("outputs", self.outputs))
        return "".join(
            f"; {name} {size:,} > max_factor: kept diagonal"
            for name, size in sides
            if size > max_factor
        )

    def matrix(self, tensors: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
        """Tensors of the parameters' shapes to `[group, out, in]`."""
        if self.inputs_first:
            columns = [tensors[0].reshape(self.groups, -1, self.outputs).mT]
        else:
            columns = [tensors[0].reshape(self.groups, self.outputs, -1)]
        if self._with_bias:
            columns.append(tensors[1].reshape(self.groups, self.outputs, 1))
        return torch.cat(columns, 2).to(dtype)

    def parts(self, matrix: Tensor, like: Sequence[Tensor]) -> list[Tensor]:
        """`[group, out, in]` to tensors of the parameters' shapes, in the dtypes of `like`."""
        weight = matrix[:, :, :-1] if self._with_bias else matrix
        if self.inputs_first:
            weight = weight.mT
        parts = [weight, matrix[:, :, -1]] if self._with_bias else [weight]
        return [
            part.reshape(t.shape).to(t.dtype).contiguous()
            for part, t in zip(parts, like, strict=True)
        ]
