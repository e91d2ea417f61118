"""Looks into a `torch.distributions` object: the tensors in it, and a copy with others."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.distributions import Distribution, Transform
from torch.distributions.constraints import Constraint

_CACHE = "_cached_x_y"  # a transform's last argument and value


def _parts(tree: Any) -> list[Any]:
    """What a distribution or its kin or a container holds; an inverse may lead back to it."""
    if isinstance(tree, (Distribution, Transform, Constraint)):
        return [value for name, value in vars(tree).items() if name != _CACHE]
    if isinstance(tree, (list, tuple)):
        return [*tree]
    return [*tree.values()] if isinstance(tree, Mapping) else []


def trees(tree: Any, seen: set[int] | None = None) -> Iterator[Any]:
    """It and everything in it, each once."""
    seen = set() if seen is None else seen
    if id(tree) in seen:
        return
    seen.add(id(tree))
    yield tree
    for part in _parts(tree):
        yield from trees(part, seen)


def tensors_in(tree: Any) -> Iterator[Tensor]:
    """All tensors in a distribution, each once."""
    return (part for part in trees(tree) if isinstance(part, Tensor))


def rebuilt(tree: Any, replaced: Mapping[int, Tensor], copies: dict[int, Any]) -> Any:
    """A copy with tensors replaced, what was derived from them in `__init__` included.

    No `__init__` runs: its arguments are not known, and what it derived is among what is replaced.
    """
    if isinstance(tree, Tensor):
        return replaced.get(id(tree), tree)
    if id(tree) in copies:
        return copies[id(tree)]
    if (
        isinstance(tree, Transform)
        and tree._cache_size == 0
        and not any(id(t) in replaced for t in tensors_in(tree))
    ):
        return tree  # the same object, so that torch sees two distributions alike in it
    if isinstance(tree, (Distribution, Transform)):
        copy = copies[id(tree)] = object.__new__(type(tree))
        for name, value in vars(tree).items():
            new = (None, None) if name == _CACHE else rebuilt(value, replaced, copies)
            vars(copy)[name] = new
        return copy
    if isinstance(tree, (list, tuple)) and not hasattr(tree, "_fields"):
        if isinstance(tree, torch.Size):
            return tree
        return type(tree)(rebuilt(item, replaced, copies) for item in tree)
    if type(tree) is dict:
        return {key: rebuilt(item, replaced, copies) for key, item in tree.items()}
    return tree
