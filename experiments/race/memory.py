"""How much memory training takes: bytes of torch's tensors that are alive at once, at the most.

Every torch operation is intercepted, so the number is the same on every run and machine. It has
parameters, gradients, what the optimizer keeps, activations and batches in it, but neither the data
set nor what a kernel allocates inside.
"""

from __future__ import annotations

import itertools

from experiments.race.contestants import Contestant
from experiments.race.courses import Course
from experiments.race.search import Setting
from experiments.scaling.counting import Counter
from experiments.workload import in_precision

STEPS = 25


def peak(contestant: Contestant, course: Course, options: Setting, steps: int = STEPS) -> int:
    """The most bytes in the first steps."""
    data, module = course.make(seed=0)
    with Counter() as counter:
        for tensor in itertools.chain(module.parameters(), module.buffers()):
            counter.follow(tensor)
        training = contestant.training(course, module, data, options)
        batches = itertools.chain.from_iterable(data.train_dataloader() for _ in itertools.count())
        for batch in itertools.islice(batches, steps):
            training.step(in_precision(batch, module), 0.0)
    return counter.peak
