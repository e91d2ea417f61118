"""The Fisher matrix of a model: which block each parameter has, and when blocks are refreshed."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ngplugin.curvature.blocks import (
    Block,
    BlockDamping,
    DiagonalBlock,
    ExactBlock,
    HalfDiagonalBlock,
    KroneckerBlock,
    UnitBlock,
)
from ngplugin.curvature.blocks.block import curvature_dtype
from ngplugin.curvature.exact_rows import ExactRows
from ngplugin.curvature.likelihoods import ScoredCall
from ngplugin.curvature.taps import LookupCall, MapCall, NormCall

MapBlock = (KroneckerBlock, HalfDiagonalBlock)  # the blocks that take the scores of maps
# More outputs than this, a vocabulary, are kept as a diagonal: their matrix squared has no room.
_LARGEST_FACTOR = 8192

_Parts = dict[int, Tensor]  # a vector over all parameters, by the id of each


def refresh_due(step: int, every: int) -> bool:
    """Whether the inverses are due: at steps 0, 1, 2, 4, 8, ... and then every `every` steps.

    The first averages rest on few batches and change fast; an inverse kept from the first batch
    can ruin a run.
    """
    return step % every == 0 or (step < every and step & (step - 1) == 0)


@dataclass(frozen=True)
class Condition:
    """Largest over smallest eigenvalue of the block-diagonal matrix, over all blocks."""

    undamped: float
    damped: float


class Fisher:
    """A block-diagonal Fisher matrix, built up from scores; all in units of F/Σw.

    The weight of each linear map that is known gets a Kronecker block, scale and offset of a
    normalization a unit-wise one, every other parameter a diagonal one.

    Args:
        diagonal: give all parameters diagonal blocks.
        exact: asked first, for a block of all parameters together; None for none.

    Attributes:
        parameters: those to be covered now, in the optimizer's order; may change between steps.
    """

    def __init__(self, diagonal: bool = False, exact: ExactRows | None = None) -> None:
        self.parameters: list[Tensor] = []
        self.exact = exact
        self._diagonal = diagonal
        self._block_of: dict[int, Block] = {}  # id of the parameter
        self._reason: dict[int, str] = {}
        self._use: dict[int, str] = {}  # of parameters that no map's block holds: what they are

    # -- taking scores in (the observer's side) ----------------------------------------------

    def add_rows(self, loss: ScoredCall, weights: Tensor) -> None:
        """Take the exact rows of a loss, if they are wanted, while its graph is there."""
        if self.exact is not None:
            self.exact.collect(loss, weights, self.parameters)
        if self.exact is not None and self.exact.refused is not None:
            self._drop([block for block in self.blocks if isinstance(block, ExactBlock)])

    def takes(self, p: Tensor) -> bool:
        """Whether scores are wanted of a parameter: not where the exact rows say all."""
        return self.exact is None or not self.exact.holds(p)

    def assign(self, calls: Sequence[MapCall | LookupCall], norms: Sequence[NormCall]) -> None:
        """Give the weight of each map a block, when it is first seen.

        A bias joins its weight's block if it is added by no other weight, and to each row once;
        otherwise, and where a weight's calls disagree about it, it gets a diagonal block of its
        own.
        """
        if self._diagonal:
            return
        added_by: dict[int, set[int]] = {}
        uses: dict[int, list[MapCall | LookupCall]] = {}
        for call in calls:
            uses.setdefault(id(call.weight), []).append(call)
            if isinstance(call, MapCall) and call.bias is not None:
                added_by.setdefault(id(call.bias), set()).add(id(call.weight))
                self._use.setdefault(id(call.bias), f"bias of {call.kind}")
        shared = {bias for bias, weights in added_by.items() if len(weights) > 1}
        for found in uses.values():
            block = self._block_of.get(id(found[0].weight))
            if block is None or (
                isinstance(block, MapBlock) and not all(block.takes(call) for call in found)
            ):
                self._choose(found, block, shared)
        self._pair(norms)

    def _pair(self, norms: Sequence[NormCall]) -> None:
        """Give scale and offset one block, where each is used with no other."""
        partners: dict[int, set[int]] = {}
        for norm in norms:
            for p, role, other in (
                (norm.weight, "weight", norm.bias),
                (norm.bias, "bias", norm.weight),
            ):
                if p is not None:
                    self._use.setdefault(id(p), f"{role} of {norm.kind}")
                    partners.setdefault(id(p), set()).add(id(other))
        followed = {id(p) for p in self.parameters if p.requires_grad}
        for norm in norms:
            scale, offset = norm.weight, norm.bias
            if scale is None or offset is None or scale.shape != offset.shape:
                continue
            if all(
                id(p) in followed and id(p) not in self._block_of and len(partners[id(p)]) == 1
                for p in (scale, offset)
            ):
                block = UnitBlock(scale, offset)
                for p in block.parameters:
                    self._block_of[id(p)] = block
                    self._reason[id(p)] = self._use[id(p)]

    def _choose(
        self, calls: Sequence[MapCall | LookupCall], old: Block | None, shared: set[int]
    ) -> None:
        """Give a weight a block that takes all its calls.

        Args:
            calls: of the weight.
            old: its block so far, made for another layout; its average is given up.
            shared: the ids of the biases that more than one weight adds.
        """
        weight = calls[0].weight
        for p in old.parameters if old else ():
            del self._block_of[id(p)]
        reason = "weight of " + " and ".join(dict.fromkeys(call.kind for call in calls))
        maps = [call for call in calls if isinstance(call, MapCall)]
        first = maps[0] if maps else None
        half_diagonal = (
            first is None
            or len(maps) < len(calls)
            or isinstance(old, HalfDiagonalBlock)
            or (weight.dim() == 2 and weight.shape[0] > _LARGEST_FACTOR)
        )
        block: Block
        if half_diagonal:
            block = HalfDiagonalBlock(weight)
        else:
            assert first is not None
            bias = self._joining_bias(first, shared)
            groups = math.lcm(*(call.groups for call in maps))
            if isinstance(old, KroneckerBlock):
                groups = math.lcm(groups, old.groups)
            block = KroneckerBlock(weight, bias, groups, first.inputs_first)
            if bias is not None:
                self._reason[id(bias)] = f"bias of {first.kind}, an input of value 1"
        if not all(block.takes(call) for call in calls):
            block = DiagonalBlock(weight)
            reason += ", which no one block can hold"
        for p in block.parameters:
            self._block_of[id(p)] = block
        self._reason[id(weight)] = reason

    def _joining_bias(self, call: MapCall, shared: set[int]) -> Tensor | None:
        """The bias that is to be one more input of the call's weight."""
        bias = call.bias
        if (
            bias is None
            or not call.bias_joins
            or not bias.requires_grad
            or not any(bias is p for p in self.parameters)
            or id(bias) in self._block_of
            or id(bias) in shared
        ):
            return None
        return bias

    def unmapped(self) -> list[Tensor]:
        """The parameters that no map's block holds."""
        others = (*MapBlock, ExactBlock)
        return [p for p in self.parameters if not isinstance(self._block_of.get(id(p)), others)]

    def add_map_score(self, call: MapCall | LookupCall, score: Tensor, share: float) -> None:
        """Take d(score)/d(output of a map), counting `share` of a draw."""
        block = self._block_of.get(id(call.weight))
        if isinstance(block, MapBlock):
            block.add_map_score(call, score, share)

    def add_gradient_scores(self, scores: Sequence[tuple[Tensor, Tensor]], share: float) -> None:
        """Take each parameter with its d(score)/d(parameter), counting `share` of a draw."""
        score_of = {id(p): score for p, score in scores}
        for p, score in scores:
            block = self._block_of.get(id(p))
            if block is None:
                block = DiagonalBlock(p)
                self._settle(block, self._use.get(id(p), "used by no linear map that is known"))
            if isinstance(block, UnitBlock):
                if p is next(q for q in block.parameters if id(q) in score_of):  # once a draw
                    pair = [score_of.get(id(q), torch.zeros_like(q)) for q in block.parameters]
                    block.add_gradient_scores(pair, share)
            else:
                assert isinstance(block, DiagonalBlock)
                block.add_gradient_score(score, share)

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
            self._drop([b for b in self.blocks if held & {id(p) for p in b.parameters}])
            self._settle(found, "all parameters of a small model together")
        return sum(not block.fold(total_weight, decay) for block in self.blocks)

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
            block = self._block_of.get(id(p))
            if block is None or not block.ready:
                block = DiagonalBlock(p, empirical=True)
                self._settle(block, "reached by no recognised loss")
            if isinstance(block, DiagonalBlock) and block.empirical and p.grad is not None:
                block.add_gradient_score(p.grad, 1.0)
                block.fold(scale, decay)

    def refresh(self, damping: BlockDamping, only_new: bool = False) -> int:
        """Invert the damped averages; returns how many factorizations failed.

        Args:
            damping: λ and how to apply it; its floor is set here. Parameters that the prediction
                does not depend on, such as a bias in front of a normalization, have gradients of
                rounding errors, and a Fisher of their squares: no block's mean eigenvalue counts
                for less than (100 ε)² of the largest.
            only_new: leave the blocks alone that have an inverse already.
        """
        ready = [block for block in self.blocks if block.ready]
        averaged = [block for block in ready if not block.every_step]
        due = [block for block in averaged if not (only_new and block.inverted)]
        if not due:
            return 0
        largest = float(torch.stack([block.mean_eigenvalue() for block in ready]).max())
        rounding = 100 * torch.finfo(curvature_dtype(ready[0].parameters[0])).eps
        floored = replace(damping, floor=rounding**2 * largest)
        return sum(not block.refresh(floored) for block in due)

    def refresh_every_step(self, damping: BlockDamping) -> int:
        """The same for the blocks that are of one batch; may be done again with more damping."""
        return sum(
            not block.refresh(damping) for block in self.blocks if block.every_step and block.ready
        )

    @property
    def blocks(self) -> list[Block]:
        """Each block once, in the order in which they were found."""
        return list(dict.fromkeys(self._block_of.values()))

    # -- products ------------------------------------------------------------------------------

    def precondition(self, vectors: _Parts) -> tuple[_Parts, _Parts]:
        """D = (F/Σw + damping)⁻¹ v, and F/Σw d, undamped.

        Args:
            vectors: id of a parameter to the vector's part for it. Parts of parameters without a
                block, which no observed prediction depends on yet, are left out of the results.
        """
        directions: _Parts = {}
        products: _Parts = {}
        for block, parts in self._split(vectors):
            direction, product = block.precondition(parts)
            self._put(block, direction, vectors, directions)
            self._put(block, product, vectors, products)
        return directions, products

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
                yield block, [vectors.get(id(p), torch.zeros_like(p)) for p in block.parameters]

    @staticmethod
    def _put(block: Block, parts: Sequence[Tensor], like: _Parts, into: _Parts) -> None:
        into.update(
            {id(p): x for p, x in zip(block.parameters, parts, strict=True) if id(p) in like}
        )

    # -- looking at it -------------------------------------------------------------------------

    def condition(self) -> Condition | None:
        """Condition numbers as of the last refresh; None before it.

        Computes the eigenvalues of every factor. Eigenvalues that rounding cannot tell from zero
        count as the smallest that it can, so a singular matrix shows as about 1/ε of its precision.
        """
        ready = [block for block in self.blocks if block.inverted]
        if not ready:
            return None
        columns = zip(*(block.extreme_eigenvalues() for block in ready), strict=True)
        low, high, damped_low, damped_high = (torch.stack([*c]).cpu().double() for c in columns)
        epsilon = torch.finfo(curvature_dtype(ready[0].parameters[0])).eps
        undamped = high.max() / low.min().clamp_min(epsilon * high.max())
        return Condition(float(undamped), float(damped_high.max() / damped_low.min()))

    def reason(self, parameter: Tensor) -> str:
        """Why the parameter has the block it has."""
        reason = self._reason.get(id(parameter), "no observed loss depends on it yet")
        why_not = self.exact and self.exact.why_not(parameter)
        return f"{reason}; not exact: {why_not}" if why_not else reason

    def block(self, parameter: Tensor) -> Block | None:
        """The block that holds the parameter, None before one was found for it."""
        return self._block_of.get(id(parameter))

    # -- saving --------------------------------------------------------------------------------

    def state_dict(self) -> list[dict[str, Any]]:
        """One entry a block; parameters are named by their place in `parameters`.

        A block of a parameter that is no longer there, its group having been removed, is left out.
        """
        place = {id(p): i for i, p in enumerate(self.parameters)}
        return [
            {
                "parameters": [place[id(p)] for p in block.parameters],
                "reasons": [self._reason[id(p)] for p in block.parameters],
                **block.state_dict(),
            }
            for block in self.blocks
            if all(id(p) in place for p in block.parameters)
        ]

    def load_state_dict(self, state: Sequence[dict[str, Any]]) -> None:
        """Take over a saved matrix, whatever blocks were there before."""
        self._block_of.clear()
        for saved in state:
            if saved["kind"] == ExactBlock.kind and self.exact is None:
                continue  # the options have changed
            parameters = [self.parameters[i] for i in saved["parameters"]]
            block: Block
            if saved["kind"] == ExactBlock.kind:
                block = ExactBlock(parameters)
            elif saved["kind"] == KroneckerBlock.kind:
                bias = parameters[1] if len(parameters) > 1 else None
                block = KroneckerBlock(parameters[0], bias, saved["groups"], saved["inputs_first"])
            elif saved["kind"] == HalfDiagonalBlock.kind:
                block = HalfDiagonalBlock(parameters[0])
            elif saved["kind"] == UnitBlock.kind:
                block = UnitBlock(*parameters)
            else:
                block = DiagonalBlock(parameters[0], saved["empirical"])
            block.load_state_dict(saved)
            for p, reason in zip(parameters, saved["reasons"], strict=True):
                self._block_of[id(p)] = block
                self._reason[id(p)] = reason

    def _drop(self, blocks: Sequence[Block]) -> None:
        for block in blocks:
            for p in block.parameters:
                del self._block_of[id(p)]

    def _settle(self, block: Block, reason: str) -> None:
        for p in block.parameters:
            self._block_of[id(p)] = block
            self._reason[id(p)] = reason
