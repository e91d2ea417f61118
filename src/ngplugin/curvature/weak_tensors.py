"""Values by tensor, which do not keep the tensors alive."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Generic, TypeVar

from torch import Tensor
from torch.utils.weak import WeakIdRef

_T = TypeVar("_T")


class WeakTensors(Generic[_T]):
    """A dictionary by the identity of tensors, for as long as one step is observed.

    Unlike that of `torch.utils.weak` it runs no Python code when a tensor goes. Python ignores
    whatever is raised there: a Ctrl-C that came at such a moment would be lost. What has gone is
    forgotten by `forget_gone`, when its memory is used again, or with the dictionary.
    """

    def __init__(self) -> None:
        self._entries: dict[int, tuple[WeakIdRef, _T]] = {}

    def get(self, tensor: Tensor, default: _T | None = None) -> _T | None:
        """Its value, if it has one."""
        found = self._entries.get(id(tensor))
        return found[1] if found is not None and found[0]() is tensor else default

    def __contains__(self, tensor: Tensor) -> bool:
        """Whether it has a value."""
        found = self._entries.get(id(tensor))
        return found is not None and found[0]() is tensor

    def __getitem__(self, tensor: Tensor) -> _T:
        """Its value; KeyError without one."""
        if tensor not in self:
            raise KeyError(tensor.shape)
        return self._entries[id(tensor)][1]

    def __setitem__(self, tensor: Tensor, value: _T) -> None:
        """Give it one."""
        self._entries[id(tensor)] = WeakIdRef(tensor), value

    def setdefault(self, tensor: Tensor, value: _T) -> _T:
        """Its value, which is the given one if it had none."""
        if tensor not in self:
            self[tensor] = value
        return self[tensor]

    def update(self, pairs: Iterable[tuple[Tensor, _T]]) -> None:
        """Give each its value."""
        for tensor, value in pairs:
            self[tensor] = value

    def __iter__(self) -> Iterator[Tensor]:
        """Those that are still there."""
        for reference, _ in tuple(self._entries.values()):
            tensor = reference()
            if tensor is not None:
                yield tensor

    def forget_gone(self) -> None:
        """Keep those only that are still there."""
        self._entries = {k: entry for k, entry in self._entries.items() if entry[0]() is not None}
