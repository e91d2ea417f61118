"""The Fisher matrix of a model: which block each parameter has, and when blocks are refreshed."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ngplugin.curvature import sharing
from ngplugin.curvature.block_choice import BlockChoice, BlockRule
from ngplugin.curvature.blocks import (
    BLOCKS,
    AveragedBlock,
    Block,
    BlockDamping,
    DiagonalBlock,
    ExactBlock,
    GradientBlock,
    MapBlock,
)
from ngplugin.curvature.blocks.block import curvature_dtype, rounding
from ngplugin.curvature.exact_rows import ExactRows
from ngplugin.curvature.factorization import Remedy
from ngplugin.curvature.likelihoods import ScoredCall
from ngplugin.curvature.pace import Work
from ngplugin.curvature.parameter_vector import dot, total
from ngplugin.curvature.ranks import largest_over_ranks, several_ranks
from ngplugin.curvature.spectrum import BINS, BlockSpectrum
from ngplugin.curvature.taps import LookupCall, MapCall, NormCall

_Parts = dict[int, Tensor]  # a vector over all parameters, by the id of each


def refresh_due(step: int, every: int) -> bool:
    """Whether all inverses are due: at steps 0, 1, 2, 4, 8, ... and then every `every` steps.

    The first averages rest on few batches and change fast; an inverse kept from the first batch
    can ruin a run.
    """
    return step % every == 0 or (step < every and step & (step - 1) == 0)


def turns(works: Sequence[int], every: int, busy: int) -> list[int]:
    """At which step of every `every` each piece of work is done, so that none has much to do.

    Args:
        works: of each piece.
        every: steps.
        busy: each so many steps there is one that has enough to do already, and one that may have
            to take its place; these are left out if any others are there.
    """
    free = [step for step in range(every) if step % busy > 1] or [*range(every)]
    return [free[i] for i in sharing.assigned(works, len(free))]


@dataclass(frozen=True)
class Condition:
    """Largest over smallest eigenvalue of the block-diagonal matrix, over all blocks."""

    undamped: float
    damped: float


@dataclass(frozen=True)
class BlockCurvature:
    """What a block says of a direction d.

    Attributes:
        block: it.
        ids: of its parameters that have a part in the direction.
        along: |vᵀd| over these, a scalar.
        value: dᵀFd/Σw.
    """

    block: Block
    ids: list[int]
    along: Tensor
    value: Tensor


class Fisher:
    """A block-diagonal Fisher matrix, built up from scores; all in units of F/Σw.

    The weight of each linear map that is known gets a Kronecker block, scale and offset of a
    normalization a unit-wise one, every other matrix a gradient-Kronecker one, and the rest
    diagonals; see `BlockChoice`.

    Args:
        rule: what was asked for.
        exact: asked first, for a block of all parameters together; None for none.
    """

    def __init__(self, rule: BlockRule | None = None, exact: ExactRows | None = None) -> None:
        self._choice = BlockChoice(rule or BlockRule())
        self.exact = exact
        self._in_turn: list[AveragedBlock] = []
        self._turns: list[int] = []  # of these blocks

    @property
    def parameters(self) -> list[Tensor]:
        """Those to be covered now, in the optimizer's order; may change between steps."""
        return self._choice.parameters

    @parameters.setter
    def parameters(self, parameters: list[Tensor]) -> None:
        self._choice.parameters = parameters

    @property
    def exact_block(self) -> ExactBlock | None:
        """The block of all parameters together, if there is one."""
        return None if self.exact is None else self.exact.block

    # -- taking scores in (the observer's side) ----------------------------------------------

    def add_rows(self, loss: ScoredCall, weights: Tensor) -> None:
        """Take the exact rows of a loss, if they are wanted, while its graph is there."""
        if self.exact is not None:
            self.exact.collect(loss, weights, self.parameters)
        if self.exact is not None and self.exact.refused is not None:
            self._choice.drop([block for block in self.blocks if isinstance(block, ExactBlock)])

    def takes(self, p: Tensor) -> bool:
        """Whether scores are wanted of a parameter: not where the exact rows say all."""
        return self.exact is None or not self.exact.holds(p)

    def assign(self, calls: Sequence[MapCall | LookupCall], norms: Sequence[NormCall]) -> None:
        """Give the weight of each map, and the parameters of each normalization, a block."""
        self._choice.assign(calls, norms)

    def compared(self, weight: Tensor) -> bool:
        """Whether it is known if the weight's maps are all that a prediction has of it."""
        return self._choice.compared(weight)

    def compare(self, weight: Tensor, other_uses: bool) -> None:
        """Learn whether a prediction depends on a weight by other ways than its maps."""
        self._choice.compare(weight, other_uses)

    def unmapped(self) -> list[Tensor]:
        """The parameters that no map's block holds."""
        others = (MapBlock, ExactBlock)
        return [p for p in self.parameters if not isinstance(self.block(p), others)]

    def add_map_score(self, call: MapCall | LookupCall, score: Tensor, share: float) -> None:
        """Take d(score)/d(output of a map), counting `share` of a draw."""
        block = self.block(call.weight)
        if isinstance(block, MapBlock):
            block.add_map_score(call, score, share)

    def add_gradient_scores(self, scores: Sequence[tuple[Tensor, Tensor]], share: float) -> None:
        """Take each parameter with its d(score)/d(parameter), counting `share` of a draw."""
        score_of = {id(p): score for p, score in scores}
        blocks = dict.fromkeys(self.block(p) or self._choice.unseen(p) for p, _ in scores)
        for block in blocks:
            assert isinstance(block, GradientBlock)
            block.add_gradient_scores(
                [score_of.get(id(p), torch.zeros_like(p)) for p in block.parameters], share
            )

    def discard(self) -> None:
        """Forget what was added and not folded."""
        for block in self.blocks:
            block.discard()
        if self.exact is not None:
            self.exact.discard()

    # -- averaging and inverting -------------------------------------------------------------

    def fold(self, total_weight: float, decay: float) -> int:
        """Fold what was added into the averages; returns how many statistics were not finite."""
        found = None if self.exact is None else self.exact.decide()
        if found is not None:
            held = {id(p) for p in found.parameters}
            self._choice.drop([b for b in self.blocks if held & {id(p) for p in b.parameters}])
            reason = "all parameters of a small model together"
            self._choice.settle(found, [reason] * len(found.parameters))
        if not several_ranks():
            return sum(not block.fold(total_weight, decay) for block in self.blocks)
        return self._fold_together(total_weight, decay)

    def _fold_together(self, total_weight: float, decay: float) -> int:
        """The same where each of several processes has added what its own batch says."""
        present = {id(p) for p in self.parameters}  # the others were frozen, or taken out
        own = {
            block: block.statistic(total_weight)
            for block in self.blocks
            if isinstance(block, AveragedBlock) and present.issuperset(map(id, block.parameters))
        }
        agreed = sharing.agree(self._choice, own)
        folded = [block for block, statistic in agreed.items() if statistic]
        for block in folded:
            block.average_in(agreed[block] or {}, decay)
        for block, means in zip(folded, sharing.means(folded), strict=True):
            block.grow(means)
        return sum(statistic is None for statistic in agreed.values())

    def fold_empirical(self, parameters: Sequence[Tensor], scale: float, decay: float) -> None:
        """Fold in gradients of the data's own labels, for parameters that no score has reached.

        Such a parameter is trained by something else than a recognised loss. Its block is named
        *empirical*.

        Args:
            parameters: those with a gradient.
            scale: what g² is to be divided by to estimate diag(F)/Σw.
            decay: β.
        """
        for p in parameters:
            block = self.block(p)
            if block is None or not block.ready:
                block = DiagonalBlock(p, empirical=True)
                self._choice.settle(block, ["reached by no recognised loss"])
            if isinstance(block, DiagonalBlock) and block.empirical and p.grad is not None:
                block.add_gradient_scores([p.grad], 1.0)
                block.fold(scale, decay)

    def refresh(
        self, damping: BlockDamping, chosen: Collection[Block] | None = None
    ) -> list[Remedy]:
        """Invert the damped averages; returns what each block took.

        Args:
            damping: λ and how to apply it; its floor is set here. Parameters that the prediction
                does not depend on, such as a bias in front of a normalization, have gradients of
                rounding errors, and a Fisher of their squares: no block's mean eigenvalue counts
                for less than (100 ε)² of the largest.
            chosen: which blocks, beside those that have no inverse yet; None for all.
        """
        ready = [block for block in self.blocks if block.ready]
        averaged = [block for block in ready if not block.every_step]
        due = [b for b in averaged if chosen is None or b in chosen or not b.inverted]
        if not due:
            return []
        floored = replace(damping, floor=self._floor(ready))
        if several_ranks():
            return sharing.refresh([b for b in due if isinstance(b, AveragedBlock)], floored)
        return [block.refresh(floored) for block in due]

    def due(self, step: int, every: int, busy: int) -> Sequence[Block] | None:
        """Whose inverses are due; None for all.

        After the first steps the blocks take turns.

        Args:
            step: its number.
            every: steps between two inversions of a block.
            busy: see `turns`.
        """
        if step < every:
            return None if refresh_due(step, every) else []
        blocks = [b for b in self.blocks if isinstance(b, AveragedBlock) and b.ready]
        if blocks != self._in_turn:
            self._in_turn = blocks
            self._turns = turns([sharing.work(block) for block in blocks], every, busy)
        now = step % every
        return [b for b, turn in zip(blocks, self._turns, strict=True) if turn == now]

    def redamp(self, damping: BlockDamping) -> int:
        """Change λ of the blocks that need no factorization for it; returns how many they are."""
        ready = [block for block in self.blocks if block.ready]
        inverted = [block for block in ready if block.inverted and not block.every_step]
        if not inverted:
            return 0
        floored = replace(damping, floor=self._floor(ready))
        if several_ranks():  # λ is added to the present averages
            sharing.average([b for b in inverted if isinstance(b, AveragedBlock) and b.redampable])
        return sum(block.redamp(floored) for block in inverted)

    def isotropic_damping(self, damping: BlockDamping) -> _Parts:
        """What to add to the diagonal of F/Σw where it is no product of factors; by parameter.

        `"relative"`: λ in units of the mean eigenvalue of the parameter's block, with the floor of
        `refresh`; `"absolute"`: λ.
        """
        ready = [block for block in self.blocks if block.ready]
        found: _Parts = {}
        means = self._mean_eigenvalues(ready)
        floor = float(means.max()) * self._rounding(ready)
        for block, mean in zip(ready, means, strict=True):
            unit = mean.clamp_min(floor)
            if damping.mode == "absolute":
                unit = torch.ones_like(unit)
            found.update({id(p): damping.value * unit for p in block.parameters})
        return found

    def _floor(self, ready: Sequence[Block]) -> float:
        return float(self._mean_eigenvalues(ready).max()) * self._rounding(ready)

    @staticmethod
    def _mean_eigenvalues(ready: Sequence[Block]) -> Tensor:
        if not several_ranks():
            return torch.stack([block.mean_eigenvalue() for block in ready])
        averaged = [block for block in ready if isinstance(block, AveragedBlock)]
        of_all = zip(averaged, sharing.means(averaged), strict=True)
        return torch.stack([block.scale(means).mean() for block, means in of_all])

    @staticmethod
    def _rounding(ready: Sequence[Block]) -> float:
        return float(rounding(curvature_dtype(ready[0].parameters[0])) ** 2)

    def work(self, damping: BlockDamping) -> Work:
        """What statistics like the last ones, and the inversion of all blocks, take."""
        found = [block.work(damping) for block in self.blocks if block.ready]
        return sum(found, Work()).over_ranks(self.parameters[0].device)

    def refresh_every_step(self, damping: BlockDamping) -> list[Remedy]:
        """The same for the blocks that are of one batch; may be done again with more damping."""
        return [b.refresh(damping) for b in self.blocks if b.every_step and b.ready]

    @property
    def blocks(self) -> list[Block]:
        """Each block once, in the order in which they were found."""
        return self._choice.blocks

    # -- products ------------------------------------------------------------------------------

    def precondition(self, vectors: _Parts, curved: bool = True) -> tuple[_Parts, _Parts]:
        """D = (F/Σw + damping)⁻¹ v, and F/Σw d, undamped.

        Args:
            vectors: id of a parameter to the vector's part for it. Parts of parameters without a
                block, which no observed prediction depends on yet, are left out of the results.
            curved: whether the second is wanted of all blocks; otherwise it is formed where none
                was since the last inversion, for `curvature`.
        """
        directions: _Parts = {}
        products: _Parts = {}
        for block, parts in self._split(vectors):
            wanted = curved or not block.knows_curvature
            direction, product = block.precondition(parts, wanted)
            self._put(block, direction, vectors, directions)
            if wanted:
                self._put(block, product, vectors, products)
        return directions, products

    def curvature(
        self, vectors: _Parts, directions: _Parts, products: _Parts
    ) -> list[BlockCurvature]:
        """DᵀFd/Σw of each block, of what `precondition` returned.

        Where a product is missing it is by the share of vᵀd that it was when there was one.
        """
        result = []
        for block in self.blocks:
            ids = [id(p) for p in block.parameters if id(p) in directions]
            if not ids:
                continue
            # Of an inverse that rounding has made indefinite it may be negative.
            along = total(dot(vectors[i], directions[i]) for i in ids).abs()
            if all(i in products for i in ids):
                found = total(dot(directions[i], products[i]) for i in ids)
                block.see_curvature(along, found)
            else:
                found = block.curvature(along)
            result.append(BlockCurvature(block, ids, along, found))
        return result

    def product(self, vectors: _Parts) -> _Parts:
        """F/Σw v, undamped; arguments as for `precondition`."""
        result: _Parts = {}
        for block, parts in self._split(vectors):
            self._put(block, block.product(parts), vectors, result)
        return result

    def _split(self, vectors: _Parts) -> Iterator[tuple[Block, list[Tensor]]]:
        """Each usable block with its parts of a vector, zeros for those that are missing."""
        for block in self.blocks:
            if block.inverted and any(id(p) in vectors for p in block.parameters):
                parts = (vectors.get(id(p)) for p in block.parameters)
                yield (
                    block,
                    [
                        torch.zeros_like(p) if v is None else v
                        for p, v in zip(block.parameters, parts, strict=True)
                    ],
                )

    @staticmethod
    def _put(block: Block, parts: Sequence[Tensor], like: _Parts, into: _Parts) -> None:
        into.update(
            {id(p): x for p, x in zip(block.parameters, parts, strict=True) if id(p) in like}
        )

    # -- looking at it -------------------------------------------------------------------------

    def spectra(self, names: Mapping[int, str] | None = None) -> list[BlockSpectrum]:
        """The eigenvalues of every block, as of its last inversion.

        Computes those of every factor, of several processes each of some.

        Args:
            names: of parameters, by id; a block is called after its first, or by its place.
        """
        place = {id(p): i for i, p in enumerate(self.parameters)}
        last = len(place)  # of those that were there once
        ready = [block for block in self.blocks if block.inverted]
        ready.sort(key=lambda block: place.get(id(block.parameters[0]), last))
        if not ready:
            return []
        mine: Sequence[Block] = ready
        if several_ranks():
            mine = sharing.own([block for block in ready if isinstance(block, AveragedBlock)])
        like = ready[0].parameters[0]
        rows = torch.full(
            (len(ready), 5 + BINS), -math.inf, dtype=curvature_dtype(like), device=like.device
        )  # what another process has found is more
        for row, block in zip(rows, ready, strict=True):
            if block in mine:
                found = block.spectrum()
                row.copy_(torch.cat([found.extremes, found.counts]))
        firsts = [id(block.parameters[0]) for block in ready]
        called = [(names or {}).get(i) or f"parameter {place.get(i, last)}" for i in firsts]
        return [
            BlockSpectrum(name, tuple(row[4:]), *row[:4])
            for name, row in zip(called, largest_over_ranks(rows).double().tolist(), strict=True)
        ]

    def condition(self, spectra: Sequence[BlockSpectrum]) -> Condition | None:
        """Condition numbers of all blocks together; None where there are none.

        Eigenvalues that rounding cannot tell from zero count as the smallest that it can, so a
        singular matrix shows as about 1/ε of its precision.
        """
        if not spectra:
            return None
        extremes = torch.tensor(
            [[-s.low, s.high, -s.damped_low, s.damped_high] for s in spectra], dtype=torch.float64
        )
        low, high, damped_low, damped_high = extremes.amax(0).tolist()  # nan if any is
        low, damped_low = -low, -damped_low
        epsilon = torch.finfo(curvature_dtype(self.blocks[0].parameters[0])).eps
        undamped = high / max(low, epsilon * high) if high > 0 else math.nan
        return Condition(undamped, math.inf if damped_low <= 0 else damped_high / damped_low)

    def reason(self, parameter: Tensor) -> str:
        """Why the parameter has the block it has."""
        reason, block = self._choice.reason(parameter), self.block(parameter)
        if block is not None and parameter is block.parameters[0]:
            reason += block.note()
        why_not = self.exact and self.exact.why_not(parameter)
        return f"{reason}; not exact: {why_not}" if why_not else reason

    def block(self, parameter: Tensor) -> Block | None:
        """The block that holds the parameter, None before one was found for it."""
        return self._choice.block(parameter)

    # -- saving --------------------------------------------------------------------------------

    def state_dict(self) -> list[dict[str, Any]]:
        """One entry a block; parameters are named by their place in `parameters`.

        A block of a parameter that is no longer there, its group having been removed, is left out.
        """
        place = {id(p): i for i, p in enumerate(self.parameters)}
        return [
            {
                "parameters": [place[id(p)] for p in block.parameters],
                "reasons": [self._choice.reason(p) for p in block.parameters],
                **block.state_dict(),
            }
            for block in self.blocks
            if all(id(p) in place for p in block.parameters)
        ]

    def load_state_dict(self, state: Sequence[dict[str, Any]]) -> None:
        """Take over a saved matrix, whatever blocks were there before."""
        self._choice.clear()
        for saved in state:
            if saved["kind"] == ExactBlock.kind and self.exact is None:
                continue  # the options have changed
            parameters = [self.parameters[i] for i in saved["parameters"]]
            block = BLOCKS[saved["kind"]].made(parameters, saved["layout"])
            block.load_state_dict(saved)
            self._choice.settle(block, saved["reasons"])
