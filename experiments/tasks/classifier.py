"""A network that learns to classify."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F

from experiments.tasks.splits import Batch
from experiments.tasks.task import Task


class Classifier(Task):
    """Minimises cross entropy; measures `loss` (nats) and `accuracy` (share in [0, 1]).

    The network takes images [batch, channels, height, width] and returns logits [batch, classes].
    """

    def loss(self, batch: Batch) -> Tensor:
        """Mean cross entropy, nats."""
        images, labels = batch
        return F.cross_entropy(self(images), labels)

    def measure(self, batch: Batch) -> dict[str, Tensor]:
        """Loss and accuracy."""
        images, labels = batch
        logits = self(images)
        hits = (logits.argmax(1) == labels).float()
        return {"loss": F.cross_entropy(logits, labels), "accuracy": hits.mean()}
