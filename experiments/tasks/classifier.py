"""A network that learns to classify, as a LightningModule."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import lightning as L
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from torchmetrics.classification import MulticlassAccuracy

from experiments.tasks.images import Batch

MakeOptimizer = Callable[[Iterable[nn.Parameter]], Optimizer]
MakeScheduler = Callable[[Optimizer, int], LRScheduler]


class Classifier(L.LightningModule):
    """Trains a network with cross entropy.

    Logs `train/loss` (nats, of a batch), `val/loss`, `val/accuracy`, `test/loss` and
    `test/accuracy` (share of images, in [0, 1]).

    Args:
        network: images [batch, channels, height, width] -> logits [batch, classes].
        classes: how many there are.
        optimizer: makes an optimizer from the network's parameters.
        scheduler: makes a scheduler from that optimizer and the steps of the whole run; it is
            advanced after every step. None for none.
    """

    def __init__(
        self,
        network: nn.Module,
        classes: int,
        optimizer: MakeOptimizer,
        scheduler: MakeScheduler | None = None,
    ) -> None:
        super().__init__()
        self.network = network
        self._make_optimizer = optimizer
        self._make_scheduler = scheduler
        # One each: validation runs in the middle of training and must not mix with it.
        self.accuracy = nn.ModuleDict(
            {
                stage: MulticlassAccuracy(classes, average="micro", validate_args=False)
                for stage in ("val", "test")
            }
        )

    def forward(self, images: Tensor) -> Tensor:
        """Logits [batch, classes]."""
        return self.network(images)  # type: ignore[no-any-return]

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Mean cross entropy of a batch, nats."""
        images, labels = batch
        loss = F.cross_entropy(self(images), labels)
        self.log("train/loss", loss, prog_bar=True)
        return loss

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """Loss and accuracy on images held out of training."""
        self._evaluate("val", batch)

    def test_step(self, batch: Batch, batch_idx: int) -> None:
        """Loss and accuracy on images held out of everything."""
        self._evaluate("test", batch)

    def _evaluate(self, stage: str, batch: Batch) -> None:
        images, labels = batch
        logits = self(images)
        self.accuracy[stage](logits, labels)
        self.log(f"{stage}/loss", F.cross_entropy(logits, labels), batch_size=len(labels))
        self.log(f"{stage}/accuracy", self.accuracy[stage], prog_bar=stage == "val")

    def configure_optimizers(self) -> Any:
        """One optimizer, and a scheduler that is advanced after every step."""
        optimizer = self._make_optimizer(self.network.parameters())
        if self._make_scheduler is None:
            return optimizer
        steps = int(self.trainer.estimated_stepping_batches)
        scheduler = self._make_scheduler(optimizer, steps)
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": scheduler, "interval": "step"},
        }
