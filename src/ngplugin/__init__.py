"""Natural-gradient training for PyTorch and Lightning."""

from ngplugin.damping import ConstantDamping as ConstantDamping
from ngplugin.damping import CosineDamping as CosineDamping
from ngplugin.damping import ExponentialDamping as ExponentialDamping
from ngplugin.damping import LinearDamping as LinearDamping
from ngplugin.errors import NgpluginError as NgpluginError
from ngplugin.optimizer import NaturalGradientOptimizer as NaturalGradientOptimizer
