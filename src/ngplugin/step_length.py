"""How far a proposed step is taken: bounded in KL, measured where it can be, undone if it fails."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from ngplugin.curvature.blocks import ExactBlock
from ngplugin.curvature.observation import Observation
from ngplugin.curvature.ranks import all_ranks
from ngplugin.geodesic_acceleration import accelerated
from ngplugin.kl_measurement import KlMeasurement
from ngplugin.move import Move, move, restore
from ngplugin.proposal import Model
from ngplugin.trust_region import StepBound

_MOST_SHRINKS = 4
_POOR = 0.25  # reduction ratio below which a step says that the next one is to be looked at
_MOST_SEARCHED = 4  # lengths of a line search
_FARTHEST = 4.0  # times the last length that was tried
_NEAR = math.log(1.1)  # another length is not worth a forward pass


@dataclass(frozen=True)
class Applied:
    """What became of a proposed step: s, and what was measured of it."""

    scale: float
    kl: float | None = None
    reduction: float | None = None  # of the scored losses, in units of the objective
    shrinks: int = 0
    rejected: bool = False

    def ratio(self, model: Model) -> float | None:
        """The reduction ratio, None if it was not measured or is lost in rounding."""
        expected = model.expected(self.scale)
        if self.reduction is None or expected <= model.rounding * model.nats:
            return None
        return self.reduction / expected

    def kl_ratio(self, model: Model) -> float | None:
        """Measured over predicted KL, None if it was not measured."""
        predicted = self.scale**2 * model.q
        return None if self.kl is None or predicted <= 0 else self.kl / predicted


class StepLength:
    """Moves parameters along a proposed step.

    Args:
        bound: on the KL of a step.
    """

    def __init__(self, bound: StepBound) -> None:
        self._bound = bound
        self._measurement = KlMeasurement()

    def measurable(self, observations: Sequence[Observation], nats: float) -> list[Observation]:
        """The observations to measure with, empty where the KL cannot be measured.

        Nor can it in any process, where that of one has nothing to measure.
        """
        recorded = [o for o in observations if o.recorded]
        taped = [o for o in recorded if o.scored]
        if recorded and not all_ranks(bool(taped), recorded[0].tape.device):
            return []
        negligible = 1e-3 * self._bound.radius(1.0) * nats
        if not taped or self._measurement.possible(taped, negligible):
            return taped
        self._bound.distrust()
        return []

    def shrunk(
        self,
        moves: Sequence[Move],
        model: Model,
        step: int,
        schedule: float,
        taped: Sequence[Observation],
    ) -> Applied:
        """Go as far as the bound allows, which may take several measurements."""
        scale = self._bound.scale(model.q, schedule)
        if not taped:
            move(moves, scale)
            return Applied(scale)
        before = [m.parameter.clone() for m in moves]
        for shrinks in range(_MOST_SHRINKS + 1):
            move(moves, scale)
            divergence, reduction = self._measurement.measure(taped)
            kl = divergence / model.nats
            rise = -reduction / model.nats - model.rounding
            factor = self._bound.shrink(kl, schedule, rise)
            if factor is None:
                applied = Applied(scale, kl, reduction, shrinks)
                ratio = applied.ratio(model)
                surprise = shrinks > 0 or (ratio is not None and ratio < _POOR)
                self._bound.calibrate(step, scale**2 * model.q, kl, surprise)
                return applied
            restore(moves, before)
            # Far out the KL saturates, and says too little of how much too long the step is.
            tried, scale = scale, scale * factor * 0.5**shrinks
        # Learnt from all the same, else the next step would be the same and fail again.
        self._bound.calibrate(step, tried**2 * model.q, kl)
        return Applied(0.0, shrinks=_MOST_SHRINKS, rejected=True)

    def tried(
        self,
        moves: Sequence[Move],
        model: Model,
        schedule: float,
        taped: Sequence[Observation],
        block: ExactBlock,
    ) -> tuple[Applied, list[Move]]:
        """Go as far as the quadratic model allows, and take it back if the model was wrong.

        It was wrong if the loss did not fall or the KL is too large. Where F is exact that is for
        want of damping, and a shorter step in the same direction would be a worse answer.

        Args:
            moves: the step at full length.
            model: of it.
            schedule: the learning rate over its peak.
            taped: to measure with.
            block: whose step it is; it has the second-order part.

        Returns:
            What became of it, and the moves of which that share was made.
        """
        scale = self._bound.scale(model.q, schedule)
        bent = accelerated(moves, scale, taped, block)
        before = [m.parameter.clone() for m in moves]
        move(bent, scale)
        divergence, reduction = self._measurement.measure(taped)
        applied = Applied(scale, divergence / model.nats, reduction)
        ratio = applied.ratio(model)
        fell = ratio is not None and ratio > 0
        if fell and self._bound.shrink(divergence / model.nats, schedule) is None:
            return applied, bent
        restore(moves, before)
        return Applied(0.0, shrinks=1, rejected=True), bent

    def searched(
        self,
        moves: Sequence[Move],
        model: Model,
        step: int,
        schedule: float,
        taped: Sequence[Observation],
    ) -> Applied:
        """Go where the measured loss is least along the step, as far as the bound allows.

        A parabola through the loss and its slope where the parameters are, and the loss at the last
        length tried, has its minimum at the next length; at most four are tried, and the best one
        whose KL is within the radius is taken. The slope is that of the scored losses alone, so
        weight decay and penalties by hand have no say.

        Source: Nocedal & Wright 2006, Numerical Optimization, §3.5, eq. 3.57.
        """
        if not taped:
            return self.shrunk(moves, model, step, schedule, taped)
        scale = self._bound.scale(model.q, schedule)
        before = [m.parameter.clone() for m in moves]
        best, shrinks = Applied(0.0, rejected=True), 0
        for _ in range(_MOST_SEARCHED):
            move(moves, scale)
            divergence, reduction = self._measurement.measure(taped)
            restore(moves, before)
            kl = divergence / model.nats
            factor = self._bound.shrink(kl, schedule)
            self._bound.calibrate(step, scale**2 * model.q, kl)
            shrinks += factor is not None
            if factor is None and reduction > (best.reduction or 0.0):
                best = Applied(scale, kl, reduction)
            bend = (
                scale * model.slope - reduction
            )  # what the parabola curves down by at this length
            wanted = 0.5 * scale * model.slope / bend if bend > 0 else _FARTHEST
            wanted = min(max(wanted, 1 / _FARTHEST), _FARTHEST)
            if factor is not None:
                wanted = min(wanted, factor)
            elif kl > 0:
                wanted = min(wanted, self._bound.room(kl, schedule))
            if not math.isfinite(wanted) or abs(math.log(wanted)) < _NEAR:
                break
            scale *= wanted
        move(moves, best.scale)
        return replace(best, shrinks=shrinks)
