"""Natural-gradient training for PyTorch and Lightning."""

from ngplugin.damping import ConstantDamping, CosineDamping, ExponentialDamping, LinearDamping
from ngplugin.errors import (
    NgpluginError,
    OptionError,
    StepOrderError,
    UnsupportedTrainerError,
)
from ngplugin.lightning import NaturalGradient
from ngplugin.optimizer import NaturalGradientOptimizer
from ngplugin.report import Coverage, StepReport

__all__ = [
    "ConstantDamping",
    "CosineDamping",
    "Coverage",
    "ExponentialDamping",
    "LinearDamping",
    "NaturalGradient",
    "NaturalGradientOptimizer",
    "NgpluginError",
    "OptionError",
    "StepOrderError",
    "StepReport",
    "UnsupportedTrainerError",
]
