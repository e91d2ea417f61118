"""The Lightning callback: natural gradient for a module that knows nothing of it."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Any

from ngplugin.curvature.blocks import DampingMode, WeightSharing
from ngplugin.curvature.observe import FisherKind
from ngplugin.curvature.products import Products
from ngplugin.curvature.ranks import several_ranks
from ngplugin.damping import Damping
from ngplugin.diagnosis import Finding
from ngplugin.errors import OptionError
from ngplugin.layer_balance import LayerBalance
from ngplugin.lightning import terminal, trainer_settings
from ngplugin.lightning.namespace import Callback
from ngplugin.lightning.running_statistics import RunningStatistics
from ngplugin.optimizer import NaturalGradientOptimizer, WrappedNaturalGradient
from ngplugin.options import (
    NoiseVariance,
    Options,
    StepSize,
    Structure,
    check_flag,
    check_number,
    check_places,
    names_nearest,
)
from ngplugin.report import Coverage, StepReport
from ngplugin.tracking.fit_log import FitLog
from ngplugin.tracking.metrics import prefix


class NaturalGradient(Callback):
    """Makes a trainer's steps natural-gradient steps, bounded in KL divergence.

        trainer = L.Trainer(callbacks=[NaturalGradient()])

    What `configure_optimizers()` returned is wrapped when the fit starts (see
    `NaturalGradientOptimizer.wrap`): its parameter groups, learning-rate schedule and weight decay
    keep their meaning; the size of its learning rate, which was tuned for other directions, is
    replaced by `lr`. A `NaturalGradientOptimizer` returned from there is taken as it is.
    Schedulers, checkpoints and loggers work as before; checkpoints carry the Fisher along, and
    load without this callback too. Several optimizers and manual optimization are followed: what
    `self.optimizers()` gives are the natural ones.

    Gradients are accumulated, unscaled and clipped first, as the trainer is set up to do, and then
    preconditioned; the KL bound acts on the step itself, after momentum and weight decay. Clipping
    by norm shortens a gradient, which the momentum takes in as it is; what bounds the step is the
    KL.

    After the first step it prints which block every parameter got, and after every step it writes
    the KL divergence, the condition number and more to all loggers, whatever `log_every_n_steps`
    is; `natgrad/kl` and `natgrad/step_scale` are also among the `callback_metrics` and in the
    progress bar. Metrics of a second optimizer begin with `natgrad-1/`, and so on. wandb and
    TensorBoard get spectra, the coverage table and pictures too, wandb also alerts.

    Args:
        lr: upper limit of the step at the peak of the learning-rate schedule, in units of the
            natural gradient.
        enabled: False leaves the training as it would be without this callback, bit for bit.
        show_coverage: print the table of parameters and blocks.
        show_summary: print at the end what the fit's numbers say, and what to change.
        show_progress: KL and step scale of the last measured step in the progress bar.
        optimizers: which of the module's optimizers are to be natural, where there are several, by
            their places in what `configure_optimizers()` returned; None for all. Several callbacks
            of one trainer need this, to share them out.
        momentum: of the running sum of gradients, in [0, 1).
        nesterov: look ahead along the momentum.
        kl_radius: how far a step may move the prediction, nats per term of the loss; None for no
            bound.
        measure_every: the most steps between measurements of the KL, each one more forward pass;
            1 for every step, None for none.
        step_size: `"bounded"` by `lr` and the bound, `"line-search"` or `"quadratic"`; the last two
            are for full batches and little noise.
        layer_balance: how a step is shared out among layers: `"natural"`, as F says;
            `"orthogonal"`, as Muon does; `"balanced"` between the two; `"equal"`, the same KL each.
        damping: of F: a number, a class of schedule such as `ngplugin.ExponentialDamping`, or
            `"auto"`, which is 0.1 and adapted where F is exact.
        damping_mode: `"relative"` to each factor's mean eigenvalue, or `"absolute"`, nats per term.
        sampling_damping: more relative damping for a factor that rests on few rows, per size over
            rows.
        fisher: at which labels scores are taken: `"sampled"` from the prediction, `"propagated"`
            through the root of its Fisher information, `"exact"`, `"empirical"` at the data's own,
            or `"ggn"`, from the loss's Hessian.
        draws: scores for each loss and observed step; `"exact"` has as many as it needs.
        structure: what is kept of F: `"auto"`, exact for a small model with large batches, else
            Kronecker; `"exact"`, `"kronecker"`, `"eigen"`, `"diagonal"`, `"identity"`,
            `"matrix-free"`.
        weight_sharing: tokens or pixels of an example count as independent rows, `"expand"`, or as
            one row, `"reduce"`.
        max_factor: a larger side of a matrix keeps the diagonal of its factor only.
        overhead: what curvature may add to the multiplications of the model's own passes, as a
            share; where it would be more, factors are kept by their `rank` leading eigenvectors,
            and statistics and inversions are rarer.
        rank: how many these are.
        cg_iterations: the most products with F for a `"matrix-free"` step.
        products: gradients with inverses in bfloat16 where that is fast, `"auto"`, or in float32,
            `"full"`.
        decay: of the running average of F, in [0, 1).
        statistics_every: the fewest steps between statistics of F; those of the first five are all
            taken.
        refresh_every: the fewest steps between two inversions of a block, after those of all at
            steps 0, 1, 2, 4, 8, ...; blocks take turns.
        burn_in: first steps that only gather statistics.
        noise_variance: of squared-error losses: `"auto"`, the batch's mean squared error,
            `"running"`, averaged over steps, or a number.
        spectrum_every: steps between condition numbers; a tenth of it after the first.
        seed: of the private random generator that draws scores.

    `NaturalGradientOptimizer` says more of each option.

    Raises:
        OptionError: an option has a value that cannot work, or options are given beside a
            `NaturalGradientOptimizer` that has its own.
        UnsupportedTrainerError: when the fit starts, a trainer setting that cannot be followed.
    """

    @names_nearest
    def __init__(
        self,
        lr: float = 1.0,
        *,
        enabled: bool = True,
        show_coverage: bool = True,
        show_summary: bool = True,
        show_progress: bool = True,
        optimizers: list[int] | None = None,
        momentum: float = 0.9,
        nesterov: bool = True,
        kl_radius: float | None = 0.05,
        measure_every: int | None = 6,
        step_size: StepSize = "bounded",
        layer_balance: LayerBalance = "balanced",
        damping: Damping = "auto",
        damping_mode: DampingMode = "relative",
        sampling_damping: float = 1.0,
        fisher: FisherKind = "propagated",
        draws: int = 1,
        structure: Structure = "auto",
        weight_sharing: WeightSharing = "expand",
        max_factor: int = 8192,
        overhead: float = 0.6,
        rank: int = 64,
        cg_iterations: int = 10,
        products: Products = "auto",
        decay: float = 0.95,
        statistics_every: int = 5,
        refresh_every: int = 20,
        burn_in: int = 0,
        noise_variance: NoiseVariance = "auto",
        spectrum_every: int = 100,
        seed: int = 0,
    ) -> None:
        super().__init__()
        check_number("lr", lr, low=0, open_low=True)
        flags = {"show_coverage": show_coverage, "show_summary": show_summary}
        for name, value in {"enabled": enabled, **flags, "show_progress": show_progress}.items():
            check_flag(name, value)
        check_places("optimizers", optimizers)
        self.enabled = enabled
        self.show_coverage = show_coverage
        self.show_summary = show_summary
        self.show_progress = show_progress
        self.lr = lr
        self.options = Options(
            momentum=momentum,
            nesterov=nesterov,
            kl_radius=kl_radius,
            measure_every=measure_every,
            step_size=step_size,
            layer_balance=layer_balance,
            damping=damping,
            damping_mode=damping_mode,
            sampling_damping=sampling_damping,
            fisher=fisher,
            draws=draws,
            structure=structure,
            weight_sharing=weight_sharing,
            max_factor=max_factor,
            overhead=overhead,
            rank=rank,
            cg_iterations=cg_iterations,
            products=products,
            decay=decay,
            statistics_every=statistics_every,
            refresh_every=refresh_every,
            burn_in=burn_in,
            noise_variance=noise_variance,
            spectrum_every=spectrum_every,
            seed=seed,
        )
        self.optimizers = optimizers
        self._ng_optimizers: list[NaturalGradientOptimizer] = []
        self._chosen_places: list[int] = []  # where they were in what the module returned
        self._rewritten = False  # whether the strategy keeps of optimizer states what it knows
        self._rest()
        self._logs: list[FitLog] = [FitLog()]

    def _rest(self) -> None:
        """Be in no fit."""
        self._fit: Any = None  # the state of the trainer whose fit this is
        self._watching = ExitStack()
        self._scaler: Any = None  # of the loss, under 16-bit precision
        self._listeners: list[Callable[[StepReport], None]] = []  # ours, one an optimizer
        self._running: RunningStatistics | None = None  # of the module
        self._reports: list[tuple[int, StepReport]] = []  # of the present batch

    def __setstate__(self, state: dict[str, Any]) -> None:
        """A copy is in no fit, whatever the original is in."""
        self.__dict__.update(state)
        self._rest()

    def __getstate__(self) -> dict[str, Any]:
        """All but what belongs to a fit that is going on."""
        passing = ("_fit", "_watching", "_scaler", "_listeners", "_reports", "_running")
        return {name: value for name, value in self.__dict__.items() if name not in passing}

    # -- looking at it -------------------------------------------------------------------------

    def summary(self, optimizer: int = 0) -> dict[str, float | None]:
        """The last fit in a few numbers: see `ngplugin.summary.Summary.numbers`.

        Args:
            optimizer: which, among those that natural gradient was put into.
        """
        return self._logs[optimizer].summary.numbers()

    def diagnosis(self, optimizer: int = 0) -> list[Finding]:
        """What the numbers of the last fit say, and what to change: see `ngplugin.diagnosis`.

        Args:
            optimizer: which, among those that natural gradient was put into.
        """
        return self._logs[optimizer].diagnosis()

    def plot(self, name: str = "kl", optimizer: int = 0) -> tuple[Any, Any]:
        """Draw the last fit so far: a matplotlib figure, and its axes.

            figure, axes = callback.plot("spectra")
            figure.savefig("spectra.png")

        Args:
            name: `"kl"` of each step, `"kl-agreement"` of measured and predicted KL, `"condition"`,
                `"block-conditions"`, `"spectra"`, `"step-scale"`, `"trust"` (reduction ratio and
                damping) or `"direction"`; those of `ngplugin report`.
            optimizer: which, among those that natural gradient was put into.

        Returns:
            A `matplotlib.figure.Figure`, which notebooks show, and its axes, or a list of them.

        Raises:
            OptionError: there is no such picture, or nothing to draw yet.
            ImportError: matplotlib is not installed; `pip install 'ngplugin[report]'`.
        """
        from ngplugin.reporting.pictures import picture
        from ngplugin.reporting.run_record import record_of

        figure = picture(record_of(self._logs[optimizer].history), name)
        return figure, figure.axes[0] if len(figure.axes) == 1 else figure.axes

    def coverage(self, optimizer: int | None = None) -> Coverage:
        """Which block every parameter has; complete after the first step.

        Args:
            optimizer: which, among those that natural gradient was put into; None for all.

        Raises:
            RuntimeError: no fit has started yet.
        """
        if not self._ng_optimizers:
            raise RuntimeError("coverage() is known once trainer.fit() has started")
        if optimizer is not None:
            return self._ng_optimizers[optimizer].coverage()
        found = [each.coverage() for each in self._ng_optimizers]
        losses = dict.fromkeys(loss for each in found for loss in each.losses)
        return Coverage(
            [row for each in found for row in each.rows],
            tuple(losses),
            max(each.statistics_every for each in found),
            max(each.refresh_every for each in found),
        )

    # -- Lightning's hooks ---------------------------------------------------------------------

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        """Put natural-gradient optimizers in the place of the module's own."""
        elsewhere = self._fit is not None and self._fit is not trainer.state
        if elsewhere and self._fit.status == "running":
            raise OptionError(
                "this NaturalGradient is in the middle of a fit of another trainer. Give each "
                "trainer one of its own."
            )
        self._clean_up()
        self._fit = trainer.state
        self._ng_optimizers = []
        if not self.enabled:
            return
        given = list(trainer.strategy.optimizers)
        chosen = self._chosen(given)
        known = {id(p): name for name, p in pl_module.named_parameters()}
        parameters = [p for i in chosen for g in given[i].param_groups for p in g["params"]]
        names = {known.get(id(p), f"no. {i}"): p for i, p in enumerate(parameters)}
        trainer_settings.check(trainer, names)
        self._check_alone(trainer, {i: given[i] for i in chosen})
        for i in chosen:
            given[i] = self._natural(given[i])
        trainer.strategy.optimizers = given
        self._ng_optimizers = [given[i] for i in chosen]
        self._chosen_places = chosen
        self._rewritten = type(trainer.strategy).__name__ == "ModelParallelStrategy"
        self._scaler = getattr(trainer.precision_plugin, "scaler", None)
        writes = trainer.is_global_zero
        self._running = RunningStatistics(pl_module)
        self._logs = [FitLog(i, trainer.loggers, writes=writes) for i in range(len(chosen))]
        for i, optimizer in enumerate(self._ng_optimizers):
            wrapped = isinstance(optimizer, WrappedNaturalGradient)
            lr = self.lr if wrapped else optimizer.defaults["lr"]
            self._logs[i].begin({"lr": lr, **vars(optimizer.options)})
            self._listeners.append(self._listener(i))
            optimizer.listeners.append(self._listeners[i])
            optimizer.parameter_names.update(known)

    def on_train_batch_start(
        self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int
    ) -> None:
        """Begin to observe."""
        self._watching.close()
        for optimizer in self._ng_optimizers:
            self._watching.enter_context(optimizer.observe(self._scaler))

    def on_before_backward(self, trainer: Any, pl_module: Any, loss: Any) -> None:
        """The forward pass is over; what the backward pass tells comes through hooks.

        With manual optimization another forward pass may follow.
        """
        if pl_module.automatic_optimization:
            self._watching.close()

    def on_train_batch_end(
        self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Report the steps that this batch made, if any."""
        self._watching.close()
        if self._running is not None:
            self._running.keep()
        reports, self._reports = self._reports, []
        # The step that Lightning's own logging writes at this moment.
        step = trainer.fit_loop.epoch_loop._batches_that_stepped
        for i, report in reports:
            self._logs[i].step(report, step)
            # Not on every step: this takes as long as a small model's own step.
            if report.kl is not None and not getattr(trainer, "barebones", False):
                shown = {f"{prefix(i)}kl": report.kl, f"{prefix(i)}step_scale": report.step_scale}
                pl_module.log_dict(shown, prog_bar=self.show_progress, logger=False, on_step=True)
            if self._logs[i].steps == 1:
                self._logs[i].coverage(self.coverage(i))
                if self.show_coverage and trainer.is_global_zero:
                    terminal.show_coverage(self.coverage(i), self._place(i))

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        """Say it if steps are made behind our back.

        An epoch that was cut short in `on_train_batch_start` also leaves an open observation.
        """
        self._watching.close()
        if trainer.current_epoch > 0 or pl_module.automatic_optimization:
            return
        idle = [i for i in range(len(self._ng_optimizers)) if not self.summary(i)["steps"]]
        if idle:
            warnings.warn(
                f"NaturalGradient: optimizer {self._chosen_places[idle[0]]} made no step in the "
                "first epoch. Usual cause: training_step uses a reference to the optimizer that "
                "configure_optimizers() kept. Take it from self.optimizers() instead; or, if it "
                "is not to be natural, name the others: NaturalGradient(optimizers=[...]).",
                stacklevel=2,
            )

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        """Say what the numbers say."""
        for i, log in enumerate(self._logs[: len(self._ng_optimizers)]):
            # One of several processes may be the only one to have come here: none waits for others.
            log.end(None if several_ranks() else self._ng_optimizers[i].spectra)
            if self.show_summary and trainer.is_global_zero:
                terminal.show_summary(self.summary(i), self.diagnosis(i), self._place(i))

    def _place(self, i: int) -> int | None:
        """Of one of several optimizers, in what the module returned."""
        return self._chosen_places[i] if len(self._ng_optimizers) > 1 else None

    # -- saving --------------------------------------------------------------------------------

    @property
    def state_key(self) -> str:
        """Under which a checkpoint has the state; of two callbacks each for its optimizers."""
        return self._generate_state_key(optimizers=self.optimizers)

    def state_dict(self) -> dict[str, Any]:
        """Nothing, since the optimizers' states have it all; unless a strategy rewrites those."""
        if not self._rewritten:
            return {}
        return {"natgrad": [optimizer.natural_state() for optimizer in self._ng_optimizers]}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over what such a strategy has saved, which it restores after the fit has started."""
        for optimizer, state in zip(
            self._ng_optimizers, state_dict.get("natgrad", ()), strict=False
        ):
            optimizer.load_natural_state(state)

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        """Stop observing."""
        self._end(trainer)

    def teardown(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Stop observing; the optimizers stay, so that a checkpoint may still be written."""
        self._end(trainer)

    def _end(self, trainer: Any) -> None:
        if self._fit is trainer.state:  # and not that of a fit inside of ours, which was refused
            self._clean_up()
            self._rest()

    def _clean_up(self) -> None:
        self._watching.close()
        self._reports.clear()
        for optimizer in self._ng_optimizers:
            optimizer.forget_observations()
        for optimizer, ours in zip(self._ng_optimizers, self._listeners, strict=False):
            optimizer.listeners[:] = [f for f in optimizer.listeners if f is not ours]
        self._listeners.clear()
        self._running = None

    def _chosen(self, given: Sequence[Any]) -> list[int]:
        """The places of the optimizers that are to be natural."""
        if self.optimizers is None:
            return list(range(len(given)))
        if wrong := [i for i in self.optimizers if i not in range(len(given))]:
            raise OptionError(
                f"NaturalGradient(optimizers={list(self.optimizers)}): there is no optimizer "
                f"{wrong[0]}; configure_optimizers() returned {len(given)}, numbered from 0."
            )
        return sorted(set(self.optimizers))

    def _check_alone(self, trainer: Any, chosen: dict[int, Any]) -> None:
        """No other callback of the fit, which began before, may have one of these optimizers."""
        others = [c for c in trainer.callbacks if isinstance(c, NaturalGradient) and c is not self]
        theirs = {id(o) for c in others if c._fit is self._fit for o in c._ng_optimizers}
        if taken := [i for i, optimizer in chosen.items() if id(optimizer) in theirs]:
            raise OptionError(
                f"two NaturalGradient callbacks for optimizer {taken[0]}. One makes all optimizers "
                "natural; two can share them out, as NaturalGradient(optimizers=[0]) and "
                "NaturalGradient(optimizers=[1])."
            )

    def _natural(self, optimizer: Any) -> NaturalGradientOptimizer:
        """An optimizer of the module with natural steps."""
        if not isinstance(optimizer, NaturalGradientOptimizer):
            return WrappedNaturalGradient(optimizer, self.lr, self.options)
        # What was wrapped for an earlier fit of the same callback has its options.
        if (self.lr, self.options) != (1.0, Options()) and self.options is not optimizer.options:
            raise OptionError(
                "configure_optimizers() returned a NaturalGradientOptimizer, which has options of "
                "its own, and NaturalGradient was given others. Give them in one place."
            )
        return optimizer

    def _listener(self, i: int) -> Callable[[StepReport], None]:
        return lambda report: self._reports.append((i, report))
