"""The Lightning callback: natural gradient for a module that knows nothing of it."""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any

from ngplugin import tracking
from ngplugin.curvature.blocks import DampingMode, WeightSharing
from ngplugin.curvature.observe import FisherKind
from ngplugin.curvature.products import Products
from ngplugin.damping import Damping
from ngplugin.errors import OptionError
from ngplugin.layer_balance import LayerBalance
from ngplugin.lightning import coverage_table, trainer_settings
from ngplugin.lightning.namespace import Callback
from ngplugin.optimizer import NaturalGradientOptimizer, WrappedNaturalGradient
from ngplugin.options import NoiseVariance, Options, StepSize, Structure, check_number
from ngplugin.report import Coverage


class NaturalGradient(Callback):
    """Makes a trainer's steps natural-gradient steps, bounded in KL divergence.

        trainer = L.Trainer(callbacks=[NaturalGradient()])

    What `configure_optimizers()` returned is wrapped when the fit starts (see
    `NaturalGradientOptimizer.wrap`): its parameter groups, learning-rate schedule and weight decay
    keep their meaning; the size of its learning rate, which was tuned for other directions, is
    replaced by `lr`. A `NaturalGradientOptimizer` returned from there is taken as it is.
    Schedulers, checkpoints and loggers work as before; checkpoints carry the Fisher along, and
    load without this callback too.

    After the first step it prints which block every parameter got, and after every step it writes
    the KL divergence, the condition number and more to all loggers, whatever `log_every_n_steps`
    is; `natgrad/kl` is also among the `callback_metrics` and in the progress bar.

    Args:
        lr: upper limit of the step at the peak of the learning-rate schedule, in units of the
            natural gradient.
        enabled: False leaves the training as it would be without this callback, bit for bit.
        show_coverage: print the table of parameters and blocks.
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
        cg_iterations: the most products with F for a `"matrix-free"` step.
        products: gradients with inverses in bfloat16 where that is fast, `"auto"`, or in float32,
            `"full"`.
        decay: of the running average of F, in [0, 1).
        statistics_every: steps between statistics of F; those of the first five are all taken.
        refresh_every: steps between inversions, after those at steps 0, 1, 2, 4, 8, ...
        burn_in: first steps that only gather statistics.
        noise_variance: of squared-error losses: `"auto"`, the batch's mean squared error,
            `"running"`, averaged over steps, or a number.
        spectrum_every: steps between condition numbers.
        seed: of the private random generator that draws scores.

    `NaturalGradientOptimizer` says more of each option.

    Raises:
        OptionError: an option has a value that cannot work, or options are given beside a
            `NaturalGradientOptimizer` that has its own.
        UnsupportedTrainerError: when the fit starts, a trainer setting that cannot be followed.
    """

    def __init__(
        self,
        lr: float = 1.0,
        *,
        enabled: bool = True,
        show_coverage: bool = True,
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
        self.enabled = enabled
        self.show_coverage = show_coverage
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
        self._ng_optimizer: NaturalGradientOptimizer | None = None
        self._names: dict[int, str] = {}  # id of a parameter to its name in the module
        self._watching = ExitStack()
        self._reported = -1  # the last step that was logged
        self._summary = tracking.Summary()

    # -- looking at it -------------------------------------------------------------------------

    def summary(self) -> dict[str, float | None]:
        """The last fit in a few numbers: see `ngplugin.tracking.Summary.numbers`."""
        return self._summary.numbers()

    def coverage(self) -> Coverage:
        """Which block every parameter has; complete after the first step.

        Raises:
            RuntimeError: no fit has started yet.
        """
        if self._ng_optimizer is None:
            raise RuntimeError("coverage() is known once trainer.fit() has started")
        return self._ng_optimizer.coverage(self._names)

    # -- Lightning's hooks ---------------------------------------------------------------------

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        """Put a natural-gradient optimizer in the place of the module's own."""
        if not self.enabled:
            return
        trainer_settings.check(trainer, pl_module)
        (given,) = trainer.strategy.optimizers  # automatic optimization allows for one only
        if not isinstance(given, NaturalGradientOptimizer):
            self._ng_optimizer = WrappedNaturalGradient(given, self.lr, self.options)
            trainer.strategy.optimizers = [self._ng_optimizer]
        elif (self.lr, self.options) == (1.0, Options()):
            self._ng_optimizer = given
        else:
            raise OptionError(
                "configure_optimizers() returned a NaturalGradientOptimizer, which has options of "
                "its own, and NaturalGradient was given others. Give them in one place."
            )
        self._names = {id(p): name for name, p in pl_module.named_parameters()}
        self._summary = tracking.Summary()
        self._reported = -1
        tracking.declare(trainer.loggers)

    def on_train_batch_start(
        self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int
    ) -> None:
        """Begin to observe."""
        self._watching.close()
        if self._ng_optimizer is not None:
            self._watching.enter_context(self._ng_optimizer.observe())

    def on_before_backward(self, trainer: Any, pl_module: Any, loss: Any) -> None:
        """The forward pass is over; what the backward pass tells comes through hooks."""
        self._watching.close()

    def on_train_batch_end(
        self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Report the step, if this batch made one."""
        self._watching.close()
        report = None if self._ng_optimizer is None else self._ng_optimizer.report
        if report is None or report.step == self._reported:
            return
        if self._reported < 0 and self.show_coverage and trainer.is_global_zero:
            coverage_table.show(self.coverage())
        self._reported = report.step
        self._summary.add(report)
        # The step that Lightning's own logging writes at this moment.
        step = trainer.fit_loop.epoch_loop._batches_that_stepped
        tracking.log_step(trainer.loggers, report, step)
        if report.kl is not None:
            name = f"{tracking.PREFIX}kl"
            pl_module.log(name, report.kl, prog_bar=True, logger=False, on_step=True)

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        """An epoch that was cut short in `on_train_batch_start` leaves an open observation."""
        self._watching.close()

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        """Stop observing."""
        self._clean_up()

    def teardown(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Stop observing; the optimizer stays, so that a checkpoint may still be written."""
        self._clean_up()

    def _clean_up(self) -> None:
        self._watching.close()
        if self._ng_optimizer is not None:
            self._ng_optimizer.forget_observations()
