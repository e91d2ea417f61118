"""Activation checkpointing: how to look into regions that are computed again in the backward pass.

`checkpoint(f, x, use_reentrant=True)` runs `f` inside a custom autograd function without a graph:
its layers are seen by nobody, and `torch.autograd.grad` cannot pass it. The non-reentrant kind
stores as little, draws the same random numbers again and has the same gradients, so while a step
is observed it takes the place of the other.

What a node of a non-reentrant region has saved is computed again for each backward pass, and each
backward pass gets it once.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.utils.checkpoint import CheckpointFunction, checkpoint

from ngplugin.curvature.process_wide import ProcessWide

_T = TypeVar("_T")


_THREADS: list[int] = []  # in which checkpoints are opened, once for each context


@contextmanager
def reentrant_checkpoints_opened() -> Iterator[None]:
    """A context in which reentrant checkpoints of this thread are non-reentrant ones."""
    thread = threading.get_ident()
    with _OPENED.made():
        _THREADS.append(thread)
        try:
            yield
        finally:
            _THREADS.remove(thread)


@contextmanager
def _opened() -> Iterator[None]:
    if "apply" in vars(CheckpointFunction):  # somebody else's
        yield
        return
    inherited: Callable[..., Any] = CheckpointFunction.apply

    def apply(function: Callable[..., Any], preserve_rng_state: bool, *args: Any) -> Any:
        differentiable = any(isinstance(t, Tensor) and t.requires_grad for t in args)
        if threading.get_ident() not in _THREADS or not differentiable:
            # What is inside of one of constants gets no gradient, and torch warns of it.
            return inherited(function, preserve_rng_state, *args)

        def opened(*inputs: Any) -> Any:  # and opened when it is computed again, after observation
            with reentrant_checkpoints_opened():
                return function(*inputs)

        return checkpoint(opened, *args, use_reentrant=False, preserve_rng_state=preserve_rng_state)

    CheckpointFunction.apply = apply  # type: ignore[method-assign]
    try:
        yield
    finally:
        del CheckpointFunction.apply


_OPENED = ProcessWide(_opened)


def in_a_backward_pass_of_its_own(act: Callable[[], _T], device: torch.device) -> _T:
    """What `act` returns, called where saved tensors of the graph may be read once.

    Read in a hook of the user's backward pass they would be missing there.

    Args:
        act: reads them.
        device: where the graph is, whose thread runs this.
    """
    results: list[_T] = []
    with torch.enable_grad():
        leaf = torch.zeros((), device=device, requires_grad=True)
        value = leaf.clone()
    value.register_hook(lambda _: results.append(act()))
    torch.autograd.grad(value, leaf)
    return results[0]
