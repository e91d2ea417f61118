"""Natural-gradient training for PyTorch and Lightning."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from ngplugin.damping import (
    AdaptiveDamping,
    ConstantDamping,
    CosineDamping,
    ExponentialDamping,
    KlMatching,
    LevenbergMarquardt,
    LinearDamping,
)
from ngplugin.declaration import declare
from ngplugin.errors import (
    LikelihoodError,
    NgpluginError,
    OptionError,
    StepOrderError,
    UnsupportedTrainerError,
)
from ngplugin.optimizer import NaturalGradientOptimizer
from ngplugin.report import Coverage, StepReport

if TYPE_CHECKING:
    from ngplugin.lightning import NaturalGradient

__all__ = [
    "AdaptiveDamping",
    "ConstantDamping",
    "CosineDamping",
    "Coverage",
    "ExponentialDamping",
    "KlMatching",
    "LevenbergMarquardt",
    "LikelihoodError",
    "LinearDamping",
    "NaturalGradient",
    "NaturalGradientOptimizer",
    "NgpluginError",
    "OptionError",
    "StepOrderError",
    "StepReport",
    "UnsupportedTrainerError",
    "declare",
]

# An editable installation has no `conf` in the package; then the checkout's own is `ngplugin.conf`.
_checkout = Path(__file__).resolve().parents[2]
if not Path(__file__).with_name("conf").is_dir() and (_checkout / "conf/optimizer").is_dir():
    __path__.append(str(_checkout))


def __getattr__(name: str) -> Any:
    """Load the callback when it is first asked for; a plain loop does without Lightning."""
    if name == "NaturalGradient":
        from ngplugin.lightning import NaturalGradient

        return NaturalGradient
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
