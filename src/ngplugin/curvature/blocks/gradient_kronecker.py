"""The gradient-Kronecker block: F of any matrix as A ⊗ G, by its sampled gradient alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ngplugin.curvature.blocks.block import GradientBlock
from ngplugin.curvature.blocks.kronecker_product import KroneckerProductBlock
from ngplugin.curvature.blocks.matrix_layout import MatrixLayout
from ngplugin.curvature.blocks.symmetric import is_diagonal, mean_eigenvalue, second_moment


class GradientKroneckerBlock(KroneckerProductBlock, GradientBlock):
    """F/Σw ≈ A ⊗ G for a parameter of two or more dimensions, as a matrix `[out, in]`.

    The first dimension that is not 1 is the outputs, all others are the inputs. With S the sampled
    gradient as this matrix, whose covariance is F,

        G = E[S Sᵀ] / Σw,   A = E[Sᵀ S] / E‖S‖²,

    so that tr A tr G = tr F. Exact if F is a Kronecker product; else the partial traces of F, one
    step of the power iteration towards the nearest one. Nothing is known of the maps that used the
    parameter, nor need be: it is for recurrent cells, graph layers, `einsum`, weight norm.

    Source: Gupta et al. 2018 (Shampoo, arXiv:1802.09568), for gradients of the data; Morwani et
    al. 2024 (arXiv:2406.17748) for the fit and its trace.

    Args:
        parameter: the parameter.
        max_factor: a factor of a larger size keeps its diagonal only.
    """

    kind = "gradient-kronecker"

    def __init__(self, parameter: Tensor, max_factor: int = 8192) -> None:
        flat = parameter.detach().squeeze()
        super().__init__([parameter], MatrixLayout(flat))
        self.max_factor = max_factor

    @staticmethod
    def suits(parameter: Tensor) -> bool:
        """Whether it has two sides, and is real."""
        return not parameter.is_complex() and sum(size > 1 for size in parameter.shape) > 1

    def note(self) -> str:
        """Which factors are not whole, for their size."""
        return self._layout.oversized(self.max_factor) + super().note()

    def layout(self) -> dict[str, Any]:
        """The size limit."""
        return {"max_factor": self.max_factor}

    def add_gradient_scores(self, scores: Sequence[Tensor], share: float) -> None:
        """Add `share` of Sᵀ S and S Sᵀ."""
        S = self._layout.matrix(scores, self._dtype)  # [1, out, in]
        self._add("A", share * second_moment(S, self._layout.inputs > self.max_factor))
        self._add("G", share * second_moment(S.mT, self._layout.outputs > self.max_factor))
        self._add("draws", S.new_ones(1, 1, 1))

    def _statistic(self, added: dict[str, Tensor], total_weight: float) -> dict[str, Tensor]:
        """Both over Σw, so that either trace is that of F; and the number of draws."""
        return {
            "A": added["A"] / total_weight,
            "G": added["G"] / total_weight,
            "draws": added["draws"],
        }

    def scale(self, means: Mapping[str, Tensor]) -> Tensor:
        """Mean of A, whose trace is 1, times mean of G."""
        return means["G"] / self._layout.inputs  # A has a trace of 1

    def averaged_factors(self) -> tuple[Tensor, Tensor]:
        """A with a trace of 1, and G."""
        A, G = self.average("A"), self.average("G")
        trace = (mean_eigenvalue(A) * A.shape[-1]).clamp_min(torch.finfo(self._dtype).tiny)
        return A / trace.reshape(-1, *[1] * (A.dim() - 1)), G

    def _moment_rows(self) -> tuple[float, float]:
        """A gradient's rows, and its columns."""
        return self._layout.outputs, self._layout.inputs

    def _sample_sizes(self, A: Tensor, G: Tensor) -> tuple[float | Tensor, float | Tensor]:
        """One draw is as many rows for G as A has equal eigenvalues, and the other way round.

        With S = G^½ Z A^½ and Z independent, S Sᵀ is a sum over the eigenvectors of A weighted by
        its eigenvalues, which varies like a sum of (tr A)² / tr A² equal ones.
        """
        draws = self.effective_count("G") * self.average("draws")
        return draws * _equal_eigenvalues(G), draws * _equal_eigenvalues(A)


def _equal_eigenvalues(M: Tensor) -> Tensor:
    """(tr M)² / tr M² of each matrix, between 1 and its size; `[group, 1, 1]`."""
    tiny = torch.finfo(M.dtype).tiny
    trace = (mean_eigenvalue(M) * M.shape[-1]).clamp_min(tiny)
    M = M / trace.reshape(-1, *[1] * (M.dim() - 1))  # before squaring, which may be too much
    squares = M.square().sum(-1) if is_diagonal(M) else M.square().sum((-2, -1))
    return 1 / squares[:, None, None].clamp_min(tiny)
