"""The Kronecker block: F of a linear map's weight (and bias) as A ⊗ G."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import Tensor

from ngplugin.curvature.blocks.block import BlockDamping, MapBlock
from ngplugin.curvature.blocks.kronecker_product import KroneckerProductBlock
from ngplugin.curvature.blocks.matrix_layout import MatrixLayout
from ngplugin.curvature.blocks.symmetric import is_diagonal, mean_eigenvalue, second_moment
from ngplugin.curvature.taps import Dimensions, LookupCall, MapCall

#: How rows that share a weight, the tokens or pixels of an example, count.
WeightSharing = Literal["expand", "reduce"]


# Rows of one statistic beyond these say little more: a running average has those of twenty.
_FEWEST_ROWS = 256
_ROWS_PER_SIZE = 0.25  # of the larger factor


class KroneckerBlock(KroneckerProductBlock, MapBlock):
    """F/Σw ≈ A ⊗ G for a weight W `[group, out, in]`, the bias being one more input of value 1.

    With a row of the map (an example, a token, a pixel) as r, its input a_r and its score g_r,

        F = Σ_r (a_r a_rᵀ) ⊗ (g_r g_rᵀ)  ≈  A ⊗ (G Σw),
        A = mean of a_r a_rᵀ over the rows with g_r ≠ 0,   G = Σ_r g_r g_rᵀ / Σw.

    Exact for one row, and whenever a and g are independent over the rows (a deep linear network
    with squared loss). A row that carries no score, a masked example or padding, says nothing
    about F and is left out of A too. Averaged are the sum of a_r a_rᵀ and the number of rows, each
    by itself: a step, or a process, counts for A by its rows.

    The rows of one example n that share the weight, its tokens or pixels t, are either treated as
    if they were independent (*expand*, as above), or all inputs of an example as one, its mean, and
    all scores as one, their sum (*reduce*):

        A = mean of ā_n ā_nᵀ over the examples, ā_n = mean_t a_nt,   G = Σ_n ĝ_n ĝ_nᵀ / Σw,
        ĝ_n = Σ_t g_nt.

    *Expand* is exact for a deep linear network each of whose rows has a loss of its own, *reduce*
    for one whose rows are summed or averaged before the loss (Eschenhagen et al. 2023,
    arXiv:2311.00636, §3.2, §3.3). An example is one place along the first axis of a map's input,
    in multi-head attention along the second.

    Where there are many rows, as of the pixels that a convolution slides over, those of some evenly
    spaced examples stand for all.

    Args:
        weight: the parameter.
        bias: the parameter that is one more input, if any.
        groups: number of independent maps that the weight is.
        inputs_first: the weight is `[group, in, out]` in memory.
        max_factor: a factor of a larger size keeps its diagonal only.
        weight_sharing: see above.
        dims: the weight's dimensions by their part in the map, where it is in neither order.

    Source: Martens & Grosse 2015 (arXiv:1503.05671) §3, §6.3 for the damping; Grosse & Martens
    2016 (arXiv:1602.01407) §3 for convolutions.
    """

    kind = "kronecker"

    def __init__(
        self,
        weight: Tensor,
        bias: Tensor | None = None,
        groups: int = 1,
        inputs_first: bool = False,
        max_factor: int = 8192,
        weight_sharing: WeightSharing = "expand",
        dims: Dimensions | None = None,
    ) -> None:
        layout = MatrixLayout(weight, bias, groups, inputs_first, dims)
        super().__init__([weight] if bias is None else [weight, bias], layout)
        self._bias = bias
        self.groups = groups
        self.inputs_first = inputs_first
        self.max_factor = max_factor
        self.weight_sharing = weight_sharing
        self.dims = dims
        self._step_rows = 0.0  # of the calls since the last statistic
        self._step_taken = self._taken = 0.0  # of them, and in the last statistic, in the factors

    def note(self) -> str:
        """Which factors are not whole, for their size."""
        return self._layout.oversized(self.max_factor) + super().note()

    def layout(self) -> dict[str, Any]:
        """Everything but the weight and the bias."""
        return {
            "groups": self.groups,
            "inputs_first": self.inputs_first,
            "max_factor": self.max_factor,
            "weight_sharing": self.weight_sharing,
            "dims": self.dims,
        }

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
        """Add the rows of one call of the map."""
        assert isinstance(call, MapCall), "a call of another layout"
        size = max(self._layout.inputs, self._layout.outputs)
        fewest = max(_FEWEST_ROWS, round(_ROWS_PER_SIZE * size))
        a, g, stands_for = call.some_rows(score, fewest)
        a = a.to(self._dtype)  # [group, example, shared, in]
        g = stands_for**0.5 * g.to(self._dtype)  # [group, example, shared, out]
        parts = self.groups // call.groups
        if parts > 1:
            a = a.repeat_interleave(parts, 0)
            g = g.unflatten(-1, (parts, -1)).movedim(3, 1).flatten(0, 1)
        self._step_rows += share * stands_for * g.shape[:3].numel() / self.groups
        counted = (g != 0).any(-1, keepdim=True).to(self._dtype)  # [group, example, shared, 1]
        a = a * counted
        if self._bias is not None:
            one = counted if call.bias is self._bias else torch.zeros_like(counted)
            more = self._layout.columns - self._layout.inputs
            a = torch.cat([a, one, one.new_zeros(*one.shape[:-1], more)], -1)
        self._add_rows(a, g, counted, share, call.first * parts)

    def _add_rows(self, a: Tensor, g: Tensor, counted: Tensor, share: float, first: int) -> None:
        """Add rows of inputs and scores, `[group, example, shared, d]`, from group `first` on.

        Args:
            a: the inputs, zero where they do not count; maybe padded.
            g: the scores.
            counted: 1 or 0.
            share: of the draw.
            first: the first of the groups that there are rows of.
        """
        if self.weight_sharing == "reduce":
            a = a.sum(2) / counted.sum(2).clamp_min(1)  # [group, example, in], as the next two
            g, counted = g.sum(2), counted.sum(2).clamp_max(1)
        else:
            a, g, counted = (t.flatten(1, 2) for t in (a, g, counted))  # [group, row, d]
        self._step_taken += counted.shape[:2].numel() / self.groups
        inputs = second_moment(a, self._layout.inputs > self.max_factor)
        d = self._layout.inputs  # without padding
        inputs = inputs[:, :d] if is_diagonal(inputs) else inputs[:, :d, :d]
        scores = second_moment(g, self._layout.outputs > self.max_factor)
        self._add_groups("inputs", inputs, share, first)
        self._add_groups("G", scores, share, first)
        self._add_groups("rows", counted.sum(1, keepdim=True), share, first)

    def _add_groups(self, name: str, value: Tensor, share: float, first: int) -> None:
        if name not in self._added:
            self._added[name] = value.new_zeros(self.groups, *value.shape[1:])
        self._added[name][first : first + len(value)].add_(value, alpha=share)

    def _statistic(self, added: dict[str, Tensor], total_weight: float) -> dict[str, Tensor]:
        """Σ aaᵀ, Σ ggᵀ / Σw, and the number of rows, `[group, 1, 1]`."""
        self.rows, self._step_rows = max(1.0, self._step_rows), 0.0
        self._taken, self._step_taken = self._step_taken, 0.0
        return {"inputs": added["inputs"], "G": added["G"] / total_weight, "rows": added["rows"]}

    def discard(self) -> None:
        """Forget what was added and not folded."""
        super().discard()
        self._step_rows = self._step_taken = 0.0

    def _moment_rows(self) -> tuple[float, float]:
        """The same for both."""
        return self._taken, self._taken

    def averaged_factors(self) -> tuple[Tensor, Tensor]:
        """A by the rows of all steps, and G."""
        inputs, rows = self.average("inputs"), self.average("rows")
        rows = rows.clamp_min(torch.finfo(self._dtype).tiny)
        return inputs / rows.reshape(-1, *[1] * (inputs.dim() - 1)), self.average("G")

    def scale(self, means: Mapping[str, Tensor]) -> Tensor:
        """Mean of A times mean of G."""
        rows = means["rows"].clamp_min(torch.finfo(self._dtype).tiny)
        return means["inputs"] / rows * means["G"]

    def _dampings(self, A: Tensor, G: Tensor, damping: BlockDamping) -> tuple[Tensor, Tensor]:
        """A group that no known map has used yet is scaled as the others are on average."""
        A_damping, G_damping = super()._dampings(A, G, damping)
        unseen = self.average("rows") == 0
        if unseen.any() and not unseen.all():
            seen = ~unseen
            A_damping = torch.where(unseen, mean_eigenvalue(A)[seen].mean(), A_damping)
            G_damping = torch.where(unseen, mean_eigenvalue(G)[seen].mean(), G_damping)
        return A_damping, G_damping
