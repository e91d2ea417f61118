"""Tensors of subclasses as plain ones."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import Parameter


def plain(t: Tensor) -> Tensor:
    """The same values and the same graph as a `Tensor`, or the parameter itself.

    A subclass may override methods that fail on what a torch function made of it, for want of
    attributes that only its own functions hand on.
    """
    if type(t) is Tensor or isinstance(t, Parameter):
        return t
    with torch.enable_grad():  # a hook that asks is run without
        return t.as_subclass(Tensor)
