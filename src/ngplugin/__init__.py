"""Natural-gradient training for PyTorch and Lightning."""

from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
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
        DamagedStateError,
        LikelihoodError,
        NgpluginError,
        OptionError,
        StepOrderError,
        UnsupportedTrainerError,
    )
    from ngplugin.lightning import NaturalGradient
    from ngplugin.optimizer import NaturalGradientOptimizer
    from ngplugin.report import Coverage, StepReport

__all__ = [
    "AdaptiveDamping",
    "ConstantDamping",
    "CosineDamping",
    "Coverage",
    "DamagedStateError",
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

# Where the names are, the cheap ones first. Nothing is imported before it is asked for: Lightning
# and Hydra look into this package in programs that never use it, and a plain loop does without
# Lightning.
_MODULES = ("errors", "damping", "report", "declaration", "optimizer", "lightning")

# An editable installation has no `conf` in the package; then the checkout's own is `ngplugin.conf`.
_checkout = Path(__file__).resolve().parents[2]
if not Path(__file__).with_name("conf").is_dir() and (_checkout / "conf/optimizer").is_dir():
    __path__.append(str(_checkout))


def __getattr__(name: str) -> Any:
    """Import what a public name stands for."""
    if name in __all__:
        for module in _MODULES:
            found = getattr(import_module(f"ngplugin.{module}"), name, None)
            if found is not None:
                return found
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    """The public names, for completion in a shell."""
    return __all__
