"""What a saved state has to be before any of it is taken over."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

#: What reading a state can come to that is not one: entries are missing, or are something else.
DAMAGES = (
    LookupError,
    TypeError,
    ValueError,
    ArithmeticError,
    AttributeError,
    RuntimeError,
    AssertionError,
)

WHAT_TO_DO = (
    "Nothing was taken over. Usual cause: the file was damaged, or edited. Load an earlier one; or "
    "leave natural gradient's part out, `del state_dict['natgrad']` (in Lightning's checkpoints "
    "`del checkpoint['optimizer_states'][0]['natgrad']`), and go on from the saved weights with "
    "curvature and momentum anew."
)


def check(state: dict[str, Any]) -> None:
    """Look for what no training has left there.

    Raises:
        ValueError: a number is not finite, momentum is not of its parameter's shape, or a block is
            one of parameters that there are not.
    """
    for place, t in tensors(state):
        if not torch.isfinite(t).all():
            raise ValueError(f"{place} has nan or inf")
    for name in ("momentum", "solver"):
        _check_shapes(name, state[name], state["shapes"])
    if "unmeasured" in state:
        _check_shapes("unmeasured", state["unmeasured"]["before"], state["shapes"])
    for i, block in enumerate(state["fisher"]):
        if not {*block["parameters"]} <= {*range(len(state["shapes"]))}:
            raise ValueError(f"block {i} is of parameters {block['parameters']}")


def _check_shapes(name: str, values: Sequence[Any], shapes: Sequence[Sequence[int]]) -> None:
    for i, (value, shape) in enumerate(zip(values, shapes, strict=True)):
        if value is not None and tuple(value.shape) != tuple(shape):
            raise ValueError(f"{name}[{i}] has shape {tuple(value.shape)}, not {tuple(shape)}")


def tensors(tree: Any, place: str = "state") -> Iterator[tuple[str, Tensor]]:
    """All tensors of a state, each with its place."""
    if isinstance(tree, Tensor):
        yield place, tree
    elif isinstance(tree, (dict, list, tuple)):
        for key, value in tree.items() if isinstance(tree, dict) else enumerate(tree):
            yield from tensors(value, f"{place}[{key!r}]")
