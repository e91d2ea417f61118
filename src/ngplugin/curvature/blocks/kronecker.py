"""The Kronecker block: F of a linear map's weight (and bias) as A ⊗ G."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ngplugin.curvature.average import RunningAverage
from ngplugin.curvature.blocks.block import Block, BlockDamping, curvature_dtype, finite
from ngplugin.curvature.blocks.factor import DampedFactor, mean_eigenvalue
from ngplugin.curvature.taps import (
    Dimensions,
    LookupCall,
    MapCall,
    as_matrices,
    as_weight,
)


class KroneckerBlock(Block):
    """F/Σw ≈ A ⊗ G for a weight W `[group, out, in]`, the bias being one more input of value 1.

    With a row of the map (an example, a token, a pixel) as r, its input a_r and its score g_r,

        F = Σ_r (a_r a_rᵀ) ⊗ (g_r g_rᵀ)  ≈  A ⊗ (G Σw),
        A = mean of a_r a_rᵀ over the rows with g_r ≠ 0,   G = Σ_r g_r g_rᵀ / Σw.

    Exact for one row, and whenever a and g are independent over the rows (a deep linear network
    with squared loss). A row that carries no score, a masked example or padding, says nothing
    about F and is left out of A too.

    Rows that share the weight are treated as if they were independent (*expand*,
    arXiv:2311.00636).

    Source: Martens & Grosse 2015 (arXiv:1503.05671) §3, §6.3 for the damping; Grosse & Martens
    2016 (arXiv:1602.01407) §3 for convolutions.
    """

    kind = "kronecker"

    def __init__(
        self,
        weight: Tensor,
        bias: Tensor | None,
        groups: int,
        inputs_first: bool = False,
        dims: Dimensions | None = None,
    ) -> None:
        self.parameters = (weight,) if bias is None else (weight, bias)
        self._bias = bias
        self.groups = groups
        self.inputs_first = inputs_first
        sizes = weight.shape[0] // groups, weight.numel() // weight.shape[0]
        self._out, self._in = sizes[::-1] if inputs_first else sizes
        self.dims = dims
        if dims is not None:
            self._out, self._in = (math.prod(weight.shape[d] for d in part) for part in dims[1:])
        self._in += bias is not None
        self._dtype = curvature_dtype(weight)
        self._added: tuple[Tensor, Tensor, Tensor] | None = None  # Σ aaᵀ, number of rows, Σ ggᵀ
        self._average_A, self._average_G = RunningAverage(), RunningAverage()
        self._average_rows = RunningAverage()  # [group, 1, 1], how many rows a statistic rests on
        self._refreshed: tuple[DampedFactor, DampedFactor] | None = None  # A and G
        self._growth: float | Tensor = 1.0  # [group, 1, 1], tr A tr G now over the last refresh's

    def takes(self, call: MapCall | LookupCall) -> bool:
        """Whether the rows of this call are rows of this block.

        Groups may be divided further if the outputs come first in memory: then all parts have the
        same inputs.
        """
        if isinstance(call, LookupCall):
            return False
        if (call.inputs_first, call.dims) != (self.inputs_first, self.dims):
            return False
        divided = not call.inputs_first and call.dims is None and self.groups % call.groups == 0
        return divided or call.groups == self.groups

    def add_map_score(self, call: MapCall | LookupCall, score: Tensor, share: float) -> None:
        """Add the rows of one call of the map.

        Args:
            call: the call.
            score: d(Σ √w s)/d(output), of the output's shape.
            share: of the draw among all draws of the step.
        """
        assert isinstance(call, MapCall), "a call of another layout"
        a = call.input_rows().to(self._dtype).flatten(1, 2)  # [group, rows, in]
        g = call.score_rows(score).to(self._dtype).flatten(1, 2)  # [group, rows, out]
        parts = self.groups // call.groups
        if parts > 1:
            a = a.repeat_interleave(parts, 0)
            g = g.unflatten(-1, (parts, -1)).movedim(2, 1).flatten(0, 1)
        counted = (g != 0).any(-1, keepdim=True).to(self._dtype)  # [group, rows, 1]
        a = a * counted  # counted² = counted, so aᵀa is the sum over the counted rows
        AA = a.mT @ a
        if self._bias is not None:
            one = counted if call.bias is self._bias else torch.zeros_like(counted)
            edge = a.mT @ one  # [group, in, 1]
            corner = one.sum(1, keepdim=True)
            AA = torch.cat([torch.cat([AA, edge], 2), torch.cat([edge.mT, corner], 2)], 1)
        rows = counted.sum(1, keepdim=True)  # [group, 1, 1]
        GG = g.mT @ g
        if self._added is None:
            A, one, G = (t.new_zeros(self.groups, *t.shape[1:]) for t in (AA, rows, GG))
            self._added = A, one, G
        start = call.first * parts
        for total, new in zip(self._added, (AA, rows, GG), strict=True):
            total[start : start + len(new)].add_(new, alpha=share)

    def discard(self) -> None:
        """Forget what was added and not folded."""
        self._added = None

    def fold(self, total_weight: float, decay: float) -> bool:
        """Fold Σ aaᵀ / rows into A, and Σ ggᵀ / Σw into G."""
        added, self._added = self._added, None
        if added is None:
            return True
        AA, rows, GG = added
        A, G = AA / rows.clamp_min(torch.finfo(self._dtype).tiny), GG / total_weight
        if not finite(A, G):
            return False
        if self._average_A:  # no rows, as of an expert that no token went to, say nothing of A
            A = torch.where(rows > 0, A, self._average_A.value)
        self._average_A.update(A, decay)
        self._average_G.update(G, decay)
        self._average_rows.update(rows, decay)
        if self._refreshed is not None:
            old_A, old_G = (factor.matrix for factor in self._refreshed)
            now = mean_eigenvalue(self._average_A.value) * mean_eigenvalue(self._average_G.value)
            then = mean_eigenvalue(old_A) * mean_eigenvalue(old_G)
            self._growth = torch.where(then > 0, now / then, 1.0)
        return True

    @property
    def ready(self) -> bool:
        """Whether there is an average to refresh from."""
        return bool(self._average_A)

    @property
    def inverted(self) -> bool:
        """Whether a refresh has succeeded."""
        return self._refreshed is not None

    @property
    def factors(self) -> tuple[DampedFactor, DampedFactor]:
        """A and G as of the last refresh, `[group, in, in]` and `[group, out, out]`."""
        assert self._refreshed is not None, "refresh() comes first"
        return self._refreshed

    def mean_eigenvalue(self) -> Tensor:
        """The product of the factors' mean eigenvalues, averaged over the groups."""
        A, G = self._average_A.value, self._average_G.value
        return (mean_eigenvalue(A) * mean_eigenvalue(G)).mean()

    def refresh(self, damping: BlockDamping) -> bool:
        """Damp each factor and invert it.

        `"relative"`: A + ε_A (tr A / d_in) I and G + ε_G (tr G / d_out) I: the damping follows each
        factor's own mean eigenvalue, so it means the same in every layer and unit. ε = λ + γ d/n,
        with n the number of rows that the average effectively rests on: a factor from fewer rows
        than its size is singular, and its sampled spectrum is spread too wide by about d/n, which
        shrinking towards the multiple of the identity mends (Ledoit & Wolf 2004, A well-conditioned
        estimator for large-dimensional covariance matrices). Where the product of the means is
        below the floor, G's is raised until it is not.

        `"absolute"`: A + π√λ I and G + (√λ/π) I, π² = (tr A / d_in) / (tr G / d_out), whose product
        exceeds A ⊗ G + λI by cross terms only (Martens & Grosse 2015, §6.3).
        """
        unseen = self._average_rows.value == 0
        if unseen.all():
            return True  # no score has come this way yet: there is nothing to invert
        A, G = self._average_A.value, self._average_G.value
        mean_A, mean_G = mean_eigenvalue(A), mean_eigenvalue(G)  # [group, 1, 1]
        tiny = torch.finfo(self._dtype).tiny
        if damping.mode == "relative":
            mean_G = torch.maximum(mean_G, damping.floor / mean_A.clamp_min(tiny))
            n = (self._average_A.effective_count * self._average_rows.value).clamp_min(1)
            A_damping = (damping.value + damping.sampling * self._in / n) * mean_A
            G_damping = (damping.value + damping.sampling * self._out / n) * mean_G
        else:
            pi = (mean_A.clamp_min(tiny) / mean_G.clamp_min(tiny)).sqrt()
            A_damping, G_damping = damping.value**0.5 * pi, damping.value**0.5 / pi
        if unseen.any():
            # A group that no known map has used yet is scaled as the others are on average.
            seen = ~unseen
            A_damping = torch.where(unseen, mean_A[seen].mean(), A_damping)
            G_damping = torch.where(unseen, mean_G[seen].mean(), G_damping)
        damped_A, damped_G = DampedFactor.of(A, A_damping), DampedFactor.of(G, G_damping)
        if damped_A is None or damped_G is None:
            return False
        self._refreshed = damped_A, damped_G
        self._growth = 1.0
        return True

    def precondition(self, gradients: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        """V = G_d⁻¹ M A_d⁻¹ with the damped factors and M the gradient, and G V A.

        With A_d = A + a I the product with the larger factor needs no multiplication, since
        V A = V A_d - a V = G_d⁻¹ M - a V, nor G V for the same reason if G is larger.
        """
        A, G = self.factors
        M = self._as_matrix(gradients)
        if self._in >= self._out:
            half = G.inverse @ M
            V = half @ A.inverse
            GVA = G.matrix @ (half - A.damping * V)
        else:
            half = M @ A.inverse
            V = G.inverse @ half
            GVA = (half - G.damping * V) @ A.matrix
        return self._as_parameters(V, gradients), self._as_parameters(self._growth * GVA, gradients)

    def product(self, vectors: Sequence[Tensor]) -> list[Tensor]:
        """G V A with the undamped factors."""
        A, G = self.factors
        GVA = self._growth * (G.matrix @ self._as_matrix(vectors) @ A.matrix)
        return self._as_parameters(GVA, vectors)

    def extreme_eigenvalues(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Products of the factors' extreme eigenvalues, over all groups."""
        A, G = self.factors
        # Rounding may leave a tiny negative eigenvalue of a positive semi-definite matrix.
        a = torch.linalg.eigvalsh(A.matrix).clamp_min(0)  # [group, in], ascending
        g = torch.linalg.eigvalsh(G.matrix).clamp_min(0)
        a_damped, g_damped = a + A.damping.squeeze(-1), g + G.damping.squeeze(-1)
        return (
            (a[:, 0] * g[:, 0]).min(),
            (a[:, -1] * g[:, -1]).max(),
            (a_damped[:, 0] * g_damped[:, 0]).min(),
            (a_damped[:, -1] * g_damped[:, -1]).max(),
        )

    def numel(self) -> int:
        """Average, factor and inverse of A and of G."""
        return 3 * self.groups * (self._in**2 + self._out**2)

    def state_dict(self) -> dict[str, Any]:
        """The averages, and the factors, dampings and inverses as of the last refresh."""
        refreshed = None
        if self._refreshed is not None:
            refreshed = [(f.matrix, f.damping, f.inverse) for f in self._refreshed]
        return {
            "kind": self.kind,
            "groups": self.groups,
            "inputs_first": self.inputs_first,
            "dims": self.dims,
            "average_A": self._average_A.state_dict(),
            "average_G": self._average_G.state_dict(),
            "average_rows": self._average_rows.state_dict(),
            "refreshed": refreshed,
            "growth": self._growth,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over a saved state."""
        like = self.parameters[0]
        self._average_A.load_state_dict(state["average_A"], like)
        self._average_G.load_state_dict(state["average_G"], like)
        self._average_rows.load_state_dict(state["average_rows"], like)
        if state["refreshed"] is None:
            self._refreshed = None
        else:
            A, G = (
                DampedFactor(*(t.to(like.device, copy=True) for t in tensors))
                for tensors in state["refreshed"]
            )
            self._refreshed = A, G
        growth = state["growth"]
        self._growth = growth.to(like.device) if isinstance(growth, Tensor) else growth

    def _as_matrix(self, tensors: Sequence[Tensor]) -> Tensor:
        """Weight (and bias) to `[group, out, in]`, the bias as the last input."""
        layout = self.groups, self._out, self.inputs_first, self.dims
        columns = [as_matrices(tensors[0], *layout)]
        if self._bias is not None:
            columns.append(tensors[1].reshape(self.groups, self._out, 1))
        return torch.cat(columns, 2).to(self._dtype)

    def _as_parameters(self, matrix: Tensor, like: Sequence[Tensor]) -> list[Tensor]:
        weight = matrix if self._bias is None else matrix[:, :, :-1]
        parts = [as_weight(weight, like[0].shape, self.inputs_first, self.dims)]
        if self._bias is not None:
            parts.append(matrix[:, :, -1])
        return [
            part.reshape(t.shape).to(t.dtype).contiguous()
            for part, t in zip(parts, like, strict=True)
        ]
