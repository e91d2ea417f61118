"""The interface of a block: F over a few parameters, per unit of objective weight."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

DampingMode = Literal["relative", "absolute"]


@dataclass(frozen=True)
class BlockDamping:
    """λ, and how a block applies it.

    Attributes:
        value: λ ≥ 0. `"relative"`: in units of the mean eigenvalue; `"absolute"`: of F/Σw.
        mode: what λ is measured in.
        sampling: γ, for `"relative"`: a factor of size d averaged from n rows gets γ d/n more.
        floor: for `"relative"`: what a block's mean eigenvalue counts as where it is smaller.
    """

    value: float
    mode: DampingMode = "relative"
    sampling: float = 0.0
    floor: float = 0.0


class Block(ABC):
    """F of some parameters, as a running average of F/Σw (nats per term).

    Three times, in this order, at most once a step: statistics are *added* while the backward pass
    runs, *folded* into the average when the step is taken, and the damped inverse is *refreshed*
    when it is due. Products with the inverse, and the eigenvalues, are those of the last refresh.
    Products with F are so too, but scaled to the trace of the present average: F may change its
    size many times over between two refreshes, its shape hardly.

    Attributes:
        parameters: the tensors whose gradients go in and directions come out, in this order.
        kind: the word for it in the coverage table.
        every_step: it is of one batch, so it takes statistics and is refreshed at every step.
    """

    kind: str
    every_step = False
    parameters: tuple[Tensor, ...]

    @abstractmethod
    def fold(self, total_weight: float, decay: float) -> bool:
        """Fold what was added into the average.

        Args:
            total_weight: Σw of the step.
            decay: β, the weight kept on the old average.

        Returns:
            False if the statistic was not finite; it is dropped and the average stays as it was.
        """

    @abstractmethod
    def discard(self) -> None:
        """Forget what was added and not folded."""

    @property
    @abstractmethod
    def ready(self) -> bool:
        """Whether there is an average to refresh from."""

    @property
    @abstractmethod
    def inverted(self) -> bool:
        """Whether a refresh has succeeded, so that products can be formed."""

    @abstractmethod
    def mean_eigenvalue(self) -> Tensor:
        """Of the average, undamped: tr(F/Σw) / number of parameters; a scalar."""

    @abstractmethod
    def refresh(self, damping: BlockDamping) -> bool:
        """Invert the damped average.

        Returns:
            False if the factorization failed; the old inverse is kept.
        """

    @abstractmethod
    def precondition(self, gradients: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        """D = (F/Σw + damping)⁻¹ g, and F/Σw d undamped, which comes nearly free with it.

        Args:
            gradients: one tensor a parameter, as in both results.
        """

    @abstractmethod
    def product(self, vectors: Sequence[Tensor]) -> list[Tensor]:
        """F/Σw, undamped, times a vector, one tensor a parameter."""

    @abstractmethod
    def extreme_eigenvalues(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Smallest and largest eigenvalue of F/Σw, then of the damped matrix; scalars."""

    @abstractmethod
    def numel(self) -> int:
        """How many numbers this block keeps, inverses included."""

    @abstractmethod
    def state_dict(self) -> dict[str, Any]:
        """Plain tensors and numbers, everything that a bit-exact continuation needs."""

    @abstractmethod
    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over a saved state."""


def finite(*tensors: Tensor) -> bool:
    """Whether every element is finite; a sum that overflows counts as not."""
    return bool(torch.isfinite(torch.stack([t.sum() for t in tensors])).all())


def curvature_dtype(parameter: Tensor) -> torch.dtype:
    """The precision in which curvature is kept: the parameter's, but at least float32."""
    return torch.promote_types(parameter.dtype, torch.float32)
