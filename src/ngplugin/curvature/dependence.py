"""What something was computed from, by what autograd knows of it."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from typing import Any

from torch import Tensor

_HIDDEN = "CheckpointFunctionBackward"  # the old kind of checkpoint does not say from what


def nodes(tensors: Sequence[Tensor]) -> Iterator[Any]:
    """The nodes of the graph that led to some tensors, each once."""
    waiting: list[Any] = [t.grad_fn for t in tensors if t.grad_fn is not None]
    met = set(waiting)
    while waiting:
        node = waiting.pop()
        yield node
        for source, _ in node.next_functions:
            if source is not None and source not in met:
                met.add(source)
                waiting.append(source)


def depends(tensors: Sequence[Tensor], parameters: Collection[int]) -> bool:
    """Whether any of the parameters would get a gradient from any of the tensors.

    Where one would, a walk down the graph soon meets it: the last layer's. Where none would, all of
    the graph has to be gone through.

    Args:
        tensors: with their graph.
        parameters: by their ids.
    """
    return any(id(t) in parameters for t in tensors) or any(
        id(getattr(node, "variable", None)) in parameters or node.name() == _HIDDEN
        for node in nodes(tensors)
    )
