"""A deep autoencoder: images squeezed through a narrow layer and drawn again."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn
from torch.nn import functional as F

from experiments.tasks.networks import dense
from experiments.tasks.splits import Batch
from experiments.tasks.task import Task


def autoencoder(
    shape: tuple[int, int, int], hidden: Sequence[int] = (1000, 500, 250), code: int = 30
) -> nn.Sequential:
    """Images [batch, channels, height, width] -> logits [batch, pixels], by way of a code.

    tanh between layers, none on the code; Xavier-normal weights and zero biases. The classic
    problem of Hinton & Salakhutdinov 2006, on which Martens 2010 and Martens & Grosse 2015
    (arXiv:1503.05671) measured.

    Args:
        shape: channels, height and width of an image.
        hidden: units of each layer before the code; after it they come in reverse.
        code: units of the narrowest layer.

    Raises:
        ValueError: a layer without units.
    """
    pixels = shape[0] * shape[1] * shape[2]
    encoder = dense(pixels, code, hidden, "tanh")
    decoder = dense(code, pixels, hidden[::-1], "tanh")
    network = nn.Sequential(nn.Flatten(), *encoder, *decoder)
    for layer in network:
        if isinstance(layer, nn.Linear):
            nn.init.xavier_normal_(layer.weight)
            nn.init.zeros_(layer.bias)
    return network


class Autoencoder(Task):
    """Minimises the Bernoulli cross entropy of pixels in [0, 1], summed over an image.

    Measures `loss` (nats per image) and `squared_error` (summed over an image).
    """

    def loss(self, batch: Batch) -> Tensor:
        """Cross entropy, nats per image."""
        images = batch[0]
        total = F.binary_cross_entropy_with_logits(self(images), images.flatten(1), reduction="sum")
        return total / len(images)

    def measure(self, batch: Batch) -> dict[str, Tensor]:
        """Loss and squared error."""
        images = batch[0]
        drawn = self(images).sigmoid()  # [batch, pixels]
        squared = (drawn - images.flatten(1)).square().sum(1)
        return {"loss": self.loss(batch), "squared_error": squared.mean()}
