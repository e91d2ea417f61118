"""What an observed call of a linear map is: its rows of inputs and of output scores."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor


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
