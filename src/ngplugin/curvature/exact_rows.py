"""Collects the rows of the exact Fisher matrix, and decides whether there is to be one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ngplugin.curvature.blocks import Block, ExactBlock
from ngplugin.curvature.blocks.block import finite
from ngplugin.curvature.jacobian import CoupledExamples, Jacobian, Layout
from ngplugin.curvature.likelihoods import ScoredCall
from ngplugin.curvature.likelihoods.loss_call import FisherRoot, RootedCall
from ngplugin.curvature.ranks import several_ranks

_CHECKED_STEPS = 3  # whose rows are held against autograd
_MOST_BYTES = 2**30  # of rows and matrices
# What `structure="auto"` takes; see `ExactRows`.
_FEWEST_ROWS = 256
_FEWEST_ROWS_PER_PARAMETER = 1 / 8
_MOST_MULTIPLICATIONS = 2e10
_MOST_TIMES_THE_STEP = 300


@dataclass
class _Pending:
    """What one loss gave before it was decided whether the block is to be exact."""

    rows: Tensor
    residual: Tensor


class ExactRows:
    """The exact Fisher matrix of a small model, while it is possible and pays.

    `structure="exact"` asks for it. Else it is chosen by what the first step showed:

    * at least 256 rows, and one for every 8 parameters: a block without an average over steps
      stands or falls with what one batch knows;
    * at most 2·10¹⁰ multiplications for the smaller of the matrices RRᵀ and RᵀR, and at most 300
      times those of the training step itself; at most 1 GiB.

    It is given up, and the parameters get their usual blocks, where an example's prediction turns
    out to depend on other examples, or rows are not to be had of a loss.

    Args:
        forced: take it whatever it costs.

    Attributes:
        block: holds the parameters; None before it was decided, or when it was given up.
        refused: why there is no exact block; None while there may be.
        no_room: it was refused for its size.
        reasons: by id, why a parameter is not in the block.
    """

    def __init__(self, forced: bool = False) -> None:
        self.block: ExactBlock | None = None
        self.refused: str | None = None
        self.no_room = False
        self.reasons: dict[int, str] = {}
        self._forced = forced
        self._untold = False  # refused for its size, or for what all models are
        self._parameters: list[Tensor] = []  # the columns of what is pending
        self._pending: list[_Pending] = []
        self._reached: set[int] = set()
        self._step_multiplications = 0
        self._steps = 0  # that were folded
        self._layouts: dict[tuple[object, ...], list[Layout | None]] = {}

    @property
    def possible(self) -> bool:
        """Whether there may be a block: in all of several processes or, as it is, in none."""
        return self.refused is None and not several_ranks()

    def holds(self, p: Tensor) -> bool:
        """Whether the parameter is in the block."""
        return self.block is not None and any(p is q for q in self.block.parameters)

    def why_not(self, p: Tensor) -> str | None:
        """Why the parameter is not in the block, if that is worth telling.

        That a model is too large for what was not asked for is not.
        """
        if self.refused is not None:
            return self.refused if self._forced or not self._untold else None
        return None if self.block is None else self.reasons.get(id(p))

    def collect(self, loss: ScoredCall, weights: Tensor, parameters: Sequence[Tensor]) -> None:
        """Take the rows of one loss, while its graph is there.

        Args:
            loss: that turned out to be part of the objective.
            weights: w of its terms, `[terms]`.
            parameters: those to be covered.
        """
        if self.refused is not None:
            return
        if several_ranks():
            self._untold = True
            self.refuse("the rows of a batch are spread over several processes")
            return
        columns = parameters if self.block is None else self.block.parameters
        columns = [p for p in columns if p.requires_grad]
        if self.block is None and not self._pending:
            self._parameters = columns
        parts = loss.parts(weights)
        obstacle = None if parts else f"{loss.name} is one of parameters alone"
        for part, w in parts:
            obstacle = obstacle or self._obstacle(part, w, columns)
        if obstacle is not None:
            self.refuse(obstacle)

    def _obstacle(self, loss: RootedCall, weights: Tensor, columns: Sequence[Tensor]) -> str | None:
        """Collect, or say why that cannot be done."""
        if not columns:
            return "no parameters"
        terms, first = len(weights), loss.predictions[0]
        examples = len(first) if first.dim() else 1
        if examples == 0 or terms % examples:
            return f"{terms:,} terms of {loss.name} for {examples:,} predictions"
        outputs = loss.outputs()
        if outputs is None:
            return f"no root of the Fisher information of {loss.name} is known"
        too_large = self._too_large(terms * outputs, columns)
        if too_large is not None:
            return too_large
        jacobian = Jacobian(loss.predictions, columns, examples)
        if self.block is None:  # what is too much for one loss need not be tried
            too_much = self._too_much(terms * outputs, columns, 3 * jacobian.operations())
            if too_much is not None:
                return too_much
        if not finite(*loss.predictions, weights):
            return None  # the step will be skipped, and says nothing about the next
        root = loss.fisher_root(weights)
        assert root is not None
        if not root.columns:
            return None  # where the loss is straight it has no curvature to take rows of
        each = terms // examples  # terms an example
        for p in columns:
            if id(p) in jacobian.unknown:
                if self.block is not None:
                    return f"a parameter now enters through {jacobian.unknown[id(p)]}"
                self.reasons[id(p)] = (
                    f"enters through {jacobian.unknown[id(p)]}, of which no rows are had"
                )
        if not jacobian.reached:
            return None  # no row of this loss is had, which says nothing about the others
        self._reached |= {id(p) for p in jacobian.reached}
        dtype = torch.promote_types(first.dtype, torch.float32)
        if first.device.type != "mps":  # small damping asks for all digits, where there are such
            dtype = torch.float64
        key = (jacobian.signature, each)
        checked = self._steps < _CHECKED_STEPS
        if checked or key not in self._layouts:
            try:
                self._layouts[key] = jacobian.layouts(lambda v: _generic_seeds(root, v, each))
            except CoupledExamples as coupled:
                return str(coupled)
        layouts = self._layouts[key]
        collected = []
        for column, residual in zip(root.columns, root.residuals, strict=True):
            for place in range(each):
                chosen = torch.zeros(terms, dtype=column.dtype, device=column.device)
                chosen[place::each] = 1
                seeds = _seeds(root, column, chosen, loss.predictions)
                rows = jacobian.rows(seeds, layouts, dtype)
                collected.append(_Pending(rows, residual[place::each]))
        if checked:
            known = [p for p in columns if id(p) not in jacobian.unknown]
            if not _agree(loss.predictions, root, columns, known, collected):
                return "the rows of the examples do not add up to the gradient"
        self._step_multiplications += 3 * jacobian.operations()
        if self.block is None:
            self._pending += collected
        else:
            for one in collected:
                self.block.add_rows(one.rows, one.residual)
        return None

    def _too_large(self, more: int, columns: Sequence[Tensor]) -> str | None:
        """Why rows and matrices have no room, if they have none."""
        size = sum(p.numel() for p in columns)
        rows = more + sum(len(one.rows) for one in self._pending)
        small = min(rows, size)
        needed = 8 * (rows * size + 2 * small**2)
        if needed <= _MOST_BYTES:
            return None
        self.no_room = self._untold = True
        return (
            f"{size:,} parameters and {rows:,} rows or more: {needed / 2**30:.1f} GiB of rows and "
            f"matrices, {_MOST_BYTES / 2**30:.0f} GiB at most"
        )

    def decide(self) -> ExactBlock | None:
        """The block, when the first step's rows speak for one; None otherwise.

        A block that was decided on before stays.
        """
        self._steps += 1
        if self.block is not None or self.refused is not None:
            return None
        if not self._pending:
            if self.reasons:
                self.refuse("nothing enters as known")
            return None
        pending, self._pending = self._pending, []
        kept = [p for p in self._parameters if id(p) in self._reached - set(self.reasons)]
        rows = sum(len(one.rows) for one in pending)
        why_not = "nothing enters as known" if not kept else self._why_not(rows, kept)
        if why_not is not None:
            self.refuse(why_not)
            return None
        self.block = ExactBlock(kept)
        columns = torch.cat(
            [
                torch.full((p.numel(),), any(p is q for q in kept), device=p.device)
                for p in self._parameters
            ]
        )
        for one in pending:
            self.block.add_rows(one.rows if columns.all() else one.rows[:, columns], one.residual)
        return self.block

    def _why_not(self, rows: int, kept: Sequence[Tensor]) -> str | None:
        """Why rows that are to be had do not pay."""
        size = sum(p.numel() for p in kept)
        wanted = max(_FEWEST_ROWS, size * _FEWEST_ROWS_PER_PARAMETER)
        if rows < wanted and not self._forced:
            self._untold = True
            return f"{rows:,} rows for {size:,} parameters, at least {wanted:,.0f} wanted"
        return self._too_much(rows, kept, self._step_multiplications)

    def _too_much(self, rows: int, columns: Sequence[Tensor], step: int) -> str | None:
        """Why a matrix of so many rows is too much work beside a step's multiplications."""
        size = sum(p.numel() for p in columns)
        needed = rows * size * min(rows, size)
        most = min(_MOST_MULTIPLICATIONS, _MOST_TIMES_THE_STEP * step)
        if needed <= most or self._forced:
            return None
        self._untold = True
        return f"{needed:.1e} multiplications a step, at most {most:.1e} wanted"

    def discard(self) -> None:
        """Forget what was collected and not folded."""
        self._pending = []
        self._step_multiplications = 0

    def refuse(self, reason: str) -> None:
        """Give the block up for good."""
        self.refused, self.block = reason, None
        self.discard()

    def state_dict(self) -> dict[str, Any]:
        """What was decided; the block itself is saved with the others."""
        return {"refused": self.refused, "costly": self._untold, "steps": self._steps}

    def load_state_dict(self, state: dict[str, Any], blocks: Sequence[Block]) -> None:
        """Take over what was decided, and the block that is among `blocks`."""
        self.discard()
        self.refused, self._steps = state["refused"], int(state["steps"])
        self._untold = bool(state["costly"])
        self.block = next((b for b in blocks if isinstance(b, ExactBlock)), None)


def root_products(
    loss: ScoredCall,
    weights: Tensor,
    tangents: Sequence[Tensor],
    before: list[Tensor] | None,
) -> list[Tensor] | None:
    """Bᵀ t with B = √(w H), in the order in which `ExactRows.collect` takes the rows BᵀJ.

    Args:
        loss: detached.
        weights: w of its terms, `[terms]`.
        tangents: t, a derivative of each prediction, of its shape.
        before: the products of the losses before it, to be added to; None if some were not to be
            had.

    Returns:
        One tensor `[examples]` for each column of B and each term of an example; None if no root is
        known, or not for these predictions alone.
    """
    parts = loss.parts(weights)
    if before is None or len(parts) != 1 or parts[0][0].predictions != loss.predictions:
        return None
    root = parts[0][0].fisher_root(weights)
    if root is None:
        return None
    # Terms are in the predictions' own order only where these are `[terms]` or `[terms, outputs]`.
    if any(t.dim() > 2 or t.numel() % len(weights) for t in loss.predictions):
        return None
    first = loss.predictions[0]
    examples = len(first) if first.dim() else 1
    each = len(weights) // examples
    products = [*before]
    for column in root.columns:
        # What a column says of a term stands where the term's own outputs are.
        seeds = _seeds(root, column, column.new_ones(len(weights)), loss.predictions)
        both = zip(seeds, tangents, strict=True)
        of_terms = torch.stack([(g * t).reshape(len(weights), -1).sum(1) for g, t in both]).sum(0)
        products += [of_terms[place::each] for place in range(each)]
    return products


def _seeds(
    root: FisherRoot, column: Tensor, weight: Tensor, predictions: Sequence[Tensor]
) -> list[Tensor]:
    """A column of B times a weight for each term, as d/d(each prediction)."""
    score = column * weight.reshape(-1, *[1] * (column.dim() - 1))
    return [g.to(p.dtype) for g, p in zip(root.pull_back(score), predictions, strict=True)]


def _generic_seeds(root: FisherRoot, examples: Tensor, each: int) -> list[Tensor]:
    """A weight for each example `[N]`, times something that no term or output is left out of."""
    like = root.columns[0]
    places = torch.arange(1, like.numel() + 1, device=like.device, dtype=torch.float64)
    generic = (1.5 + places.sin()).reshape(like.shape)
    weight = examples.repeat_interleave(each).reshape(-1, *[1] * (like.dim() - 1))
    return root.pull_back((generic * weight).to(like.dtype))


def _agree(
    predictions: Sequence[Tensor],
    root: FisherRoot,
    columns: Sequence[Tensor],
    known: Sequence[Tensor],
    collected: Sequence[_Pending],
) -> bool:
    """Whether a combination of all rows is what autograd says of the same combination.

    Every example counts with a weight of its own, so that rows in another's place show.
    """
    if not known:
        return True
    examples = len(collected[0].rows)
    places = torch.arange(1, examples + 1, device=predictions[0].device, dtype=torch.float64)
    weight = places.sin()
    found = torch.zeros_like(collected[0].rows[0])
    for one in collected:
        found += one.rows.mT @ weight.to(one.rows.dtype)
    terms = weight.repeat_interleave(len(root.columns[0]) // examples).to(root.columns[0].dtype)
    whole = torch.stack(root.columns).sum(0)
    exact = torch.autograd.grad(
        predictions,
        known,
        _seeds(root, whole, terms, predictions),
        retain_graph=True,
        allow_unused=True,
    )
    gradients = {id(p): g for p, g in zip(known, exact, strict=True)}
    tolerance = 1e-8 if predictions[0].dtype == torch.float64 else 1e-2
    off, size = [], []
    for p, part in zip(columns, found.split([p.numel() for p in columns]), strict=True):
        if id(p) in gradients:
            g = gradients[id(p)]
            dense = torch.zeros_like(p) if g is None else g.to_dense()
            wanted = dense.reshape(-1).to(part.dtype)
            off.append((part - wanted).norm())
            size.append(wanted.norm())
    return bool(torch.stack(off).norm() <= tolerance * torch.stack(size).norm())
