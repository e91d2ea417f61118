"""Per-example Jacobians of whatever a training step predicted, in any order of differentiation.

For predictions of which example i's depends on example i alone, one backward pass of their
weighted sum gives δ at the output of every node that a parameter enters (see `uses`), and with it
every example's own gradient: J_i = Σ_uses Σ_{rows of i} left ⊗ right. No backward pass per
example, no copies of the weights.

Which example a row belongs to is measured, not assumed: a second backward pass with the examples'
numbers as weights gives δ' = number · δ. Rows that are concatenated, reordered or sequence-first
are told apart that way, and rows in which examples meet are found out.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge

from ngplugin.curvature.likelihoods.loss_call import widened
from ngplugin.curvature.uses import Node, Use, find_uses

_TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4}  # of δ', relative to its largest

#: A weight for each example `[N]` to a gradient of each prediction.
Seeds = Callable[[Tensor], Sequence[Tensor]]


class CoupledExamples(Exception):
    """A row of the computation that belongs to more than one example."""


@dataclass(frozen=True)
class Layout:
    """Which rows belong to which example: those at `rows`, as many for each, in order.

    Attributes:
        rows: their places, the examples' one after another; None if all rows are in order.
        each: how many an example has.
    """

    rows: Tensor | None
    each: int

    def of(self, t: Tensor, examples: int) -> Tensor:
        """`[rows, size]` to `[example, each, size]`."""
        chosen = t if self.rows is None else t[self.rows]
        return chosen.reshape(examples, self.each, t.shape[1])


class Jacobian:
    """The per-example Jacobian of predictions with respect to parameters.

    Args:
        predictions: with their graph, which is kept.
        parameters: the columns, in this order.
        examples: N.

    Attributes:
        unknown: by id, the parameters that enter in a way that is not known, and the node's name.
        signature: equal for graphs of the same layout.
    """

    def __init__(
        self, predictions: Sequence[Tensor], parameters: Sequence[Tensor], examples: int
    ) -> None:
        self._predictions = [*predictions]
        self._parameters = [*parameters]
        self._examples = examples
        uses, self.unknown = find_uses(predictions, parameters)
        self._uses = [use for use in uses if id(use.parameter) not in self.unknown]
        self._nodes: list[Node] = list(dict.fromkeys(use.node for use in self._uses))
        shapes = [(n.name(), tuple(n._input_metadata[0].shape)) for n in self._nodes]
        self.signature = (examples, *shapes)

    @property
    def reached(self) -> list[Tensor]:
        """The parameters that the predictions depend on, in ways that are known."""
        found = {id(use.parameter) for use in self._uses}
        return [p for p in self._parameters if id(p) in found]

    def operations(self) -> int:
        """About how many multiplications one forward pass takes."""
        total = 0
        for use in self._uses:
            output = use.node._input_metadata[0].shape
            total += math.prod(output[:-1]) * use.parameter.numel()
        return total

    @torch.no_grad()
    def layouts(self, seeds: Seeds) -> list[Layout | None]:
        """Of the rows of each use; None where a use has no part in the prediction.

        Args:
            seeds: that reach every row of every example.

        Raises:
            CoupledExamples: some row belongs to several examples.
        """
        like = self._predictions[0]
        numbers = torch.arange(1, self._examples + 1, device=like.device, dtype=torch.float64)
        once = self._deltas(seeds(torch.ones_like(numbers)))
        again = self._deltas(seeds(numbers))
        found: list[Layout | None] = []
        for use in self._uses:
            delta, weighted = once[use.node], again[use.node]
            if delta is None or weighted is None:
                found.append(None)
                continue
            # δ stands in the left or the right part, or both; the other is the same each time.
            one = _products(use, delta)
            many = _products(use, weighted)
            found.append(_layout(one, many, self._examples, use.node.name()))
        return found

    @torch.no_grad()
    def rows(
        self, seeds: Sequence[Tensor], layouts: Sequence[Layout | None], dtype: torch.dtype
    ) -> Tensor:
        """J of the predictions times seeds, `[N, parameters]`.

        Args:
            seeds: a gradient of each prediction.
            layouts: what `layouts()` found in a graph of the same `signature`.
            dtype: of the result.
        """
        deltas = self._deltas(seeds)
        parts: dict[int, list[tuple[Tensor, Tensor | None]]] = {}
        composed: dict[int, list[Tensor]] = {}
        for use, layout in zip(self._uses, layouts, strict=True):
            delta = deltas[use.node]
            if delta is None or layout is None:
                continue
            left, right = use.rows(delta)
            left = layout.of(left, self._examples)
            right = None if right is None else layout.of(right, self._examples)
            if use.operand is not None:
                whole = left.sum(1) if right is None else left.mT @ right
                composed.setdefault(id(use.parameter), []).append(self._through(use, whole))
            elif use.transposed and right is not None:
                parts.setdefault(id(use.parameter), []).append((right, left))
            else:
                parts.setdefault(id(use.parameter), []).append((left, right))
        size = sum(p.numel() for p in self._parameters)
        result = self._predictions[0].new_zeros((self._examples, size), dtype=dtype)
        columns = result.split([p.numel() for p in self._parameters], 1)
        for p, column in zip(self._parameters, columns, strict=True):
            _fill(column, parts.get(id(p), []), composed.get(id(p), []))
        return result

    def _deltas(self, seeds: Sequence[Tensor]) -> dict[Node, Tensor | None]:
        edges = [GradientEdge(node, 0) for node in self._nodes]
        found = torch.autograd.grad(
            self._predictions, edges, list(seeds), retain_graph=True, allow_unused=True
        )
        return dict(zip(self._nodes, found, strict=True))

    def _through(self, use: Use, gradients: Tensor) -> Tensor:
        """Carry `[N, operand]` on to the parameter the operand was made of, `[N, parameter]`."""
        assert use.operand is not None
        (carried,) = torch.autograd.grad(
            [use.operand],
            [use.parameter],
            [gradients.reshape(self._examples, *use.shape)],
            retain_graph=True,
            is_grads_batched=True,
        )
        return carried.reshape(self._examples, -1)


def _fill(
    column: Tensor, parts: Sequence[tuple[Tensor, Tensor | None]], composed: Sequence[Tensor]
) -> None:
    """Add up what one parameter's uses give, into `[N, parameter]`."""
    outer = [(left, right) for left, right in parts if right is not None]
    if outer:
        lefts, rights = (widened(torch.cat([pair[i] for pair in outer], 1)) for i in (0, 1))
        matrix = lefts.mT @ rights  # [N, a, b]
        column.view(matrix.shape).copy_(matrix)
    for left, right in parts:
        if right is None:
            column.add_(left.sum(1))
    for whole in composed:
        column.add_(whole)


def _products(use: Use, delta: Tensor) -> Tensor:
    """Something linear in δ with a row for each row of the use, `[rows, size]`."""
    left, right = use.rows(delta)
    if right is None:
        return left
    # Only one side has δ; a signed sum of the other keeps the product linear and small.
    return torch.cat([left * _signed(right), right * _signed(left)], 1)


def _signed(t: Tensor) -> Tensor:
    """A generic combination of each row's features, `[rows, 1]`."""
    places = torch.arange(1, t.shape[1] + 1, device=t.device, dtype=t.dtype)
    return t @ places.sin()[:, None]


def _layout(one: Tensor, many: Tensor, examples: int, name: str) -> Layout | None:
    """Find whose each row is, from a quantity linear in δ and the same with δ' = number · δ.

    Raises:
        CoupledExamples: a row is no multiple, or no whole one, or examples differ in their rows.
    """
    rows = len(one)
    limit = _TOLERANCE.get(one.dtype, 0.03) * many.abs().max().double()
    one, many = one.double(), many.double()
    alive = one.abs().amax(1) > 0
    if not alive.any():
        return None

    def fits(owner: Tensor, chosen: Tensor) -> bool:
        off = many[chosen] - (owner + 1)[:, None] * one[chosen]
        return bool((off.abs() <= limit).all())

    places = alive.nonzero()[:, 0]
    low, high = int(places[0]), int(places[-1]) + 1
    every = torch.arange(rows, device=one.device)
    for start, stop in ((0, rows), (low, high)):
        if (stop - start) % examples:
            continue
        each = (stop - start) // examples
        inside = every[start:stop]
        if fits((inside - start) // each, inside):
            whole = start == 0 and stop == rows
            return Layout(None if whole else inside, each)
        if fits((inside - start) % examples, inside):
            return Layout(inside.reshape(each, examples).mT.reshape(-1), each)
    chosen = places
    strongest = one[chosen].abs().argmax(1, keepdim=True)
    ratio = many[chosen].gather(1, strongest) / one[chosen].gather(1, strongest)
    owner = ratio[:, 0].round() - 1
    counts = torch.bincount(owner.clamp(0, examples - 1).long(), minlength=examples)
    if (
        not fits(owner, chosen)
        or owner.min() < 0
        or owner.max() >= examples
        or counts.min() != counts.max()
    ):
        raise CoupledExamples(f"a row of {name} depends on several examples")
    order = owner.sort(stable=True).indices
    return Layout(chosen[order], int(counts[0]))
