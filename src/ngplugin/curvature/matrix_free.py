"""Products with the Fisher matrix of all parameters together, on the observed batch.

F v = Jᵀ(H(J v)), with J the Jacobian of the predictions and H the Fisher information of the
predictive distributions. No matrix is formed and no independence of layers, rows or pixels is
assumed. The predictions come from the tape as differentiable functions of the parameters; one
backward pass is Jᵀu, which is linear in u, so its derivative by u along v is J v, for every call
that can be differentiated twice (Pearlmutter 1994; Schraudolph 2002, Fast Curvature Matrix-Vector
Products). A product costs about two backward passes, the first one a forward pass more.

Dropout keeps the masks of the forward pass; normalization by the batch's own statistics is
differentiated through. Nothing of the user's changes: gradients, buffers, generators.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ngplugin.curvature.observation import Observation, ScoredLoss
from ngplugin.curvature.parameter_vector import Parts
from ngplugin.curvature.ranks import mean_over_ranks_


@dataclass(frozen=True)
class _Linearized:
    """One observation's predictions as functions of the parameters, to first order.

    Attributes:
        losses: the scored ones, each with its predictions and their graph.
        predictions: those of all losses that depend on a parameter.
        leaves: the parameters' stand-ins, in their order.
        duals: u, one each of `predictions`.
        pulled: Jᵀu with its graph, a part a leaf; None where no prediction depends on it.
    """

    losses: list[tuple[ScoredLoss, tuple[Tensor, ...]]]
    predictions: list[Tensor]
    leaves: list[Tensor]
    duals: list[Tensor]
    pulled: list[Tensor | None]

    @staticmethod
    def of(observation: Observation, parameters: Sequence[Tensor]) -> _Linearized:
        # Stand-ins, so that hooks on the parameters do not fire.
        leaves = [p.detach().requires_grad_() for p in parameters]
        losses = observation.replay(
            {id(p): leaf for p, leaf in zip(parameters, leaves, strict=True)}
        )
        predictions = [t for _, tensors in losses for t in tensors if t.requires_grad]
        if not predictions:
            return _Linearized(losses, [], leaves, [], [])
        with torch.enable_grad():
            duals = [torch.zeros_like(t).requires_grad_() for t in predictions]
            pulled = torch.autograd.grad(
                predictions, leaves, duals, create_graph=True, allow_unused=True
            )
        return _Linearized(losses, predictions, leaves, duals, [*pulled])

    def product(self, vectors: Sequence[Tensor]) -> list[Tensor | None]:
        """Jᵀ H J v."""
        if not self.predictions:
            return [None] * len(self.leaves)
        reached = [(g, v) for g, v in zip(self.pulled, vectors, strict=True) if g is not None]
        pushed = torch.autograd.grad(
            [g for g, _ in reached],
            self.duals,
            [v.to(g.dtype) for g, v in reached],
            retain_graph=True,
            allow_unused=True,
        )
        tangent_of = {
            id(t): u for t, u in zip(self.predictions, pushed, strict=True) if u is not None
        }
        scores: list[Tensor] = []
        for loss, tensors in self.losses:
            own = [tangent_of.get(id(t), torch.zeros_like(t)) for t in tensors]
            parts = loss.call.information(loss.weights, own)
            scores += [
                s.to(t.dtype) for s, t in zip(parts, tensors, strict=True) if t.requires_grad
            ]
        return [
            *torch.autograd.grad(
                self.predictions,
                self.leaves,
                scores,
                retain_graph=True,
                allow_unused=True,
            )
        ]


class BatchFisher:
    """F/Σw of one step's observations, through its products.

    The graph of a single observation is kept between products. Of several, the micro-batches of an
    accumulated step, each is built anew for each product: a forward pass more, but no more memory
    than one takes.

    Args:
        observations: with tapes; the parameters are still, or again, what they were.
        parameters: all over which F is taken.
        total_weight: Σw.
    """

    def __init__(
        self,
        observations: Sequence[Observation],
        parameters: Sequence[Tensor],
        total_weight: float,
    ) -> None:
        # Of a batch without examples torch has not every second derivative.
        self._observations = [
            o
            for o in observations
            if o.recorded and any(t.numel() for s in o.scored for t in s.call.predictions)
        ]
        self._parameters = [*parameters]
        self._total_weight = total_weight
        self._kept: _Linearized | None = None
        self._versions: list[int] = []  # of the parameters, of which it is made

    def product(self, vectors: Parts) -> Parts:
        """F/Σw v.

        Args:
            vectors: id of a parameter to the vector's part for it; parts that are missing are zero.

        Returns:
            The parts of all parameters.

        Raises:
            RuntimeError: a tape has an obstacle, or a call has no second derivative. A tape with a
                `hidden_derivative` would not be noticed.
        """
        given = [vectors.get(id(p), torch.zeros_like(p)) for p in self._parameters]
        result = {id(p): torch.zeros_like(p) for p in self._parameters}
        versions = [p._version for p in self._parameters]
        if versions != self._versions:  # a step was tried and taken back, which autograd minds
            self._versions, self._kept = versions, None
        for observation in self._observations:
            linearized = self._kept or _Linearized.of(observation, self._parameters)
            if len(self._observations) == 1:
                self._kept = linearized
            for p, part in zip(self._parameters, linearized.product(given), strict=True):
                if part is not None:
                    result[id(p)] += part / self._total_weight
        mean_over_ranks_([*result.values()])
        return result
