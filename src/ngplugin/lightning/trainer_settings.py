"""Which trainer settings natural gradient follows, and what to do about those it cannot."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from ngplugin.errors import UnsupportedTrainerError


@dataclass(frozen=True)
class Setting:
    """A trainer setting that needs a word.

    Attributes:
        found: looks at (trainer, names of the parameters to be trained) and says what was set, None
            if it was not.
        why: what natural gradient cannot do with it.
        instead: what to do.
        refused: raise, instead of a warning.
    """

    found: Callable[[Any, Mapping[str, Tensor]], str | None]
    why: str
    instead: str
    refused: bool = True


def _flat_or_foreign(trainer: Any, trained: Mapping[str, Tensor]) -> str | None:
    # By name: the class may come from `lightning` or from `pytorch_lightning`.
    name = type(trainer.strategy).__name__
    return f"strategy {name}" if name in ("FSDPStrategy", "XLAFSDPStrategy") else None


def _own_engine(trainer: Any, trained: Mapping[str, Tensor]) -> str | None:
    name = type(trainer.strategy).__name__
    return f"strategy {name}" if name in ("DeepSpeedStrategy", "ColossalAIStrategy") else None


def _sharded(trainer: Any, trained: Mapping[str, Tensor]) -> str | None:
    """A parameter of which this process has but a piece, as FSDP2 and tensor parallelism make."""
    pieces = [name for name, p in trained.items() if hasattr(p, "to_local")]
    if not pieces:
        return None
    more = f" and {len(pieces) - 1} more" if len(pieces) > 1 else ""
    return f"the sharded parameter {pieces[0]}{more} ({type(trainer.strategy).__name__})"


def _drifting_copies(trainer: Any, trained: Mapping[str, Tensor]) -> str | None:
    period = getattr(trainer.strategy, "_model_averaging_period", None)
    return None if period is None else f"DDPStrategy(model_averaging_period={period})"


def _no_optimizer(trainer: Any, trained: Mapping[str, Tensor]) -> str | None:
    optimizers = trainer.strategy.optimizers
    mock = len(optimizers) == 1 and type(optimizers[0]).__name__ == "_MockOptimizer"
    return "no optimizer from configure_optimizers()" if mock or not optimizers else None


def _value_clipping(trainer: Any, trained: Mapping[str, Tensor]) -> str | None:
    algorithm = getattr(trainer, "gradient_clip_algorithm", None)
    if trainer.gradient_clip_val and getattr(algorithm, "value", algorithm) == "value":
        return "gradient_clip_algorithm='value'"
    return None


def _rate_finder(trainer: Any, trained: Mapping[str, Tensor]) -> str | None:
    names = [type(callback).__name__ for callback in getattr(trainer, "callbacks", ())]
    return "LearningRateFinder" if "LearningRateFinder" in names else None


#: Everything else is followed; docs/support.md lists what is tested.
SETTINGS = (
    Setting(
        _flat_or_foreign,
        "the optimizer is given flat pieces of several parameters, of which no Fisher block can "
        "be formed",
        "use strategy='ddp', which spreads the factorizations over the devices",
    ),
    Setting(
        _own_engine,
        "it makes the optimizer's steps by itself",
        "use strategy='ddp', which spreads the factorizations over the devices",
    ),
    Setting(
        _sharded,
        "each process has a piece of it and of its gradient, of which no Fisher block can be "
        "formed",
        "leave the layers whole (strategy='ddp'), or give them to an optimizer of their own and "
        "choose the others with NaturalGradient(optimizers=[...])",
    ),
    Setting(
        _drifting_copies,
        "the copies of the model differ between two averages, so that they have no Fisher "
        "information in common",
        "leave model_averaging_period away",
    ),
    Setting(
        _no_optimizer,
        "there is nothing to take parameters and a learning-rate schedule from",
        "return any torch optimizer, such as torch.optim.SGD(self.parameters(), lr=1.0)",
    ),
    Setting(
        _value_clipping,
        "clipping single gradient elements turns the gradient before it is preconditioned",
        "leave clipping away, the KL radius bounds the step; or clip by norm",
        refused=False,
    ),
    Setting(
        _rate_finder,
        "it looks for a rate by steps of the module's own optimizer, since it runs before any "
        "other callback; of the rate it finds only the schedule's shape is used",
        "leave it away, and give NaturalGradient(lr=...) if another size is wanted",
        refused=False,
    ),
)


def check(trainer: Any, trained: Mapping[str, Tensor]) -> None:
    """Go through the table.

    Args:
        trainer: whose settings are meant.
        trained: the parameters that natural gradient is to train, by name.

    Raises:
        UnsupportedTrainerError: a setting that cannot be followed.
    """
    for setting in SETTINGS:
        found = setting.found(trainer, trained)
        if found is None:
            continue
        message = f"NaturalGradient with {found}: {setting.why}. Instead: {setting.instead}."
        if setting.refused:
            raise UnsupportedTrainerError(
                f"{message} To train without natural gradient, pass NaturalGradient(enabled=False)."
            )
        warnings.warn(message, stacklevel=2)
