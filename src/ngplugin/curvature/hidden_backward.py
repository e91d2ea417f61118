"""Backward passes inside custom autograd functions."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

from torch import Tensor


@contextmanager
def gradients_set_aside(parameters: Iterable[Tensor]) -> Iterator[None]:
    """A context that leaves no trace in `.grad`.

    A function that computes its own forward pass again, as reversible layers do, calls
    `torch.autograd.backward` on it, which adds to the gradients of the parameters inside, whoever
    asked for the function's derivative and for what.
    """
    kept = [(p, p.grad) for p in parameters]
    for p, _ in kept:
        p.grad = None
    try:
        yield
    finally:
        for p, gradient in kept:
            p.grad = gradient
