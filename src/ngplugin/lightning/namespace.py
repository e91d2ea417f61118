"""Lightning under the name by which the running program knows it.

`lightning` and `pytorch_lightning` are one library under two names. A callback of one runs in a
trainer of the other; where a class is asked for by name, as on the command line of `LightningCLI`,
it has to be of the same one.
"""

from __future__ import annotations

import sys
from importlib import import_module
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

_NAMES = ("lightning.pytorch", "pytorch_lightning")


def _callback() -> Any:
    """The base class of callbacks: of each name that is imported, else of the first installed."""
    names = [name for name in _NAMES if name in sys.modules]
    names = names or [name for name in _NAMES if find_spec(name.partition(".")[0])][:1]
    if not names:
        raise ImportError(
            "NaturalGradient is a callback for Lightning, and neither lightning nor "
            "pytorch_lightning is installed: pip install lightning. A loop of your own does "
            "without it, with ngplugin.NaturalGradientOptimizer."
        )
    bases = tuple(import_module(f"{name}.callbacks").Callback for name in names)
    return bases[0] if len(bases) == 1 else type("Callback", bases, {})


if TYPE_CHECKING:
    from lightning.pytorch.callbacks import Callback as Callback
else:
    Callback = _callback()
