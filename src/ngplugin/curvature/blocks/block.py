"""The interface of a block: F over a few parameters, per unit of objective weight."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from ngplugin.curvature.factorization import Remedy
from ngplugin.curvature.pace import Work
from ngplugin.curvature.products import Products
from ngplugin.curvature.spectrum import Spectrum
from ngplugin.curvature.taps import LookupCall, MapCall

DampingMode = Literal["relative", "absolute"]


@dataclass(frozen=True)
class BlockDamping:
    """How a block is to be inverted: λ, how it is applied, and for which products.

    Attributes:
        value: λ ≥ 0. `"relative"`: in units of the mean eigenvalue; `"absolute"`: of F/Σw.
        mode: what λ is measured in.
        sampling: γ, for `"relative"`: a factor of size d averaged from n rows gets γ d/n more.
        floor: for `"relative"`: what a block's mean eigenvalue counts as where it is smaller.
        products: in what the inverses are to be multiplied.
        share: a factor the products with which take more than this share of the layer's own
            forward and backward pass is kept by its leading eigenvectors.
        rank: by how many, or as many as `share` has room for.
    """

    value: float
    mode: DampingMode = "relative"
    sampling: float = 0.0
    floor: float = 0.0
    products: Products = "full"
    share: float = math.inf
    rank: int = 64


class Block(ABC):
    """F of some parameters, as a running average of F/Σw (nats per term).

    Three times, in this order, at most once a step: statistics are *added* while the backward pass
    runs, *folded* into the average when the step is taken, and the damped inverse is *refreshed*
    when it is due. Products with the inverse, and the eigenvalues, are those of the last refresh.
    Products with F are so too, but scaled to the trace of the present average: F may change its
    size many times over between two refreshes, its shape hardly.

    A block is made of its parameters and its `layout`, both of which a saved state names.

    Attributes:
        parameters: the tensors whose gradients go in and directions come out, in this order.
        kind: the word for it in the coverage table and in a saved state.
        every_step: it is of one batch, so it takes statistics and is refreshed at every step.
        redampable: another λ takes no factorization.
    """

    kind: str
    every_step = False
    redampable = False
    parameters: tuple[Tensor, ...]
    _curvature_share: Tensor | None = None  # dᵀFd over gᵀd and the growth since the inversion

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
    def refresh(self, damping: BlockDamping) -> Remedy:
        """Invert the damped average; returns what it took."""

    def redamp(self, damping: BlockDamping) -> bool:
        """Change λ without a factorization.

        Returns:
            False, and nothing changes, if the block knows no eigenvalues: the next refresh will.
        """
        return False

    @abstractmethod
    def precondition(
        self, gradients: Sequence[Tensor], curved: bool = True
    ) -> tuple[list[Tensor], list[Tensor]]:
        """D = (F/Σw + damping)⁻¹ g, and F/Σw d undamped, which is less work along with it.

        Args:
            gradients: one tensor a parameter, as in both results.
            curved: whether the second is wanted; an empty list otherwise.
        """

    @property
    def growth(self) -> float | Tensor:
        """By what the average has grown since it was inverted."""
        return 1.0

    def see_curvature(self, along: Tensor, curvature: Tensor) -> None:
        """Learn dᵀFd, scalars both, for a direction d with gᵀd = `along`."""
        share = curvature / (along * self.growth)
        self._curvature_share = torch.where(share.isfinite(), share, 1.0)

    def curvature(self, along: Tensor) -> Tensor:
        """What dᵀFd is by the last that was seen since the block was inverted.

        gᵀd is dᵀ(F + damping)d; the share of it that is F's changes slowly. Where none was seen
        it counts as all.
        """
        return (
            along if self._curvature_share is None else along * self._curvature_share * self.growth
        )

    @property
    def knows_curvature(self) -> bool:
        """Whether any was seen since the block was inverted."""
        return self._curvature_share is not None

    @abstractmethod
    def product(self, vectors: Sequence[Tensor]) -> list[Tensor]:
        """F/Σw, undamped, times a vector, one tensor a parameter."""

    @abstractmethod
    def spectrum(self) -> Spectrum:
        """The eigenvalues of F/Σw, and the extremes of those of the damped matrix."""

    def work(self, damping: BlockDamping) -> Work:
        """What statistics like the last one, and such an inversion, take; nothing for diagonals."""
        return Work()

    @abstractmethod
    def numel(self) -> int:
        """How many numbers this block keeps, inverses included."""

    @abstractmethod
    def note(self) -> str:
        """What else the coverage table is to say of why it is as it is; maybe nothing."""

    def layout(self) -> dict[str, Any]:
        """What beside the parameters it takes to make this block anew: plain values."""
        return {}

    @classmethod
    def made(cls, parameters: Sequence[Tensor], layout: dict[str, Any]) -> Block:
        """A block without an average, from its parameters and what `layout()` said."""
        return cls(*parameters, **layout)

    @abstractmethod
    def state_dict(self) -> dict[str, Any]:
        """Plain tensors and numbers, everything that a bit-exact continuation needs."""

    @abstractmethod
    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over a saved state."""


class MapBlock(Block):
    """A block that is built from the rows of observed linear maps."""

    @abstractmethod
    def takes(self, call: MapCall | LookupCall) -> bool:
        """Whether the rows of this call are rows of this block."""

    @abstractmethod
    def add_map_score(self, call: MapCall | LookupCall, score: Tensor, share: float) -> None:
        """Add the rows of one call.

        Args:
            call: the call, one that the block takes.
            score: d(Σ √w s)/d(output), of the output's shape.
            share: of the draw among all draws of the step.
        """


class GradientBlock(Block):
    """A block that is built from the sampled gradient of its parameters.

    With independent scores of mean zero, the gradient g of their weighted sum has covariance F, so
    ggᵀ is an unbiased estimate of F: neither per-example gradients nor the calls that the
    parameters went through are needed.
    """

    @abstractmethod
    def add_gradient_scores(self, scores: Sequence[Tensor], share: float) -> None:
        """Add `share` of what ggᵀ says, with g = d(Σ √w s)/d(parameter), one tensor each."""


def finite(*tensors: Tensor) -> bool:
    """Whether every element is finite; a sum that overflows counts as not."""
    return bool(torch.isfinite(torch.stack([t.sum() for t in tensors])).all())


def rounding(dtype: torch.dtype) -> float:
    """Scores below this share of the largest ones may be rounding errors and nothing else."""
    return 100 * float(torch.finfo(dtype).eps)


def curvature_dtype(parameter: Tensor) -> torch.dtype:
    """The precision in which curvature is kept: the parameter's, but at least float32; real."""
    return torch.promote_types(parameter.dtype, torch.float32).to_real()


def as_real(t: Tensor) -> Tensor:
    """A complex tensor as its real and imaginary parts, `[..., 2]`; a real one as it is."""
    return torch.view_as_real(t) if t.is_complex() else t


def as_parameter(t: Tensor, like: Tensor) -> Tensor:
    """Back from `as_real`, in the type of `like`."""
    t = t.to(like.dtype.to_real())
    return torch.view_as_complex(t) if like.is_complex() else t
