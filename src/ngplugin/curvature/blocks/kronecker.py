"""The Kronecker block: F of a linear map's weight (and bias) as A ⊗ G."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ngplugin.curvature.average import RunningAverage
from ngplugin.curvature.blocks.block import Block, BlockDamping, curvature_dtype, finite
from ngplugin.curvature.taps import MapCall


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

    def __init__(self, weight: Tensor, bias: Tensor | None, groups: int) -> None:
        self.parameters = (weight,) if bias is None else (weight, bias)
        self._bias = bias
        self.groups = groups
        self._out = weight.shape[0] // groups
        self._in = weight.numel() // weight.shape[0] + (bias is not None)
        self._dtype = curvature_dtype(weight)
        self._added: tuple[Tensor, Tensor, Tensor] | None = None  # Σ aaᵀ, number of rows, Σ ggᵀ
        self._average_A, self._average_G = RunningAverage(), RunningAverage()
        self._average_rows = RunningAverage()  # [group, 1, 1], how many rows a statistic rests on
        # As of the last refresh, [group, in, in] and [group, out, out]:
        self.A: Tensor | None = None
        self.G: Tensor | None = None
        self._A_inverse: Tensor | None = None
        self._G_inverse: Tensor | None = None
        self._A_damping: Tensor | None = None  # [group, 1, 1]
        self._G_damping: Tensor | None = None

    def add_map_score(self, call: MapCall, score: Tensor, share: float) -> None:
        """Add the rows of one call of the map.

        Args:
            call: the call.
            score: d(Σ √w s)/d(output), of the output's shape.
            share: of the draw among all draws of the step.
        """
        a = call.input_rows().to(self._dtype).flatten(1, 2)  # [group, rows, in]
        g = call.score_rows(score).to(self._dtype).flatten(1, 2)  # [group, rows, out]
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
            self._added = AA * share, rows * share, GG * share
        else:
            for total, new in zip(self._added, (AA, rows, GG), strict=True):
                total.add_(new, alpha=share)

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
        self._average_A.update(A, decay)
        self._average_G.update(G, decay)
        self._average_rows.update(rows, decay)
        return True

    @property
    def ready(self) -> bool:
        """Whether there is an average to refresh from."""
        return bool(self._average_A)

    @property
    def inverted(self) -> bool:
        """Whether a refresh has succeeded."""
        return self._A_inverse is not None

    def mean_eigenvalue(self) -> Tensor:
        """The product of the factors' mean eigenvalues, averaged over the groups."""
        A, G = self._average_A.value, self._average_G.value
        return (_mean_eigenvalue(A) * _mean_eigenvalue(G)).mean()

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
        A, G = self._average_A.value, self._average_G.value
        mean_A, mean_G = _mean_eigenvalue(A), _mean_eigenvalue(G)  # [group, 1, 1]
        tiny = torch.finfo(self._dtype).tiny
        if damping.mode == "relative":
            mean_G = torch.maximum(mean_G, damping.floor / mean_A.clamp_min(tiny))
            n = (self._average_A.effective_count * self._average_rows.value).clamp_min(1)
            A_damping = (damping.value + damping.sampling * self._in / n) * mean_A
            G_damping = (damping.value + damping.sampling * self._out / n) * mean_G
        else:
            pi = (mean_A.clamp_min(tiny) / mean_G.clamp_min(tiny)).sqrt()
            A_damping, G_damping = damping.value**0.5 * pi, damping.value**0.5 / pi
        A_inverse, G_inverse = _inverse(A, A_damping), _inverse(G, G_damping)
        if A_inverse is None or G_inverse is None:
            return False
        self.A, self.G = A, G
        self._A_damping, self._G_damping = A_damping, G_damping
        self._A_inverse, self._G_inverse = A_inverse, G_inverse
        return True

    def precondition(self, gradients: Sequence[Tensor]) -> list[Tensor]:
        """G⁻¹ M A⁻¹ with the damped factors and M the gradient as `[group, out, in]`."""
        assert self._A_inverse is not None
        assert self._G_inverse is not None
        M = self._as_matrix(gradients)
        return self._as_parameters(self._G_inverse @ M @ self._A_inverse, gradients)

    def product(self, vectors: Sequence[Tensor]) -> list[Tensor]:
        """G V A with the undamped factors."""
        V = self._as_matrix(vectors)
        product = self._average_G.value @ V @ self._average_A.value
        return self._as_parameters(product, vectors)

    def extreme_eigenvalues(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Products of the factors' extreme eigenvalues, over all groups."""
        assert self.A is not None
        assert self.G is not None
        assert self._A_damping is not None
        assert self._G_damping is not None
        # Rounding may leave a tiny negative eigenvalue of a positive semi-definite matrix.
        a = torch.linalg.eigvalsh(self.A).clamp_min(0)  # [group, in], ascending
        g = torch.linalg.eigvalsh(self.G).clamp_min(0)
        a_damped, g_damped = a + self._A_damping.squeeze(-1), g + self._G_damping.squeeze(-1)
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
        tensors = {name: getattr(self, name) for name in self._TENSORS}
        return {
            "kind": self.kind,
            "groups": self.groups,
            "average_A": self._average_A.state_dict(),
            "average_G": self._average_G.state_dict(),
            "average_rows": self._average_rows.state_dict(),
            **tensors,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over a saved state."""
        like = self.parameters[0]
        self._average_A.load_state_dict(state["average_A"], like)
        self._average_G.load_state_dict(state["average_G"], like)
        self._average_rows.load_state_dict(state["average_rows"], like)
        for name in self._TENSORS:
            saved = state[name]
            setattr(self, name, None if saved is None else saved.to(like.device, copy=True))

    _TENSORS = ("A", "G", "_A_inverse", "_G_inverse", "_A_damping", "_G_damping")

    def _as_matrix(self, tensors: Sequence[Tensor]) -> Tensor:
        """Weight (and bias) to `[group, out, in]`, the bias as the last input."""
        columns = [tensors[0].reshape(self.groups, self._out, -1)]
        if self._bias is not None:
            columns.append(tensors[1].reshape(self.groups, self._out, 1))
        return torch.cat(columns, 2).to(self._dtype)

    def _as_parameters(self, matrix: Tensor, like: Sequence[Tensor]) -> list[Tensor]:
        if self._bias is None:
            return [matrix.reshape(like[0].shape).to(like[0].dtype)]
        weight, bias = matrix[:, :, :-1], matrix[:, :, -1]
        return [
            weight.reshape(like[0].shape).to(like[0].dtype),
            bias.reshape(like[1].shape).to(like[1].dtype),
        ]


def _mean_eigenvalue(M: Tensor) -> Tensor:
    """tr M / d of each matrix, `[group, 1, 1]`."""
    return M.diagonal(dim1=-2, dim2=-1).mean(-1)[:, None, None]


def _inverse(M: Tensor, damping: Tensor) -> Tensor | None:
    """(M + damping I)⁻¹ by Cholesky, in float64 if the first try fails; None if that fails too."""
    damped = M.clone()
    damped.diagonal(dim1=-2, dim2=-1).add_(damping.squeeze(-1))
    # The second try is on the CPU because not every device knows float64.
    for convert in (Tensor.clone, lambda t: t.cpu().double()):
        factor, failed = torch.linalg.cholesky_ex(convert(damped))
        if not failed.any():
            inverse = torch.cholesky_inverse(factor).to(M)
            return inverse if finite(inverse) else None
    return None
