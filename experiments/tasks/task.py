"""What every task is: a LightningModule that says what it minimises and what it measures."""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from typing import Any

import lightning as L
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

MakeOptimizer = Callable[[Iterable[nn.Parameter]], Optimizer]
MakeScheduler = Callable[[Optimizer, float], LRScheduler]


class Task(L.LightningModule, ABC):
    """Trains a network on `loss` and logs `measure` on what was held out.

    Logs `train/loss` of a batch in every step, beside `train/seconds` since training began, and
    `val/NAME` and `test/NAME` for every name that `measure` returns, averaged over batches by their
    size.

    Args:
        network: what it takes and returns is each subclass's to say.
        optimizer: makes an optimizer from the parameters.
        scheduler: makes a scheduler from that optimizer and the steps of the whole run; it is
            advanced after every step. None for none.
    """

    def __init__(
        self,
        network: nn.Module,
        optimizer: MakeOptimizer,
        scheduler: MakeScheduler | None = None,
    ) -> None:
        super().__init__()
        self.network = network
        self._make_optimizer = optimizer
        self._make_scheduler = scheduler

    def forward(self, inputs: Any) -> Tensor:
        """What the network makes of its inputs."""
        return self.network(inputs)  # type: ignore[no-any-return]

    @abstractmethod
    def loss(self, batch: Any) -> Tensor:
        """What training minimises, of a training batch."""

    @abstractmethod
    def measure(self, batch: Any) -> dict[str, Tensor]:
        """Numbers to judge by, of a batch that was held out, by their names."""

    def size(self, batch: Any) -> int:
        """How much a batch counts in the average over batches: its number of examples."""
        return len(batch[0])

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """The loss of a batch."""
        loss = self.loss(batch)
        self.log("train/loss", loss, prog_bar=True, batch_size=self.size(batch))
        self.log("train/seconds", time.perf_counter() - self._started)
        return loss

    def on_train_start(self) -> None:
        """Start the clock."""
        self._started = time.perf_counter()

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        """What is measured on examples held out of training."""
        self._log_measured("val", batch)

    def test_step(self, batch: Any, batch_idx: int) -> None:
        """What is measured on examples held out of everything."""
        self._log_measured("test", batch)

    def _log_measured(self, stage: str, batch: Any) -> None:
        for name, value in self.measure(batch).items():
            shown = stage == "val" and name != "loss"
            self.log(f"{stage}/{name}", value, prog_bar=shown, batch_size=self.size(batch))

    def configure_optimizers(self) -> Any:
        """One optimizer, and a scheduler that is advanced after every step."""
        optimizer = self._make_optimizer(self.parameters())
        if self._make_scheduler is None:
            return optimizer
        steps = self.trainer.estimated_stepping_batches  # inf without a limit
        scheduler = self._make_scheduler(optimizer, steps)
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": scheduler, "interval": "step"},
        }
