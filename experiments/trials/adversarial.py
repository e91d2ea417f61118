"""Two networks against each other, each with an optimizer of its own, stepped by hand."""

from __future__ import annotations

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits
from torch.utils.data import DataLoader, TensorDataset

from experiments.trials.trial import QUIET

PIXELS, LATENT, HIDDEN = 64, 16, 128


def energy_distance(x: Tensor, y: Tensor) -> Tensor:
    """2 E‖x - y‖ - E‖x - x'‖ - E‖y - y'‖, without bias; zero where both have one distribution.

    Args:
        x: `[n, features]`.
        y: `[m, features]`.
    """
    within = [torch.pdist(z).mean() for z in (x, y)]
    return 2 * torch.cdist(x, y).mean() - within[0] - within[1]


class AdversarialDigits(L.LightningModule):
    """Draws digits (Goodfellow et al. 2014, with the generator's loss that does not saturate).

    What it returns as its loss is neither objective, since those say nothing of the drawings, but
    how far they are from the batch.
    """

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.generator = nn.Sequential(
            nn.Linear(LATENT, HIDDEN),
            nn.BatchNorm1d(HIDDEN),
            nn.LeakyReLU(0.2),
            nn.Linear(HIDDEN, HIDDEN),
            nn.BatchNorm1d(HIDDEN),
            nn.LeakyReLU(0.2),
            nn.Linear(HIDDEN, PIXELS),
            nn.Tanh(),
        )
        self.discriminator = nn.Sequential(
            nn.Linear(PIXELS, HIDDEN),
            nn.LeakyReLU(0.2),
            nn.Linear(HIDDEN, HIDDEN),
            nn.LeakyReLU(0.2),
            nn.Linear(HIDDEN, 1),
        )

    def configure_optimizers(self) -> list[torch.optim.Optimizer]:
        """Adam with the rate and the betas that are usual for this."""
        parts = (self.generator, self.discriminator)
        return [torch.optim.Adam(p.parameters(), lr=2e-4, betas=(0.5, 0.999)) for p in parts]

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        """First the generator, then the discriminator."""
        (real,) = batch  # [batch, pixels]
        for_generator, for_discriminator = self.optimizers()  # type: ignore[misc]
        z = torch.randn(len(real), LATENT, device=self.device)

        self.toggle_optimizer(for_generator)
        drawn = self.generator(z)
        loss = self._told_to_be(True, drawn)
        for_generator.zero_grad()
        self.manual_backward(loss)
        for_generator.step()
        self.untoggle_optimizer(for_generator)

        self.toggle_optimizer(for_discriminator)
        fake = self.generator(z).detach()
        loss = 0.5 * (self._told_to_be(True, real) + self._told_to_be(False, fake))
        for_discriminator.zero_grad()
        self.manual_backward(loss)
        for_discriminator.step()
        self.untoggle_optimizer(for_discriminator)
        return energy_distance(drawn.detach(), real)

    def _told_to_be(self, real: bool, images: Tensor) -> Tensor:
        logits = self.discriminator(images)  # [batch, 1]
        return binary_cross_entropy_with_logits(logits, torch.full_like(logits, real))


def gan(callbacks: list[Callback]) -> None:
    """Two optimizers, manual optimization, toggled parameters."""
    images = torch.tensor(load_digits().data / 8 - 1, dtype=torch.float32)
    loader = DataLoader(TensorDataset(images), batch_size=64, shuffle=True, drop_last=True)
    L.Trainer(max_epochs=20, callbacks=callbacks, **QUIET).fit(AdversarialDigits(), loader)
