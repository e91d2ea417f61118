"""Convolutions as linear maps of patches, in any number of dimensions."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch.nn.functional as F
from torch import Tensor

from ngplugin.curvature.taps.map_call import MapCall

Sizes = int | Sequence[int]  # one number for all dimensions, or one for each


def convolution(kind: str) -> Callable[..., MapCall]:
    """A reader of `F.conv1d`, `F.conv2d` or `F.conv3d`."""

    def read(
        input: Tensor,
        weight: Tensor,
        bias: Tensor | None = None,
        stride: Sizes = 1,
        padding: str | Sizes = 0,
        dilation: Sizes = 1,
        groups: int = 1,
    ) -> MapCall:
        x = input.detach()
        kernel = weight.shape[2:]
        strides, dilations = _each(stride, kernel), _each(dilation, kernel)

        def input_rows(every: int = 1) -> Tensor:
            some = _batched(x, kernel)[::every]
            padded = F.pad(some, _margins(padding, kernel, dilations))
            return patch_rows(padded, kernel, strides, dilations, groups)

        def score_rows(score: Tensor) -> Tensor:
            return position_rows(_batched(score, kernel), groups)

        return MapCall(
            kind, weight, bias, groups, input_rows, score_rows, thin_input_rows=input_rows
        )

    return read


def transposed_convolution(kind: str) -> Callable[..., MapCall]:
    """A reader of `F.conv_transpose1d`, `F.conv_transpose2d` or `F.conv_transpose3d`.

    The rows are the positions of the *input*: each is mapped to a whole patch of the output, and
    overlapping patches are added up. So the score of a row is the patch of the output's score
    that it reaches, and the bias, added to each output position once, is no part of a row.
    """

    def read(
        input: Tensor,
        weight: Tensor,
        bias: Tensor | None = None,
        stride: Sizes = 1,
        padding: Sizes = 0,
        output_padding: Sizes = 0,
        groups: int = 1,
        dilation: Sizes = 1,
    ) -> MapCall:
        x = input.detach()
        kernel = weight.shape[2:]  # of [in, out/groups, *kernel]
        strides, dilations = _each(stride, kernel), _each(dilation, kernel)
        # The patches cover the output as it would be with nothing cut off at its edges (padding)
        # and nothing appended behind (output padding); negative margins remove what was appended.
        pairs = zip(_each(padding, kernel), _each(output_padding, kernel), strict=True)
        margins = [m for p, extra in reversed([*pairs]) for m in (p, p - extra)]

        def input_rows() -> Tensor:
            return position_rows(_batched(x, kernel), groups)

        def score_rows(score: Tensor) -> Tensor:
            whole = F.pad(_batched(score, kernel), margins)
            return patch_rows(whole, kernel, strides, dilations, groups)

        return MapCall(kind, weight, bias, groups, input_rows, score_rows, True, False)

    return read


def patch_rows(
    image: Tensor,
    kernel: Sequence[int],
    strides: Sequence[int],
    dilations: Sequence[int],
    groups: int,
) -> Tensor:
    """What the kernel meets at each of its positions.

    Args:
        image: `[N, C, *size]`.
        kernel: its size, one number a dimension, like the next two.
        strides: from one position to the next.
        dilations: from one element of the kernel to the next.
        groups: that the channels are divided into.

    Returns:
        `[group, N, position, C/groups · kernel]`, channels slowest, as in a weight's memory.
    """
    dims = len(kernel)
    for i, (k, s, d) in enumerate(zip(kernel, strides, dilations, strict=True)):
        # Each unfolding appends a dimension; the result is a view, whatever the overlap.
        image = image.unfold(2 + i, d * (k - 1) + 1, s)[..., ::d]
    grouped = image.unflatten(1, (groups, -1))  # [N, group, C/groups, *positions, *kernel]
    positions, within = range(3, 3 + dims), range(3 + dims, 3 + 2 * dims)
    rows: Tensor = grouped.permute(1, 0, *positions, 2, *within)
    return rows.flatten(2, 1 + dims).flatten(3)


def position_rows(image: Tensor, groups: int) -> Tensor:
    """`[N, C, *size]` to `[group, N, position, C/groups]`."""
    grouped: Tensor = image.flatten(2).unflatten(1, (groups, -1))
    return grouped.permute(1, 0, 3, 2)


def _batched(image: Tensor, kernel: Sequence[int]) -> Tensor:
    """A single `[C, *size]` becomes a batch of one."""
    return image if image.dim() == len(kernel) + 2 else image.unsqueeze(0)


def _each(value: Sizes, kernel: Sequence[int]) -> list[int]:
    """One number a dimension."""
    values = [value] if isinstance(value, int) else [*value]
    return values * len(kernel) if len(values) == 1 else values


def _margins(padding: str | Sizes, kernel: Sequence[int], dilations: Sequence[int]) -> list[int]:
    """Zeros to add before and after, the last dimension first, as `F.pad` takes them."""
    if padding == "valid":
        return [0] * (2 * len(kernel))
    if padding == "same":  # the odd one of an uneven total goes behind
        totals = [d * (k - 1) for d, k in zip(dilations, kernel, strict=True)]
        pairs = [(total // 2, total - total // 2) for total in totals]
    else:
        assert not isinstance(padding, str)  # the convolution itself refuses any other word
        pairs = [(p, p) for p in _each(padding, kernel)]
    return [margin for pair in reversed(pairs) for margin in pair]
