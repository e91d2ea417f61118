"""A loss of the user's own: no known likelihood, only a function of the model's outputs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from ngplugin.curvature.likelihoods.likelihood import FisherKind, Prediction
from ngplugin.curvature.likelihoods.loss_call import FisherRoot, ScoredCall
from ngplugin.curvature.likelihoods.output_curvature import OutputCurvature, Rows

# Losses of which more than this share of the sloping rows is straight go by the name of empirical.
_MOSTLY = 0.5


@dataclass(frozen=True)
class OwnLoss(ScoredCall):
    """What an objective says beside the losses that are recognised; it is a single term.

    It is treated as -log p of a distribution in natural parameters, the outputs, would be: the
    Fisher information is the loss's own Hessian (see `OutputCurvature`), and the KL its Bregman
    divergence. Like the variance of squared error, the unit in which it is a nat is taken
    from the data: the Newton decrement gᵀH⁺g, which for squared error is the sum of squares.

    Attributes:
        predictions: the outputs of the model's last layers.
        curvature: of the loss at these outputs.
        alone: no other loss is a part of the value.
    """

    predictions: tuple[Tensor, ...]
    curvature: OutputCurvature
    alone: bool

    @property
    def name(self) -> str:  # type: ignore[override]
        """What the coverage table calls it."""
        if self.curvature.straight > _MOSTLY:
            return "the empirical Fisher of a loss without curvature"
        return "the Gauss-Newton matrix of a loss of its own"

    @property
    def target(self) -> Tensor:  # type: ignore[override]
        """Nothing: the loss knows what it compares with."""
        return self.curvature.value

    def likelihood(self, predictions: tuple[Tensor, ...] | None = None) -> OwnPrediction:
        """The outputs, as something to be compared."""
        outputs = self.curvature.outputs if predictions is None else [*predictions]
        return OwnPrediction(self, outputs)

    def weights(self, gradient: Tensor) -> Tensor:
        """|d(objective)/d(value)|, `[1]`."""
        return gradient.abs().reshape(1).to(self.curvature.value.dtype)

    def scores(
        self, kind: FisherKind, weights: Tensor, draws: int, generator: torch.Generator
    ) -> Iterator[tuple[list[Tensor], float]]:
        """√w |H|^½ ε, or ε g of every row if it is to be empirical; there is no exact one."""
        root = self.curvature.slope_root if kind == "empirical" else self.curvature.root
        for _ in range(draws):
            yield [weights.sqrt().reshape(()) * seed for seed in root(generator)], 1 / draws

    def parts(self, weights: Tensor) -> list[tuple[OwnRows, Tensor]]:
        """One for all outputs that share their rows, each row a term."""
        found: list[tuple[OwnRows, Tensor]] = []
        for group in self.curvature.groups():
            members = tuple(self.predictions[i] for i in group.members)
            if all(t.grad_fn is not None for t in members):  # a parameter itself is no prediction
                rows = OwnRows(members, group, [self.curvature.slopes[i] for i in group.members])
                found.append((rows, weights.expand(len(group.values))))
        return found

    def information(self, weights: Tensor, tangents: Sequence[Tensor]) -> list[Tensor]:
        """W |H| t."""
        return [weights.reshape(()) * part for part in self.curvature.times(tangents)]

    def detached(self) -> OwnLoss:
        """The same with detached outputs."""
        return replace(self, predictions=tuple(t.detach() for t in self.predictions))

    def nats(self) -> Tensor:
        """What the value's unit is worth, a scalar.

        A loss that falls to zero is no further from its minimum than its value, whatever a nearly
        flat Hessian says.
        """
        decrement = self.curvature.decrement()
        value = self.curvature.value
        bounded = torch.minimum(decrement, 2 * value)
        return torch.where(value > 0, bounded, decrement) if self.alone else decrement


class OwnRows:
    """The rows of some outputs, as terms with a square root of |H|.

    Args:
        predictions: the outputs.
        group: their |H|.
        slopes: g of each output.
    """

    name = "a loss of its own"

    def __init__(
        self, predictions: tuple[Tensor, ...], group: Rows, slopes: Sequence[Tensor]
    ) -> None:
        self.predictions = predictions
        self._group = group
        self._slopes = slopes

    def outputs(self) -> int:
        """The columns that are not zero in every row."""
        return len(self._columns())

    def fisher_root(self, weights: Tensor) -> FisherRoot:
        """√w |H|^½ column by column; ρ = √w (uᵀg)/√λ along each eigenvector u."""
        group, sqrt = self._group, weights.sqrt()
        along = group.gather(dict(zip(group.members, self._slopes, strict=True)))
        columns, residuals = [], []
        for k in self._columns():
            root = group.values[:, k].sqrt()
            columns.append(sqrt[:, None] * group.column(k))
            residuals.append(sqrt * torch.where(root > 0, along[:, k] / root, 0.0))
        return FisherRoot(columns, residuals, self._pull_back)

    def _columns(self) -> list[int]:
        return (self._group.values > 0).any(0).nonzero()[:, 0].tolist()

    def _pull_back(self, rows: Tensor) -> list[Tensor]:
        """`[rows, features]` to a gradient of each output."""
        parts = rows.split(self._group.widths, 1)
        return [part.reshape(t.shape) for part, t in zip(parts, self.predictions, strict=True)]


class OwnPrediction(Prediction):
    """Outputs of a model, of which only a loss is known."""

    def __init__(self, call: OwnLoss, outputs: Sequence[Tensor]) -> None:
        self.call = call
        self.outputs = outputs

    def kl(self, other: OwnPrediction) -> Tensor:
        """The larger of ½ ΔᵀHΔ and L(z + Δ) - L(z) - gᵀΔ, in units of the loss, `[1]`.

        The second, a Bregman divergence, is the KL where L is -log p in natural parameters, and
        sees what H at z does not: an exponential that grows. The first is never negative.
        """
        curvature = self.call.curvature
        pairs = zip(other.outputs, self.outputs, strict=True)
        delta = [(new - old).to(old.dtype) for new, old in pairs]
        linear = sum((g * d).sum() for g, d in zip(curvature.slopes, delta, strict=True))
        bregman = other.nll(curvature.value) - self.nll(curvature.value) - linear
        return torch.maximum(0.5 * curvature.squared_length(delta), bregman).reshape(1)

    def nll(self, target: Tensor) -> Tensor:
        """The loss itself, `[1]`."""
        return self.call.curvature.loss(self.outputs).detach().reshape(1)

    def divergence(self, target: Tensor, nll: Tensor | None = None) -> Tensor:
        """Half its unit, as of squared error under its own variance, `[1]`."""
        return 0.5 * self.call.nats().reshape(1)

    def dispersion(
        self, target: Tensor, weight: Tensor, noise_variance: float | Literal["auto"]
    ) -> Tensor:
        """The unit that makes it nats."""
        return self.call.nats()
