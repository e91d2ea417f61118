"""One natural-gradient step: curvature, direction, length, report, in this order."""

from __future__ import annotations

import copy
import dataclasses
import math
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ngplugin.curvature.blocks import BlockDamping, ExactBlock
from ngplugin.curvature.blocks.block import GradientBlock
from ngplugin.curvature.exact_rows import ExactRows
from ngplugin.curvature.factorization import Remedy
from ngplugin.curvature.fisher import Condition, Fisher
from ngplugin.curvature.objective import ObjectiveWeight
from ngplugin.curvature.observation import Observation, why_no_fisher
from ngplugin.curvature.pace import Pace, Work
from ngplugin.curvature.parameter_vector import dot, total
from ngplugin.curvature.spectrum import BlockSpectrum
from ngplugin.damping import AdaptiveDamping, LevenbergMarquardt, as_schedule, damping_at
from ngplugin.direction import Direction
from ngplugin.errors import OptionError, StepOrderError
from ngplugin.momentum import GradientMomentum
from ngplugin.move import Move
from ngplugin.nat_worth import BatchNatWorth, NatWorth, RunningNatWorth
from ngplugin.objective_check import ObjectiveCheck
from ngplugin.options import Options
from ngplugin.proposal import Model, Proposals
from ngplugin.report import StepReport
from ngplugin.saved_places import Places
from ngplugin.solver import BatchMetric, BlockSolver, MatrixFreeSolver, Solver, SubspaceSolver
from ngplugin.step_group import StepGroup, make_dense
from ngplugin.step_length import Applied, StepLength
from ngplugin.step_watch import Needs, StepWatch
from ngplugin.trust_region import NoTrustRegion, StepBound, TrustRegion
from ngplugin.unmeasured_step import UnmeasuredStep

_FIRST_STEPS = 5  # whose statistics are all taken and whose KL is all measured, if any is
_CURVED_EVERY = 6  # the most steps between those for which F d is formed
_SHARES = 4  # of the overhead: products with A, and with G, statistics, inversions
_MOST_TRIALS = 8  # of one step, with more and more damping
_MOST_BAD_BATCHES = 10  # at the start, without any that gives a Fisher


class NaturalGradientStep:
    """Makes steps, and remembers what the next one needs.

    Args:
        options: documented at `NaturalGradientOptimizer`.

    Attributes:
        fisher: the running average of F.
        steps: how many were made.
        report: of the last one.
        losses: names of those that were scored so far.
        pace: how often F is seen and inverted.
        listeners: are given the report of each step.
        watch: what is observed of the step that is being made up.
        names: of parameters, by id, as far as they are known.
    """

    def __init__(self, options: Options) -> None:
        self.options = options
        exact = None
        # An exact block has the true F, from Jacobians and not from scores at labels.
        if options.structure in ("auto", "exact") and options.fisher != "empirical":
            exact = ExactRows(forced=options.structure == "exact")
        self.fisher = Fisher(options.block_rule(), exact)
        self.steps = 0
        self.report: StepReport | None = None
        self.losses: list[str] = []
        self.names: dict[int, str] = {}
        self.listeners: list[Callable[[StepReport], None]] = []
        self.pace = Pace(options.statistics_every, options.refresh_every)
        self._work: Work | None = None  # of curvature, counted at the first statistics
        self._solver: Solver = BlockSolver()
        if options.structure == "matrix-free":
            self._solver = MatrixFreeSolver(options.cg_iterations)
        elif options.step_size == "quadratic":
            self._solver = SubspaceSolver()
        self._proposals = Proposals(options.layer_balance)
        self._curved_step = -_CURVED_EVERY  # the last for which F d was formed
        self._damping = as_schedule(copy.deepcopy(options.damping))
        self._exact_damping = LevenbergMarquardt() if options.damping == "auto" else self._damping
        self._bound: StepBound = NoTrustRegion(options.measure_every)
        if options.kl_radius is not None:
            self._bound = TrustRegion(options.kl_radius, options.measure_every, _FIRST_STEPS)
        self._length = StepLength(self._bound)
        self._unmeasured = UnmeasuredStep()
        self._check = ObjectiveCheck()
        self._worth: NatWorth
        if options.noise_variance == "running":
            self._worth = RunningNatWorth(options.decay)
        else:
            self._worth = BatchNatWorth(options.noise_variance)
        self._momentum = GradientMomentum(options.nesterov)
        self._weight = ObjectiveWeight(1.0, 1.0, 1.0, 0.0)  # of the last observed step
        self._refreshed_damping = math.nan  # λ of the blocks as they are
        self._condition: Condition | None = None
        self._condition_step = -1
        self._spectra: list[BlockSpectrum] = []  # of this step
        self._remedies: list[Remedy] = []  # what its inversions took
        self._statistics_step = -1  # the last that gave statistics
        self.watch = StepWatch(options, self.fisher, self._needs)
        self._last_time = time.perf_counter()

    # -- observing -----------------------------------------------------------------------------

    def _needs(self) -> Needs:
        options = self.options
        if options.structure == "identity" and options.kl_radius is None:
            return Needs(statistics=False, record=False)
        statistics = self._statistics_due()
        busy = statistics and self.pace.statistics_every > 1
        record = self._solver.needs_tape or self._bound.measurement_due(self.steps, busy)
        record = record or self._steers_damping() is not None
        return Needs(statistics, record or options.step_size == "line-search")

    def _statistics_due(self) -> bool:
        """On each of the first steps, and once in every so many; not all may be seen."""
        every = self.pace.statistics_every
        usual = self.steps < max(_FIRST_STEPS, self.options.burn_in)
        usual = usual or self.steps // every > self._statistics_step // every
        return usual or self._exact_block() is not None or not self._knows_curvature()

    def _exact_block(self) -> ExactBlock | None:
        return self.fisher.exact_block

    def _steering(self) -> AdaptiveDamping | None:
        """The damping that learns from what is measured, if any does."""
        both = (self._exact_damping, self._damping)
        return next((d for d in both if isinstance(d, AdaptiveDamping)), None)

    def _steers_damping(self) -> AdaptiveDamping | None:
        """What wants to know what is measured of this step."""
        steering, chosen = self._steering(), self.fisher.exact
        exact = chosen is not None and chosen.refused is None
        return steering if exact or steering is self._damping else None

    # -- stepping ------------------------------------------------------------------------------

    @torch.no_grad()
    def step(self, groups: Sequence[StepGroup]) -> None:
        """Move the parameters along what was observed, and write the report.

        Without any gradient there is nothing to do: no step is counted. Nor is one that moves
        nothing and saw nothing: `torch.distributed.checkpoint` makes such steps, with learning
        rates of zero, to have an optimizer make its state. A batch whose gradient is not finite is
        skipped, and no average learns from it; the momentum learns from no step that is not finite.

        Raises:
            StepOrderError: no observed loss has ever reached a parameter.
        """
        started = time.perf_counter()
        observations = self.watch.taken()
        idle = not observations and all(group.lr == 0 for group in groups)
        if idle or all(p.grad is None for group in groups for p in group.parameters):
            self.fisher.discard()
            self.watch.go_on()
            return
        make_dense(groups)
        with self.watch.paused():
            damping = damping_at(self._damping, self.steps)
            rule = self._rule(damping)
            squares = _squared_gradients(groups)
            finite = math.isfinite(float(total(squares.values())))
            self._settle_last_step(finite)
            weight = self._weigh(observations) if finite else None
            dropped = self._update_curvature(groups, observations, rule, weight)
            schedule = max((group.schedule for group in groups), default=1.0)
            finite = finite and self._knows_curvature()
            model, applied = Model(), Applied(0.0)
            if finite:
                telling = observations if weight is not None else []  # of how far a step goes
                model, applied = self._move(groups, schedule, telling, rule, squares)
                finite = model.finite()
                model = model if finite else Model()
        for observation in observations:
            observation.release()
        now = time.perf_counter()
        seconds = max(now - self._last_time, 1e-9)
        spent = now - started + sum(observation.seconds for observation in observations)
        norms = math.sqrt(model.gg * model.dd)
        condition = self._condition
        self.report = StepReport(
            step=self.steps,
            kl=applied.kl,
            kl_predicted=applied.scale**2 * model.q,
            kl_radius=self._bound.radius(schedule),
            step_scale=applied.scale,
            damping=damping if self._exact_block() is None else self._exact_value(),
            condition_number=None if condition is None else condition.damped,
            condition_number_undamped=None if condition is None else condition.undamped,
            reduction_ratio=applied.ratio(model),
            grad_norm=math.sqrt(model.gg),
            natural_grad_norm=math.sqrt(model.dd),
            cosine=model.gd / norms if norms > 0 else 0.0,
            overhead=min(1.0, spent / seconds),
            seconds=seconds,
            shrinks=applied.shrinks,
            skipped=int(not finite),
            rejected=int(applied.rejected),
            failed_factorizations=sum(r > Remedy.FLOAT64 for r in self._remedies),
            remedy=int(max(self._remedies, default=0)),
            dropped_statistics=dropped,
            spectra=tuple(self._spectra),
        )
        self._spectra, self._remedies = [], []
        self.steps += 1
        self._last_time = now
        for listener in self.listeners:
            listener(self.report)
        self._check.see(self.report.reduction_ratio)
        self.watch.go_on()

    def _settle_last_step(self, finite: bool) -> None:
        """Trust the last step, or take it back, now that there are gradients behind it."""
        if finite:
            self._unmeasured.trust()
        elif self._unmeasured.taken_back():
            self._momentum.forget()
            self._bound.calibrate(self.steps, math.nan, math.nan)

    def _may_lead_nowhere(self) -> bool:
        """Whether a parameter enters no known map; it may be the argument of any function."""
        bounded = self.options.kl_radius is not None
        return bounded and any(isinstance(block, GradientBlock) for block in self.fisher.blocks)

    def _weigh(self, observations: Sequence[Observation]) -> ObjectiveWeight | None:
        """What the observed objective weighs, None if nothing; the bound learns of it."""
        if not observations:
            return None
        scored = [loss for observation in observations for loss in observation.scored]
        device = observations[0].tape.device
        weight = ObjectiveWeight.of(scored, self._worth.noise_variance, device)
        if weight is not None:
            self._weight = weight = self._worth.see(weight)
            self._bound.see_loss(weight.nll)
        return weight

    def _update_curvature(
        self,
        groups: Sequence[StepGroup],
        observations: Sequence[Observation],
        rule: BlockDamping,
        weight: ObjectiveWeight | None,
    ) -> int:
        """Fold what was observed into F and invert what is due; returns how much was dropped.

        Of a step without a weight nothing is folded: some of its statistics may look sound, as
        those of layers behind a saturated one do.
        """
        options = self.options
        if options.structure == "identity" and options.kl_radius is None:
            return 0
        scored = [loss for observation in observations for loss in observation.scored]
        names = (loss.call.name for loss in scored)
        self.losses += [name for name in dict.fromkeys(names) if name not in self.losses]
        dropped = int(bool(scored) and weight is None)
        if weight is not None and any(o.counted for o in observations):
            self._statistics_step = self.steps
            dropped += self.fisher.fold(weight.total, options.decay)
            if not dropped:
                self._fold_empirical(groups, weight)
        self.fisher.discard()
        chosen = self.fisher.exact
        if options.structure == "exact" and chosen is not None and chosen.no_room:
            raise OptionError(
                f"structure='exact': {chosen.refused}. Give it a smaller model or batch, or use "
                "structure='auto', which keeps F in blocks where it is too large."
            )
        if not self._knows_curvature():
            if dropped and self.steps < _MOST_BAD_BATCHES:
                return dropped  # a bad batch, as any may be
            raise StepOrderError(why_no_fisher(observations))
        if self._work is None:
            self._count(rule)
        due = self.fisher.due(self.steps, self.pace.refresh_every, self.pace.statistics_every)
        self._remedies = self.fisher.refresh(rule, due)
        if due is not None and rule.value != self._refreshed_damping:
            self.fisher.redamp(rule)
        self._refreshed_damping = rule.value
        self._remedies += self.fisher.refresh_every_step(self._exact_rule())
        if self._condition_due():
            self._spectra = self.fisher.spectra(self.names)
            self._condition = self.fisher.condition(self._spectra)
            self._condition_step = self.steps
        return dropped

    def _count(self, rule: BlockDamping) -> None:
        """Settle for good how often curvature is due, now that it is known what it takes."""
        self._work = self.fisher.work(rule)
        self._keep_pace()

    def _keep_pace(self) -> None:
        options, work = self.options, self._work
        asked = Pace(options.statistics_every, options.refresh_every)
        self.pace = asked if work is None else asked.within(work, options.overhead / _SHARES)

    def _condition_due(self) -> bool:
        """Every so often, on a step that has least else to do: the one before statistics.

        The first ones are of few batches, so that the second ones come sooner.
        """
        every = self.options.spectrum_every
        every = every if self._condition_step > 0 else every // 10
        late = self.steps - self._condition_step - every
        quiet = (self.steps + 1) % self.pace.statistics_every == 0
        return self._condition_step < 0 or (late >= 0 and quiet)

    def _knows_curvature(self) -> bool:
        """Whether any step so far has given what a direction or a length can be found from."""
        needless = self.options.structure == "identity" and self.options.kl_radius is None
        return needless or any(block.ready for block in self.fisher.blocks)

    def _exact_value(self) -> float:
        return damping_at(self._exact_damping, self.steps)

    def _exact_rule(self) -> BlockDamping:
        return BlockDamping(self._exact_value(), self.options.damping_mode)

    def _rule(self, damping: float) -> BlockDamping:
        options = self.options
        return BlockDamping(
            damping,
            options.damping_mode,
            options.sampling_damping,
            products=options.products,
            share=options.overhead / _SHARES,
            rank=options.rank,
        )

    def _fold_empirical(self, groups: Sequence[StepGroup], weight: ObjectiveWeight) -> None:
        """Give parameters that only an unrecognised loss trains the empirical Fisher.

        The batch gradient of Σ w ℓ has the variance Σ w² Var(∇ℓ) if terms are independent; per Σw
        the empirical Fisher is Σ w ∇ℓ∇ℓᵀ / Σw, for which g² / Σ w² stands in.
        """
        parameters = [p for group in groups for p in group.parameters if p.grad is not None]
        self.fisher.fold_empirical(parameters, weight.squares, self.options.decay)

    def _move(
        self,
        groups: Sequence[StepGroup],
        schedule: float,
        observations: Sequence[Observation],
        rule: BlockDamping,
        squares: dict[int, Tensor],
    ) -> tuple[Model, Applied]:
        """Propose a step and take it; with an exact block until one succeeds."""
        averaged = self._averaged(groups)
        steering, block = self._steers_damping(), self._exact_block()
        taped = self._length.measurable(observations, self._weight.nats)
        retries = block is not None and steering is not None and bool(taped)
        metric = self._solver.metric(self.fisher, taped, self._weight.total, rule)
        applied = Applied(0.0)
        for trial in range(_MOST_TRIALS if retries else 1):
            if block is not None:
                block.momentum = max(g.momentum for g in groups) if retries and not trial else 0.0
            moves, model = self._propose(groups, averaged, metric, bool(taped), squares)
            if block is not None and block.momentum > 0 and model.gg == 0:
                block.momentum = 0.0  # nothing to go on for
                moves, model = self._propose(groups, averaged, metric, bool(taped), squares)
            if not (moves and self.steps >= self.options.burn_in and model.finite()):
                break
            # Without a gradient there is no fall to be had, however much damping there is.
            retries = retries and model.gg > 0
            if retries:
                assert block is not None
                applied, moves = self._length.tried(moves, model, schedule, taped, block)
            elif self.options.step_size == "line-search":
                applied = self._length.searched(moves, model, self.steps, schedule, taped)
            else:
                if not taped and self._may_lead_nowhere():
                    self._unmeasured.keep([m.parameter for m in moves])
                applied = self._length.shrunk(moves, model, self.steps, schedule, taped)
            if steering is not None:
                failed = applied.rejected and retries
                steering.see(-1.0 if failed else applied.ratio(model), applied.kl_ratio(model))
            if not applied.rejected:
                self._remember(block, moves, applied.scale)
                break
            if retries:
                self._remedies += self.fisher.refresh_every_step(self._exact_rule())
        if applied.rejected or not model.finite():
            self._momentum.discard()
        else:
            self._momentum.keep()
        return model, applied

    def _remember(self, block: ExactBlock | None, moves: Sequence[Move], scale: float) -> None:
        """Have what carries steps on know the one that was made."""
        if block is None and not self._solver.remembers:
            return
        directions = {id(m.parameter): m.direction * scale for m in moves}
        self._solver.remember(directions)
        if block is not None and all(id(p) in directions for p in block.parameters):
            block.remember([directions[id(p)] for p in block.parameters])

    def _averaged(self, groups: Sequence[StepGroup]) -> dict[int, Tensor]:
        """What to precondition, by the id of each parameter: of the objective over Σw.

        The exact block's rows are of this batch's objective itself, and so is what it is given.
        """
        exact, averaged = self._exact_ids(), {}
        # Plain gradient descent knows nothing of Σw.
        total_weight = 1.0 if self.options.structure == "identity" else self._weight.total
        for group in groups:
            own = [p for p in group.parameters if p.grad is not None]
            averaged.update({id(p): p.grad for p in own if id(p) in exact and p.grad is not None})
            others = [p for p in own if id(p) not in exact]
            momentum = group.momentum if self._solver.averages else 0.0
            vectors = self._momentum.propose(others, momentum, total_weight)
            averaged.update(zip(map(id, others), vectors, strict=True))
        return averaged

    def _exact_ids(self) -> set[int]:
        block = self._exact_block()
        return set() if block is None else {id(p) for p in block.parameters}

    def _propose(
        self,
        groups: Sequence[StepGroup],
        averaged: dict[int, Tensor],
        metric: Fisher | BatchMetric,
        measured: bool,
        squares: dict[int, Tensor],
    ) -> tuple[list[Move], Model]:
        """The step before its length is decided, and its model; empty if there is no gradient."""
        if self.options.structure == "identity":
            direction = Direction(averaged)
        else:
            curved = measured or self.steps >= self._curved_step + _CURVED_EVERY
            self._curved_step = self.steps if curved else self._curved_step
            direction = self._solver.direction(metric, averaged, curved)
        units = dict.fromkeys(self._exact_ids(), 1 / self._weight.total)
        return self._proposals.made(groups, direction, metric, self._weight, units, squares)

    # -- saving --------------------------------------------------------------------------------

    def state_dict(
        self, parameters: Sequence[Tensor], names: Sequence[str] | None = None
    ) -> dict[str, Any]:
        """Plain tensors and numbers, everything that a bit-exact continuation needs.

        Args:
            parameters: in the optimizer's order.
            names: theirs, where they are known; they tell parameters apart if some are added or
                removed before the state is loaded.
        """
        self.fisher.parameters = [*parameters]
        weight, condition = self._weight, self._condition
        return {
            "steps": self.steps,
            "shapes": [tuple(p.shape) for p in parameters],
            "names": names,
            "momentum": self._momentum.state_dict(parameters),
            "fisher": self.fisher.state_dict(),
            "bound": self._bound.state_dict(),
            "solver": self._solver.state_dict(parameters),
            "exact": None if self.fisher.exact is None else self.fisher.exact.state_dict(),
            "damping": (steering := self._steering()) and steering.state_dict(),
            "refreshed_damping": self._refreshed_damping,
            "generator": self.watch.generator_state(),
            "weight": (weight.total, weight.nats, weight.squares, weight.nll),
            "nat_worth": self._worth.state_dict(),
            "condition": condition and (condition.undamped, condition.damped),
            "condition_step": self._condition_step,
            "statistics_step": self._statistics_step,
            "curved_step": self._curved_step,
            "work": self._work and dataclasses.astuple(self._work),
            "beside": self._proposals.beside,
        }

    def load_state_dict(
        self,
        state: dict[str, Any],
        parameters: Sequence[Tensor],
        names: Sequence[str] | None = None,
    ) -> Places:
        """Take over what a saved state has of these parameters; arguments as of `state_dict`."""
        shapes = [p.shape for p in parameters]
        places = Places.find(shapes, names, state["shapes"], state.get("names"))
        if all(i is None for i in places.of):
            return places  # another model: its first steps are first steps
        self.steps = int(state["steps"])
        self._unmeasured.trust()
        self._momentum.load_state_dict(places.rearranged(state["momentum"]), parameters)
        self.fisher.parameters = [*parameters]
        self.fisher.load_state_dict(places.renumbered(state["fisher"]))
        if places.same:  # else the next step is measured, and calibrates anew
            self._bound.load_state_dict(state["bound"])
        self._solver.load_state_dict(places.rearranged(state["solver"]), parameters)
        # Where an exact block lost a parameter, it is decided anew.
        if self.fisher.exact is not None and state.get("exact") is not None and places.same:
            self.fisher.exact.load_state_dict(state["exact"], self.fisher.blocks)
        steering = self._steering()
        if steering is not None and state.get("damping") is not None:
            steering.load_state_dict(state["damping"])
        self._refreshed_damping = float(state.get("refreshed_damping", math.nan))
        self.watch.load_generator_state(state["generator"], parameters[0].device, self.steps)
        self._weight = ObjectiveWeight(*state["weight"])
        self._worth.load_state_dict(state.get("nat_worth", {}))
        self._condition = state["condition"] and Condition(*state["condition"])
        self._condition_step = int(state["condition_step"])
        self._statistics_step = int(state.get("statistics_step", self.steps - 1))
        work = state.get("work")
        self._work = work and Work(*work)
        self._keep_pace()
        self._curved_step = int(state.get("curved_step", self.steps - _CURVED_EVERY))
        self._proposals.beside = float(state.get("beside", 1.0))
        return places


def _squared_gradients(groups: Sequence[StepGroup]) -> dict[int, Tensor]:
    """GᵀG of each parameter; where that overflows, so would every product with the gradient."""
    gradients = {id(p): p.grad for group in groups for p in group.parameters}
    return {key: dot(g, g) for key, g in gradients.items() if g is not None}
