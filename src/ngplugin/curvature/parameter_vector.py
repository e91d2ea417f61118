"""A vector over all parameters, in parts: each by the id of its parameter."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

Parts = dict[int, Tensor]


def dot(a: Tensor, b: Tensor) -> Tensor:
    """aᵀb in float32 or wider, a scalar."""
    if a.dtype == b.dtype == torch.float32:  # nearly always, and called for every parameter
        return torch.dot(a.reshape(-1), b.reshape(-1))
    dtype = torch.promote_types(a.dtype, b.dtype)
    dtype = torch.promote_types(dtype, torch.float32)
    a, b = a.reshape(-1).to(dtype), b.reshape(-1).to(dtype)
    return torch.vdot(a, b).real if dtype.is_complex else torch.dot(a, b)


def total(numbers: Iterable[Tensor]) -> Tensor:
    """The sum of at least one scalar."""
    return functools.reduce(torch.add, numbers)


def inner(a: Mapping[int, Tensor], b: Mapping[int, Tensor]) -> Tensor:
    """aᵀb over all parts of `a`, of which there is at least one."""
    return total(dot(part, b[key]) for key, part in a.items())


def combined(a: Mapping[int, Tensor], scale: Tensor | float, b: Mapping[int, Tensor]) -> Parts:
    """A + scale · b."""
    return {key: part + scale * b[key] for key, part in a.items()}
