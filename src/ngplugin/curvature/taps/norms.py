"""Normalizations with a scale and an offset for each feature."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class NormCall:
    """One observed normalization: output = weight · normalized input + bias, feature by feature.

    Attributes:
        kind: what the coverage table calls it.
        weight: the scales, if any.
        bias: the offsets, if any.
    """

    kind: str
    weight: Tensor | None
    bias: Tensor | None


def _layer_norm(
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> NormCall:
    return NormCall("layer_norm", weight, bias)


def _rms_norm(
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    eps: float | None = None,
) -> NormCall:
    return NormCall("rms_norm", weight, None)


def _group_norm(
    input: Tensor,
    num_groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> NormCall:
    return NormCall("group_norm", weight, bias)


def _with_statistics(kind: str) -> Callable[..., NormCall]:
    """A reader of `F.batch_norm` or `F.instance_norm`."""

    def read(
        input: Tensor,
        running_mean: Tensor | None = None,
        running_var: Tensor | None = None,
        weight: Tensor | None = None,
        bias: Tensor | None = None,
        *options: Any,
        **more: Any,
    ) -> NormCall:
        return NormCall(kind, weight, bias)

    return read


_READERS: dict[Callable[..., Any], Callable[..., NormCall]] = {
    F.layer_norm: _layer_norm,
    F.rms_norm: _rms_norm,
    F.group_norm: _group_norm,
    F.batch_norm: _with_statistics("batch_norm"),
    F.instance_norm: _with_statistics("instance_norm"),
}

#: The normalizations that are known.
NORMS = tuple(_READERS)


def read_norm_call(
    function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> NormCall | None:
    """The normalization that a call of a torch function applies, None if it is none we know."""
    reader = _READERS.get(function)
    return None if reader is None else reader(*args, **kwargs)
