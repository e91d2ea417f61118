"""The natural-gradient optimizer, as torch knows optimizers: groups, options, state."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager
from dataclasses import fields
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from ngplugin import saved_state
from ngplugin.coverage import coverage_of
from ngplugin.curvature.blocks import DampingMode, WeightSharing
from ngplugin.curvature.observe import FisherKind, LossScaler
from ngplugin.curvature.pace import Pace
from ngplugin.curvature.products import Products
from ngplugin.curvature.spectrum import BlockSpectrum
from ngplugin.damping import Damping
from ngplugin.errors import DamagedStateError, OptionError
from ngplugin.layer_balance import LayerBalance
from ngplugin.natural_step import NaturalGradientStep
from ngplugin.options import (
    NoiseVariance,
    Options,
    StepSize,
    Structure,
    check_choice,
    check_number,
    names_nearest,
)
from ngplugin.report import Coverage, StepReport
from ngplugin.saved_places import Places
from ngplugin.step_group import StepGroup

_STATE_KEY = "natgrad"  # of our part of a state dict; other optimizers ignore it


class NaturalGradientOptimizer(Optimizer):
    """Steps along the natural gradient, no further than a KL radius.

    A step is

        m ← μ m + g,   d = (F + damping)⁻¹ m,   Δ = -lr (d + weight_decay θ),
        θ ← θ + s Δ,   s = min(1, √(⅔ radius / KL(p_θ ‖ p_θ+Δ)))

    with F a running average of the Fisher information of the model's own predictive distribution.
    It is seen by observing the forward pass:

        with optimizer.observe():
            loss = criterion(model(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    A `closure` given to `step` is observed by itself. Most steps need no observation, and on those
    `observe()` does nothing.

    Multiplying the loss by a constant, another reduction, or accumulating micro-batches changes
    neither direction nor KL. With `lr=1`, no momentum and no bound a step is a damped Gauss-Newton
    step on the objective as written.

    Args:
        params: parameters, or parameter groups with their own `lr`, `momentum`, `weight_decay`.
        lr: upper limit of the step, in units of the natural gradient. A learning-rate schedule
            also scales the KL radius, by the square of lr over its peak.
        momentum: μ of the gradient's average, in [0, 1), in the convention of `torch.optim.SGD`.
        nesterov: use g + μ m in place of m.
        weight_decay: decoupled, per unit of lr.
        kl_radius: bound on the KL of a step, nats per term, that no measured step exceeds; None for
            no bound. A term is one element of the loss as `reduction="none"` would give it. Steps
            are meant to use two thirds of it. Where the prediction is nearer to the data than half
            a nat, the bound falls with it; see `TrustRegion`.
        measure_every: the most steps between measurements of the KL, each one more forward pass;
            fewer where the prediction is off, and those of the first five steps are all measured.
            1 for every step. None: no measurement, and steps that are much shorter, since the
            prediction alone is no bound. Without a bound: every so many steps, only to be reported.
        step_size: `"bounded"`: as long as `lr` and the bound allow. `"line-search"`: where the
            measured loss of the batch is least along the step, within the bound, `lr` being the
            first length that is tried; one to four forward passes a step. `"quadratic"`: α d + μ p
            with p the last step and both numbers from the quadratic model with the whole Fisher
            matrix of the batch, in place of `momentum`; two more products with it a step. The last
            two are for full batches and little noise.
        layer_balance: how the step is shared out among blocks. `"natural"`: as F says.
            `"orthogonal"`: each matrix has a step as long as a semi-orthogonal one. `"balanced"`:
            the geometric mean of the two. `"equal"`: each block has the same share of the predicted
            KL. All keep the step's predicted KL as a whole; see `ngplugin.layer_balance`.
        damping: λ ≥ 0, or a function of the step such as `ExponentialDamping`. `"auto"`: 0.1, and
            for exact blocks, whose smallest eigenvalues are worth having, `LevenbergMarquardt`,
            which asks for the reduction ratio of every step and takes back those that fail.
        damping_mode: `"relative"`: λ in units of each factor's mean eigenvalue. `"absolute"`: in
            units of F's eigenvalues, nats per term.
        sampling_damping: γ, with relative damping: a factor of size d that rests on n rows gets
            γ d/n more, since the spectrum of an average of few rows is spread too wide.
        fisher: how scores are chosen. `"sampled"`: at labels drawn from the model's own prediction.
            `"propagated"`: random signs through the square root of the output's Fisher information,
            same mean and covariance with far less noise where the prediction is nearly certain.
            `"exact"`: all columns of that root, a backward pass for each class, or for each element
            along a prediction's last dimension. `"empirical"`: at the data's own labels, which
            gives another matrix than the Fisher. `"ggn"`: from the loss's own Hessian at the
            outputs of the last layers, as for every loss that is not recognised.
        draws: scores for each loss and observed step; an exact Fisher has as many as it needs.
        structure: what is kept of F. `"auto"`: exact for a small model with large batches (see
            `ExactRows`), else Kronecker. `"exact"`: one block of all parameters, from per-example
            Jacobians, whatever it costs, up to 1 GiB. `"kronecker"`: two factors for each linear
            map and each other matrix, unit-wise blocks for normalizations, else diagonals.
            `"eigen"`: for linear maps the second moments along the factors' eigenvectors too
            (EKFAC). `"diagonal"`: diagonal everywhere. `"identity"`: d = m, gradient descent with
            momentum, whose steps `kl_radius` bounds like any others. `"matrix-free"`: d solves
            (F + damping) d = m with the F of the step's own batch, over all parameters together, by
            conjugate gradients that the Kronecker blocks precondition. Relative damping is then λ
            times the mean eigenvalue of each block, and momentum is only in where the search
            starts. For large batches.
        weight_sharing: how tokens or pixels of an example count that share a weight. `"expand"`: as
            independent rows, right where each has a loss of its own. `"reduce"`: as one row, the
            mean input with the summed score, right where they are pooled before the loss. An
            example is one place along the first axis of a map's input, or of the batch of
            `nn.MultiheadAttention`; where other layers have the tokens first, leave it at
            `"expand"`.
        max_factor: a side of a matrix that is larger keeps the diagonal of its factor only.
        overhead: what curvature may add to the multiplications of a step's own forward and backward
            pass, as a share, on average over steps; without the forward passes that measure the KL.
            A quarter is for products with each of a layer's two factors. One takes d / (3 · rows),
            for a side of d units and so many rows a step (examples, tokens, pixels); where that is
            more, the factor is kept by its `rank` leading eigenvectors and the mean of the other
            eigenvalues, unless that is no less work. A quarter each is for statistics and for
            inversions, which are rarer where they would take more, up to ten times; see `Pace`.
            Counted at the first step and not timed, so that a run can be repeated. 1e9 for whole
            factors, statistics and inversions whatever they take.
        rank: see `overhead`; 4 · rank / (3 · rows) is what such a product takes. Source: Puiu 2022
            (arXiv:2206.15397).
        cg_iterations: the most products with F for a `"matrix-free"` step, each about two backward
            passes; every step starts from the last one's direction.
        products: in what float32 gradients are multiplied by the inverses. `"auto"`: bfloat16 for
            factors of a size of 128 or more where the hardware has products of it, `"full"`:
            float32.
        decay: β of the running average of F, in [0, 1).
        statistics_every: the fewest steps between statistics of F; the first five steps give one
            each. See `overhead` for when they are more, and `pace` for how many.
        refresh_every: the fewest steps between two inversions of a block, after those of all blocks
            at steps 0, 1, 2, 4, 8, ...; blocks take turns, so that no step has much to invert.
        burn_in: first steps that only gather statistics and move nothing.
        noise_variance: σ² of squared-error losses. `"auto"`: the batch's mean squared error.
            `"running"`: what a nat is worth by the batches, averaged over observed steps with
            `decay`, for small batches whose error varies. It only decides how large a nat is.
        spectrum_every: steps between condition numbers; each costs the eigenvalues of every factor.
            After those of the first step it is a tenth of it.
        seed: of the private random generator that draws scores.

    Raises:
        OptionError: an option has a value that cannot work.

    Source: Amari 1998; Martens 2014 (arXiv:1412.1193); Martens & Grosse 2015 (arXiv:1503.05671).
    Defaults: chosen here, by the runs in `experiments/`.
    """

    @names_nearest
    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1.0,
        momentum: float = 0.9,
        *,
        nesterov: bool = True,
        weight_decay: float = 0.0,
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
        check_number("lr", lr, low=0)
        check_number("weight_decay", weight_decay, low=0)
        options = Options(
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
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})
        self._prepare(options)

    @staticmethod
    def wrap(optimizer: Optimizer, lr: float = 1.0, **options: Any) -> NaturalGradientOptimizer:
        """Put natural-gradient steps in the place of another optimizer's.

        The given optimizer keeps its parameter groups, and whatever holds it (schedulers above
        all) stays valid. The *shape* of its learning rate, lr over its peak, scales our own `lr`
        and radius; its size was tuned for other directions and is not used. Its weight decay is
        kept, decoupled: θ shrinks by its own lr times its own weight decay a step.

        Args:
            optimizer: any torch optimizer.
            lr: upper limit of the step at the peak of the schedule.
            options: those of `NaturalGradientOptimizer`, except `params` and `weight_decay`.

        Returns:
            A `NaturalGradientOptimizer` with the given optimizer's groups, state and defaults.

        Raises:
            OptionError: it is no optimizer, is one of these already, or an option cannot work.
        """
        for name in options:
            check_choice("option", name, [field.name for field in fields(Options)])
        return WrappedNaturalGradient(optimizer, lr, Options(**options))

    def _prepare(self, options: Options) -> None:
        self._engine = NaturalGradientStep(options)
        self._peak_lr: list[float] = []  # the largest seen, a group each

    @property
    def options(self) -> Options:
        """What the optimizer was made with."""
        return self._engine.options

    @property
    def pace(self) -> Pace:
        """Steps between statistics, and between inversions of a block; settled at the first."""
        return self._engine.pace

    @property
    def parameter_names(self) -> dict[int, str]:
        """By id; for messages, saved states and spectra; add yours."""
        return self._engine.names

    @property
    def listeners(self) -> list[Callable[[StepReport], None]]:
        """Functions that are given the report of each step; append yours."""
        return self._engine.listeners

    @property
    def report(self) -> StepReport | None:
        """The last step in numbers; None before the first."""
        return self._engine.report

    def observe(self, scaler: LossScaler | None = None) -> AbstractContextManager[Any]:
        """A context for the forward pass of one batch, or of one micro-batch.

        Inside an `observe()` of the same optimizer, or on a step that needs nothing from it, it
        does nothing. The backward pass may be inside or after it, and so may steps.

        Args:
            scaler: a `torch.amp.GradScaler` that multiplies the loss before the backward pass.
        """
        trainable = [p for group in self.param_groups for p in group["params"] if p.requires_grad]
        return self._engine.watch.observe(trainable, scaler)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Zero the gradients, and forget what was learnt along with them if no step used it.

        Args:
            set_to_none: see `torch.optim.Optimizer.zero_grad`.
        """
        super().zero_grad(set_to_none)
        self._engine.watch.zeroed()

    def forget_observations(self) -> None:
        """Drop what was observed since the last step, which will not be made."""
        self._engine.watch.forget()

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Make one step.

        Args:
            closure: computes the loss and its gradients; called once, first, and observed.

        Returns:
            What the closure returned.

        Raises:
            StepOrderError: no observed loss has ever reached a parameter.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad(), self.observe():
                loss = closure()
        self._engine.step([self._step_group(i, g) for i, g in enumerate(self.param_groups)])
        return loss

    # -- what the groups say -------------------------------------------------------------------

    def _step_group(self, index: int, group: dict[str, Any]) -> StepGroup:
        lr = float(group["lr"])
        return StepGroup(
            group["params"],
            lr=lr,
            decay=lr * float(group["weight_decay"]),
            momentum=float(group["momentum"]),
            schedule=self._schedule(index, group),
        )

    def _schedule(self, index: int, group: dict[str, Any]) -> float:
        """The learning rate over its peak: what a scheduler says it is, or the largest seen.

        A warm-up starts near zero, so the first rate seen is no measure. Where a scheduler's
        factors exceed one, what it calls the initial rate is none either.
        """
        self._peak_lr += [0.0] * (index + 1 - len(self._peak_lr))
        lr = float(group["lr"])
        self._peak_lr[index] = max(self._peak_lr[index], lr)
        peak = max(self._peak_lr[index], float(group.get("max_lr", group.get("initial_lr", 0.0))))
        return lr / peak if peak > 0 else 0.0

    # -- looking at it -------------------------------------------------------------------------

    def spectra(self) -> list[BlockSpectrum]:
        """The eigenvalues of every block as of its last inversion; none before the first step.

        Computes those of every factor, of several processes each of some: all of them have to ask.
        """
        return self._engine.fisher.spectra(self.parameter_names)

    def coverage(self, names: dict[int, str] | None = None) -> Coverage:
        """Which block every parameter has; complete after the first step.

        Args:
            names: of parameters, by id; otherwise `parameter_names`, otherwise those in the groups,
                otherwise numbers.
        """
        engine, names = self._engine, names or self.parameter_names
        return coverage_of(
            self.param_groups, engine.fisher, self.options, engine.losses, engine.pace, names
        )

    # -- saving --------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """A plain optimizer state dict, with everything of ours under one more key.

        Other optimizers load it and ignore that key; it holds plain tensors and numbers only.
        """
        state = self._plain_state_dict()
        state[_STATE_KEY] = self.natural_state()
        return state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over a state dict of this class, or of a plain optimizer: then F starts anew.

        If parameters were added or removed since, a warning names them, and what is known of the
        others is taken over.

        Args:
            state_dict: what `state_dict()` returned.

        Raises:
            DamagedStateError: it is not; then nothing of it was taken over.
        """
        ours = state_dict.get(_STATE_KEY)
        plain = {k: v for k, v in state_dict.items() if k != _STATE_KEY}
        before = self.natural_state()
        if ours is not None:
            self.load_natural_state(ours)
        try:
            self._load_plain_state_dict(plain)
        except ValueError as error:  # groups of other sizes
            self._load_settings(plain["param_groups"])
            if ours is None:
                warnings.warn(
                    f"ngplugin: the saved optimizer has other parameters ({error}); its state is "
                    "not used, natural-gradient steps do without.",
                    stacklevel=2,
                )
        except Exception:  # what torch makes of a damaged state
            self._take_over(before)
            raise

    def natural_state(self) -> dict[str, Any]:
        """What `state_dict()` has beside a plain optimizer's state."""
        return {
            **self._engine.state_dict(self._parameters(), self._names()),
            "peak_lr": list(self._peak_lr),
        }

    def load_natural_state(self, state: dict[str, Any]) -> None:
        """Take over what `natural_state()` returned, all of it or nothing.

        Args:
            state: it.

        Raises:
            DamagedStateError: it is something else.
        """
        before = self.natural_state()  # the tensors themselves, which loading does not write to
        try:
            saved_state.check(state)
            places = self._take_over(state)
        except saved_state.DAMAGES as damage:
            self._take_over(before)
            raise DamagedStateError(
                "the natural-gradient part of a saved state cannot be used: "
                f"{type(damage).__name__}: {damage}. {saved_state.WHAT_TO_DO}"
            ) from damage
        if not places.same:
            warnings.warn(
                "ngplugin: parameters have changed since the state was saved. "
                f"Curvature and momentum start anew for: {', '.join(places.new) or 'none'}. "
                f"Saved, but not here: {', '.join(places.gone) or 'none'}. Usual cause: a layer "
                "was added, removed or resized.",
                stacklevel=3,
            )

    def __getstate__(self) -> dict[str, Any]:
        """Of copies and pickles: what torch has of an optimizer, and what a checkpoint has of ours.

        Like torch's hooks, listeners stay behind, and so does what was observed of an open step,
        whose gradients torch does not copy either.
        """
        names = [self.parameter_names.get(id(p)) for p in self._parameters()]
        ours = self.natural_state()
        if ours["generator"] is not None:
            # A new tensor: of what is pickled for a spawned process it would be gone by then.
            ours["generator"] = ours["generator"].tolist()
        return {**self._plain_getstate(), _STATE_KEY: (self.options, names, ours)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Also torch's way to load a plain state dict."""
        super().__setstate__({k: v for k, v in state.items() if k != _STATE_KEY})
        if _STATE_KEY in state:
            options, names, ours = state[_STATE_KEY]
            if ours["generator"] is not None:
                ours = {**ours, "generator": torch.tensor(ours["generator"], dtype=torch.uint8)}
            self._prepare(options)
            known = zip(self._parameters(), names, strict=True)
            self.parameter_names.update({id(p): name for p, name in known if name is not None})
            self.load_natural_state(ours)

    def _take_over(self, state: dict[str, Any]) -> Places:
        places = self._engine.load_state_dict(state, self._parameters(), self._names())
        self._peak_lr[:] = map(float, state["peak_lr"])
        return places

    def _load_settings(self, saved: Sequence[dict[str, Any]]) -> None:
        """Learning rates and the like of saved groups, where there are as many as here."""
        if len(saved) == len(self.param_groups):
            for group, settings in zip(self.param_groups, saved, strict=True):
                kept = {k: v for k, v in settings.items() if k not in ("params", "param_names")}
                group.update(kept)

    def _names(self) -> list[str] | None:
        """Every parameter's name, if somebody has told them."""
        found = [self.parameter_names.get(id(p)) for p in self._parameters()]
        if None in found:  # torch keeps names if the constructor was given them
            found = [name for g in self.param_groups for name in g.get("param_names", ())]
        names = [name for name in found if name is not None]
        return names if len(names) == len(self._parameters()) else None

    def _parameters(self) -> list[Tensor]:
        return [p for group in self.param_groups for p in group["params"]]

    def _plain_getstate(self) -> dict[str, Any]:
        return super().__getstate__()

    def _plain_state_dict(self) -> dict[str, Any]:
        return super().state_dict()

    def _load_plain_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)


class WrappedNaturalGradient(NaturalGradientOptimizer):
    """Natural-gradient steps on another optimizer's parameter groups; see `wrap`.

    Groups, state and defaults are the wrapped optimizer's own objects, never copies, so that
    schedulers, learning-rate monitors and code that edits `param_groups` all meet the same ones.
    """

    def __init__(self, optimizer: Optimizer, lr: float, options: Options) -> None:
        if not isinstance(optimizer, Optimizer):
            raise OptionError(
                f"wrap({type(optimizer).__name__}): expected a torch.optim.Optimizer; to start "
                "from parameters use NaturalGradientOptimizer(params)"
            )
        if isinstance(optimizer, NaturalGradientOptimizer):
            raise OptionError("wrap(): this is a NaturalGradientOptimizer already")
        check_number("lr", lr, low=0, open_low=True)
        self._ng_inner = optimizer
        self._own_lr = float(lr)
        # Fills in what Optimizer.__init__ would have, without groups of its own.
        Optimizer.__setstate__(self, {})
        self._prepare(options)

    @property
    def optimizer(self) -> Optimizer:
        """The wrapped optimizer; the name under which learning-rate monitors look for it."""
        return self._ng_inner

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """The wrapped optimizer's parameter groups."""
        return self._ng_inner.param_groups

    @param_groups.setter
    def param_groups(self, groups: list[dict[str, Any]]) -> None:
        self._ng_inner.param_groups = groups

    @property
    def state(self) -> Any:
        """The wrapped optimizer's state: its own buffers, which no step of ours touches."""
        return self._ng_inner.state

    @state.setter
    def state(self, state: Any) -> None:
        self._ng_inner.state = state

    @property
    def defaults(self) -> dict[str, Any]:
        """The wrapped optimizer's defaults."""
        return self._ng_inner.defaults

    @defaults.setter
    def defaults(self, defaults: dict[str, Any]) -> None:
        self._ng_inner.defaults = defaults

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group to the wrapped optimizer."""
        self._ng_inner.add_param_group(param_group)

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Make one step; see `NaturalGradientOptimizer.step`."""
        loss = super().step(closure)
        # A scheduler built on the wrapped optimizer asks it whether it has stepped.
        self._ng_inner._opt_called = True  # type: ignore[attr-defined]
        return loss

    def _step_group(self, index: int, group: dict[str, Any]) -> StepGroup:
        schedule = self._schedule(index, group)
        return StepGroup(
            group["params"],
            lr=self._own_lr * schedule,
            decay=float(group["lr"]) * float(group.get("weight_decay", 0.0)),
            momentum=self.options.momentum,
            schedule=schedule,
        )

    def _plain_getstate(self) -> dict[str, Any]:
        return {"_ng_inner": self._ng_inner, "_own_lr": self._own_lr}

    def _plain_state_dict(self) -> dict[str, Any]:
        return self._ng_inner.state_dict()

    def _load_plain_state_dict(self, state: dict[str, Any]) -> None:
        self._ng_inner.load_state_dict(state)
