"""Natural gradient in a Lightning program as it is, without an edit: `NGPLUGIN_AUTO=1`.

    NGPLUGIN_AUTO=1 python their_script.py
    NGPLUGIN_AUTO=1 NGPLUGIN_OPTIONS=kl_radius=0.1,structure=eigen python their_script.py

Lightning asks every entry point of the groups `lightning.pytorch.callbacks_factory` and
`pytorch_lightning.callbacks_factory` for callbacks whenever a `Trainer` is made, in each program of
the environment, so nothing is imported here before it is known to be wanted. Fabric has such a
group too, but tells its callbacks of no forward pass, so there is nothing to offer it.
"""

from __future__ import annotations

import os
import warnings
from typing import Any

_ON, _OFF = ("1", "true"), ("", "0", "false")


def callbacks() -> list[Any]:
    """What a trainer is to have more: nothing, unless `NGPLUGIN_AUTO=1`.

    Raises:
        OptionError: `NGPLUGIN_AUTO` or `NGPLUGIN_OPTIONS` has a value that cannot work.
    """
    wanted = os.environ.get("NGPLUGIN_AUTO", "")
    if wanted.lower() in _OFF:
        return []
    from ngplugin.errors import OptionError

    if wanted.lower() not in _ON:
        raise OptionError(
            f"NGPLUGIN_AUTO={wanted!r}: expected 1, to train by natural gradient, or 0"
        )
    try:
        from ngplugin.lightning.automatic import with_options
    except ImportError as error:  # of no concern to a trainer that did not ask for it by name
        warnings.warn(f"ngplugin: no natural gradient, {error}", stacklevel=2)
        return []
    return [with_options(os.environ.get("NGPLUGIN_OPTIONS", ""))]
