"""Shaped like Bayesian networks: weights drawn anew in each call, several calls a step."""

from __future__ import annotations

import lightning as L
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.distributions import Categorical, MixtureSameFamily, Normal
from torch.utils.data import DataLoader, TensorDataset

from tests.look_alikes.look_alike import look_alike, point

F = nn.functional


class Drawn(nn.Module):
    """A weight of which mean and softplus⁻¹ of the deviation are learnt (Blundell et al. 2015)."""

    def __init__(self, *shape: int) -> None:
        super().__init__()
        self.mean = nn.Parameter(0.1 * torch.randn(shape))
        self.rho = nn.Parameter(-7 + 0.1 * torch.randn(shape))

    def forward(self) -> tuple[Tensor, Tensor]:
        """A draw, and the log of posterior over prior there."""
        deviation = torch.log1p(self.rho.exp())
        noise = torch.randn_like(self.mean)
        drawn = self.mean + deviation * noise
        log_posterior = -(deviation.log() + 0.5 * noise.square() + 0.92).sum()
        scales = Normal(torch.zeros(2), torch.tensor([0.1, 0.4]))
        prior = MixtureSameFamily(Categorical(torch.tensor([1.0, 0.0])), scales)
        return drawn, log_posterior - prior.log_prob(drawn).sum()


class BayesianLinear(nn.Module):
    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.weight, self.bias = Drawn(outputs, inputs), Drawn(outputs)
        self.divergence = torch.zeros(())

    def forward(self, x: Tensor) -> Tensor:
        (weight, of_weight), (bias, of_bias) = self.weight(), self.bias()
        self.divergence = of_weight + of_bias
        return F.linear(x, weight, bias)


class Bayesian(L.LightningModule):
    """The evidence lower bound over three draws."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(BayesianLinear(64, 32), nn.ReLU(), BayesianLinear(32, 10))

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        x, y = batch
        loss = torch.zeros(())
        for _ in range(3):
            loss = loss + F.cross_entropy(self.layers(x), y) / 3
            divergences = [m.divergence for m in self.modules() if isinstance(m, BayesianLinear)]
            loss = loss + 1e-4 * torch.stack(divergences).mean() / 3
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), lr=1e-3)


@point(4, "the evidence lower bound of a Bayesian network, three draws of its weights a step")
def test_a_bayesian_network_trains_and_its_deviations_stay_numbers() -> None:
    # The smaller a deviation is, the less curvature it has, and the longer its natural step: where
    # nothing but F says how long, softplus underflows, and the loss is inf for ever.
    x, y = load_digits(return_X_y=True)
    data = TensorDataset(torch.tensor(x[:640] / 16).float(), torch.tensor(y[:640]))
    run = look_alike(Bayesian, DataLoader(data, batch_size=64), 0.6, max_epochs=5)
    assert all(bool((m.rho > -60).all()) for m in run.module.modules() if isinstance(m, Drawn))
