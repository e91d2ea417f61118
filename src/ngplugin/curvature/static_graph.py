"""Keeps our backward passes out of what data parallelism takes for the training step's.

`DistributedDataParallel(static_graph=True)` averages gradients at the end of the first backward
pass that comes through the model's outputs, which is ours if a score is carried back inside the
step's own. The gradients are not there yet then, and the ranks would drift apart without a word.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence

from torch import Tensor

from ngplugin.curvature.dependence import nodes
from ngplugin.curvature.ranks import several_ranks

_ANNOUNCED = "_static_graph_delay_allreduce_enqueued"  # the model's word for having been through


@contextlib.contextmanager
def unannounced(tensors: Sequence[Tensor]) -> Iterator[None]:
    """A context for backward passes from `tensors` that no data parallelism is to know of."""
    waiting = []
    if several_ranks():
        for node in nodes(tensors):
            model = getattr(node, "ddp_weakref", lambda: None)()
            if model is not None and getattr(model, _ANNOUNCED, True) is False:
                waiting.append(model)
    for model in waiting:
        setattr(model, _ANNOUNCED, True)
    try:
        yield
    finally:
        for model in waiting:
            setattr(model, _ANNOUNCED, False)
