"""Carries scores of a prediction back to where the Fisher matrix takes them in."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from ngplugin.curvature.likelihoods import FisherKind, ScoredCall
from ngplugin.curvature.observation import Observation
from ngplugin.curvature.taps import LookupCall, MapCall, NormCall


class ScoreSink(Protocol):
    """What takes the scores in: the Fisher matrix under construction."""

    def add_rows(self, loss: ScoredCall, weights: Tensor) -> None:
        """Take what is wanted of a loss beside scores, while its graph is there."""

    def takes(self, p: Tensor) -> bool:
        """Whether scores are wanted of a parameter."""

    def assign(self, calls: Sequence[MapCall | LookupCall], norms: Sequence[NormCall]) -> None:
        """Learn which parameters act through which maps and normalizations."""

    def compared(self, weight: Tensor) -> bool:
        """Whether it is known if the weight's maps are all that a prediction has of it."""

    def compare(self, weight: Tensor, other_uses: bool) -> None:
        """Learn whether a prediction depends on a weight by other ways than its maps."""

    def unmapped(self) -> list[Tensor]:
        """The parameters whose score is wanted as a plain gradient."""

    def add_map_score(self, call: MapCall | LookupCall, score: Tensor, share: float) -> None:
        """Take d(score)/d(output of a map), counting `share` of a draw."""

    def add_gradient_scores(self, scores: Sequence[tuple[Tensor, Tensor]], share: float) -> None:
        """Take each parameter with its d(score)/d(parameter), counting `share` of a draw."""


class ScoreBackward:
    """The backward pass of scores: to the outputs of maps, and to parameters of no map.

    Args:
        sink: takes the scores.
        kind: how they are drawn.
        draws: number of scores for each loss.
        generator: private source of randomness.
    """

    def __init__(
        self, sink: ScoreSink, kind: FisherKind, draws: int, generator: torch.Generator
    ) -> None:
        self._sink = sink
        self._kind = kind
        self._draws = draws
        self._generator = generator

    def run(self, observation: Observation, loss: ScoredCall, weights: Tensor) -> None:
        """F = Σ_i w_i J_iᵀ H_i J_i, from scores s_i of mean 0 and covariance H_i.

        Terms are independent, so the gradient of Σ_i √w_i s_i has the covariance F.
        """
        self._sink.add_rows(loss, weights)
        self._compare(observation, loss.predictions)
        maps = [m for m in observation.maps if self._sink.takes(m[0].weight)]
        norms = [n for n in observation.norms if n.weight is None or self._sink.takes(n.weight)]
        self._sink.assign([call for call, _ in maps], norms)
        unmapped = [p for p in self._sink.unmapped() if p.requires_grad]
        inputs: Any = [*(edge for _, edge in maps), *unmapped]
        if not inputs:
            return
        for seeds, share in loss.scores(self._kind, weights, self._draws, self._generator):
            enlarged, factor = _enlarged(seeds, loss.predictions)
            scores = torch.autograd.grad(
                loss.predictions, inputs, enlarged, retain_graph=True, allow_unused=True
            )
            if factor is not None:
                scores = [s if s is None else s.float() / factor for s in scores]
            for (call, _), score in zip(maps, scores, strict=False):
                if score is not None:
                    self._sink.add_map_score(call, score, share)
            gradients = zip(unmapped, scores[len(maps) :], strict=True)
            self._sink.add_gradient_scores(
                [(p, score) for p, score in gradients if score is not None], share
            )

    def _compare(self, observation: Observation, predictions: Sequence[Tensor]) -> None:
        """Have the sink know of weights whose maps are not all that the prediction has of them.

        As of a weight that is divided by its own norm, which a product with it computes. Such a
        weight is told from one that is merely in a penalty too: the rows of its maps do not give
        the gradient of the prediction.
        """
        mapped = {id(call.weight) for call, _ in observation.maps}
        doubtful = [w for key, w in observation.elsewhere.items() if key in mapped]
        doubtful = [w for w in doubtful if w.requires_grad and not self._sink.compared(w)]
        doubtful = [w for w in doubtful if self._sink.takes(w)]
        if not doubtful:
            return
        calls = [
            (call, edge)
            for call, edge in observation.maps
            if any(call.weight is w for w in doubtful)
        ]
        inputs: Any = [*(edge for _, edge in calls), *doubtful]
        generator = torch.Generator(predictions[0].device).manual_seed(0)
        scores = torch.autograd.grad(
            predictions,
            inputs,
            [
                torch.randn(p.shape, generator=generator, dtype=p.dtype, device=p.device)
                for p in predictions
            ],
            retain_graph=True,
            allow_unused=True,
        )
        for weight, exact in zip(doubtful, scores[len(calls) :], strict=True):
            if exact is not None:
                missing = exact.to_dense() if exact.is_sparse else exact.clone()
                for (call, _), score in zip(calls, scores, strict=False):
                    if call.weight is weight and score is not None:
                        missing -= call.weight_gradient(score)
                self._sink.compare(weight, bool(missing.norm() > 0.05 * exact.norm()))


def _enlarged(
    seeds: Sequence[Tensor], predictions: Sequence[Tensor]
) -> tuple[list[Tensor], Tensor | None]:
    """Scores in the predictions' types, and by what they were multiplied, if by anything.

    In float16 what is far below 1 soon is nothing on its way back, so the largest is made 1, as a
    loss scaler does with the objective.
    """
    factor = None
    if any(p.dtype == torch.float16 for p in predictions):
        largest = torch.stack([g.abs().amax() for g in seeds if g.numel()]).max().float()
        factor = torch.where(largest > 0, 1 / largest, 1.0)
        seeds = [g * factor for g in seeds]
    return [g.to(p.dtype) for g, p in zip(seeds, predictions, strict=True)], factor
