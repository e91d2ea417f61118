"""Reads a call of a torch function as a linear map: its rows of inputs and of output scores.

One layout for every map, `[group, example, shared, feature]`: a linear layer on tokens shares its
weight over the tokens of an example, a convolution over the pixels of its output, and a grouped
convolution is several maps side by side. After that all maps are the same mathematics (the layout
of Eschenhagen et al. 2023, arXiv:2311.00636).

Each reader below has the signature of the torch function it reads.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

_Pair = int | tuple[int, ...]


@dataclass(frozen=True)
class MapCall:
    """One observed application of a weight: output = weight · input + bias, a row at a time.

    Attributes:
        kind: what the coverage table calls it.
        weight: the parameter; as a matrix it is `[group, out, in]` in memory order.
        bias: the parameter added to each output row, if any.
        groups: number of independent maps.
        input_rows: computes `[group, example, shared, in]`.
        score_rows: turns a gradient of the output's shape into `[group, example, shared, out]`.
    """

    kind: str
    weight: Tensor
    bias: Tensor | None
    groups: int
    input_rows: Callable[[], Tensor]
    score_rows: Callable[[Tensor], Tensor]


def _linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> MapCall | None:
    if weight.dim() != 2:  # a vector is allowed as weight; it is no matrix to factorize
        return None
    x = input.detach()

    def rows(t: Tensor) -> Tensor:  # [..., feature] -> [1, example, shared, feature]
        if t.dim() == 1:
            return t.reshape(1, 1, 1, -1)
        return t.reshape(1, t.shape[0], -1, t.shape[-1])

    return MapCall("linear", weight, bias, 1, lambda: rows(x), rows)


def _conv2d(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: _Pair = 1,
    padding: str | _Pair = 0,
    dilation: _Pair = 1,
    groups: int = 1,
) -> MapCall:
    x = input.detach()
    kernel = weight.shape[2:]
    stride, dilation = _pair(stride), _pair(dilation)

    def input_rows() -> Tensor:
        image = x if x.dim() == 4 else x.unsqueeze(0)  # [N, C, H, W]
        image = F.pad(image, _margins(padding, kernel, dilation))
        # [N, C·kh·kw, L]: the channel is the slowest index, so the groups lie one after another.
        patches = F.unfold(image, tuple(kernel), dilation=dilation, stride=stride)
        grouped: Tensor = patches.unflatten(1, (groups, -1))  # [N, group, in, L]
        return grouped.permute(1, 0, 3, 2)

    def score_rows(score: Tensor) -> Tensor:
        score = score if score.dim() == 4 else score.unsqueeze(0)  # [N, out, H', W']
        grouped: Tensor = score.flatten(2).unflatten(1, (groups, -1))  # [N, group, out, L]
        return grouped.permute(1, 0, 3, 2)

    return MapCall("conv2d", weight, bias, groups, input_rows, score_rows)


def _pair(value: _Pair) -> tuple[int, int]:
    if isinstance(value, int):
        return value, value
    return (value[0], value[-1])


def _margins(
    padding: str | _Pair, kernel: torch.Size, dilation: tuple[int, int]
) -> tuple[int, int, int, int]:
    """Zeros to add: left, right, top, bottom."""
    if padding == "valid":
        return 0, 0, 0, 0
    if padding == "same":  # the odd one of an uneven total goes to the right and to the bottom
        height, width = (d * (k - 1) for d, k in zip(dilation, kernel, strict=True))
        return width // 2, width - width // 2, height // 2, height - height // 2
    assert not isinstance(padding, str)  # conv2d itself refuses any other word
    height, width = _pair(padding)
    return width, width, height, height


_READERS: dict[Callable[..., Any], Callable[..., MapCall | None]] = {
    F.linear: _linear,
    F.conv2d: _conv2d,
}


def read_map_call(
    function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> MapCall | None:
    """The linear map that a call of a torch function applies, None if it is none we know."""
    reader = _READERS.get(function)
    return None if reader is None else reader(*args, **kwargs)
