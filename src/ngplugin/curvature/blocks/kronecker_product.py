"""What blocks have in common that are a Kronecker product of two factors."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ngplugin.curvature.blocks.averaged import AveragedBlock, Inversion
from ngplugin.curvature.blocks.block import BlockDamping
from ngplugin.curvature.blocks.factor import Factor, damped_factor
from ngplugin.curvature.blocks.low_rank_factor import low_rank_factor, read_factor
from ngplugin.curvature.blocks.matrix_layout import MatrixLayout
from ngplugin.curvature.blocks.symmetric import diagonal_of, is_diagonal, mean_eigenvalue
from ngplugin.curvature.factorization import Remedy
from ngplugin.curvature.pace import Work
from ngplugin.curvature.spectrum import Spectrum, counted, counted_products

_USUAL_ROWS = 1024  # where they are not seen
_SMALL_SIZE = 128  # of a factor with which any product is soon done
_LOWEST_RANK = 32  # whatever it takes
_AVERAGED = 32  # rows of a second moment that take as long as averaging it; see docs/cost.md


class KroneckerProductBlock(AveragedBlock):
    """F/Σw ≈ A ⊗ G for a matrix `[group, out, in]`: A over its inputs, G over its outputs.

    Either factor may be kept as its diagonal only. Where A and G come from is the subclass's to
    say, with "G" among its averages, and on how many rows they rest.

    Args:
        parameters: as the layout takes them.
        layout: how they are a matrix.
    """

    def __init__(self, parameters: Sequence[Tensor], layout: MatrixLayout) -> None:
        super().__init__(parameters)
        self._layout = layout
        self.rows: float = _USUAL_ROWS  # of a step, that the map was applied to

    def note(self) -> str:
        """Which factors are kept by their leading eigenvectors, since the last refresh."""
        sides = (("A", "inputs", self._layout.inputs), ("G", "outputs", self._layout.outputs))
        return super().note() + "".join(
            f"; {side} {size:,} by {self._refreshed[f'{name}_basis'].shape[-1]} eigenvectors"
            for name, side, size in sides
            if f"{name}_basis" in self._refreshed
        )

    @abstractmethod
    def averaged_factors(self) -> tuple[Tensor, Tensor]:
        """A and G by the averages, `[group, d, d]` or their diagonals `[group, d]`."""

    def _sample_sizes(self, A: Tensor, G: Tensor) -> tuple[float | Tensor, float | Tensor]:
        """How many independent rows A and G effectively rest on; `[group, 1, 1]` or numbers."""
        rows = self.effective_count("G") * self.average("rows")
        return rows, rows

    @property
    def factors(self) -> tuple[Factor, Factor]:
        """A and G as of the last refresh."""
        assert self.inverted, "refresh() comes first"
        inputs, outputs = self._layout.inputs, self._layout.outputs
        return read_factor(self._refreshed, "A", inputs), read_factor(self._refreshed, "G", outputs)

    def _invert(self, damping: BlockDamping, diagonal: bool) -> Inversion | None:
        """Damp each factor and invert it, if any score has come this way yet."""
        A, G = self.averaged_factors()
        if not G.any():
            return Inversion({})
        if diagonal:
            A, G = diagonal_of(A), diagonal_of(G)
        A_damping, G_damping = self._dampings(A, G, damping)
        damped_A, A_remedy = self._inverted("A", A, A_damping, damping)
        damped_G, G_remedy = self._inverted("G", G, G_damping, damping)
        if damped_A is None or damped_G is None:
            return None
        tensors = {**damped_A.padded(self._layout.columns).named("A"), **damped_G.named("G")}
        return Inversion(tensors, max(A_remedy, G_remedy))

    def _inverted(
        self, name: str, X: Tensor, damping: Tensor, how: BlockDamping
    ) -> tuple[Factor | None, Remedy]:
        size = X.shape[-1]
        rank = self._kept_rank(size, how)
        if is_diagonal(X) or rank is None:
            return damped_factor(X, damping, how.products)
        start = self._refreshed.get(f"{name}_basis")
        return low_rank_factor(X, damping, rank, None if start is None else start[:, :size])

    def _kept_rank(self, size: int, how: BlockDamping) -> int | None:
        """By how many eigenvectors a factor is kept; None if it is whole."""
        # Of d multiplications an element of the layer's matrix for a product with X, 2 r for one
        # by r eigenvectors, and 3 rows for the pass forward and backward.
        room = 3 * how.share * self.rows
        rank = max(_LOWEST_RANK, int(min(how.rank, room / 2)))
        return None if size <= max(room, 2 * rank, _SMALL_SIZE) else rank

    def _dampings(self, A: Tensor, G: Tensor, damping: BlockDamping) -> tuple[Tensor, Tensor]:
        """What is added to the diagonals of A and G, `[group, 1, 1]` each.

        `"relative"`: A + ε_A (tr A / d_in) I and G + ε_G (tr G / d_out) I: the damping follows each
        factor's own mean eigenvalue, so it means the same in every layer and unit. ε = λ + γ d/n,
        with n the number of rows that the average effectively rests on: a factor from fewer rows
        than its size is singular, and its sampled spectrum is spread too wide by about d/n, which
        shrinking towards the multiple of the identity mends (Ledoit & Wolf 2004, A well-conditioned
        estimator for large-dimensional covariance matrices). The elements of a diagonal are
        spread by 1/n, like factors of size 1. Where the product of the means is below the floor,
        G's is raised until it is not.

        `"absolute"`: A + π√λ I and G + (√λ/π) I, π² = (tr A / d_in) / (tr G / d_out), whose product
        exceeds A ⊗ G + λI by cross terms only (Martens & Grosse 2015, §6.3).
        """
        mean_A, mean_G = mean_eigenvalue(A), mean_eigenvalue(G)  # [group, 1, 1]
        tiny = torch.finfo(self._dtype).tiny
        if damping.mode == "absolute":
            # The roots apart, for their quotient is finite whatever they are.
            pi = mean_A.clamp_min(tiny).sqrt() / mean_G.clamp_min(tiny).sqrt()
            return damping.value**0.5 * pi, damping.value**0.5 / pi
        mean_G = torch.maximum(mean_G, damping.floor / mean_A.clamp_min(tiny))
        shares = self._damping_shares(A, G, damping)
        return shares[0] * mean_A, shares[1] * mean_G

    def _damping_shares(
        self, A: Tensor, G: Tensor, damping: BlockDamping
    ) -> tuple[float | Tensor, float | Tensor]:
        """ε_A and ε_G of relative damping."""
        shares = []
        for matrix, n in zip((A, G), self._sample_sizes(A, G), strict=True):
            size = 1 if is_diagonal(matrix) else matrix.shape[-1]
            n = n.clamp_min(1) if isinstance(n, Tensor) else max(n, 1.0)
            shares.append(damping.value + damping.sampling * size / n)
        return shares[0], shares[1]

    def precondition(
        self, gradients: Sequence[Tensor], curved: bool = True
    ) -> tuple[list[Tensor], list[Tensor]]:
        """V = G_d⁻¹ M A_d⁻¹ with the damped factors and M the gradient, and G V A.

        With A_d = A + a I the product with the larger factor needs no multiplication, since
        V A = V A_d - a V = G_d⁻¹ M - a V, nor G V for the same reason if G is larger.
        """
        A, G = self.factors
        # Once for all products, unless one of the factors is too small for another precision.
        computed = A.computed if A.computed == G.computed else self._dtype
        M = self._layout.matrix(gradients, computed, padded=True)
        inputs_larger = self._layout.inputs >= self._layout.outputs
        if inputs_larger:
            half = G.solve(M)
            V = A.solve_right(half)
        else:
            half = A.solve_right(M)
            V = G.solve(half)
        directions = self._layout.parts(V, gradients)
        if not curved:
            return directions, []
        if inputs_larger:
            GVA = G.times(half - A.damping.to(V.dtype) * V)
        else:
            GVA = A.times_right(half - G.damping.to(V.dtype) * V)
        return directions, self._layout.parts(self._growth * GVA.to(self._dtype), gradients)

    def product(self, vectors: Sequence[Tensor]) -> list[Tensor]:
        """G V A with the undamped factors."""
        A, G = self.factors
        V = self._layout.matrix(vectors, self._dtype, padded=True)
        GVA = self._growth * A.times_right(G.times(V))
        return self._layout.parts(GVA, vectors)

    def work(self, damping: BlockDamping) -> Work:
        """Of the passes of a matrix, of scores on their way back, and of both factors."""
        passing = self._passing()
        sizes = [
            (size, rows)
            for size, rows, X in zip(
                (self._layout.inputs, self._layout.outputs),
                self._moment_rows(),
                self.averaged_factors(),
                strict=True,
            )
            if not is_diagonal(X)
        ]
        moments = sum(size**2 * (rows + _AVERAGED) for size, rows in sizes)
        inversions = sum(self._inversion_work(size, damping) for size, _ in sizes)
        groups = self._layout.groups
        return Work(passing, passing / 3 + groups * moments, groups * inversions, maps=1)

    def _passing(self) -> float:
        """Multiplications of the map's own forward and backward pass."""
        return 3 * self.rows * sum(p.numel() for p in self.parameters)

    @abstractmethod
    def _moment_rows(self) -> tuple[float, float]:
        """Rows of the last statistic of A, and of G."""

    def _inversion_work(self, size: int, how: BlockDamping) -> float:
        """Of one factor: d³ for Cholesky and the inverse from it (docs/cost.md), or a sweep."""
        rank = self._kept_rank(size, how)
        return size**3 if rank is None else 2 * size**2 * rank + 4 * size * rank**2

    def state_dict(self) -> dict[str, Any]:
        """Also the rows of a step."""
        return {**super().state_dict(), "rows": self.rows}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over a saved state."""
        super().load_state_dict(state)
        self.rows = float(state.get("rows", _USUAL_ROWS))

    def spectrum(self) -> Spectrum:
        """Products of the factors' eigenvalues, of all groups."""
        A, G = self.factors
        (a, a_times), (g, g_times) = A.eigenvalues(), G.eigenvalues()  # [group, n]
        a_damped, g_damped = a + A.damping[:, 0], g + G.damping[:, 0]
        extremes = (
            (a.amin(1) * g.amin(1)).min(),
            (a.amax(1) * g.amax(1)).max(),
            (a_damped.amin(1) * g_damped.amin(1)).min(),
            (a_damped.amax(1) * g_damped.amax(1)).max(),
        )
        counts = counted_products(counted(a, a_times), counted(g, g_times))
        return Spectrum(counts, torch.stack(extremes))
