"""Embeddings as look-ups: linear maps of one-hot inputs."""

from __future__ import annotations

import torch
from torch import Tensor

from ngplugin.curvature.taps.map_call import LookupCall


def embedding(
    input: Tensor,
    weight: Tensor,
    padding_idx: int | None = None,
    max_norm: float | None = None,
    norm_type: float = 2.0,
    scale_grad_by_freq: bool = False,
    sparse: bool = False,
) -> LookupCall:
    """Reads `F.embedding`."""
    indices = input.detach().reshape(-1).to(torch.int64, copy=True)
    kept = _not_padding(indices, weight, padding_idx)

    def score_rows(score: Tensor) -> Tensor:
        return score.reshape(-1, score.shape[-1]) * kept[:, None]

    return LookupCall("embedding", weight, indices, score_rows)


def embedding_bag(
    input: Tensor,
    weight: Tensor,
    offsets: Tensor | None = None,
    max_norm: float | None = None,
    norm_type: float = 2,
    scale_grad_by_freq: bool = False,
    mode: str = "mean",
    sparse: bool = False,
    per_sample_weights: Tensor | None = None,
    include_last_offset: bool = False,
    padding_idx: int | None = None,
) -> LookupCall | None:
    """Reads `F.embedding_bag`: each entry of a bag is a row with its share of the bag's score."""
    if mode == "max" or input.is_floating_point():  # the second: an old order of the arguments
        return None
    indices = input.detach().reshape(-1).to(torch.int64, copy=True)
    places = torch.arange(len(indices), device=indices.device)
    if offsets is None:
        bag_of, bags = places // max(1, input.shape[1]), input.shape[0]
    else:
        starts = offsets[:-1] if include_last_offset else offsets
        bag_of, bags = torch.searchsorted(starts, places.to(starts), right=True) - 1, len(starts)
    factor = _not_padding(indices, weight, padding_idx).to(weight.dtype)
    if mode == "mean":
        sizes = factor.new_zeros(bags).index_add_(0, bag_of, factor)
        factor = factor / sizes[bag_of].clamp_min(1)
    elif per_sample_weights is not None:
        factor = factor * per_sample_weights.detach().reshape(-1)

    def score_rows(score: Tensor) -> Tensor:  # [bags, dim]
        return score[bag_of] * factor[:, None]

    return LookupCall("embedding_bag", weight, indices, score_rows)


def _not_padding(indices: Tensor, weight: Tensor, padding_idx: int | None) -> Tensor:
    if padding_idx is None:
        return torch.ones_like(indices, dtype=torch.bool)
    return indices != padding_idx % weight.shape[0]
