"""Linear layers as linear maps of feature vectors."""

from __future__ import annotations

from torch import Tensor

from ngplugin.curvature.taps.map_call import MapCall


def linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> MapCall | None:
    """Reads `F.linear`."""
    if weight.dim() != 2:  # a vector is allowed as weight; it is no matrix to factorize
        return None
    x = input.detach()
    return MapCall("linear", weight, bias, 1, lambda: feature_rows(x), feature_rows)


def feature_rows(t: Tensor) -> Tensor:
    """`[..., feature]` to `[1, example, shared, feature]`."""
    if t.dim() == 1:
        return t.reshape(1, 1, 1, -1)
    return t.reshape(1, t.shape[0], -1, t.shape[-1])
