"""What an observed call of a linear map is: its rows of inputs and of output scores."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from torch import Tensor

#: Which dimensions of a weight are groups, which outputs, which inputs.
Dimensions = tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]


_FEWEST_EXAMPLES = 8  # that rows are taken of, see `MapCall.some_rows`


@dataclass(frozen=True)
class MapCall:
    """One observed application of a weight: output = weight · input + bias, a row at a time.

    Attributes:
        kind: what the coverage table calls it.
        weight: the parameter; as a matrix it is `[group, out, in]` in memory order.
        bias: the parameter added to the output, if any.
        groups: number of independent maps that the whole weight is.
        input_rows: computes `[group, example, shared, in]`, of the groups that the call applies.
        score_rows: turns a gradient of the output's shape into `[group, example, shared, out]`.
        inputs_first: the weight is `[group, in, out]` in memory order instead.
        bias_joins: the bias is added once to each row, as an input of value 1 would be.
        first: the first of the groups that the call applies.
        dims: the weight's dimensions by their part in the map, where it is in neither order.
        thin_input_rows: computes `input_rows()[:, ::k]` where that is less work; None: it is not.
    """

    kind: str
    weight: Tensor
    bias: Tensor | None
    groups: int
    input_rows: Callable[[], Tensor]
    score_rows: Callable[[Tensor], Tensor]
    inputs_first: bool = False
    bias_joins: bool = True
    first: int = 0
    dims: Dimensions | None = None
    thin_input_rows: Callable[[int], Tensor] | None = None

    def with_examples_last(self, count: int) -> MapCall:
        """The same call where it is not the first axis of rows that are examples, but the last."""

        def sorted_rows(t: Tensor) -> Tensor:
            shared = t.shape[1:3].numel() // max(count, 1)
            return t.reshape(len(t), shared, count, t.shape[-1]).transpose(1, 2)

        return replace(
            self,
            input_rows=lambda: sorted_rows(self.input_rows()),
            score_rows=lambda score: sorted_rows(self.score_rows(score)),
            thin_input_rows=None,
        )

    def some_rows(self, score: Tensor, fewest: int) -> tuple[Tensor, Tensor, float]:
        """The rows of some of the examples, evenly spaced, for a mean over many.

        Args:
            score: the gradient of the output.
            fewest: rows that are enough, about; at least 8 examples are taken all the same, since
                the rows of one resemble each other.

        Returns:
            Inputs and scores, and how many rows each stands for.
        """
        g = self.score_rows(score)
        examples, shared = g.shape[1:3]
        every = max(1, min(round(examples * shared / fewest), examples // _FEWEST_EXAMPLES))
        if every == 1:
            return self.input_rows(), g, 1.0
        thin = self.thin_input_rows
        a = self.input_rows()[:, ::every] if thin is None else thin(every)
        return a, g[:, ::every], examples / a.shape[1]

    def weight_gradient(self, score: Tensor) -> Tensor:
        """What the rows say d(score)/d(weight) is, the gradient at the output being given."""
        a, g = self.input_rows().flatten(1, 2), self.score_rows(score).flatten(1, 2)
        matrices = g.mT @ a.to(g.dtype)
        whole = matrices.new_zeros(self.groups, *matrices.shape[1:])
        whole[self.first : self.first + len(matrices)] = matrices
        return as_weight(whole, self.weight.shape, self.inputs_first, self.dims)


@dataclass(frozen=True)
class LookupCall:
    """One observed look-up: the linear map of one-hot inputs, whose rows are never written out.

    Attributes:
        kind: what the coverage table calls it.
        weight: the parameter, `[vocabulary, dim]`.
        indices: which row of the weight each input row looks up, `[rows]`.
        score_rows: turns a gradient of the output's shape into `[rows, dim]`; zero where the
            weight gets no gradient (padding).
    """

    kind: str
    weight: Tensor
    indices: Tensor
    score_rows: Callable[[Tensor], Tensor]

    def weight_gradient(self, score: Tensor) -> Tensor:
        """What the rows say d(score)/d(weight) is, the gradient at the output being given."""
        g = self.score_rows(score)
        return g.new_zeros(self.weight.shape).index_add_(0, self.indices, g)


def as_matrices(
    weight: Tensor, groups: int, outs: int, inputs_first: bool, dims: Dimensions | None
) -> Tensor:
    """A weight, or its gradient, as `[group, out, in]`; the layout as of a `MapCall`."""
    if dims is not None:
        weight = weight.permute(*itertools.chain(*dims))
    if inputs_first:
        return weight.reshape(groups, -1, outs).mT
    return weight.reshape(groups, outs, -1)


def as_weight(
    matrices: Tensor, shape: Sequence[int], inputs_first: bool, dims: Dimensions | None
) -> Tensor:
    """Back from `as_matrices`, to the weight's own shape."""
    if inputs_first:
        matrices = matrices.mT
    if dims is None:
        return matrices.reshape(*shape)
    order = [*itertools.chain(*dims)]
    permuted = matrices.reshape([shape[d] for d in order])
    return permuted.permute([order.index(d) for d in range(len(order))])
