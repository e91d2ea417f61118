"""The eigen block (EKFAC): second moments along the Kronecker factors' eigenvectors."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from ngplugin.curvature.average import RunningAverage
from ngplugin.curvature.blocks.averaged import Inversion
from ngplugin.curvature.blocks.block import BlockDamping
from ngplugin.curvature.blocks.kronecker import KroneckerBlock
from ngplugin.curvature.blocks.symmetric import diagonal_of, is_diagonal
from ngplugin.curvature.factorization import Remedy, eigh
from ngplugin.curvature.pace import Work
from ngplugin.curvature.ranks import mean_over_ranks_
from ngplugin.curvature.spectrum import Spectrum, spectrum

_MOST_AT_ONCE = 2**24  # numbers of the per-example gradients that are formed together


class EigenBlock(KroneckerBlock):
    """F/Σw ≈ (U_A ⊗ U_G) diag(M) (U_A ⊗ U_G)ᵀ, with A = U_A a U_Aᵀ and G = U_G g U_Gᵀ.

    The factors of `KroneckerBlock` only give the eigenvectors, at each refresh. The eigenvalues

        M_ij = Σ_n (u_i^Gᵀ S_n u_j^A)² / Σw,   S_n = Σ_t g_nt a_ntᵀ,

    are measured along them at every statistic, with S_n the gradient of the score of one example n:
    they are the diagonal of F in that basis, also where an example's rows share the weight. (The
    calls of a weight that is used several times count as independent.) Of all diagonals in
    this basis it is the nearest to F, so never further from it than A ⊗ G, whose eigenvalues are
    a_j g_i.

    At a refresh M is carried over to the new basis as the diagonal there of the matrix it stands
    for in the old one, M' = R_G² M (R_A²)ᵀ with R = U_newᵀ U_old and elementwise squares; at the
    first it is a_j g_i. A factor that is too large for a matrix keeps its axes as eigenvectors.

    Source: George et al. 2018 (arXiv:1806.03884).
    """

    kind = "eigen"
    redampable = True

    def _add_rows(self, a: Tensor, g: Tensor, counted: Tensor, share: float, first: int) -> None:
        super()._add_rows(a, g, counted, share, first)
        a = a[..., : self._layout.inputs]
        if self.inverted:
            groups = slice(first, first + len(a))
            bases = [basis if is_diagonal(basis) else basis[groups] for basis in self._bases()]
            self._add_groups("M", squared_gradients(a, g, *bases), share, first)

    def _statistic(self, added: dict[str, Tensor], total_weight: float) -> dict[str, Tensor]:
        """M/Σw too, once there is a basis for it."""
        statistic = super()._statistic(added, total_weight)
        return {**statistic, "M": added["M"] / total_weight} if "M" in added else statistic

    def scale(self, means: Mapping[str, Tensor]) -> Tensor:
        """Of M, once there is one."""
        return self.average("M").mean() if "M" in self._averages else super().scale(means).mean()

    def grow(self, means: Mapping[str, Tensor]) -> None:
        """The eigenvalues are those of the new averages, nothing has to be scaled."""
        if self.inverted:
            mean_over_ranks_([self._averages["M"].sum])
            self._refreshed.update(self._damped(self._refreshed))

    def _invert(self, damping: BlockDamping, diagonal: bool) -> Inversion | None:
        """Find the eigenvectors, take M over to them, and damp it; see `_damped`."""
        A, G = self.averaged_factors()
        if not G.any():
            return Inversion({})
        if diagonal:
            A, G = diagonal_of(A), diagonal_of(G)
        eigen_A, A_remedy = eigenvectors(A)
        eigen_G, G_remedy = eigenvectors(G)
        if eigen_A is None or eigen_G is None:
            return None
        (a, U_A), (g, U_G) = eigen_A, eigen_G
        if "M" in self._averages:
            old_A, old_G = self._bases()
            M = carried(carried(self.average("M"), old_G, U_G).mT, old_A, U_A).mT
        else:
            M = g[:, :, None] * a[:, None, :]
        tensors = {"U_A": U_A, "U_G": U_G, "M": M, **self._settings(damping)}
        return Inversion(tensors, max(A_remedy, G_remedy))

    def work(self, damping: BlockDamping) -> Work:
        """Also of the rows along the eigenvectors, and of their squares' product."""
        work, taken = super().work(damping), self._taken
        inputs, outputs = self._layout.inputs, self._layout.outputs
        rotated = taken * (inputs**2 + outputs**2 + inputs * outputs)
        return replace(work, statistics=work.statistics + self.groups * rotated)

    def _inversion_work(self, size: int, how: BlockDamping) -> float:
        """Of `eigh`; see docs/cost.md."""
        return 6 * size**3

    def take(self, inversion: Inversion) -> Remedy:
        """Go on averaging M in the new basis."""
        if inversion.tensors:
            self._averages.setdefault("M", RunningAverage())
            self._averages["M"].replace(inversion.tensors["M"], like=self._averages["G"])
            damped = self._damped(inversion.tensors)
            inversion = inversion._replace(tensors={**inversion.tensors, **damped})
        return super().take(inversion)

    def _settings(self, damping: BlockDamping) -> dict[str, Tensor]:
        """What `_damped` has to know of the damping, `[group, 1, 1]` each."""
        A, G = self.averaged_factors()
        one = A.new_ones(self.groups, 1, 1)
        settings = {
            "absolute": one * (damping.value if damping.mode == "absolute" else 0.0),
            "floor": one * damping.floor,
        }
        shares = self._damping_shares(A, G, damping) if damping.mode == "relative" else (0.0, 0.0)
        settings["A_share"], settings["G_share"] = (one * share for share in shares)
        return settings

    def redamp(self, damping: BlockDamping) -> bool:
        """The eigenvalues are known: add another damping to them."""
        if not self.inverted:
            return False
        self._refreshed.update(self._settings(damping))
        self._refreshed.update(self._damped(self._refreshed))
        return True

    def _damped(self, refreshed: dict[str, Tensor]) -> dict[str, Tensor]:
        """M by the average, and the damping D to be added to it; no factorization is needed.

        `"relative"`: D_ij = ε_A mean_j M_ij + ε_G mean_i M_ij + ε_A ε_G max(mean M, floor), with
        the ε of `KroneckerProductBlock`. For M_ij = a_j g_i this is what damping both factors adds.

        `"absolute"`: λ.
        """
        M = self.average("M")
        A_share, G_share = refreshed["A_share"], refreshed["G_share"]  # [group, 1, 1]
        mean = M.mean((1, 2), keepdim=True)
        D = (
            A_share * M.mean(2, keepdim=True)
            + G_share * M.mean(1, keepdim=True)
            + A_share * G_share * torch.maximum(mean, refreshed["floor"])
            + refreshed["absolute"]
        )
        seen = self.average("rows") > 0
        # A group that no known map has used yet is scaled as the others are, if there are any.
        if seen.any() and not seen.all():
            D = torch.where(seen, D, mean[seen].mean())
        return {"M": M, "damping": D}

    def _bases(self) -> tuple[Tensor, Tensor]:
        """U_A and U_G, columns `[group, d, d]`, or ones `[group, d]` for the axes themselves."""
        assert self.inverted, "refresh() comes first"
        return self._refreshed["U_A"], self._refreshed["U_G"]

    def precondition(
        self, gradients: Sequence[Tensor], curved: bool = True
    ) -> tuple[list[Tensor], list[Tensor]]:
        """Divide by M + D in the basis, and multiply the result by M."""
        M, D = self._refreshed["M"], self._refreshed["damping"]
        gradient = self._rotated(gradients)
        V = torch.where(M + D > 0, gradient / (M + D), 0.0)
        products = self._rotated_back(M * V, gradients) if curved else []
        return self._rotated_back(V, gradients), products

    def product(self, vectors: Sequence[Tensor]) -> list[Tensor]:
        """Multiply by M in the basis."""
        return self._rotated_back(self._refreshed["M"] * self._rotated(vectors), vectors)

    def _rotated(self, tensors: Sequence[Tensor]) -> Tensor:
        """U_Gᵀ V U_A."""
        U_A, U_G = self._bases()
        V = along(U_G, self._layout.matrix(tensors, self._dtype))
        return along(U_A, V.mT).mT

    def _rotated_back(self, V: Tensor, like: Sequence[Tensor]) -> list[Tensor]:
        """U_G V U_Aᵀ."""
        U_A, U_G = (U if is_diagonal(U) else U.mT for U in self._bases())
        return self._layout.parts(along(U_A, along(U_G, V).mT).mT, like)

    def spectrum(self) -> Spectrum:
        """Of M and of M + D."""
        M, damped = self._refreshed["M"], self._refreshed["M"] + self._refreshed["damping"]
        return spectrum(M, (*M.aminmax(), *damped.aminmax()))


def eigenvectors(X: Tensor) -> tuple[tuple[Tensor, Tensor] | None, Remedy]:
    """Eigenvalues `[group, d]` of each matrix, and eigenvectors as columns; None if it failed.

    Of a diagonal the eigenvectors are the axes, for which stand ones `[group, d]`.
    """
    if is_diagonal(X):
        return (X, torch.ones_like(X)), Remedy.NONE
    found, remedy = eigh(X)
    return found and (found[0].clamp_min(0), found[1]), remedy


def along(U: Tensor, M: Tensor) -> Tensor:
    """Uᵀ M, for M `[group, d, n]`."""
    return M if is_diagonal(U) else U.mT @ M


def carried(M: Tensor, old: Tensor, new: Tensor) -> Tensor:
    """The diagonal, along new eigenvectors, of a matrix that is diagonal along the old ones.

    Args:
        M: the old diagonal as `[group, d, n]`; n are independent.
        old: eigenvectors.
        new: eigenvectors.
    """
    if is_diagonal(new):
        return M
    turned = new.mT if is_diagonal(old) else new.mT @ old
    return turned.square() @ M


def squared_gradients(a: Tensor, g: Tensor, U_A: Tensor, U_G: Tensor) -> Tensor:
    """Σ_n (U_Gᵀ Σ_t g_nt a_ntᵀ U_A)², elementwise squares; `[group, out, in]`.

    Without shared rows the square of the product is the product of the squares. With them each
    example's gradient is formed, a few at a time, and either it or its rows are rotated, whatever
    is less work.

    Args:
        a: inputs `[group, example, shared, in]`.
        g: scores `[group, example, shared, out]`.
        U_A: eigenvectors over the inputs.
        U_G: eigenvectors over the outputs.
    """
    shared, inputs, outputs = a.shape[2], a.shape[3], g.shape[3]
    rows_first = shared * (inputs**2 + outputs**2) < inputs * outputs * (inputs + outputs)
    if rows_first:
        a = a if is_diagonal(U_A) else a @ U_A[:, None]
        g = g if is_diagonal(U_G) else g @ U_G[:, None]
    if shared == 1:
        return g.squeeze(2).square().mT @ a.squeeze(2).square()
    total = a.new_zeros(len(a), outputs, inputs)
    at_once = max(1, _MOST_AT_ONCE // max(1, len(a) * inputs * outputs))
    for some_a, some_g in zip(a.split(at_once, 1), g.split(at_once, 1), strict=True):
        S = some_g.mT @ some_a  # [group, example, out, in]
        if not rows_first:
            S = S if is_diagonal(U_G) else U_G.mT[:, None] @ S
            S = S if is_diagonal(U_A) else S @ U_A[:, None]
        total += S.square().sum(1)
    return total
