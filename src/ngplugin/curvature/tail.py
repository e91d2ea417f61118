"""The part of a forward pass behind the model's last layers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from ngplugin.curvature.recorded_call import Mark, RecordedCall, Slot, slots_in, tensors_in
from ngplugin.curvature.subclasses import plain
from ngplugin.curvature.tape import Tape


class Tail:
    """A value as a function of the outputs of the model's last layers.

    A layer is a call that parameters enter beside what was computed from data. The last layers are
    those from which the value is reached by a way on which there is no other.

    Args:
        tape: of the forward pass, not yet released.
        value: one tensor on it.
        deep: stop at layers with matrices only; where other parameters enter, they count
            themselves as outputs of the model. Those that layers have too are none: a penalty on
            weights says nothing of a prediction.

    Attributes:
        outputs: of the last layers, with their graph.
        mark: where the tape has them, for a replay.
        fixed: loss values that are accounted for; they enter as constants. By slot.
    """

    def __init__(self, tape: Tape, value: Mark, deep: bool = False) -> None:
        self._tape = tape
        (self._place,) = value.tensors
        self.fixed: dict[int, Tensor] = {}
        self._calls: list[RecordedCall] = []
        outputs = self._walk(value, deep)
        self.outputs = tuple(map(plain, outputs.values()))
        places = tuple(key if type(key) is Slot else t for key, t in outputs.items())
        self.mark = Mark(value.position, places)

    def _walk(self, value: Mark, deep: bool) -> dict[Any, Tensor]:
        """Back from the value; returns outputs by slot, or by id where no call made them."""
        tape, outputs = self._tape, dict[Any, Tensor]()
        stops = {"layer"} if deep else {"layer", "beside"}
        bare = tape.parameters.keys() - tape.in_layers(value) if deep else set()
        of_layers = {
            tape.alias[s] for call in tape.calls if call.entry in stops for s in call.touched
        }
        needed = tape.memory(value)
        for i in range(value.position - 1, -1, -1):
            call = tape.calls[i]
            met = [s for s in call.touched if tape.alias[s] in needed]
            if not met:
                continue
            written = any(tape.alias[s] in of_layers and s in tape.made for s in met)
            if i in tape.scored:
                self.fixed[met[0]] = tape.scored[i]
            elif call.entry in stops:
                outputs.update((s, tape.made[s]) for s in met)
            elif written and set(slots_in(call.args)).intersection(met):
                # In place: the layer's output is what it is now.
                outputs.update((s, tape.made[s]) for s in met if s in tape.made)
            else:
                self._calls.insert(0, call)
                needed.update(tape.alias[s] for s in slots_in((call.args, call.kwargs)))
                for t in tensors_in([call.args, call.kwargs]):
                    unknown = t.grad_fn is not None and not tape.origin_known(t)
                    if unknown or id(t) in bare:
                        outputs[id(t)] = t
                continue
            needed.difference_update(tape.alias[s] for s in met)
        return outputs

    def __call__(self, outputs: Sequence[Tensor]) -> Tensor:
        """The value that other outputs give, differentiably."""
        values, replaced = dict(self.fixed), dict[int, Tensor]()
        for place, tensor in zip(self.mark.tensors, outputs, strict=True):
            if type(place) is Slot:
                values[place] = tensor
            else:
                replaced[id(place)] = tensor
        return plain(self._tape.run_again(self._calls, values, replaced)[self._place])
