"""The curvature of any loss at the outputs of a model, measured by differentiating it twice."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ngplugin.curvature.factorization import eigh
from ngplugin.curvature.likelihoods.likelihood import random_signs
from ngplugin.curvature.likelihoods.loss_call import fixed, widened

Loss = Callable[[Sequence[Tensor]], Tensor]  # outputs -> a scalar

_MOST_FEATURES = 32  # of a row whose Hessian is computed in full, a product for each
_MOST_EIGEN = 1e8  # rows · features³: eigenvalue problems of all rows, about a second's tenth
_PROBES = 8  # random products that estimate the diagonal of a larger or entangled Hessian
_MOST_OF_ROW = 4.0  # medians; the squares of normal errors lose a quarter of their sum by it
_ALIKE = 1e-3  # relative difference up to which two measurements of a Hessian agree


@dataclass(frozen=True)
class Rows:
    """|H| of outputs that share all but their last dimension: one small matrix for each row.

    Attributes:
        members: which outputs, by their places.
        widths: features of each.
        values: `[rows, features]`, eigenvalues, or the diagonal itself without vectors.
        vectors: `[rows, features, features]`, in columns.
    """

    members: tuple[int, ...]
    widths: tuple[int, ...]
    values: Tensor
    vectors: Tensor | None

    def gather(self, outputs: Sequence[Tensor] | Mapping[int, Tensor]) -> Tensor:
        """In the basis of the eigenvectors, `[rows, features]`."""
        parts = [outputs[i].reshape(-1, w) for i, w in zip(self.members, self.widths, strict=True)]
        joined = torch.cat(parts, 1)
        if self.vectors is None:
            return joined
        return (self.vectors.mT @ joined[:, :, None])[:, :, 0]

    def column(self, k: int) -> Tensor:
        """The k-th column of |H|^½ of each row, over its features, `[rows, features]`."""
        root = self.values[:, k, None].sqrt()
        if self.vectors is not None:
            return root * self.vectors[:, :, k]
        unit = root.new_zeros(sum(self.widths))
        unit[k] = 1.0
        return root * unit

    def scatter(self, rows: Tensor, into: list[Tensor]) -> None:
        """The inverse of `gather`."""
        if self.vectors is not None:
            rows = (self.vectors @ rows[:, :, None])[:, :, 0]
        for i, part in zip(self.members, rows.split(self.widths, 1), strict=True):
            into[i] = part.reshape(into[i].shape)


class OutputCurvature:
    """|H| of a loss at some outputs: its Hessian with every eigenvalue's sign made positive.

    With it JᵀHJ is the generalized Gauss-Newton matrix (Schraudolph 2002; Martens 2014,
    arXiv:1412.1193, §8). For a loss that is convex in the outputs |H| = H. Where it is not, the
    absolute value keeps a step away from a saddle as far as one towards a minimum (Dauphin et al.
    2014, arXiv:1406.2572).

    The outputs of one row (an example, a token) may depend on each other, rows may not. That is
    tried: if products with two random sign vectors agree element by element, the Hessian is a
    diagonal, and they give it exactly. Otherwise that of every row is computed in full, if it is
    small and if a random product confirms that rows are independent. What remains gets the
    diagonal, estimated from a few products (Hutchinson).

    A loss may have a slope g along which it is straight: the absolute error, a norm. A row gets the
    *empirical* κ g gᵀ of that part of its slope, with one κ for all rows: such that a Newton step
    would take the loss itself away, as it does from a sum of squares.

    Args:
        loss: of outputs in the dtypes of these; evaluated once, and differentiated.
        outputs: where.
        generator: of the random products.

    Attributes:
        outputs: detached, in float32 or wider, as is all the rest.
        value: of the loss.
        slopes: g, one tensor an output.
        straight: the share of rows with a slope that is for the most part straight, in [0, 1].
    """

    def __init__(self, loss: Loss, outputs: Sequence[Tensor], generator: torch.Generator) -> None:
        self._loss = loss
        self._dtypes = [t.dtype for t in outputs]
        self.outputs = [*map(fixed, outputs)]
        leaves = [t.detach().requires_grad_() for t in self.outputs]
        with torch.enable_grad():
            value = self.loss(leaves)
            slopes = _derivatives([value], leaves, None, create_graph=True)
        self.value = value.detach()
        self.slopes = [g.detach() for g in slopes]
        self._groups: list[Rows] = []
        product = _Products(slopes, leaves, generator)
        straight, sloping = 0, 0
        scale = self._loss_scale()
        for members in _by_rows(self.outputs):
            widths = tuple(_width(self.outputs[i]) for i in members)
            values, vectors = product.rows(members, widths)
            group = Rows(members, widths, values, vectors)
            g = Rows(members, widths, values, None).gather(self.slopes)
            group, slope, flat = _with_empirical(group, g, scale)
            self._groups.append(group)
            sloping += int(slope.sum())
            straight += int((slope & flat).sum())
        self.straight = straight / sloping if sloping else 0.0

    def loss(self, outputs: Sequence[Tensor]) -> Tensor:
        """The loss of other outputs, in float32 or wider; a scalar."""
        pairs = zip(outputs, self._dtypes, strict=True)
        return widened(self._loss([t.to(dtype) for t, dtype in pairs])).reshape(())

    def groups(self) -> list[Rows]:
        """Outputs that share their rows, each group by itself."""
        return self._groups

    def _loss_scale(self) -> float:
        """What the loss is worth in its own units, positive: its size, or a part of Σ|g z|.

        The second keeps it from vanishing where a loss of either sign passes zero.
        """
        pairs = zip(self.slopes, self.outputs, strict=True)
        linear = sum(float((g * z).abs().sum()) for g, z in pairs)
        return max(abs(float(self.value)), 0.1 * linear)

    def root(self, generator: torch.Generator) -> list[Tensor]:
        """|H|^½ ε with random signs ε, one tensor an output: mean 0 and covariance |H|."""
        seeds = [torch.zeros_like(t) for t in self.outputs]
        for group in self._groups:
            group.scatter(group.values.sqrt() * random_signs(group.values, generator), seeds)
        return seeds

    def slope_root(self, generator: torch.Generator) -> list[Tensor]:
        """√κ ε g with a random sign ε for every row: covariance κ g gᵀ; κ as for straight rows."""
        seeds = [torch.zeros_like(t) for t in self.outputs]
        scale = self._loss_scale()
        for group in self._groups:
            plain = replace(group, vectors=None)
            g = plain.gather(self.slopes)
            rows = (g != 0).any(1).sum()
            kappa = rows / (2 * scale) if scale > 0 else torch.zeros_like(self.value)
            plain.scatter(kappa.sqrt() * random_signs(g[:, :1], generator) * g, seeds)
        return seeds

    def times(self, vectors: Sequence[Tensor]) -> list[Tensor]:
        """|H| v, one tensor an output."""
        products = [torch.zeros_like(t) for t in self.outputs]
        for group in self._groups:
            group.scatter(group.values * group.gather(vectors), products)
        return products

    def squared_length(self, vectors: Sequence[Tensor]) -> Tensor:
        """VᵀHv, a scalar."""
        parts = [(group.values * group.gather(vectors).square()).sum() for group in self._groups]
        return torch.stack(parts).sum()

    def decrement(self) -> Tensor:
        """GᵀH⁺g, twice what a Newton step of the outputs would take off the loss; a scalar.

        Where H nearly vanishes in a row, the quadratic model promises it too much: no row counts
        for more than a few times the median of those that count at all.
        """
        parts = []
        for group in self._groups:
            g = group.gather(self.slopes)
            of_row = torch.where(group.values > 0, g.square() / group.values, 0.0)
            if group.vectors is not None:
                of_row = of_row.sum(1)
            most = _MOST_OF_ROW * of_row[of_row > 0].median() if of_row.any() else 0.0
            parts.append(of_row.clamp_max(most).sum())
        return torch.stack(parts).sum()


def _with_empirical(group: Rows, g: Tensor, scale: float) -> tuple[Rows, Tensor, Tensor]:
    """Add κ g₀ g₀ᵀ to every row, with g₀ the part of its slope along which it is straight.

    Args:
        group: of outputs.
        g: their slopes, `[rows, features]`.
        scale: Σ g₀ᵀ(κ g₀ g₀ᵀ)⁺g₀ is to be twice this.

    Returns:
        The group, and for each row (without vectors: each element) whether it has a slope and
        whether most of it is straight.
    """
    if group.vectors is None:
        slope, rest = g.square(), torch.where(group.values > 0, 0.0, g.square())
    else:
        along = (group.vectors.mT @ g[:, :, None])[:, :, 0]  # in the basis of the eigenvectors
        g0 = torch.where(group.values > 0, 0.0, along)
        slope, rest = along.square().sum(1), g0.square().sum(1)
    # The square of what rounding leaves of a slope is no part of it.
    straight = (rest > torch.finfo(g.dtype).eps * slope) & rest.isfinite()
    values, vectors = group.values, group.vectors
    if scale > 0 and straight.any():
        kappa = straight.sum() / (2 * scale)
        if vectors is None:
            values = values + kappa * rest
        else:
            g0 = torch.where(straight[:, None], g0, 0.0)
            H = torch.diag_embed(values) + kappa * g0[:, :, None] * g0[:, None, :]
            found, _ = eigh(H)
            if found is not None:
                values, vectors = _positive(found[0]), vectors @ found[1]
    return replace(group, values=values, vectors=vectors), slope > 0, rest > 0.5 * slope


def _positive(eigenvalues: Tensor) -> Tensor:
    """Their absolute values; zero where only rounding keeps one from it; `[rows, features]`."""
    values = eigenvalues.abs()
    noise = torch.finfo(values.dtype).eps ** 0.5 * values.amax(1, keepdim=True)
    return torch.where(values > noise, values, 0.0)


class _Products:
    """Products of a loss's Hessian with vectors over the outputs."""

    def __init__(
        self, slopes: Sequence[Tensor], leaves: Sequence[Tensor], generator: torch.Generator
    ) -> None:
        self._slopes, self._leaves, self._generator = slopes, leaves, generator
        signs = [self._signs(range(len(leaves))) for _ in range(2)]
        self._probes = [[v * h for v, h in zip(vs, self._times(vs), strict=True)] for vs in signs]

    def rows(
        self, members: tuple[int, ...], widths: tuple[int, ...]
    ) -> tuple[Tensor, Tensor | None]:
        """|H| of a group of outputs: eigenvalues and vectors, or the diagonal and None."""
        joined = [
            torch.cat([probe[i].reshape(-1, w) for i, w in zip(members, widths, strict=True)], 1)
            for probe in self._probes
        ]
        if _alike(*joined) or not all(bool(t.isfinite().all()) for t in joined):
            return joined[0].abs(), None
        rows, features = joined[0].shape
        if features <= _MOST_FEATURES and rows * features**3 <= _MOST_EIGEN:
            H = self._full(members, widths, rows)
            found = None if H is None else eigh(H)[0]
            if found is not None:
                return _positive(found[0]), found[1]
        for _ in range(_PROBES - len(self._probes)):
            vs = self._signs(members)
            hs = self._times(vs)
            joined.append(
                torch.cat(
                    [(vs[i] * hs[i]).reshape(-1, w) for i, w in zip(members, widths, strict=True)],
                    1,
                )
            )
        return torch.stack(joined).mean(0).abs(), None

    def _full(self, members: tuple[int, ...], widths: tuple[int, ...], rows: int) -> Tensor | None:
        """The Hessian of every row, `[rows, features, features]`; None if rows meet."""

        def columns(vectors: Sequence[Tensor]) -> Tensor:
            products = self._times(vectors)
            return torch.cat([products[i].reshape(rows, -1) for i in members], 1)

        H = []
        for i, w in zip(members, widths, strict=True):
            for j in range(w):
                unit = [torch.zeros_like(t) for t in self._leaves]
                unit[i].reshape(rows, w)[:, j] = 1.0
                H.append(columns(unit))
        full = torch.stack(H, 2)
        full = 0.5 * (full + full.mT)
        signs = self._signs(members)
        v = torch.cat([signs[i].reshape(rows, -1) for i in members], 1)
        confirmed = _alike(columns(signs), (full @ v[:, :, None])[:, :, 0])
        return full if confirmed else None

    def _signs(self, members: Sequence[int]) -> list[Tensor]:
        return [
            random_signs(t.detach(), self._generator) if i in members else torch.zeros_like(t)
            for i, t in enumerate(self._leaves)
        ]

    def _times(self, vectors: Sequence[Tensor]) -> list[Tensor]:
        curved = [i for i, g in enumerate(self._slopes) if g.requires_grad]
        if not curved:
            return [torch.zeros_like(t) for t in self._leaves]
        try:
            return _derivatives(
                [self._slopes[i] for i in curved], self._leaves, [vectors[i] for i in curved]
            )
        except RuntimeError:  # torch has no second derivative of some function, such as ctc_loss
            self._slopes = [g.detach() for g in self._slopes]
            return [torch.zeros_like(t) for t in self._leaves]


def _derivatives(
    values: Sequence[Tensor],
    leaves: Sequence[Tensor],
    vectors: Sequence[Tensor] | None,
    create_graph: bool = False,
) -> list[Tensor]:
    """Of Σ vector · value; zero where nothing depends on a leaf."""
    found = torch.autograd.grad(
        values, leaves, vectors, retain_graph=True, create_graph=create_graph, allow_unused=True
    )
    return [torch.zeros_like(t) if d is None else d for d, t in zip(found, leaves, strict=True)]


def _alike(a: Tensor, b: Tensor) -> bool:
    return bool((a - b).abs().max() <= _ALIKE * torch.maximum(a.abs().max(), b.abs().max()))


def _width(t: Tensor) -> int:
    """Features of a row: the last dimension, if there are several."""
    return t.shape[-1] if t.dim() > 1 else 1


def _by_rows(outputs: Sequence[Tensor]) -> list[tuple[int, ...]]:
    """Places of the outputs that have the same rows."""
    groups: dict[torch.Size, list[int]] = {}
    for i, t in enumerate(outputs):
        if t.numel():
            groups.setdefault(t.shape[:-1] if t.dim() > 1 else t.shape, []).append(i)
    return [tuple(members) for members in groups.values()]
