"""Which block each parameter gets: chosen from the maps and normalizations it was seen in."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from ngplugin.curvature.blocks import (
    Block,
    DiagonalBlock,
    EigenBlock,
    GradientBlock,
    GradientKroneckerBlock,
    HalfDiagonalBlock,
    KroneckerBlock,
    MapBlock,
    UnitBlock,
    WeightSharing,
)
from ngplugin.curvature.taps import LookupCall, MapCall, NormCall

#: What is kept of the Fisher matrix of a parameter, where there is a choice.
BlockStructure = Literal["auto", "kronecker", "eigen", "diagonal"]


@dataclass(frozen=True)
class BlockRule:
    """What a user may say about the choice of blocks.

    Attributes:
        structure: `"kronecker"` or `"eigen"`: that block for the weights of maps; `"auto"`: at
            present the first; `"diagonal"`: a diagonal for every parameter.
        weight_sharing: how the rows of an example that share a weight count; see `KroneckerBlock`.
        max_factor: a Kronecker factor of a larger size is kept as its diagonal.
    """

    structure: BlockStructure = "auto"
    weight_sharing: WeightSharing = "expand"
    max_factor: int = 8192


class BlockChoice:
    """The block of each parameter, and why it has that one.

    Args:
        rule: what was asked for.

    Attributes:
        parameters: those to be covered now, in the optimizer's order; may change between steps.
    """

    def __init__(self, rule: BlockRule) -> None:
        self.parameters: list[Tensor] = []
        self._rule = rule
        self._block_of: dict[int, Block] = {}  # id of the parameter
        self._reason: dict[int, str] = {}
        self._other_uses: dict[int, bool] = {}  # of weights of maps, where it was looked at
        self._use: dict[int, str] = {}  # of parameters that no map's block holds: what they are

    @property
    def blocks(self) -> list[Block]:
        """Each block once, in the order in which they were found."""
        return list(dict.fromkeys(self._block_of.values()))

    def block(self, parameter: Tensor) -> Block | None:
        """The block that holds the parameter, None before one was found for it."""
        return self._block_of.get(id(parameter))

    def reason(self, parameter: Tensor) -> str:
        """Why the parameter has the block it has."""
        return self._reason.get(id(parameter), "no observed loss depends on it yet")

    def settle(self, block: Block, reasons: Sequence[str]) -> None:
        """Give a block's parameters that block, for these reasons."""
        for p, reason in zip(block.parameters, reasons, strict=True):
            self._block_of[id(p)] = block
            self._reason[id(p)] = reason

    def drop(self, blocks: Sequence[Block]) -> None:
        """Take the parameters of some blocks away from them."""
        for block in blocks:
            for p in block.parameters:
                del self._block_of[id(p)]

    def arrange(self) -> None:
        """Have the blocks in the order of their parameters, in whatever order they were found."""
        held = {id(p): self._block_of[id(p)] for p in self.parameters if id(p) in self._block_of}
        self._block_of = held | self._block_of

    def clear(self) -> None:
        """Take every parameter's block away."""
        self._block_of.clear()

    # -- by what was seen ----------------------------------------------------------------------

    def assign(self, calls: Sequence[MapCall | LookupCall], norms: Sequence[NormCall]) -> None:
        """Give the weight of each map a block, when it is first seen.

        A bias joins its weight's block if it is added by no other weight, and to each row once;
        otherwise, and where a weight's calls disagree about it, it gets a diagonal block of its
        own.
        """
        if self._rule.structure == "diagonal":
            return
        calls = [call for call in calls if not self._other_uses.get(id(call.weight), False)]
        added_by: dict[int, set[int]] = {}
        uses: dict[int, list[MapCall | LookupCall]] = {}
        for call in calls:
            uses.setdefault(id(call.weight), []).append(call)
            if isinstance(call, MapCall) and call.bias is not None:
                added_by.setdefault(id(call.bias), set()).add(id(call.weight))
                self._use.setdefault(id(call.bias), f"bias of {call.kind}")
        shared = {bias for bias, weights in added_by.items() if len(weights) > 1}
        for found in uses.values():
            block = self.block(found[0].weight)
            if block is None or (
                isinstance(block, MapBlock) and not all(block.takes(call) for call in found)
            ):
                self._choose(found, block, shared)
        self._pair(norms)

    def compared(self, weight: Tensor) -> bool:
        """Whether it is known if the weight's maps are all that a prediction has of it."""
        return id(weight) in self._other_uses

    def compare(self, weight: Tensor, other_uses: bool) -> None:
        """Learn whether a prediction depends on a weight by other ways than its maps.

        Then the rows of its maps are not its F, and a block of theirs is given up.
        """
        self._other_uses[id(weight)] = other_uses
        if other_uses:
            self._use[id(weight)] = "used by a linear map and otherwise"
            block = self.block(weight)
            for p in block.parameters if isinstance(block, MapBlock) else ():
                del self._block_of[id(p)]

    def unseen(self, parameter: Tensor) -> GradientBlock:
        """Give a parameter a block that a score reaches through no map that is known."""
        use = self._use.get(id(parameter))
        by_feature = use is not None and not self._other_uses.get(id(parameter), False)
        block = self._gradient_block(parameter, elementwise=by_feature)
        self.settle(block, [use or "used by no linear map that is known"])
        return block

    def _gradient_block(self, parameter: Tensor, elementwise: bool) -> GradientBlock:
        """A block for a parameter of which only the sampled gradient is known.

        Args:
            parameter: the parameter.
            elementwise: it scales or offsets each feature by itself, so no factorization holds.
        """
        if (
            self._rule.structure == "diagonal"
            or elementwise
            or not GradientKroneckerBlock.suits(parameter)
        ):
            return DiagonalBlock(parameter)
        return GradientKroneckerBlock(parameter, self._rule.max_factor)

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
                self.settle(block, [self._use[id(p)] for p in block.parameters])

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
        block: Block
        if len(maps) < len(calls) or isinstance(old, HalfDiagonalBlock):
            block = HalfDiagonalBlock(weight)
        else:
            block = self._map_block(maps, old, shared)
        reasons = [reason]
        if not all(block.takes(call) for call in calls):
            block = self._gradient_block(weight, elementwise=False)
            reasons = [f"{reason}, which no one map's block can hold"]
        elif len(block.parameters) > 1:
            reasons.append(f"bias of {calls[0].kind}, an input of value 1")
        self.settle(block, reasons)

    def _map_block(
        self, calls: Sequence[MapCall], old: Block | None, shared: set[int]
    ) -> KroneckerBlock:
        """A block for a weight that is multiplied with and never looked up in."""
        first = calls[0]
        groups = math.lcm(*(call.groups for call in calls))
        if isinstance(old, KroneckerBlock):
            groups = math.lcm(groups, old.groups)
        kind = EigenBlock if self._rule.structure == "eigen" else KroneckerBlock
        return kind(
            first.weight,
            self._joining_bias(first, shared),
            groups,
            first.inputs_first,
            self._rule.max_factor,
            self._rule.weight_sharing,
            first.dims,
        )

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
