"""Whether something was computed from some of the parameters, by what autograd knows of it."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

from torch import Tensor

_HIDDEN = "CheckpointFunctionBackward"


def depends(tensors: Sequence[Tensor], parameters: Collection[int]) -> bool:
    """Whether any of the parameters would get a gradient from any of the tensors.

    Where one would, a walk down the graph soon meets it: the last layer's. Where none would, all of
    the graph has to be gone through.

    Args:
        tensors: with their graph.
        parameters: by their ids.
    """
    if any(id(t) in parameters for t in tensors):
        return True
    waiting: list[Any] = [t.grad_fn for t in tensors if t.grad_fn is not None]
    met = set(waiting)
    while waiting:
        node = waiting.pop()
        # The old kind of checkpoint hides what it computed from.
        if id(getattr(node, "variable", None)) in parameters or node.name() == _HIDDEN:
            return True
        new = {source for source, _ in node.next_functions if source is not None} - met
        met |= new
        waiting += new
    return False
