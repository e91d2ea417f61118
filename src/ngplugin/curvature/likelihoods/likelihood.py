"""The interface of a predictive distribution, one independent term a row."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import Any, Literal

import torch
from torch import Tensor

#: How the scores of a term are chosen, whose mean square is its H:
#: "sampled": s = -∇ log p(y) at labels y drawn from the model's own prediction;
#: "propagated": R ε with H = R Rᵀ and random signs ε, in one go;
#: "exact": every column of R in turn;
#: "empirical": s at the data's own labels, with a random sign: the *empirical* Fisher matrix, which
#: is not the Fisher matrix (Kunstner, Balles & Hennig 2019, arXiv:1905.12558);
#: "ggn": R ε with H the Hessian of the loss itself, as for losses that are not recognised.
FisherKind = Literal["sampled", "propagated", "exact", "empirical", "ggn"]

_MOST_PASSES = 1024  # of an exact Fisher matrix, for each loss


def check_passes(count: int, name: str) -> None:
    """Refuse an exact Fisher matrix of absurd cost.

    Args:
        count: backward passes that it takes.
        name: of the loss.

    Raises:
        ValueError: more than 1,024.
    """
    if count > _MOST_PASSES:
        raise ValueError(
            f"fisher='exact' takes {count:,} backward passes for one {name}, a column of the "
            f"output's Fisher information each; at most {_MOST_PASSES:,} are made. Usual cause: a "
            "large vocabulary, or a wide output. Try fisher='propagated', whose scores have the "
            "same mean square, with draws=16 if it is too noisy."
        )


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

    def divergence(self, target: Tensor, nll: Tensor | None = None) -> Tensor:
        """How far the prediction is from the data, never negative; nats, `[terms]`.

        The `nll`, except where that has no smallest value.

        Args:
            target: what was observed.
            nll: of it, where it is known already.
        """
        return self.nll(target) if nll is None else nll

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
    def root(self, vector: Tensor) -> Tensor:
        """R v of every term, with H = R Rᵀ square; v and the result have the shape of η."""

    def propagated_score(self, generator: torch.Generator) -> Tensor:
        """Draw s = R ε with independent signs ε = ±1, the shape of η.

        Mean and covariance are those of a sampled score, 0 and H, but no rare label decides its
        size: where a prediction is nearly certain, a sampled label almost never shows the little
        Fisher information that is left (curvature propagation: Martens, Sutskever & Swersky 2012,
        arXiv:1206.6464).
        """
        return self.root(random_signs(self.natural, generator))

    def exact_scores(self, apart: int, generator: torch.Generator) -> Iterator[Tensor]:
        """The columns of R one by one, each times √passes, so that their mean square is H.

        Args:
            apart: how many neighbouring terms take turns. All others share a pass with
                independent signs, so that the square of a sum over them is right on average.
            generator: of the signs.
        """
        columns = self.natural.shape[1:].numel()
        like = self.natural.reshape(len(self.natural), columns)
        for vector in turns(like, apart, generator):
            yield self.root(vector.view_as(self.natural))

    def empirical_score(self, target: Tensor, generator: torch.Generator) -> Tensor:
        """±∇_η -log p(target | η), the shape of η, with an independent sign for each term.

        The data's own scores do not average to zero; with their signs the square of a sum is right.
        """
        score = self.residual(target)
        sign = random_signs(score.new_empty(len(score)), generator)
        return score * sign.reshape(-1, *[1] * (score.dim() - 1))

    def _at(self, natural: Tensor) -> Likelihood:
        """The same family at other natural parameters."""
        return type(self)(natural)

    @abstractmethod
    def information(self, vector: Tensor) -> Tensor:
        """H v of every term, exactly; both of the shape of η."""

    def root_matrix(self) -> Tensor:
        """R of every term as a matrix, `[terms, outputs, columns]`."""
        one = torch.zeros_like(self.natural)
        if one.dim() == 1:
            return self.root(one + 1)[:, None, None]
        columns = []
        for c in range(one.shape[1]):
            one.zero_()[:, c] = 1
            columns.append(self.root(one))
        return torch.stack(columns, -1)

    def residual(self, target: Tensor) -> Tensor:
        """-d log p(target)/dη of every term, the shape of η."""
        eta = self.natural.detach().requires_grad_()
        with torch.enable_grad():
            total = self._at(eta).nll(target).sum()
        (gradient,) = torch.autograd.grad(total, eta)
        return gradient


def random_signs(like: Tensor, generator: torch.Generator) -> Tensor:
    """Independent +1 or -1 with probability one half each, in the shape of `like`."""
    bits = torch.randint(2, like.shape, generator=generator, device=like.device)
    return bits.to(like.dtype).mul_(2).sub_(1)


def turns(like: Tensor, apart: int, generator: torch.Generator) -> Iterator[Tensor]:
    """Vectors v whose R v are the columns of every term's R, each times √passes and a random sign.

    Args:
        like: `[terms, columns]`, as the vectors are to be.
        apart: how many neighbouring terms take turns; the others have zeros meanwhile.
        generator: of the signs.
    """
    terms, columns = like.shape
    place = torch.arange(terms, device=like.device) % apart
    for i in range(apart):
        own = (place == i).to(like.dtype) * (apart * columns) ** 0.5  # [terms]
        for j in range(columns):
            vector = torch.zeros_like(like)
            vector[:, j] = own * random_signs(own, generator)
            yield vector
