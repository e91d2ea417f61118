"""One call of a torch function as a tape keeps it, to be run again."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from ngplugin.curvature.random_state import set_random_state
from ngplugin.curvature.subclasses import plain

# How parameters enter a call: none does; by themselves, as in `w * mask`; beside what was computed
# from data; or as a layer's weight.
Entry = Literal["none", "alone", "beside", "layer"]


class Slot(int):
    """Stands in a recorded call's arguments for a tensor that an earlier call made."""


@dataclass(frozen=True)
class Mark:
    """A prediction's place on the tape: after which call, and which tensors."""

    position: int
    tensors: tuple[Any, ...]  # slots, or the tensors themselves where no call made them

    def values(
        self, values: dict[int, Tensor], replaced: Mapping[int, Tensor]
    ) -> tuple[Tensor, ...]:
        """The tensors in a replay; cloned, since a later call may write into a prediction."""
        found = (values[t] if type(t) is Slot else replaced.get(id(t), t) for t in self.tensors)
        return tuple(plain(torch.clone(t)) for t in found)


@dataclass(frozen=True)
class RecordedCall:
    """A function, what it was given and what it made."""

    function: Callable[..., Any]
    args: tuple[Any, ...]  # tensors made by earlier calls are slots
    kwargs: dict[str, Any]
    outputs: tuple[Slot | None, ...]  # one for each tensor of the result, in order
    copies: frozenset[int]  # ids of constants that the call changes behind its result
    random: tuple[Tensor, ...] | None  # generator states before a call that consumed randomness
    autocast: torch.dtype | None  # None: autocast was off
    differentiable: bool  # gradients were enabled
    entry: Entry

    @property
    def touched(self) -> list[Slot]:
        """What it makes or writes to; x[i] = y returns nothing, it writes into x."""
        made = [s for s in self.outputs if s is not None]
        return made or slots_in(self.args[:1])

    def run_again(
        self, device: torch.device, values: dict[int, Tensor], replaced: Mapping[int, Tensor]
    ) -> None:
        """Call the function with other tensors, as the first time; leaves the random state moved.

        Args:
            device: whose random state and autocast count.
            values: of the slots; what the call makes is put there.
            replaced: by id, what stands for tensors that no call made.
        """

        def value_of(leaf: Any) -> Any:
            if type(leaf) is Slot:
                return values[leaf]
            if id(leaf) in self.copies:
                return torch.clone(leaf)
            if id(leaf) in replaced:
                return replaced[id(leaf)]
            # The graph of what was made from other optimizers' parameters is gone by now.
            return leaf.detach() if isinstance(leaf, Tensor) and leaf.grad_fn else leaf

        if self.random is not None:
            set_random_state(device, self.random)
        autocast: contextlib.AbstractContextManager[Any] = contextlib.nullcontext()
        if self.autocast is not None:
            autocast = torch.autocast(device.type, dtype=self.autocast)
        with autocast:
            result = self.function(
                *map_tensors(value_of, self.args), **map_tensors(value_of, self.kwargs)
            )
        for slot, tensor in zip(self.outputs, tensors_in(result), strict=False):
            if slot is not None:
                values[slot] = tensor


def map_tensors(function: Callable[[Any], Any], tree: Any) -> Any:
    """Apply `function` to each leaf of nested tuples, lists and dicts, keeping their types."""
    if isinstance(tree, tuple):
        items = [map_tensors(function, item) for item in tree]
        return type(tree)(*items) if hasattr(tree, "_fields") else tuple(items)
    if isinstance(tree, list):
        return [map_tensors(function, item) for item in tree]
    if isinstance(tree, dict):
        return {key: map_tensors(function, item) for key, item in tree.items()}
    return function(tree)


def tensors_in(tree: Any) -> Iterator[Tensor]:
    """Each tensor in nested tuples, lists and dicts, in order."""
    if isinstance(tree, Tensor):
        yield tree
    elif isinstance(tree, (tuple, list)):
        for item in tree:
            yield from tensors_in(item)
    elif isinstance(tree, dict):
        yield from tensors_in(list(tree.values()))


def slots_in(tree: Any) -> list[Slot]:
    """Each slot in nested tuples, lists and dicts, in order."""
    found: list[Slot] = []
    map_tensors(lambda leaf: found.append(leaf) if type(leaf) is Slot else None, tree)
    return found


def changes_first_argument(name: str, kwargs: dict[str, Any]) -> bool:
    """Whether a call writes into its first argument: `add_`, `x[i] = y`, `inplace=True`."""
    return (
        (name.endswith("_") and not name.endswith("__"))
        or name == "__setitem__"
        or kwargs.get("inplace") is True
    )
