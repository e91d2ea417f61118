"""Square roots of the Fisher information of a distribution in its own tensors.

A root is R of each term with E_y[s sᵀ] = R Rᵀ and s = -∇ log p(y), the gradient in the tensors that
the distribution holds. Made of the first that applies:

1. A matrix for each term, of few elements. E[s sᵀ] is the Hessian of KL(p ‖ q) in the tensors of q
   at q = p, taken of the KL that torch knows (Kullback 1959, Information Theory and Statistics,
   §2.6); otherwise the mean over draws.
2. Few outcomes, fewer than elements or without a KL: a column √p(y) s(y) for each of them.
3. Many tensor elements a term, or elements that several terms share: the draws are the columns.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.distributions import Categorical, Distribution, OneHotCategorical, kl_divergence

_DRAWS = 32  # a relative error of √(kurtosis/32) in one term's information
_MOST_OUTCOMES = 64  # whose log p are computed one by one
_LARGEST = 16  # matrix of a term

#: Puts tensors in place of a distribution's own.
Rebuild = Callable[[Sequence[Tensor]], Distribution]


class Root(ABC):
    """R of each term.

    Attributes:
        columns: of R.
        apart: whether neighbouring terms can be told apart by giving the others zeros.
    """

    columns: int
    apart = True

    @abstractmethod
    def __call__(self, vector: Tensor) -> list[Tensor]:
        """R v, summed over terms where they share an element; in the shapes of the tensors.

        Args:
            vector: v, `[terms, columns]`.
        """


class OutcomeRoot(Root):
    """A column for each label that there is.

    Args:
        tensors: the distribution's own, `[...]` each.
        nll: of every outcome at those tensors, `[outcomes, *batch]`; differentiable.
    """

    def __init__(
        self, tensors: Sequence[Tensor], nll: Callable[[Sequence[Tensor]], Tensor]
    ) -> None:
        self._tensors = tensors
        self._nll = nll
        self._p = (-nll(tensors)).exp().flatten(1).mT  # [terms, outcomes]
        self.columns = self._p.shape[1]

    def __call__(self, vector: Tensor) -> list[Tensor]:
        """Σ_y √p(y) s(y) v_y."""
        factors = self._p.sqrt() * vector
        return gradient(self._tensors, lambda t: self._nll(t).flatten(1).mT, factors)


class MatrixRoot(Root):
    """R from E[s sᵀ].

    Args:
        tensors: the distribution's own, `[*batch, ...]` each.
        information: E[s sᵀ], `[terms, elements, elements]`, the elements those of all tensors.
    """

    def __init__(self, tensors: Sequence[Tensor], information: Tensor) -> None:
        self._tensors = tensors
        self._root = semidefinite_cholesky(information)
        self.columns = information.shape[-1]

    def __call__(self, vector: Tensor) -> list[Tensor]:
        """The matrix-vector products."""
        product = (self._root @ vector.unsqueeze(-1)).squeeze(-1)
        sizes = [t.numel() // len(vector) for t in self._tensors]
        parts = product.split(sizes, 1)
        return [part.reshape(t.shape) for part, t in zip(parts, self._tensors, strict=True)]


class DrawnRoot(Root):
    """Scores of drawn labels for columns, which have E[s sᵀ] on average.

    Args:
        tensors: the distribution's own.
        nll: of the drawn labels at those tensors, `[draws, *batch]`; differentiable.
        draws: how many.
    """

    apart = False

    def __init__(
        self,
        tensors: Sequence[Tensor],
        nll: Callable[[Sequence[Tensor]], Tensor],
        draws: int,
    ) -> None:
        self._tensors = tensors
        self._nll = nll
        self.columns = draws

    def __call__(self, vector: Tensor) -> list[Tensor]:
        """Σ_k s(y_k) v_k / √draws."""
        factors = vector / self.columns**0.5
        return gradient(self._tensors, lambda t: self._nll(t).flatten(1).mT, factors)


def root_of(
    tensors: Sequence[Tensor], shape: torch.Size, at: Rebuild, draw: Callable[[int], Tensor]
) -> Root:
    """The root of a distribution, each element of whose batch is a term.

    Args:
        tensors: the distribution's own, detached.
        shape: of the terms.
        at: the distribution with others in their place.
        draw: so many labels for each term, `[draws, *shape, *event]`; others at each call.
    """
    outcomes = _outcomes(at(tensors), shape)
    listed = None if outcomes is None else OutcomeRoot(tensors, lambda t: outcomes(at(t)))
    terms = shape.numel()
    prefixed = terms and all(t.shape[: len(shape)] == shape for t in tensors)
    elements = sum(t.numel() for t in tensors) // max(terms, 1)
    # The fewer columns, the less noise in their sum with random signs.
    if prefixed and elements <= min(_LARGEST, _LARGEST if listed is None else listed.columns):
        information = _information(tensors, terms, at, draw, sample=listed is None)
        if information is not None:
            return MatrixRoot(tensors, information)
    if listed is not None:
        return listed
    labels = draw(_DRAWS)
    return DrawnRoot(tensors, lambda t: -at(t).log_prob(labels), _DRAWS)


def _information(
    tensors: Sequence[Tensor],
    terms: int,
    at: Rebuild,
    draw: Callable[[int], Tensor],
    sample: bool,
) -> Tensor | None:
    """E[s sᵀ], `[terms, elements, elements]`, from the KL or else, if `sample`, from draws.

    None where terms share elements, so that a score is not its own rows' alone.
    """
    y = draw(1)
    scores = _scores(tensors, at, y, terms)  # [1, terms, elements]
    # Then weighing the terms would not weigh the rows.
    weights = 1 + torch.arange(terms, device=scores.device).to(scores) % 7 / 7
    weighed = gradient(tensors, lambda t: -at(t).log_prob(y).reshape(-1), weights)
    off = (_rows(weighed, terms) - weights[:, None] * scores[0]).abs().max()
    if not bool(off <= 1e-4 * scores.abs().max()):
        return None
    information = _hessian_of_kl(tensors, at, scores)
    if information is None and sample:
        scores = _scores(tensors, at, draw(_DRAWS), terms)
        information = torch.einsum("kti,ktj->tij", scores, scores) / len(scores)
    return information


def _scores(tensors: Sequence[Tensor], at: Rebuild, y: Tensor, terms: int) -> Tensor:
    """-∇ log p of every draw and term, `[draws, terms, elements]`."""
    leaves = [t.detach().requires_grad_() for t in tensors]
    with torch.enable_grad():
        nll = -at(leaves).log_prob(y)  # [draws, *shape]
        draws = nll.reshape(len(y), -1).sum(1).unbind()
    rows = []
    for values in draws:
        grads = torch.autograd.grad(values, leaves, retain_graph=True, allow_unused=True)
        rows.append(_rows(_zeros_for_none(grads, leaves), terms))
    return torch.stack(rows)


def gradient(
    tensors: Sequence[Tensor], values: Callable[[Sequence[Tensor]], Tensor], factors: Tensor
) -> list[Tensor]:
    """d/d(each tensor) of Σ factors · values(tensors)."""
    leaves = [t.detach().requires_grad_() for t in tensors]
    with torch.enable_grad():
        # A factor of zero leaves out even a value that is not finite.
        total = torch.where(factors != 0, factors * values(leaves), 0.0).sum()
    return _zeros_for_none(torch.autograd.grad(total, leaves, allow_unused=True), leaves)


def _zeros_for_none(grads: Sequence[Tensor | None], like: Sequence[Tensor]) -> list[Tensor]:
    return [torch.zeros_like(t) if g is None else g for g, t in zip(grads, like, strict=True)]


def _outcomes(
    distribution: Distribution, shape: torch.Size
) -> Callable[[Distribution], Tensor] | None:
    """What gives -log p of every label, `[outcomes, *shape]`; None if there are too many."""
    if isinstance(distribution, (Categorical, OneHotCategorical)):
        return lambda d: -d.logits.movedim(-1, 0)  # type: ignore[attr-defined]
    try:
        values = distribution.enumerate_support(expand=False)
    except NotImplementedError:  # so does one whose labels are not the same for all terms
        return None
    if len(values) > _MOST_OUTCOMES or distribution.log_prob(values).shape[1:] != shape:
        return None
    return lambda d: -d.log_prob(values)


def _hessian_of_kl(tensors: Sequence[Tensor], at: Rebuild, scores: Tensor) -> Tensor | None:
    """∇² KL(p ‖ q) at q = p, `[terms, elements, elements]`; None if that is not E[s sᵀ].

    It is not where the tensors depend on one another, or the support on them: then the KL has a
    slope at q = p. Nor where the KL is made of an absolute value, as that of Laplace distributions,
    which hides its second derivative: then that is zero though scores are not.
    """
    terms = scores.shape[1]
    p = at(tensors)
    leaves = [t.detach().requires_grad_() for t in tensors]
    with torch.enable_grad():
        try:
            kl = kl_divergence(p, at(leaves))
        except NotImplementedError:
            return None
        if kl.numel() != terms or not kl.requires_grad:
            return None
        slopes = torch.autograd.grad(
            kl.sum(), leaves, create_graph=True, allow_unused=True, materialize_grads=True
        )
        slope = _rows(slopes, terms)  # [terms, elements]
        columns = []
        for j in range(slope.shape[1]):
            if not slope.requires_grad:
                return None
            grads = torch.autograd.grad(
                slope[:, j].sum(),
                leaves,
                retain_graph=True,
                allow_unused=True,
                materialize_grads=True,
            )
            columns.append(_rows(grads, terms).detach())
    information = torch.stack(columns, -1)
    size = scores.square().mean((0, 1)).sqrt()  # [elements]
    flat = (slope.detach().abs() <= 1e-3 * size).all()
    curved = ((information.diagonal(dim1=1, dim2=2).sum(0) > 0) | (size == 0)).all()
    right = flat & curved & information.isfinite().all()
    return information if bool(right) else None


def _rows(parts: Sequence[Tensor], terms: int) -> Tensor:
    """`[terms, elements]`."""
    return torch.cat([part.reshape(terms, -1) for part in parts], 1)


def semidefinite_cholesky(matrices: Tensor) -> Tensor:
    """L with L Lᵀ = M, `[..., n, n]`; a column of zeros where nothing is left of the diagonal."""
    rest = matrices.clone()
    root = torch.zeros_like(rest)
    least = 10 * rest.shape[-1] * torch.finfo(rest.dtype).eps * matrices.diagonal(dim1=-2, dim2=-1)
    for j in range(rest.shape[-1]):
        pivot = rest[..., j, j]
        left = (pivot > least[..., j]).unsqueeze(-1)
        size = torch.where(left, pivot.unsqueeze(-1), 1.0).sqrt()
        column = torch.where(left, rest[..., :, j] / size, 0.0)
        root[..., :, j] = column
        rest = rest - column.unsqueeze(-1) * column.unsqueeze(-2)
    return root
