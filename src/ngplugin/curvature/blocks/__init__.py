"""How a piece of the Fisher matrix is kept, damped and inverted: one file a structure."""

from ngplugin.curvature.blocks.averaged import AveragedBlock as AveragedBlock
from ngplugin.curvature.blocks.block import Block as Block
from ngplugin.curvature.blocks.block import BlockDamping as BlockDamping
from ngplugin.curvature.blocks.block import DampingMode as DampingMode
from ngplugin.curvature.blocks.block import GradientBlock as GradientBlock
from ngplugin.curvature.blocks.block import MapBlock as MapBlock
from ngplugin.curvature.blocks.diagonal import DiagonalBlock as DiagonalBlock
from ngplugin.curvature.blocks.eigen import EigenBlock as EigenBlock
from ngplugin.curvature.blocks.exact import ExactBlock as ExactBlock
from ngplugin.curvature.blocks.gradient_kronecker import (
    GradientKroneckerBlock as GradientKroneckerBlock,
)
from ngplugin.curvature.blocks.half_diagonal import HalfDiagonalBlock as HalfDiagonalBlock
from ngplugin.curvature.blocks.kronecker import KroneckerBlock as KroneckerBlock
from ngplugin.curvature.blocks.kronecker import WeightSharing as WeightSharing
from ngplugin.curvature.blocks.unit import UnitBlock as UnitBlock

#: By the word that a saved state has for it.
BLOCKS: dict[str, type[Block]] = {
    block.kind: block
    for block in (
        DiagonalBlock,
        EigenBlock,
        ExactBlock,
        GradientKroneckerBlock,
        HalfDiagonalBlock,
        KroneckerBlock,
        UnitBlock,
    )
}

__all__ = [
    "BLOCKS",
    "AveragedBlock",
    "Block",
    "BlockDamping",
    "DampingMode",
    "DiagonalBlock",
    "EigenBlock",
    "ExactBlock",
    "GradientBlock",
    "GradientKroneckerBlock",
    "HalfDiagonalBlock",
    "KroneckerBlock",
    "MapBlock",
    "UnitBlock",
    "WeightSharing",
]
