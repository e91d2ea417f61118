"""The Bernoulli distribution: binary cross-entropy losses."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ngplugin.curvature.likelihoods.likelihood import Likelihood, random_signs


class Bernoulli(Likelihood):
    """p(y = 1 | η) = sigmoid(η), with η the logits `[terms]`."""

    def sampled_score(self, generator: torch.Generator) -> Tensor:
        """sigmoid(η) - y, y ~ Bernoulli(sigmoid(η))."""
        p = self.natural.sigmoid()
        return p - torch.bernoulli(p, generator=generator)

    def propagated_score(self, generator: torch.Generator) -> Tensor:
        """ε √(p (1 - p))."""
        # sigmoid(-η) is 1 - p without the cancellation.
        root = (self.natural.sigmoid() * (-self.natural).sigmoid()).sqrt()
        return root * random_signs(root, generator)

    def kl(self, other: Likelihood) -> Tensor:
        """p (log p - log q) + (1 - p) (log(1 - p) - log(1 - q))."""
        a, b = self.natural, other.natural
        zero = a.sigmoid() * (F.logsigmoid(a) - F.logsigmoid(b))
        return zero + (-a).sigmoid() * (F.logsigmoid(-a) - F.logsigmoid(-b))

    def nll(self, target: Tensor) -> Tensor:
        """y (log y - log p) + (1 - y) (log(1 - y) - log(1 - p)), with y in [0, 1], `[terms]`."""
        other = 1 - target
        one = torch.xlogy(target, target) - target * F.logsigmoid(self.natural)
        return one + torch.xlogy(other, other) - other * F.logsigmoid(-self.natural)
