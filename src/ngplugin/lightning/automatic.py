"""The callback of `NGPLUGIN_AUTO=1`, which nobody put into the trainer by hand."""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable
from typing import Any

from ngplugin.errors import NgpluginError, OptionError
from ngplugin.lightning.callback import NaturalGradient
from ngplugin.options import check_choice


class AutomaticNaturalGradient(NaturalGradient):
    """Natural gradient where it can be had, and nothing where it cannot.

    Where the trainer has a `NaturalGradient` of its own, and where the fit is one that
    `NaturalGradient` refuses, it leaves the trainer with a line on the terminal.
    """

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Leave to a `NaturalGradient` that was put there by hand."""
        theirs = [c for c in trainer.callbacks if isinstance(c, NaturalGradient) and c is not self]
        if theirs:
            self._leave(trainer, f"the trainer has a {type(theirs[0]).__name__} already")
        else:
            self._try(super().setup, trainer, pl_module, stage)

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        """Take part in the fit, or leave."""
        if self._try(super().on_fit_start, trainer, pl_module):
            _say(trainer, "this fit is by natural gradient")

    def _try(self, hook: Callable[..., None], trainer: Any, *arguments: Any) -> bool:
        try:
            hook(trainer, *arguments)
        except NgpluginError as refusal:
            self._leave(trainer, str(refusal))
            return False
        return True

    def _leave(self, trainer: Any, why: str) -> None:
        # Another list: Lightning is going through the old one.
        trainer.callbacks = [callback for callback in trainer.callbacks if callback is not self]
        _say(trainer, f"the trainer is left as it is. {why}")


def with_options(text: str) -> AutomaticNaturalGradient:
    """The callback with the options of a text such as `kl_radius=0.1,structure=eigen`.

    Values are numbers, `true`, `false`, `null`, or words.

    Raises:
        OptionError: there is no such option, or it has a value that cannot work.
    """
    names = list(inspect.signature(NaturalGradient).parameters)
    options = {}
    for item in filter(None, (part.strip() for part in text.split(","))):
        name, equals, value = (part.strip() for part in item.partition("="))
        if not equals:
            raise OptionError(
                f"NGPLUGIN_OPTIONS={text!r}: {item!r} has no value; expected a list such as "
                "kl_radius=0.1,structure=eigen"
            )
        check_choice("NGPLUGIN_OPTIONS: option", name, names)
        options[name] = _value(value)
    try:
        return AutomaticNaturalGradient(**options)
    except OptionError as error:
        raise OptionError(f"NGPLUGIN_OPTIONS: {error}") from None


def _value(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return text  # a word


def _say(trainer: Any, message: str) -> None:
    if trainer.is_global_zero:
        print(f"ngplugin, by NGPLUGIN_AUTO: {message}")
