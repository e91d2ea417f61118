"""The interface of a predictive distribution, one independent term a row."""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from typing import Any, Literal

import torch
from torch import Tensor

FisherKind = Literal["sampled", "propagated"]


class Prediction(ABC):
    """What a model predicts for every term."""

    @abstractmethod
    def kl(self, other: Any) -> Tensor:
        """KL(self ‖ other) of every term, nats, `[terms]`."""

    @abstractmethod
    def nll(self, target: Tensor) -> Tensor:
        """-log p(target) of every term, less its smallest value; nats, `[terms]`.

        So it is the divergence of the prediction from the data, KL(data ‖ p), and 0 where the
        prediction can get no better; twice it is the deviance. A density of variable width has no
        smallest value; see `divergence`.
        """

    def divergence(self, target: Tensor) -> Tensor:
        """How far the prediction is from the data, never negative; nats, `[terms]`.

        The `nll`, except where that has no smallest value.
        """
        return self.nll(target)

    def dispersion(
        self, target: Tensor, weight: Tensor, noise_variance: float | Literal["auto"]
    ) -> Tensor:
        """The variance of y in units of the unit-dispersion family; a scalar, 1 if there is none.

        Args:
            target: what was observed.
            weight: of each term, `[terms]`.
            noise_variance: the variance where the family has one, `"auto"` to estimate it.
        """
        return torch.ones((), dtype=weight.dtype, device=weight.device)


class Likelihood(Prediction):
    """p(y | η) of every term, in natural parameters η.

    For an exponential family in its natural parameters the Fisher information of a term,
    H = E_y[s sᵀ] with s = -∇_η log p(y | η), equals the Hessian of -log p(y | η) for every y, so
    the Fisher matrix of a model is its generalized Gauss-Newton matrix (Martens 2014,
    arXiv:1412.1193, §9).

    Args:
        natural: η, `[terms, ...]`, float32 or wider.
    """

    def __init__(self, natural: Tensor) -> None:
        self.natural = natural

    @abstractmethod
    def sampled_score(self, generator: torch.Generator) -> Tensor:
        """Draw y from the model's own prediction: s = -∇_η log p(y | η), the shape of η."""

    @abstractmethod
    def propagate(self, signs: Tensor) -> Tensor:
        """H^½ ε of every term, for a symmetric or other root H^½, the shape of η.

        Args:
            signs: ε, the shape of η.
        """

    def propagated_score(self, generator: torch.Generator) -> Tensor:
        """Draw s = H^½ ε with independent signs ε = ±1, the shape of η.

        Mean and covariance are those of a sampled score, 0 and H, but no rare label decides its
        size: where a prediction is nearly certain, a sampled label almost never shows the little
        Fisher information that is left (curvature propagation: Martens, Sutskever & Swersky 2012,
        arXiv:1206.6464).
        """
        return self.propagate(random_signs(self.natural, generator))

    def root(self) -> Tensor:
        """H^½ of every term as a matrix, `[terms, outputs, columns]`."""
        one = torch.zeros_like(self.natural)
        if one.dim() == 1:
            return self.propagate(one + 1)[:, None, None]
        columns = []
        for c in range(one.shape[1]):
            one.zero_()[:, c] = 1
            columns.append(self.propagate(one))
        return torch.stack(columns, -1)

    def residual(self, target: Tensor) -> Tensor:
        """-d log p(target)/dη of every term, the shape of η."""
        eta = self.natural.detach().requires_grad_()
        with torch.enable_grad():
            total = self._at(eta).nll(target).sum()
        (gradient,) = torch.autograd.grad(total, eta)
        return gradient

    def _at(self, natural: Tensor) -> Likelihood:
        """The same family elsewhere."""
        other = copy.copy(self)
        other.natural = natural
        return other


def random_signs(like: Tensor, generator: torch.Generator) -> Tensor:
    """Independent +1 or -1 with probability one half each, in the shape of `like`."""
    bits = torch.randint(2, like.shape, generator=generator, device=like.device)
    return bits.to(like.dtype).mul_(2).sub_(1)
