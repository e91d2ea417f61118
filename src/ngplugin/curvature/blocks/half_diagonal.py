"""The half-diagonal Kronecker block: one factor a diagonal, for embeddings and vocabularies."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from ngplugin.curvature.blocks.block import BlockDamping, MapBlock
from ngplugin.curvature.blocks.kronecker_product import KroneckerProductBlock
from ngplugin.curvature.blocks.matrix_layout import MatrixLayout
from ngplugin.curvature.blocks.symmetric import mean_eigenvalue
from ngplugin.curvature.parameter_vector import total
from ngplugin.curvature.taps import LookupCall, MapCall

_LOOKED_UP, _MULTIPLIED = "looked up", "multiplied"


class HalfDiagonalBlock(KroneckerProductBlock, MapBlock):
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
        super().__init__([weight], MatrixLayout(weight))  # the vocabulary as outputs
        self._vocabulary, self._dim = weight.shape

    def takes(self, call: MapCall | LookupCall) -> bool:
        """Whether the call applies the weight as one matrix."""
        return isinstance(call, LookupCall) or (
            call.groups == 1 and call.weight.dim() == 2 and call.dims is None
        )

    def add_map_score(self, call: MapCall | LookupCall, score: Tensor, share: float) -> None:
        """Add the rows of one call."""
        if isinstance(call, LookupCall):
            use = _LOOKED_UP
            g = call.score_rows(score).to(self._dtype)  # [rows, dim]
            counted = (g != 0).any(-1).to(self._dtype)  # [rows]
            v = g.new_zeros(self._vocabulary).index_add_(0, call.indices, counted)
            M = g.mT @ g
        else:
            use = _MULTIPLIED
            a = call.input_rows().to(self._dtype).flatten(0, 2)  # [rows, in]
            g = call.score_rows(score).to(self._dtype).flatten(0, 2)  # [rows, out]
            counted = (g != 0).any(-1).to(self._dtype)
            a = a * counted[:, None]
            over_vocabulary, over_dim = (a, g) if call.inputs_first else (g, a)
            v, M = over_vocabulary.square().sum(0), over_dim.mT @ over_dim
        self._add(f"{use} v", v[None] * share)
        self._add(f"{use} M", M[None] * share)
        self._add(f"{use} rows", counted.sum().reshape(1, 1, 1) * share)

    def _statistic(self, added: dict[str, Tensor], total_weight: float) -> dict[str, Tensor]:
        """V, M and the rows of each use, divided by Σw where it is made of scores."""
        scores = {f"{_LOOKED_UP} M", f"{_MULTIPLIED} v"}
        return {
            name: value / total_weight if name in scores else value for name, value in added.items()
        }

    def _uses(self, values: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor, Tensor, Tensor]]:
        """Each use with its v, M and rows, of those that there were."""
        for use in (_LOOKED_UP, _MULTIPLIED):
            if f"{use} v" in values:
                rows = values[f"{use} rows"].clamp_min(torch.finfo(self._dtype).tiny)
                yield use, values[f"{use} v"], values[f"{use} M"], rows

    def _averaged_uses(self) -> Iterator[tuple[str, Tensor, Tensor, Tensor]]:
        return self._uses({name: self.average(name) for name in self._averages})

    def scale(self, means: Mapping[str, Tensor]) -> Tensor:
        """Of each use, added up."""
        return total(v * M / rows for _, v, M, rows in self._uses(means))

    def averaged_factors(self) -> tuple[Tensor, Tensor]:
        """S as A, and D with a trace of 1 as G."""
        D = total(v * (_trace(M) / rows).squeeze(-1) for _, v, M, rows in self._averaged_uses())
        S = total(v.sum() * M / rows for _, v, M, rows in self._averaged_uses())
        return S, D / D.sum().clamp_min(torch.finfo(self._dtype).tiny)

    def _passing(self) -> float:
        """A lookup multiplies nothing."""
        return super()._passing() if f"{_MULTIPLIED} v" in self._averages else 0.0

    def _moment_rows(self) -> tuple[float, float]:
        """Those of S; D takes no product."""
        return self.rows, 0.0

    def _rare(self) -> Tensor:
        """What one looked-up row counts in D, `[1, 1, 1]`."""
        like, tiny = next(iter(self._averages.values())).sum, torch.finfo(self._dtype).tiny
        row = trace = like.new_zeros(1, 1, 1)
        for use, v, M, rows in self._averaged_uses():
            trace = trace + v.sum() * _trace(M) / rows
            if use == _LOOKED_UP:
                row = _trace(M) / rows
        return row / trace.clamp_min(tiny)

    def _sample_sizes(self, A: Tensor, G: Tensor) -> tuple[float | Tensor, float | Tensor]:
        """That of S; the one row more takes the place of D's sampling damping."""
        rows = total(rows for *_, rows in self._averaged_uses())
        count = max(self.effective_count(name) for name in self._averages)
        return count * rows, float("inf")

    def _dampings(self, A: Tensor, G: Tensor, damping: BlockDamping) -> tuple[Tensor, Tensor]:
        """D gets one row more, in either mode."""
        S_damping, D_damping = super()._dampings(A, G, damping)
        return S_damping, D_damping + self._rare()


def _trace(M: Tensor) -> Tensor:
    """Tr M of each, `[group, 1, 1]`."""
    return mean_eigenvalue(M) * M.shape[-1]
