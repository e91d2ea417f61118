"""Muon for the matrices of a network, AdamW for the rest, as one optimizer."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any
from unittest import mock

import torch
import torch.optim._muon
from torch import Tensor
from torch.optim import AdamW, Muon, Optimizer

from ngplugin.curvature.products import multiplies_bfloat16


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
        with _in_fast_precision(self.param_groups[0]["params"][0].device):
            for part in self._parts:
                part.step()
        return loss

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load what `state_dict` returned."""
        super().load_state_dict(state_dict)
        self._share()


def _in_fast_precision(device: torch.device) -> AbstractContextManager[Any]:
    """Where a processor has no products of bfloat16, Muon's are dozens of times faster without."""
    if multiplies_bfloat16(device):
        return nullcontext()
    return mock.patch.object(torch.optim._muon, "_zeropower_via_newtonschulz", orthogonalized)


def orthogonalized(G: Tensor, coefficients: Sequence[float], iterations: int, eps: float) -> Tensor:
    """U Vᵀ of G = U S Vᵀ, about: singular values between 0.7 and 1.2; in G's own precision.

    X ← a X + (b X Xᵀ + c (X Xᵀ)²) X from X = G/‖G‖, with X the wide one of G and Gᵀ.

    Source: Jordan et al. 2024, Muon.
    """
    a, b, c = coefficients
    tall = G.shape[0] > G.shape[1]
    X = G.T if tall else G
    X = X / X.norm().clamp_min(eps)
    for _ in range(iterations):
        M = X @ X.T
        X = a * X + (b * M + c * M @ M) @ X
    return X.T if tall else X
