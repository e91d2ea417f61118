"""The categorical distribution: cross-entropy and nll losses."""

from __future__ import annotations

import torch
from torch import Tensor

from ngplugin.curvature.likelihoods.likelihood import Likelihood, random_signs


class Categorical(Likelihood):
    """p(y = c | η) = softmax(η)_c, with η the logits `[terms, classes]`.

    Log-probabilities are logits too: softmax leaves them as they are.
    """

    def sampled_score(self, generator: torch.Generator) -> Tensor:
        """softmax(η) - onehot(y), y ~ softmax(η)."""
        p = self.natural.softmax(-1)
        y = torch.multinomial(p, 1, generator=generator)  # [terms, 1]
        return p.scatter_add(-1, y, p.new_full((1, 1), -1.0).expand_as(y))

    def propagated_score(self, generator: torch.Generator) -> Tensor:
        """√p∘ε - p (√pᵀε), whose covariance is diag(p) - ppᵀ."""
        p = self.natural.softmax(-1)
        root = p.sqrt()
        signed = root * random_signs(root, generator)
        return signed - p * signed.sum(-1, keepdim=True)

    def kl(self, other: Likelihood) -> Tensor:
        """Σ_c p_c (log p_c - log q_c)."""
        log_p = self.natural.log_softmax(-1)
        log_q = other.natural.log_softmax(-1)
        p = log_p.exp()
        # A class of probability 0 (a masked logit of -inf) contributes nothing, not nan.
        return torch.where(p > 0, p * (log_p - log_q), 0.0).sum(-1)

    def nll(self, target: Tensor) -> Tensor:
        """KL from class indices `[terms]` or class probabilities `[terms, classes]`."""
        log_p = self.natural.log_softmax(-1)
        if target.is_floating_point():
            return torch.where(target > 0, target * (target.log() - log_p), 0.0).sum(-1)
        return -log_p.gather(-1, target.unsqueeze(-1)).squeeze(-1)
