"""Functions of torch that hide the calls they are made of.

While a `TorchFunctionMode` handles a function, the calls inside it pass the mode by. A composite
is therefore run by its own code under a mode that is on again. That code begins by asking whether
it has to be handed to a mode, which would lead back here, so it runs among names where the answer
is no; torch's own modules stay as they are.
"""

from __future__ import annotations

import types
from collections.abc import Callable
from typing import Any

import torch.nn.functional as F
from torch import Tensor

_COMPOSITES = {F.multi_head_attention_forward}


def opened(function: Callable[..., Any]) -> Callable[..., Any] | None:
    """The same function, to be called with the mode on; None if it is no composite."""
    if function not in _COMPOSITES or not isinstance(function, types.FunctionType):
        return None
    names = {**function.__globals__, "has_torch_function": lambda _: False}
    twin = types.FunctionType(
        function.__code__, names, function.__name__, function.__defaults__, function.__closure__
    )
    twin.__kwdefaults__ = function.__kwdefaults__
    return twin


def examples(*args: Any, **kwargs: Any) -> int:
    """How many examples a composite is given; each of its maps has rows `[..., example]`.

    Attention has tokens first, `[token, example, feature]`, and flattens them so; its module moves
    them there whatever its `batch_first`.
    """
    query: Tensor = args[0] if args else kwargs["query"]
    return query.shape[1] if query.dim() == 3 else 1
