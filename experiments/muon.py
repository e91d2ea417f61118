"""Muon for the matrices of a network, AdamW for the rest, as one optimizer."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.optim import AdamW, Muon, Optimizer


class MuonWithAdamW(Optimizer):
    """`torch.optim.Muon` takes parameters with two dimensions only: AdamW gets all others.

    One torch optimizer with the parameter groups and the state of both, so that schedulers,
    checkpoints and Lightning see nothing unusual.

    Args:
        params: parameters; no groups.
        lr: of Muon. With `adjust_lr_fn="match_rms_adamw"` a step has the size of one of AdamW's,
            and both share it.
        momentum: of Muon, in [0, 1).
        weight_decay: decoupled, of both, per unit of lr.
        adamw_lr: of AdamW; None for the same as Muon's.
        adjust_lr_fn: how Muon scales a step with the shape of the matrix.

    Raises:
        ValueError: an option is out of range; torch's own message.

    Source: Jordan et al. 2024; Liu et al. 2025 (arXiv:2502.16982) for the matched size.
    """

    def __init__(
        self,
        params: Iterable[Tensor],
        lr: float = 1e-3,
        momentum: float = 0.95,
        weight_decay: float = 0.01,
        adamw_lr: float | None = None,
        adjust_lr_fn: str = "match_rms_adamw",
    ) -> None:
        params = list(params)
        matrices = [p for p in params if p.ndim == 2]
        others = [p for p in params if p.ndim != 2]
        self._parts: list[Optimizer] = []
        if matrices:
            self._parts.append(
                Muon(matrices, lr, weight_decay, momentum, adjust_lr_fn=adjust_lr_fn)
            )
        if others:
            rate = lr if adamw_lr is None else adamw_lr
            self._parts.append(AdamW(others, rate, weight_decay=weight_decay))
        super().__init__([group for part in self._parts for group in part.param_groups], {})
        self._share()

    def _share(self) -> None:
        """Make the parts work on our groups and state: schedulers and checkpoints know only those.

        torch copies the groups it is given, at construction and at loading.
        """
        start = 0
        for part in self._parts:
            count = len(part.param_groups)
            part.param_groups = self.param_groups[start : start + count]
            part.state = self.state
            start += count

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """Make one step of each part."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for part in self._parts:
            part.step()
        return loss

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load what `state_dict` returned."""
        super().load_state_dict(state_dict)
        self._share()
