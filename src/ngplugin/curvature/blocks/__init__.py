"""How a piece of the Fisher matrix is kept, damped and inverted: one file a structure."""

from ngplugin.curvature.blocks.block import Block as Block
from ngplugin.curvature.blocks.block import BlockDamping as BlockDamping
from ngplugin.curvature.blocks.block import DampingMode as DampingMode
from ngplugin.curvature.blocks.diagonal import DiagonalBlock as DiagonalBlock
from ngplugin.curvature.blocks.exact import ExactBlock as ExactBlock
from ngplugin.curvature.blocks.half_diagonal import HalfDiagonalBlock as HalfDiagonalBlock
from ngplugin.curvature.blocks.kronecker import KroneckerBlock as KroneckerBlock
from ngplugin.curvature.blocks.unit import UnitBlock as UnitBlock

__all__ = [
    "Block",
    "BlockDamping",
    "DampingMode",
    "DiagonalBlock",
    "ExactBlock",
    "HalfDiagonalBlock",
    "KroneckerBlock",
    "UnitBlock",
]
