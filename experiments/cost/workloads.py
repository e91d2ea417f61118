"""The workloads whose memory is counted, and their shapes on paper."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain, count
from typing import Any

from experiments.scaling.models import Map, Model, Norm, perceptron, transformer
from experiments.tasks.task import Task
from experiments.workload import in_precision, make


@dataclass(frozen=True)
class Workload:
    """What is trained.

    Attributes:
        name: as the tables have it.
        overrides: of `conf/train.yaml`.
        rows: of an exact block, which all parameters are then in; 0 for Kronecker blocks.
    """

    name: str
    overrides: tuple[str, ...]
    rows: int = 0

    def made(self) -> tuple[Task, Iterator[Any]]:
        """The module, and its training batches without an end, in its precision."""
        data, module = make(self.overrides, 0)
        batches = chain.from_iterable(data.train_dataloader() for _ in count())
        return module, (in_precision(batch, module) for batch in batches)

    def shapes(self, module: Task) -> Model:
        """On paper; for what depends on the data, the module is asked."""
        if self.name == "char_transformer":
            symbols = module.network.out.out_features  # type: ignore[union-attr]
            return transformer("", 2, 128, 64, int(symbols), examples=32, tied=False)  # type: ignore[arg-type]
        return _SHAPES[self.name]


_SHAPES = {
    "digits_mlp": perceptron("", (64, 256, 256, 10), 128),
    "mnist5k_cnn": Model(
        "",
        (
            Map("linear", 9, 16, 28 * 28),
            Map("linear", 9 * 16, 32, 14 * 14),
            Map("linear", 9 * 32, 64, 7 * 7),
            Map("linear", 64 * 9, 10, bias=True),
        ),
        (Norm(16, True), Norm(32, True), Norm(64, True)),
        logits=10,
        examples=128,
    ),
    "autoencoder": perceptron("", (784, 1000, 500, 250, 30, 250, 500, 1000, 784), 500),
    "implicit_image": perceptron("", (256, 128, 128, 128, 3), 4096),
    "poisson_pinn": perceptron("", (2, 64, 64, 1), 1020),
}

WORKLOADS = (
    Workload("digits_mlp", ("experiment=digits_mlp", "model.hidden=[256,256]")),
    Workload("mnist5k_cnn", ("data=mnist5k", "model=cnn")),
    Workload("autoencoder", ("experiment=autoencoder",)),
    Workload("char_transformer", ("experiment=char_transformer",)),
    Workload("implicit_image", ("experiment=implicit_image",)),
    Workload("poisson_pinn", ("experiment=poisson_pinn",), rows=1020),
)
