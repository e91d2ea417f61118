"""The torch calls that led from the parameters to a prediction, and how to run them once more.

Measuring the KL divergence of a step needs the prediction on the same batch under the new
parameters. Calling the user's code again would repeat its side effects: metrics, logs, hidden
state, random numbers. So the calls themselves are recorded while the user's code runs, and only
those that carry a parameter's value to the prediction are run again.

What a replay holds fixed: the inputs, every value that does not depend on a parameter, the random
numbers (the generator's state is kept for each call that consumed any), the autocast setting, and
Python's control flow. What it never touches: buffers (a call that changed one, such as batch
normalization, gets a copy of it), gradients, and the global random state.

Tensors made during the recording are known by weak reference, and the nodes of the graph by what is
written into them, so that the graph of an objective goes when the user lets it go. Only the outputs
of layers are kept alive, until `release`: the objective as a function of the last ones is of
interest too.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.parameter import Parameter, is_lazy

from ngplugin.curvature.process_wide import ProcessWide
from ngplugin.curvature.random_state import random_state, set_random_state
from ngplugin.curvature.recorded_call import (
    Entry,
    Mark,
    RecordedCall,
    Slot,
    changes_first_argument,
    map_tensors,
    slots_in,
    tensors_in,
)
from ngplugin.curvature.subclasses import plain
from ngplugin.curvature.weak_tensors import WeakTensors

# Update running statistics among their arguments without raising those tensors' version counters.
_WRITES_UNNOTICED = {"batch_norm", "instance_norm", "native_batch_norm"}

_ATTENTION_IN_STEPS = ProcessWide(lambda: sdpa_kernel(SDPBackend.MATH))


def _same(t: Tensor) -> Tensor:
    return t.view_as(t)


def _graphed(tensors: Iterable[Tensor]) -> list[Tensor]:
    return [t for t in tensors if t.requires_grad]


class Tape:
    """Records calls as they happen (`run`), and runs them again (`replay`).

    Args:
        parameters: the tensors whose later values a replay must see. They are read at replay
            time, so changing them in place and replaying gives the changed model's prediction.
        layers: the functions that apply a layer's weights.
    """

    def __init__(self, parameters: Sequence[Tensor], layers: Collection[Any] = ()) -> None:
        self._layers = layers
        self.parameters = {id(p): p for p in parameters}
        self.device = parameters[0].device if parameters else torch.device("cpu")
        self.calls: list[RecordedCall] = []
        self._slots: Any = WeakTensors()  # tensor -> Slot
        self._key = object()  # under which nodes of the graph have the slots of what they made
        self._memory: Any = WeakTensors()  # what others are views of -> first slot
        self.alias: list[int] = []  # slot -> the first slot of those that share its memory
        self._originals: dict[Slot, Tensor] = {}  # constants as they were before being written to
        self._written: Any = WeakTensors()  # constants that the forward pass changed
        self._alone: dict[Slot, frozenset[int]] = {}  # computed from parameters only -> their ids
        self.made: dict[Slot, Tensor] = {}  # by calls that parameters enter, with their graph
        self.scored: dict[int, Tensor] = {}  # place of a call -> the loss value it returned
        self._unmade = {id(p) for p in parameters if is_lazy(p)}  # the first batch shapes them
        self._foreign: Any = WeakTensors()  # made from other optimizers' parameters
        self._ungraphed: set[Slot] = set()  # last written to while gradients were disabled
        self.obstacle: str | None = None  # why this tape cannot be replayed
        self.hidden_derivative: str | None = None  # why a replay cannot be differentiated

    def run(
        self, function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """Call `function(*args, **kwargs)`, record it if a parameter's value enters it."""
        inputs = [*tensors_in(args), *tensors_in(kwargs)]
        self._adopt(inputs)
        if not any(id(t) in self.parameters or t in self._slots for t in inputs):
            differentiable = torch.is_grad_enabled() and any(t.requires_grad for t in inputs)
            if not (differentiable and all(map(self.origin_known, inputs))):
                return function(*args, **kwargs)
            # What data that require grad lead to, such as coordinates, is differentiated by again.
            # What only parameters of others lead to stays as it is, whatever becomes of them.
            if all(isinstance(t, Parameter) or t in self._foreign for t in _graphed(inputs)):
                result = function(*args, **kwargs)
                self._foreign.update((t, None) for t in _graphed(tensors_in(result)))
                return result

        name = getattr(function, "__name__", "")
        self._check_origin(inputs, name)
        writes = changes_first_argument(name, kwargs) or "out" in kwargs
        if writes:
            self._keep_original(next(tensors_in([kwargs.get("out"), args, kwargs])), name)
        random = random_state(self.device)
        constants = [t for t in inputs if t not in self._slots and not t.is_inference()]
        versions = [t._version for t in constants]
        given = [] if writes else [(t, t._version) for t in inputs if not t.is_inference()]
        recorded_args = map_tensors(self._slot_of, args)
        recorded_kwargs = map_tensors(self._slot_of, kwargs)

        result = function(*args, **kwargs)

        # `broadcast_tensors` and the like return what they are given where there is nothing to do.
        handed_on = {id(t) for t, version in given if t._version == version}
        outputs = tuple(
            None if id(t) in handed_on else self._new_slot(t) for t in tensors_in(result)
        )
        if outputs and all(id(t) in handed_on for t in tensors_in(result)):
            return result
        entry = self._entry(function, inputs, result)
        if entry != "none":
            made = zip(outputs, tensors_in(result), strict=True)
            self.made.update((slot, t) for slot, t in made if slot is not None)
        for t in tensors_in(result):
            node: Any = t.grad_fn
            if node is not None and t in self._slots:
                node.metadata[self._key, t.output_nr] = self._slots[t]
        if entry == "alone":
            origins = self._parameters_in(inputs)
            self._alone.update((slot, origins) for slot in outputs if slot is not None)
        written = slots_in(outputs or recorded_args[:1])
        if torch.is_grad_enabled():
            self._ungraphed.difference_update(written)
        else:
            self._ungraphed.update(written)
        if not outputs and name != "__setitem__":
            return result  # a shape, a number: nothing to replay
        consumed = any(
            not torch.equal(a, b) for a, b in zip(random, random_state(self.device), strict=True)
        )
        changed = [t for t, v in zip(constants, versions, strict=True) if t._version != v]
        if name in _WRITES_UNNOTICED:
            changed = [t for t in constants if id(t) not in self.parameters]
            self._written.update((t, None) for t in changed)
        rewritten = {id(t) for t in changed} & self.parameters.keys()
        if rewritten and rewritten <= self._unmade:
            return result  # its first values, to which a replay shall not go back
        if rewritten:
            self.obstacle = f"`{name}` changed a parameter in place during the forward pass"
        autocast = torch.is_autocast_enabled(self.device.type)
        self.calls.append(
            RecordedCall(
                function,
                recorded_args,
                recorded_kwargs,
                outputs,
                frozenset(id(t) for t in changed),
                random if consumed else None,
                torch.get_autocast_dtype(self.device.type) if autocast else None,
                torch.is_grad_enabled(),
                entry,
            )
        )
        return result

    def _entry(self, function: Callable[..., Any], inputs: Sequence[Tensor], result: Any) -> Entry:
        weights = [
            t for t in inputs if id(t) in self.parameters or self._slots.get(t) in self._alone
        ]
        derivative = function is torch.autograd.grad  # its graph is no argument of it
        if function in self._layers or derivative:
            return "layer" if weights or derivative else "none"
        if not weights:
            return "none"
        data = [t for t in inputs if t in self._slots and self._slots[t] not in self._alone]
        size = max(t.numel() for t in weights)
        if not data and (
            len(weights) == len(inputs) or all(t.numel() == size for t in tensors_in(result))
        ):
            return "alone"
        if all(t.numel() == 1 for t in tensors_in(result)):
            return "none"  # a penalty is added to a loss
        return "layer" if any(t.dim() > 1 for t in weights) else "beside"

    def _parameters_in(self, inputs: Sequence[Tensor]) -> frozenset[int]:
        """The ids of those among the inputs, or that these were computed from alone."""
        direct = frozenset(id(t) for t in inputs if id(t) in self.parameters)
        slots = [self._slots[t] for t in inputs if t in self._slots]
        return direct.union(*(self._alone.get(slot, ()) for slot in slots))

    def plain(self, tree: Any) -> Any:
        """A call's arguments with tensors of subclasses as plain ones, known here all the same."""

        def known(leaf: Any) -> Any:
            if not isinstance(leaf, Tensor) or id(leaf) in self.parameters:
                return leaf
            t = plain(leaf)
            if leaf in self._slots:
                self._slots[t] = self._slots[leaf]
            return t

        return map_tensors(known, tree)

    def score(self, value: Tensor) -> None:
        """Note that a value is that of a loss which is accounted for."""
        if value in self._slots:
            slot = self._slots[value]
            last = max(i for i, call in enumerate(self.calls) if slot in call.touched)
            self.scored[last] = plain(torch.clone(torch.detach(value)))
            self._alone.pop(slot, None)

    def release(self) -> None:
        """Let the graph go; `tail` finds nothing from here on."""
        self.made.clear()
        for tensors in (self._slots, self._memory, self._written, self._foreign):
            tensors.forget_gone()

    def mark(self, tensors: Sequence[Tensor]) -> Mark:
        """Remember `tensors`, as they are now, as something a replay shall return."""
        self._adopt(tensors)
        self._check_origin(tensors, "the loss")
        return Mark(len(self.calls), tuple(self._slot_of(t) for t in tensors))

    def replay(
        self, marks: Sequence[Mark], leaves: Mapping[int, Tensor] | None = None
    ) -> list[tuple[Tensor, ...]]:
        """Run the recorded calls with the parameters' present values.

        Args:
            marks: what to return, in the order in which they were marked.
            leaves: id of a parameter to the tensor that takes its place. With it the results are
                differentiable functions of these tensors, as often as one likes: attention is
                computed in steps, since its fused kernels have no second derivative.

        Returns:
            For each mark its tensors, as they were when they were marked; detached unless `leaves`
            are given.

        Raises:
            RuntimeError: the tape has an `obstacle`.
        """
        if self.obstacle:
            raise RuntimeError(f"the prediction cannot be computed again: {self.obstacle}")
        calls = self._needed_calls(marks)
        last_use: dict[int, int] = {}
        for i, call in calls:
            for slot in slots_in((call.args, call.kwargs, call.outputs)):
                last_use[slot] = i
        for mark in marks:
            for slot in slots_in(mark.tensors):
                last_use[slot] = max(mark.position, last_use.get(slot, 0))
        differentiates = any(call.function is torch.autograd.grad for _, call in calls)
        kernels: contextlib.AbstractContextManager[Any] = contextlib.nullcontext()
        if leaves is not None:
            differentiates, kernels = True, _ATTENTION_IN_STEPS.made()
        values: dict[int, Tensor] = {slot: torch.clone(t) for slot, t in self._originals.items()}
        replaced = leaves or {}
        waiting = list(marks)
        results: list[tuple[Tensor, ...]] = []
        before = random_state(self.device)
        try:
            with torch.set_grad_enabled(differentiates), kernels:
                for i, call in calls:
                    while waiting and waiting[0].position <= i:
                        results.append(waiting.pop(0).values(values, replaced))
                    # Without leaves a derivative in the forward pass sees everything.
                    graphed = call.differentiable if leaves is not None else differentiates
                    with torch.set_grad_enabled(graphed):
                        call.run_again(self.device, values, replaced)
                    for slot in slots_in((call.args, call.kwargs, call.outputs)):
                        if last_use[slot] <= i:
                            values.pop(slot, None)
                results += [mark.values(values, replaced) for mark in waiting]
        finally:
            set_random_state(self.device, before)
        if leaves is None:
            return [tuple(t.detach() for t in tensors) for tensors in results]
        return results

    @contextlib.contextmanager
    def keeping_buffers(self) -> Iterator[None]:
        """A context that leaves no trace in the buffers which the forward pass changed.

        A backward pass runs what is checkpointed again, and batch normalization in it once more
        updates its running statistics.
        """
        buffers = [t for t in self._written if not t.requires_grad]
        before = [torch.clone(t) for t in buffers]
        try:
            yield
        finally:
            for t, values in zip(buffers, before, strict=True):
                t.data.copy_(values)  # unnoticed, since the user's graph may have saved it

    # -- the part behind the last layers -------------------------------------------------------

    def place(self, value: Tensor) -> Mark | None:
        """Where a value is; None if it was not computed on the tape."""
        return Mark(len(self.calls), (self._slots[value],)) if value in self._slots else None

    def memory(self, mark: Mark) -> set[int]:
        """The marked tensors' own memory, named by its first slot."""
        return {self.alias[s] for s in slots_in(mark.tensors)}

    def upstream(self, mark: Mark) -> set[int]:
        """All memory, named by its first slot, that the marked tensors depend on."""
        calls = [call for _, call in self._needed_calls([mark])]
        return {self.alias[s] for call in calls for s in call.touched}

    def in_layers(self, mark: Mark) -> set[int]:
        """The ids of the parameters that enter the layers which the marked tensors depend on."""
        found: set[int] = set()
        for _, call in self._needed_calls([mark]):
            if call.entry == "layer":
                inputs = call.args, call.kwargs
                found.update(id(t) for t in tensors_in(inputs) if id(t) in self.parameters)
                found.update(*(self._alone.get(slot, ()) for slot in slots_in(inputs)))
        return found

    def run_again(
        self,
        calls: Sequence[RecordedCall],
        values: Mapping[int, Tensor],
        replaced: Mapping[int, Tensor],
    ) -> dict[int, Tensor]:
        """Some calls in their order, from other values.

        Args:
            calls: of the tape.
            values: by slot, what was made before them.
            replaced: by id, what to take for tensors that no call made.

        Returns:
            Their results, and the values, by slot.
        """
        known: dict[int, Tensor] = {slot: torch.clone(t) for slot, t in self._originals.items()}
        known.update(values)
        before = random_state(self.device)
        try:
            for call in calls:
                call.run_again(self.device, known, replaced)
        finally:
            set_random_state(self.device, before)
        return known

    # -- recording -------------------------------------------------------------------------

    def _slot_of(self, leaf: Any) -> Any:
        return self._slots.get(leaf, leaf) if isinstance(leaf, Tensor) else leaf

    def _new_slot(self, tensor: Tensor) -> Slot | None:
        if id(tensor) in self.parameters:
            return None
        if tensor in self._slots:  # changed in place: it keeps its slot
            return self._slots[tensor]  # type: ignore[no-any-return]
        slot = Slot(len(self.alias))
        base = tensor._base if tensor._is_view() else None
        if base is None or id(base) in self.parameters:
            base = tensor
        # What a subclass's function makes is a view of a tensor that nobody sees.
        self.alias.append(self._memory.setdefault(base, int(slot)))
        self._slots[tensor] = slot
        return slot

    def _keep_original(self, target: Tensor, name: str) -> None:
        if target in self._slots or id(target) in self.parameters:
            return
        original = torch.clone(torch.detach(target))
        slot = self._new_slot(target)
        if slot is not None:
            self._originals[slot] = original
            self._written[target] = None

    def _adopt(self, tensors: Sequence[Tensor]) -> None:
        """Know tensors that are others under a new name, which no torch function gave them.

        `as_subclass` does that, and constructors of subclasses; autograd calls it an alias.
        """
        for t in tensors:
            node: Any = t.grad_fn
            nr = t.output_nr
            if node is None or self.origin_known(t):
                continue
            of: Any = None
            while node is not None:
                of = node.metadata.get((self._key, nr), getattr(node, "variable", None))
                if of is not None or node.name() != "AliasBackward0":
                    break
                node, nr = node.next_functions[0]
            if of is not None:
                call = RecordedCall(
                    _same, (of,), {}, (self._new_slot(t),), frozenset(), None, None, True, "none"
                )
                self.calls.append(call)

    @property
    def hides_functions(self) -> bool:
        """Whether a function was called that does more than its calls which were seen."""
        return self.obstacle is not None or self.hidden_derivative is not None

    def origin_known(self, t: Tensor) -> bool:
        """Whether the tape knows how a tensor was computed, if it was at all."""
        known = t in self._slots or id(t) in self.parameters or t.grad_fn is None
        return known or t in self._foreign

    def _check_origin(self, tensors: Sequence[Tensor], name: str) -> None:
        for t in tensors:
            if t.requires_grad and self._slots.get(t) in self._ungraphed:
                self.hidden_derivative = (
                    f"a tensor of shape {tuple(t.shape)} that enters `{name}` has a derivative "
                    "that none of its calls has (a custom autograd.Function)"
                )
            if not self.origin_known(t):
                self.obstacle = (
                    f"a tensor of shape {tuple(t.shape)} that enters `{name}` was made by no torch "
                    "function that can be observed (a custom autograd.Function, a scripted module, "
                    "or a graph from before this step)"
                )

    # -- replaying -------------------------------------------------------------------------

    def _needed_calls(self, marks: Sequence[Mark]) -> list[tuple[int, RecordedCall]]:
        """The calls on whose results a marked tensor depends, with their places, in order."""
        needed: set[int] = set()  # memory, named by its first slot
        chosen: list[tuple[int, RecordedCall]] = []
        pending = sorted(marks, key=lambda mark: mark.position)
        for i in range(len(self.calls) - 1, -1, -1):
            while pending and pending[-1].position > i:
                needed.update(self.alias[s] for s in slots_in(pending.pop().tensors))
            call = self.calls[i]
            if any(self.alias[s] in needed for s in call.touched):
                needed.update(self.alias[s] for s in slots_in((call.args, call.kwargs)))
                chosen.append((i, call))
        return chosen[::-1]
