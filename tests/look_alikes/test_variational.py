"""Shaped like variational autoencoders: a sampled latent, a likelihood, an annealed divergence."""

from __future__ import annotations

import lightning as L
import pytest
import torch
from torch import Tensor, nn
from torch.distributions import Bernoulli, Independent, NegativeBinomial, Normal, kl_divergence
from torch.utils.data import DataLoader, TensorDataset

from tests.look_alikes.look_alike import look_alike, point
from tests.oracle import generator

COUNTS = torch.poisson(
    torch.exp(
        torch.randn(96, 2, generator=generator(1)) @ torch.randn(2, 12, generator=generator(2))
    ).clamp(max=30.0),
    generator=generator(3),
)


class Variational(L.LightningModule):
    """Counts, or whether there are any, through two latent numbers."""

    def __init__(self, likelihood: str) -> None:
        super().__init__()
        self.likelihood = likelihood
        self.encoder = nn.Sequential(nn.Linear(12, 24), nn.BatchNorm1d(24), nn.ReLU())
        self.mean, self.log_variance = nn.Linear(24, 2), nn.Linear(24, 2)
        self.decoder = nn.Sequential(nn.Linear(2, 24), nn.ReLU(), nn.Dropout(0.1))
        self.leave = nn.Linear(24, 12)
        self.px_r = nn.Parameter(torch.zeros(12))  # of each count, its own dispersion
        self.draws: list[float] = []
        self.training_step_outputs: list[Tensor] = []

    def divergences(self, x: Tensor) -> tuple[Tensor, Tensor]:
        hidden = self.encoder(torch.log1p(x))
        posterior = Normal(self.mean(hidden), (0.5 * self.log_variance(hidden)).exp())
        z = posterior.rsample()
        self.draws.append(float(z.detach().sum()))
        kl = kl_divergence(posterior, Normal(torch.zeros_like(z), torch.ones_like(z))).sum(1)
        return -self.predict(z).log_prob(self.target(x)), kl

    def target(self, x: Tensor) -> Tensor:
        return (x > 0).float() if self.likelihood == "bernoulli" else x

    def predict(self, z: Tensor) -> Independent:
        logits = self.leave(self.decoder(z))
        if self.likelihood == "bernoulli":
            return Independent(Bernoulli(logits=logits + self.px_r), 1)
        rate = nn.functional.softplus(logits) + 1e-4
        size = self.px_r.exp()
        return Independent(NegativeBinomial(size, logits=(rate / size).log()), 1)

    def training_step(self, batch: list[Tensor], batch_idx: int) -> dict[str, Tensor]:
        reconstruction, kl = self.divergences(batch[0])
        annealed = min(1.0, (self.current_epoch + 1) / 5)
        loss = (reconstruction + annealed * kl).mean()
        self.log("elbo", -loss, on_step=False, on_epoch=True)
        self.training_step_outputs.append(loss.detach())
        return {"loss": loss, "kl": kl.detach()}

    def on_train_epoch_end(self) -> None:
        self.log("mean_loss", torch.stack(self.training_step_outputs).mean())
        self.training_step_outputs.clear()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), lr=1e-3, eps=0.01, weight_decay=1e-6)


@point(6, "a step that draws random numbers and fills a list")
@pytest.mark.parametrize(
    ("likelihood", "fall"),
    [
        pytest.param("bernoulli", 0.96, marks=point(4, "log_prob of Bernoulli and an annealed KL")),
        pytest.param("counts", 0.8, marks=point(4, "NegativeBinomial.log_prob and an annealed KL")),
    ],
)
def test_a_variational_autoencoder_trains_and_draws_once_a_batch(
    likelihood: str, fall: float
) -> None:
    data = DataLoader(TensorDataset(COUNTS), batch_size=32)
    run = look_alike(lambda: Variational(likelihood), data, fall, max_epochs=8)
    assert len(run.module.draws) == len(set(run.module.draws)) == 24
    assert not run.module.training_step_outputs
