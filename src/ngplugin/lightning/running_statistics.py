"""Running statistics of normalizations, which a batch of no numbers would spoil for good."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from ngplugin.curvature.ranks import alike


class RunningStatistics:
    """Takes back what is no number among a module's `running_mean` and `running_var`.

    The forward pass of one batch with a nan or an inf leaves them so for ever, and every prediction
    in evaluation with them, however well the weights were kept. Nothing here waits for the device;
    statistics that are numbers are what they would be anyway, bit for bit.

    Args:
        module: of whose normalizations.
    """

    def __init__(self, module: nn.Module) -> None:
        self._places = [*_places(module)]
        self._kept: list[Tensor] = []
        self.keep()

    @torch.no_grad()
    def keep(self) -> None:
        """Take over those that are numbers, and put back the others as they were."""
        tensors = [t for part, name in self._places if (t := getattr(part, name, None)) is not None]
        groups = alike([(t.dtype, t.device) for t in tensors])
        now = [torch.cat([tensors[i].reshape(-1) for i in same]) for same in groups]
        if [(t.shape, t.dtype, t.device) for t in now] != [
            (t.shape, t.dtype, t.device) for t in self._kept
        ]:
            self._kept = now  # at first, or moved to another device
            return
        self._kept = [
            torch.where(new.isfinite(), new, old) for new, old in zip(now, self._kept, strict=True)
        ]
        for same, kept in zip(groups, self._kept, strict=True):
            parts = kept.split([tensors[i].numel() for i in same])
            for i, part in zip(same, parts, strict=True):
                tensors[i].copy_(part.view_as(tensors[i]))


def _places(module: nn.Module) -> Iterator[tuple[nn.Module, str]]:
    for part in module.modules():
        for name in ("running_mean", "running_var"):
            t = getattr(part, name, None)
            if isinstance(t, Tensor) and t.is_floating_point() and not is_lazy(t):
                yield part, name
