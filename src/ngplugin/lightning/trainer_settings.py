"""Which trainer settings natural gradient follows, and what to do about those it cannot."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from ngplugin.errors import UnsupportedTrainerError


@dataclass(frozen=True)
class Setting:
    """A trainer setting that needs a word.

    Attributes:
        found: looks at (trainer, module) and says what was set, None if it was not.
        why: what natural gradient cannot do with it.
        instead: what to do.
        refused: raise, instead of a warning.
    """

    found: Callable[[Any, Any], str | None]
    why: str
    instead: str
    refused: bool = True


def _several_processes(trainer: Any, module: Any) -> str | None:
    return f"{trainer.world_size} processes" if trainer.world_size > 1 else None


def _sharded(trainer: Any, module: Any) -> str | None:
    # By name: the class may come from `lightning` or from `pytorch_lightning`.
    name = type(trainer.strategy).__name__
    sharded = ("FSDPStrategy", "DeepSpeedStrategy", "ModelParallelStrategy", "XLAFSDPStrategy")
    return f"strategy {name}" if name in sharded else None


def _scaled_loss(trainer: Any, module: Any) -> str | None:
    scaler = getattr(trainer.precision_plugin, "scaler", None)
    return f"precision={trainer.precision!r}" if scaler is not None else None


def _manual(trainer: Any, module: Any) -> str | None:
    return None if module.automatic_optimization else "automatic_optimization=False"


def _no_optimizer(trainer: Any, module: Any) -> str | None:
    optimizers = trainer.strategy.optimizers
    mock = len(optimizers) == 1 and type(optimizers[0]).__name__ == "_MockOptimizer"
    return "no optimizer from configure_optimizers()" if mock or not optimizers else None


def _value_clipping(trainer: Any, module: Any) -> str | None:
    algorithm = getattr(trainer, "gradient_clip_algorithm", None)
    if trainer.gradient_clip_val and getattr(algorithm, "value", algorithm) == "value":
        return "gradient_clip_algorithm='value'"
    return None


#: Everything else is followed: gradient accumulation, clipping by norm, bf16 and 64-bit
#: precision, schedulers, checkpoints, loggers, profilers, one device of any kind.
SETTINGS = (
    Setting(
        _sharded,
        "parameters and gradients exist in pieces only, of which no Fisher block can be formed",
        "use one device",
    ),
    Setting(
        _several_processes,
        "each process would average the Fisher information of its own batches, and the model "
        "copies would drift apart",
        "use devices=1, num_nodes=1",
    ),
    Setting(
        _scaled_loss,
        "the loss is multiplied by a changing factor, and steps are skipped behind our back",
        "use precision='bf16-mixed' or '32-true'",
    ),
    Setting(
        _manual,
        "which forward pass belongs to which step is not known",
        "use automatic optimization, or ngplugin.NaturalGradientOptimizer.wrap(optimizer) in "
        "configure_optimizers() with `with optimizer.observe():` around the forward pass",
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
)


def check(trainer: Any, module: Any) -> None:
    """Go through the table.

    Raises:
        UnsupportedTrainerError: a setting that cannot be followed.
    """
    for setting in SETTINGS:
        found = setting.found(trainer, module)
        if found is None:
            continue
        message = f"NaturalGradient with {found}: {setting.why}. Instead: {setting.instead}."
        if setting.refused:
            raise UnsupportedTrainerError(
                f"{message} To train without natural gradient, pass NaturalGradient(enabled=False)."
            )
        warnings.warn(message, stacklevel=2)
