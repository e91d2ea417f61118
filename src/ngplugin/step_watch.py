"""What was observed of the step that is being made up: one region, or one for each micro-batch."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch
from torch import Tensor

from ngplugin.curvature.fisher import Fisher
from ngplugin.curvature.observation import Observation
from ngplugin.curvature.observe import LossScaler, Observer
from ngplugin.curvature.ranks import rank
from ngplugin.options import Options
from ngplugin.usable_parameters import check_usable


@dataclass(frozen=True)
class Needs:
    """What a step needs from its forward pass.

    Attributes:
        statistics: of F.
        record: the calls, so that they can be run again.
    """

    statistics: bool
    record: bool


class StepWatch:
    """Opens regions of the user's code to an observer, and has what it saw until the step is made.

    Args:
        options: documented at `NaturalGradientOptimizer`.
        fisher: takes the statistics.
        needs: what the next step needs; asked whenever one begins.
    """

    def __init__(self, options: Options, fisher: Fisher, needs: Callable[[], Needs]) -> None:
        self._options = options
        self._fisher = fisher
        self._needs = needs
        self._generator: torch.Generator | None = None
        self.observer: Observer | None = None  # while a region is open
        self.observations: list[Observation] = []

    def observe(
        self, parameters: Sequence[Tensor], scaler: LossScaler | None = None
    ) -> AbstractContextManager[None]:
        """A context for a forward pass; does nothing where nothing is needed from it."""
        needs = self._needs()
        if self.observer or not parameters or not (needs.statistics or needs.record):
            return contextlib.nullcontext()
        return self._region(parameters, scaler)

    @contextlib.contextmanager
    def _region(self, parameters: Sequence[Tensor], scaler: LossScaler | None) -> Iterator[None]:
        check_usable(parameters)
        self._let_go()
        self._fisher.parameters = [*parameters]
        needs = self._needs()
        observer = Observer(
            parameters,
            self._fisher if needs.statistics else None,
            needs.record,
            self._options.fisher,
            self._options.draws,
            self.generator(parameters[0].device),
            scaler,
        )
        first = observer.observation
        self.observer = observer
        self.observations.append(first)
        try:
            with observer:
                yield
        finally:
            self.observer = None
            last = observer.observation
            if last is not first and not last.tape.calls:
                self.observations.remove(last)  # nothing came after the last step

    def _let_go(self) -> None:
        """Keep no graph that the user has let go, and nothing of one without a backward pass."""
        for observation in [o for o in self.observations if o.over]:
            observation.release()
            if not observation.scored:
                self.observations.remove(observation)

    def generator(self, device: torch.device) -> torch.Generator:
        """The private source of randomness that scores are drawn from."""
        if self._generator is None:
            # Each of several processes draws for itself.
            seed = self._options.seed + rank()
            self._generator = torch.Generator(device).manual_seed(seed)
        return self._generator

    # -- around a step -------------------------------------------------------------------------

    def taken(self) -> list[Observation]:
        """What was observed of the step that is made now."""
        observations, self.observations = self.observations, []
        return observations

    def paused(self) -> AbstractContextManager[None]:
        """A context in which nothing is observed, for our own torch calls."""
        return self.observer.paused() if self.observer else contextlib.nullcontext()

    def go_on(self) -> None:
        """Begin anew after a step in the middle of an open region."""
        if self.observer:
            needs = self._needs()
            sink = self._fisher if needs.statistics else None
            self.observations.append(self.observer.restart(sink, needs.record))

    def zeroed(self) -> None:
        """Drop what was learnt along with gradients that were now zeroed, and no step used.

        A forward pass that was observed but not yet differentiated still counts, since gradients
        are usually zeroed between the two.
        """
        if not self.observations:
            return
        for observation in self.observations[:-1]:  # the last may be that of an open region
            if observation.spent:
                observation.release()
                self.observations.remove(observation)
        for observation in self.observations:
            observation.forget_scores()
        self._fisher.discard()

    def forget(self) -> None:
        """Drop what was observed of a step that will not be made."""
        for observation in self.observations:
            observation.release()
        self.observations.clear()
        self._fisher.discard()

    # -- saving --------------------------------------------------------------------------------

    def generator_state(self) -> Tensor | None:
        """Where the generator is; None before the first draw."""
        return None if self._generator is None else self._generator.get_state()

    def load_generator_state(self, state: Tensor | None, device: torch.device, steps: int) -> None:
        """Go on drawing from there.

        Args:
            state: what `generator_state()` returned.
            device: of the parameters.
            steps: how many were made by then.
        """
        if state is None:
            return
        generator = self.generator(device)
        generator.set_state(state.cpu())
        if rank() > 0:  # the state is the first process's, and each draws for itself
            generator.manual_seed(generator.initial_seed() + rank() + steps)
