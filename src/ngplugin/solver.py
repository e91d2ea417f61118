"""How a step's direction is found from a vector: by the blocks alone, or by all of F."""

from __future__ import annotations

import warnings
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from ngplugin.curvature.blocks import BlockDamping
from ngplugin.curvature.blocks.block import curvature_dtype
from ngplugin.curvature.conjugate_gradients import conjugate_gradients
from ngplugin.curvature.fisher import Fisher
from ngplugin.curvature.matrix_free import BatchFisher
from ngplugin.curvature.observation import Observation
from ngplugin.curvature.parameter_vector import Parts, dot, inner, total
from ngplugin.direction import Direction, Piece
from ngplugin.layer_balance import semi_orthogonal_length

_TOLERANCE = 1e-3  # of the residual, see `conjugate_gradients`


class Metric(Protocol):
    """The Fisher matrix of one step; vectors by the id of each parameter."""

    def product(self, vectors: Parts) -> Parts:
        """F/Σw v, undamped."""


class BatchMetric(Metric, Protocol):
    """One that is of the step's own batch, and finds a direction by itself."""

    def direction(self, vectors: Parts) -> Direction:
        """D = (F/Σw + damping)⁻¹ v."""


class Solver(ABC):
    """Chooses the metric of each step.

    Attributes:
        needs_tape: whether the forward pass of every step has to be recorded.
        averages: whether the gradient is to be averaged over steps first.
        remembers: whether it wants to know what steps were made.
    """

    needs_tape: bool
    averages: bool
    remembers = False

    def direction(self, metric: Fisher | BatchMetric, vectors: Parts, curved: bool) -> Direction:
        """D of a step along `vectors`.

        Args:
            metric: what `metric` returned.
            vectors: by the id of each parameter.
            curved: whether F/Σw d is wanted, all of it.
        """
        if isinstance(metric, Fisher):
            return of_blocks(metric, vectors, curved)
        return metric.direction(vectors)

    def remember(self, directions: Parts) -> None:  # noqa: B027 (most have no use for it)
        """Learn what step was made, as a direction."""

    @abstractmethod
    def metric(
        self,
        fisher: Fisher,
        taped: Sequence[Observation],
        total_weight: float,
        damping: BlockDamping,
    ) -> Fisher | BatchMetric:
        """What the step is to be measured and preconditioned with.

        Args:
            fisher: the blocks, inverted.
            taped: what was observed of this step, as far as it can be computed again.
            total_weight: Σw of it.
            damping: λ and how to apply it.
        """

    @abstractmethod
    def state_dict(self, parameters: Sequence[Tensor]) -> list[Tensor | None]:
        """One entry a parameter."""

    @abstractmethod
    def load_state_dict(self, state: Sequence[Tensor | None], parameters: Sequence[Tensor]) -> None:
        """Take over a saved state, of a solver of any kind."""


def of_blocks(fisher: Fisher, vectors: Parts, curved: bool = True) -> Direction:
    """D by the blocks alone, a piece each."""
    natural, products = fisher.precondition(vectors, curved)
    found = fisher.curvature(vectors, natural, products)
    pieces = [Piece(f.ids, f.along, f.value, semi_orthogonal_length(f.block)) for f in found]
    return Direction(natural, products, pieces)


def _in_one_piece(vectors: Parts, natural: Parts, products: Parts) -> Direction:
    along, curvature = inner(natural, vectors).abs(), inner(natural, products)
    return Direction(natural, products, [Piece([*natural], along, curvature, 1.0)])


class BlockSolver(Solver):
    """The running averages, block by block."""

    needs_tape = False
    averages = True

    def metric(
        self,
        fisher: Fisher,
        taped: Sequence[Observation],
        total_weight: float,
        damping: BlockDamping,
    ) -> Fisher | BatchMetric:
        """The blocks themselves."""
        return fisher

    def state_dict(self, parameters: Sequence[Tensor]) -> list[Tensor | None]:
        """Nothing."""
        return [None] * len(parameters)

    def load_state_dict(self, state: Sequence[Tensor | None], parameters: Sequence[Tensor]) -> None:
        """Nothing to take over."""


class MatrixFreeSolver(Solver):
    """All of the batch's F, solved by conjugate gradients that the blocks precondition.

    Gradients are not averaged: one of an earlier batch has parts in which this batch has no
    curvature, and they would be divided by λ alone. Momentum is in the start of the search, the
    last step's direction, of which a search cut short keeps what it did not come to (Martens 2010,
    §4.8). Where the forward pass cannot be computed again or differentiated twice, one warning says
    so and the blocks alone decide.

    Args:
        iterations: the most of them in a step.

    Attributes:
        iterations: the same.
        last: the direction of the last step.
    """

    needs_tape = True
    averages = False

    def __init__(self, iterations: int) -> None:
        self.iterations = iterations
        self.last: Parts = {}  # the direction of the last step
        self._impossible = False
        self._warned = False

    def metric(
        self,
        fisher: Fisher,
        taped: Sequence[Observation],
        total_weight: float,
        damping: BlockDamping,
    ) -> Fisher | BatchMetric:
        """The batch's F/Σw with the blocks' damping."""
        if self._impossible:
            return fisher
        if not taped:
            self._warn("on some steps the forward pass cannot be run again")
            return fisher
        hidden = next((o.tape.hidden_derivative for o in taped), None)
        if hidden is not None:
            self.give_up(hidden)
            return fisher
        return _MatrixFree(self, fisher, taped, total_weight, damping)

    def state_dict(self, parameters: Sequence[Tensor]) -> list[Tensor | None]:
        """The last step's direction."""
        return [self.last.get(id(p)) for p in parameters]

    def load_state_dict(self, state: Sequence[Tensor | None], parameters: Sequence[Tensor]) -> None:
        """Take over a saved direction."""
        self.last = {
            id(p): d.to(p.device, copy=True)
            for p, d in zip(parameters, state, strict=True)
            if d is not None
        }

    def give_up(self, obstacle: str) -> None:
        """Leave all further steps to the blocks."""
        self._impossible = True
        self._warn(obstacle)

    def _warn(self, obstacle: str) -> None:
        if not self._warned:
            self._warned = True
            warnings.warn(
                "ngplugin: structure='matrix-free' has to step like structure='auto', without "
                f"products with the whole Fisher matrix: {obstacle}.",
                stacklevel=2,
            )


class SubspaceSolver(Solver):
    """How far to go along d and along the last step, by a quadratic model with all of F.

    With d = (F̂ + damping)⁻¹ g by the blocks, p the last step, and F that of the batch over all
    parameters together, the direction is α d + μ p where

        ⎡ dᵀ(F+λ)d  dᵀ(F+λ)p ⎤ ⎡ α ⎤   ⎡ gᵀd ⎤
        ⎣ pᵀ(F+λ)d  pᵀ(F+λ)p ⎦ ⎣ μ ⎦ = ⎣ gᵀp ⎦

    minimises the model. It takes the place of the averaged gradient and of a learning rate; two
    products with F cost about four backward passes a step. For full batches and little noise. Where
    the forward pass cannot be run again, or differentiated twice, the blocks alone decide.

    Source: Martens & Grosse 2015 (arXiv:1503.05671) §6.4, §7.

    Attributes:
        last: p.
    """

    needs_tape = True
    averages = False
    remembers = True

    def __init__(self) -> None:
        self.last: Parts = {}

    def metric(
        self,
        fisher: Fisher,
        taped: Sequence[Observation],
        total_weight: float,
        damping: BlockDamping,
    ) -> Fisher | BatchMetric:
        """The batch's own F where it can be had."""
        if not taped or any(o.tape.hidden_derivative for o in taped):
            return fisher
        return _Subspace(self, fisher, taped, total_weight, damping)

    def remember(self, directions: Parts) -> None:
        """Take p."""
        self.last = directions

    def state_dict(self, parameters: Sequence[Tensor]) -> list[Tensor | None]:
        """The last step's direction."""
        return [self.last.get(id(p)) for p in parameters]

    def load_state_dict(self, state: Sequence[Tensor | None], parameters: Sequence[Tensor]) -> None:
        """Take over a saved direction."""
        self.last = {
            id(p): d.to(p.device, copy=True)
            for p, d in zip(parameters, state, strict=True)
            if d is not None
        }


class _Subspace:
    """F/Σw of one batch on the span of two vectors."""

    def __init__(
        self,
        solver: SubspaceSolver,
        fisher: Fisher,
        taped: Sequence[Observation],
        total_weight: float,
        damping: BlockDamping,
    ) -> None:
        self._solver = solver
        self._fisher = fisher
        self._damping = fisher.isotropic_damping(damping)
        self._batch = BatchFisher(taped, fisher.parameters, total_weight)

    def direction(self, vectors: Parts) -> Direction:
        """The minimiser, in one piece."""
        d, last = self._fisher.precondition(vectors)[0], self._solver.last
        last = {key: last[key] for key in d if key in last}
        basis = [d, last] if last.keys() == d.keys() else [d]
        try:
            products = [self.product(v) for v in basis]
        except RuntimeError as error:
            if "not implemented" not in str(error):  # of a second derivative
                raise
            return of_blocks(self._fisher, vectors)
        M = [
            inner(u, Fv) + self._damped(u, v)
            for u in basis
            for v, Fv in zip(basis, products, strict=True)
        ]
        b = [inner(u, vectors) for u in basis]
        numbers = torch.stack([*M, *b]).double().cpu()  # two by two: nothing for a device
        if not bool(numbers.isfinite().all()):
            return of_blocks(self._fisher, vectors)
        matrix, right = numbers[: len(M)].reshape(len(b), len(b)), numbers[len(M) :, None]
        # The last step may be zero or next to parallel to d: of all solutions the shortest.
        shares = torch.linalg.lstsq(matrix, right, driver="gelsd").solution[:, 0].tolist()
        return _in_one_piece(vectors, _combination(shares, basis), _combination(shares, products))

    def product(self, vectors: Parts) -> Parts:
        """By two backward passes."""
        found = self._batch.product(vectors)
        return {key: found[key] for key in vectors if key in found}

    def _damped(self, u: Parts, v: Parts) -> Tensor:
        """UᵀΛv with each parameter's λ."""
        return total(self._damping[key] * dot(part, v[key]) for key, part in u.items())


def _combination(shares: Sequence[float], vectors: Sequence[Parts]) -> Parts:
    return {
        key: total(share * v[key] for share, v in zip(shares, vectors, strict=True))
        for key in vectors[0]
    }


class _MatrixFree:
    """F/Σw of one batch, plus damping.

    The damping is λ times the identity, `"relative"` in units of the mean eigenvalue of the
    parameter's own block.
    """

    def __init__(
        self,
        solver: MatrixFreeSolver,
        fisher: Fisher,
        taped: Sequence[Observation],
        total_weight: float,
        damping: BlockDamping,
    ) -> None:
        self._solver = solver
        self._fisher = fisher
        self._damping = fisher.isotropic_damping(damping)
        self._batch = BatchFisher(taped, fisher.parameters, total_weight)

    def direction(self, vectors: Parts) -> Direction:
        """By conjugate gradients, in one piece."""
        directions, _ = self._fisher.precondition(vectors)
        if not directions:  # no block has an inverse yet
            return Direction({})
        # Parameters without a block are left out, as they are there.
        b = {key: vectors[key].to(curvature_dtype(vectors[key])) for key in directions}
        last = self._solver.last
        # In the order of b, which rounding sees: a saved one comes back in another.
        start = {key: last[key] for key in b} if last.keys() == b.keys() else None
        try:
            solution = conjugate_gradients(
                self._damped,
                b,
                lambda v: self._fisher.precondition(v)[0],
                self._solver.iterations,
                _TOLERANCE,
                start,
            )
        except RuntimeError as error:
            if "not implemented" not in str(error):  # of a second derivative
                raise
            self._solver.give_up(str(error).split(". ")[0])
            return of_blocks(self._fisher, vectors)
        self._solver.last = solution.x
        undamped = {
            key: Ad - self._damping[key] * solution.x[key] for key, Ad in solution.product.items()
        }
        return _in_one_piece(vectors, solution.x, undamped)

    def product(self, vectors: Parts) -> Parts:
        """By two backward passes."""
        found = self._batch.product(vectors)
        return {key: found[key] for key in vectors if key in found}

    def _damped(self, vectors: Parts) -> Parts:
        products = self.product(vectors)
        return {key: products[key] + self._damping[key] * v for key, v in vectors.items()}
