"""Which loggers can show more than numbers, told by the names of their classes.

By names, since there are two Lightnings, and none of their optional packages need be there.
"""

from __future__ import annotations

from typing import Any, Literal

Kind = Literal["wandb", "tensorboard", "csv"]
_CLASSES: dict[str, Kind] = {
    "WandbLogger": "wandb",
    "TensorBoardLogger": "tensorboard",
    "CSVLogger": "csv",
}


def kind(logger: Any) -> Kind | None:
    """Of a logger or a subclass of one; None where only numbers can be written."""
    names = (base.__name__ for base in type(logger).__mro__)
    return next((_CLASSES[name] for name in names if name in _CLASSES), None)
