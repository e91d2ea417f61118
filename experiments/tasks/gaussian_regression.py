"""A number predicted together with how uncertain it is."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F

from experiments.tasks.splits import Batch
from experiments.tasks.task import Task


class GaussianRegression(Task):
    """Minimises the negative log-likelihood of a Gaussian whose variance is predicted too.

    Measures `loss` (nats) and `rmse`, the root of the mean squared error of the mean; what is
    measured has to come in one batch, for a root is no mean over batches. The network returns
    [batch, 2]: the mean, and what softplus makes the variance of (Lakshminarayanan et al. 2017,
    arXiv:1612.01474).
    """

    def gaussian(self, inputs: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and variance [batch] each; the variance is at least 1e-6."""
        mean, raw = self(inputs).unbind(1)
        return mean, F.softplus(raw) + 1e-6

    def loss(self, batch: Batch) -> Tensor:
        """Mean negative log-likelihood, nats."""
        inputs, targets = batch
        mean, variance = self.gaussian(inputs)
        return F.gaussian_nll_loss(mean, targets, variance, full=True)

    def measure(self, batch: Batch) -> dict[str, Tensor]:
        """Nats, and the error of the mean."""
        inputs, targets = batch
        mean, _ = self.gaussian(inputs)
        return {"loss": self.loss(batch), "rmse": F.mse_loss(mean, targets).sqrt()}
