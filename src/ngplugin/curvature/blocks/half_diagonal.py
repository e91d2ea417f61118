"""The half-diagonal Kronecker block: one factor a diagonal, for embeddings and vocabularies."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ngplugin.curvature.average import RunningAverage
from ngplugin.curvature.blocks.block import Block, BlockDamping, curvature_dtype, finite
from ngplugin.curvature.blocks.factor import DampedFactor, mean_eigenvalue
from ngplugin.curvature.taps import LookupCall, MapCall

_Part = tuple[Tensor, Tensor, Tensor]  # v [vocabulary], M [dim, dim], number of rows


class HalfDiagonalBlock(Block):
    """F/Σw ≈ diag(D) ⊗ S for a weight `[vocabulary, dim]`: D a vector, S `[dim, dim]`.

    *Looked up* (an embedding), the input of a row is one-hot, so A is the diagonal of the token
    frequencies without any approximation, and F ≈ A ⊗ G as in `KroneckerBlock`. *Multiplied* (an
    output layer), S comes from the inputs and D keeps the diagonal of G only: a vocabulary squared
    has no room.

    Each of these uses is F_u = diag(v_u) ⊗ M_u / rows_u. A weight used in both ways (tied) has the
    sum of the two as its F, for which stands the one product with the same trace over either side,

        D = Σ_u v_u tr M_u / rows_u / tr F,   S = Σ_u (Σ v_u) M_u / rows_u,

    which is exact if either factor is the same in all uses.

    D is a frequency for tokens that come often. One that comes less than once a batch is known to
    be rare but not how rare: with D ≈ 0 the first gradient that reaches it would be divided by
    next to nothing. So D is damped by one row more, which bounds that step by the one that this
    batch alone would give.
    """

    kind = "half-diagonal kronecker"

    def __init__(self, weight: Tensor) -> None:
        self.parameters = (weight,)
        self._vocabulary, self._dim = weight.shape
        self._dtype = curvature_dtype(weight)
        self._added: dict[bool, _Part] = {}  # looked up or not
        self._average_D, self._average_S = RunningAverage(), RunningAverage()
        self._average_rows = RunningAverage()
        self._average_row = RunningAverage()  # what one looked-up row counts in D
        self._D: Tensor | None = None  # as of the last refresh, like the next two
        self._D_damping: Tensor | None = None  # a scalar
        self._S: DampedFactor | None = None  # [1, dim, dim]
        self._growth: float | Tensor = 1.0  # tr F now, over that of the last refresh

    def takes(self, call: MapCall | LookupCall) -> bool:
        """Whether the call applies the weight as one matrix."""
        return isinstance(call, LookupCall) or (
            call.groups == 1 and call.weight.dim() == 2 and call.dims is None
        )

    def add_map_score(self, call: MapCall | LookupCall, score: Tensor, share: float) -> None:
        """Add the rows of one call.

        Args:
            call: the call.
            score: d(Σ √w s)/d(output), of the output's shape.
            share: of the draw among all draws of the step.
        """
        looked_up = isinstance(call, LookupCall)
        if isinstance(call, LookupCall):
            g = call.score_rows(score).to(self._dtype)  # [rows, dim]
            counted = (g != 0).any(-1).to(self._dtype)  # [rows]
            v = g.new_zeros(self._vocabulary).index_add_(0, call.indices, counted)
            M = g.mT @ g
        else:
            a = call.input_rows().to(self._dtype).flatten(0, 2)  # [rows, in]
            g = call.score_rows(score).to(self._dtype).flatten(0, 2)  # [rows, out]
            counted = (g != 0).any(-1).to(self._dtype)
            a = a * counted[:, None]
            over_vocabulary, over_dim = (a, g) if call.inputs_first else (g, a)
            v, M = over_vocabulary.square().sum(0), over_dim.mT @ over_dim
        part = v * share, M * share, counted.sum() * share
        if looked_up in self._added:
            for total, new in zip(self._added[looked_up], part, strict=True):
                total.add_(new)
        else:
            self._added[looked_up] = part

    def discard(self) -> None:
        """Forget what was added and not folded."""
        self._added = {}

    def fold(self, total_weight: float, decay: float) -> bool:
        """Fold the sum of the uses into D and S."""
        added, self._added = self._added, {}
        if not added:
            return True
        like, tiny = self.parameters[0], torch.finfo(self._dtype).tiny
        D = torch.zeros(self._vocabulary, dtype=self._dtype, device=like.device)
        S = torch.zeros(self._dim, self._dim, dtype=self._dtype, device=like.device)
        row, total_rows = D.new_zeros(()), D.new_zeros(())
        for looked_up, (v, M, rows) in added.items():
            mean_M = M / rows.clamp_min(tiny)
            D += v * mean_M.trace()
            S += v.sum() * mean_M
            total_rows += rows
            if looked_up:
                row = mean_M.trace()
        trace = D.sum().clamp_min(tiny)
        D, S, row = D / trace, S / total_weight, row / trace
        if not finite(D, S):
            return False
        self._average_D.update(D, decay)
        self._average_S.update(S, decay)
        self._average_rows.update(total_rows, decay)
        self._average_row.update(row, decay)
        if self._D is not None and self._S is not None:
            now = self._average_D.value.sum() * self._average_S.value.trace()
            then = self._D.sum() * self._S.matrix[0].trace()
            self._growth = torch.where(then > 0, now / then, 1.0)
        return True

    @property
    def ready(self) -> bool:
        """Whether there is an average to refresh from."""
        return bool(self._average_D)

    @property
    def inverted(self) -> bool:
        """Whether a refresh has succeeded."""
        return self._S is not None

    def mean_eigenvalue(self) -> Tensor:
        """The product of the factors' mean eigenvalues."""
        return self._average_D.value.mean() * self._average_S.value.diagonal().mean()

    def refresh(self, damping: BlockDamping) -> bool:
        """Damp each factor, as `KroneckerBlock` does, and invert S.

        D gets one row more in either mode; this takes the place of the sampling damping.
        """
        D, S = self._average_D.value, self._average_S.value[None]
        tiny = torch.finfo(self._dtype).tiny
        mean_D, mean_S = D.mean(), mean_eigenvalue(S)
        if damping.mode == "relative":
            mean_S = torch.maximum(mean_S, damping.floor / mean_D.clamp_min(tiny))
            n = (self._average_D.effective_count * self._average_rows.value).clamp_min(1)
            D_damping = damping.value * mean_D
            S_damping = (damping.value + damping.sampling * self._dim / n) * mean_S
        else:
            pi = (mean_D.clamp_min(tiny) / mean_S.clamp_min(tiny)).sqrt()
            D_damping = (damping.value**0.5 * pi).reshape(())
            S_damping = damping.value**0.5 / pi
        factor = DampedFactor.of(S, S_damping)
        if factor is None:
            return False
        self._D, self._D_damping = D, D_damping + self._average_row.value
        self._S = factor
        self._growth = 1.0
        return True

    def precondition(self, gradients: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        """V = D_d⁻¹ M S_d⁻¹ with the damped factors and M the gradient, and D V S.

        V S = V S_d - s V = D_d⁻¹ M - s V, with s the damping of S.
        """
        D, D_damping, S = self._factors()
        (M,) = gradients
        damped = (D + D_damping)[:, None]
        half = torch.where(damped > 0, M.to(self._dtype) / damped, 0.0)
        V = half @ S.inverse[0]
        DVS = self._growth * D[:, None] * (half - S.damping[0] * V)
        return [V.to(M.dtype)], [DVS.to(M.dtype)]

    def product(self, vectors: Sequence[Tensor]) -> list[Tensor]:
        """D V S with the undamped factors."""
        D, _, S = self._factors()
        (V,) = vectors
        DVS = self._growth * D[:, None] * (V.to(self._dtype) @ S.matrix[0])
        return [DVS.to(V.dtype)]

    def extreme_eigenvalues(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Products of the factors' extreme eigenvalues."""
        D, D_damping, S = self._factors()
        # Rounding may leave a tiny negative eigenvalue of a positive semi-definite matrix.
        s = torch.linalg.eigvalsh(S.matrix[0]).clamp_min(0)  # ascending
        s_damped = s + S.damping.reshape(())
        low, high = D.min(), D.max()
        return (
            low * s[0],
            high * s[-1],
            (low + D_damping) * s_damped[0],
            (high + D_damping) * s_damped[-1],
        )

    def numel(self) -> int:
        """Average and value of D; average, factor and inverse of S."""
        return 2 * self._vocabulary + 3 * self._dim**2

    def state_dict(self) -> dict[str, Any]:
        """The averages, and the factors, dampings and inverse as of the last refresh."""
        S = self._S
        return {
            "kind": self.kind,
            "average_D": self._average_D.state_dict(),
            "average_S": self._average_S.state_dict(),
            "average_rows": self._average_rows.state_dict(),
            "average_row": self._average_row.state_dict(),
            "D": self._D,
            "D_damping": self._D_damping,
            "S": None if S is None else (S.matrix, S.damping, S.inverse),
            "growth": self._growth,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over a saved state."""
        like = self.parameters[0]
        for name in ("average_D", "average_S", "average_rows", "average_row"):
            getattr(self, f"_{name}").load_state_dict(state[name], like)
        for name in ("D", "D_damping", "growth"):
            saved = state[name]
            moved = saved.to(like.device, copy=True) if isinstance(saved, Tensor) else saved
            setattr(self, f"_{name}", moved)
        self._S = None
        if state["S"] is not None:
            self._S = DampedFactor(*(t.to(like.device, copy=True) for t in state["S"]))

    def _factors(self) -> tuple[Tensor, Tensor, DampedFactor]:
        assert self._D is not None, "refresh() comes first"
        assert self._D_damping is not None
        assert self._S is not None
        return self._D, self._D_damping, self._S
