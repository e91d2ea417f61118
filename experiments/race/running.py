"""Training by the clock: trials one after the other, the race in turns.

The clock is the processor's time of this process while steps are made; what is judged in between
does not count. In the race all contestants of a seed are alive at once and train in short turns, so
that whatever else the machine does meets all alike. Each has its own state of torch's random
numbers: what it does is the same as if it were alone.
"""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from importlib.util import find_spec
from typing import Any

import torch

from experiments.race.contestants import Contestant
from experiments.race.courses import Course
from experiments.race.results import Curve
from experiments.race.search import Setting, search, setting
from experiments.workload import in_precision

TURN = 0.25  # seconds
TUNING_SEED = 100  # none of those that are raced
# The end decides, and whose last step takes too long has the point before it.
TUNING_SHARES = (0.25, 0.5, 0.75, 0.8, 0.85, 0.9, 0.95, 1.0)
EARLIEST = 0.004  # share of the time, of the first point after the start
LATE = 1.02  # shares of the time after which nothing counts: a step that took too long


class Runner:
    """One contestant on one course, from the start to the end of its time.

    Attributes:
        curve: what was measured so far.
        over: whether the time is spent, or the run has failed.
        spent: seconds of the processor in steps.

    Args:
        contestant: who.
        course: what and how long.
        options: of the contestant.
        seed: of the weights and the batches.
        shares: of the time at which to judge; None for those of the course.
        steps: that end the run, whatever the time.
    """

    def __init__(
        self,
        contestant: Contestant,
        course: Course,
        options: Setting,
        seed: int,
        shares: Sequence[float] | None = None,
        steps: int | None = None,
    ) -> None:
        self.course = course
        self.curve = Curve(seed, options)
        self.over = False
        self.spent = 0.0
        self._most_steps = steps
        self._times: list[float] = []
        self._ahead = [*(points(course.points) if shares is None else shares)]
        self._judged = 0
        self._data, self._module = course.make(seed)
        self._training = contestant.training(course, self._module, self._data, options)
        self._batches = self._endless()
        self._random = torch.get_rng_state()
        self._judge()

    def advance(self, seconds: float) -> None:
        """Take a turn of some seconds, or less if the time is over."""
        if self.over:
            return
        others = torch.get_rng_state()
        torch.set_rng_state(self._random)
        end = min(self.spent + seconds, self.course.seconds)
        while not self.over and self.spent < end:
            self._step()
        self._random = torch.get_rng_state()
        torch.set_rng_state(others)
        if self.over:
            self._finish()

    def run(self) -> Curve:
        """To the end."""
        self.advance(math.inf)
        return self.curve

    def _step(self) -> None:
        batch = next(self._batches)
        share = self.spent / self.course.seconds
        started = time.process_time()
        try:
            loss = self._training.step(batch, share).item()
        # A factorization that fails is part of a method; a package that breaks is part of it too.
        except (RuntimeError, ValueError, ArithmeticError) as error:
            self._fail(f"{type(error).__name__}: {str(error).splitlines()[0][:80]}")
            return
        self._times.append(time.process_time() - started)
        self.spent += self._times[-1]
        if not math.isfinite(loss):
            self._fail("the loss was not finite")
            return
        share = self.spent / self.course.seconds
        self.over = share >= 1 or len(self._times) == self._most_steps
        if (share >= self._ahead[0] or self.over) and share <= LATE:
            self._judge()
        while len(self._ahead) > 1 and self._ahead[0] <= share:
            self._ahead.pop(0)

    def _judge(self) -> None:
        """Add a point to the curve."""
        wanted = self.over or self._judged % self.course.metric_every == 0
        self._judged += 1
        with torch.random.fork_rng(devices=[]):  # loaders draw from it
            loss = self.course.judge(self._module, self._data)
            held_out = self.course.judge_held_out(self._module, self._data) if wanted else None
        if not math.isfinite(loss):
            self._fail("the loss was not finite")
            return
        self.curve.steps.append(len(self._times))
        self.curve.seconds.append(self.spent)
        self.curve.losses.append(loss)
        self.curve.metrics.append(held_out)

    def _fail(self, reason: str) -> None:
        self.curve.failure = reason
        self.over = True

    def _finish(self) -> None:
        """Keep what is told in the end, and let go of the rest."""
        self.curve.summarize(self._times)
        self.curve.overhead = self._training.overhead
        del self._training, self._module, self._batches

    def _endless(self) -> Iterator[Any]:
        loader = self._data.train_dataloader()
        for batch in itertools.chain.from_iterable(loader for _ in itertools.count()):
            yield in_precision(batch, self._module)


def points(count: int) -> list[float]:
    """Shares of the time at which to judge: half of them closer together towards the start."""
    early, even = count // 2, count - count // 2
    growing = [EARLIEST ** (1 - k / early) for k in range(early)]
    return sorted({*growing, *((k + 1) / even for k in range(even))})


def installed(contestant: Contestant) -> bool:
    """Whether the package that it needs is there."""
    return contestant.package is None or find_spec(contestant.package) is not None


def tune(
    contestant: Contestant, course: Course, name: str, first: int = 5, more: int = 3
) -> list[tuple[Setting, float]]:
    """Search for the setting with the least loss in the end; all that were tried, with losses."""
    axes = contestant.axes[name]
    warm_up(course, {name: (contestant, setting(axes, (0,) * len(axes)))})

    def judge(place: tuple[int, ...]) -> float:
        runner = Runner(contestant, course, setting(axes, place), TUNING_SEED, TUNING_SHARES)
        return runner.run().final

    found = search(len(axes), judge, first, more)
    return [(setting(axes, place), loss) for place, loss in found.items()]


def race(
    course: Course,
    entries: Mapping[str, tuple[Contestant, Setting]],
    seed: int,
    steps: int | None = None,
) -> dict[str, Curve]:
    """All contestants on one seed, in turns."""
    runners = {
        name: Runner(contestant, course, options, seed, steps=steps)
        for name, (contestant, options) in entries.items()
    }
    while not all(runner.over for runner in runners.values()):
        for runner in runners.values():
            runner.advance(TURN)
    return {name: runner.curve for name, runner in runners.items()}


def warm_up(course: Course, entries: Mapping[str, tuple[Contestant, Setting]]) -> None:
    """Two steps of each, so that nobody's clock has what is only loaded once in it."""
    for contestant, options in entries.values():
        Runner(contestant, course, options, TUNING_SEED, (1.0,), steps=2).run()
