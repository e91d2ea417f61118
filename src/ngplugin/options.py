"""The options of a natural-gradient optimizer, checked where they are given."""

from __future__ import annotations

import difflib
import functools
import inspect
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, ParamSpec, get_args

from ngplugin.curvature.block_choice import BlockRule, BlockStructure
from ngplugin.curvature.blocks import DampingMode, WeightSharing
from ngplugin.curvature.observe import FisherKind
from ngplugin.curvature.products import Products
from ngplugin.damping import AdaptiveDamping, Damping, as_schedule
from ngplugin.errors import OptionError
from ngplugin.layer_balance import LayerBalance

#: Which block a parameter gets; `"identity"` is F = I, plain gradient descent.
Structure = Literal["auto", "exact", "kronecker", "eigen", "diagonal", "identity", "matrix-free"]

#: How long a step is; see `NaturalGradientOptimizer`.
StepSize = Literal["bounded", "line-search", "quadratic"]

#: σ² of squared-error losses: given, or estimated from a batch or from a running average of them.
NoiseVariance = float | Literal["auto", "running"]


@dataclass(frozen=True)
class Options:
    """Everything but the parameters, learning rate and weight decay.

    `NaturalGradientOptimizer` documents each one.

    Raises:
        OptionError: a value that cannot work.
    """

    momentum: float = 0.9
    nesterov: bool = True
    kl_radius: float | None = 0.05
    measure_every: int | None = 6
    step_size: StepSize = "bounded"
    layer_balance: LayerBalance = "balanced"
    damping: Damping = "auto"
    damping_mode: DampingMode = "relative"
    sampling_damping: float = 1.0
    fisher: FisherKind = "propagated"
    draws: int = 1
    structure: Structure = "auto"
    weight_sharing: WeightSharing = "expand"
    max_factor: int = 8192
    overhead: float = 0.6
    rank: int = 64
    cg_iterations: int = 10
    products: Products = "auto"
    decay: float = 0.95
    statistics_every: int = 5
    refresh_every: int = 20
    burn_in: int = 0
    noise_variance: NoiseVariance = "auto"
    spectrum_every: int = 100
    seed: int = 0

    def __post_init__(self) -> None:
        check_flag("nesterov", self.nesterov)
        check_number("momentum", self.momentum, low=0, high=1, open_high=True)
        if self.kl_radius is not None:
            check_number("kl_radius", self.kl_radius, low=0, open_low=True, hint="None: no bound")
        as_schedule(self.damping)
        check_choice("damping_mode", self.damping_mode, get_args(DampingMode))
        check_number("sampling_damping", self.sampling_damping, low=0)
        check_choice("fisher", self.fisher, get_args(FisherKind))
        check_choice("structure", self.structure, get_args(Structure))
        check_choice("weight_sharing", self.weight_sharing, get_args(WeightSharing))
        check_count("max_factor", self.max_factor, low=1)
        check_number("overhead", self.overhead, low=0, hint="1e9: every factor whole")
        check_count("rank", self.rank, low=1)
        check_number("decay", self.decay, low=0, high=1, open_high=True)
        if self.noise_variance not in ("auto", "running"):
            hint = "or 'auto' or 'running'"
            check_number("noise_variance", self.noise_variance, low=0, open_low=True, hint=hint)
        check_choice("step_size", self.step_size, get_args(StepSize))
        check_choice("layer_balance", self.layer_balance, get_args(LayerBalance))
        check_choice("products", self.products, get_args(Products))
        if self.measure_every is not None:
            check_count("measure_every", self.measure_every, low=1)
        for name in ("draws", "statistics_every", "refresh_every"):
            check_count(name, getattr(self, name), low=1)
        check_count("spectrum_every", self.spectrum_every, low=1)
        check_count("cg_iterations", self.cg_iterations, low=1)
        check_count("burn_in", self.burn_in, low=0)
        check_count("seed", self.seed, low=0)
        self._check_measured()
        self._check_structure()
        self._check_damping()

    def _check_measured(self) -> None:
        """Refuse what needs measurements where there are to be none."""
        if self.step_size == "line-search" and self.measure_every is None:
            raise OptionError(
                "step_size='line-search' with measure_every=None: a line search measures every "
                "step; leave measure_every at a number"
            )
        if isinstance(self.damping, AdaptiveDamping) and self.measure_every is None:
            raise OptionError(
                f"{self._named_damping()} with measure_every=None: it learns from what is "
                "measured of the steps; leave measure_every at a number, or give damping one"
            )

    def _check_structure(self) -> None:
        """Refuse what has F twice, and what an exact F has no place for."""
        if self.step_size == "quadratic" and self.structure in ("matrix-free", "identity"):
            raise OptionError(
                f"step_size='quadratic' with structure={self.structure!r}: 'matrix-free' minimises "
                "the same quadratic model already, and 'identity' has none; use structure='auto'"
            )
        if self.fisher == "empirical" and self.structure in ("exact", "matrix-free"):
            raise OptionError(
                f"fisher='empirical' with structure={self.structure!r}, which takes F from the "
                "model's Jacobian and never sees the data's labels; use structure='auto'"
            )
        steered = self.damping == "auto" or isinstance(self.damping, AdaptiveDamping)
        if self.step_size == "line-search" and self.structure == "exact" and steered:
            raise OptionError(
                f"step_size='line-search' with structure='exact' and {self._named_damping()}, "
                "which takes steps back and tries shorter ones itself, so that no search is made; "
                "give damping a number, or leave step_size at 'bounded'"
            )

    def _check_damping(self) -> None:
        """Refuse what is in other units than the damping."""
        if self.damping_mode != "absolute":
            return
        if self.damping == "auto" and self.structure != "exact":
            raise OptionError(
                "damping='auto' with damping_mode='absolute': 'auto' is a share of each factor's "
                "mean eigenvalue; give damping a number, in nats per term, or leave damping_mode "
                "at 'relative'"
            )
        if self.sampling_damping not in (0, Options.sampling_damping):
            raise OptionError(
                f"sampling_damping={self.sampling_damping!r} with damping_mode='absolute': it is "
                "added to relative damping only; leave one of them away"
            )

    def _named_damping(self) -> str:
        named = "'auto'" if self.damping == "auto" else f"{type(self.damping).__name__}()"
        return f"damping={named}"

    def block_rule(self) -> BlockRule:
        """How blocks are to be chosen; `"identity"` and `"matrix-free"` have some beside them."""
        structure: BlockStructure = "auto"
        if self.structure in ("kronecker", "eigen", "diagonal"):
            structure = self.structure
        return BlockRule(structure, self.weight_sharing, self.max_factor)


_P = ParamSpec("_P")


def names_nearest(init: Callable[_P, None]) -> Callable[_P, None]:
    """A constructor whose `TypeError` for an unknown keyword names the nearest one it has."""
    known = [name for name in inspect.signature(init).parameters if name != "self"]

    @functools.wraps(init)
    def checked(*args: _P.args, **kwargs: _P.kwargs) -> None:
        for name in (name for name in kwargs if name not in known):
            called = init.__qualname__.partition(".")[0]
            raise TypeError(
                f"{called}() got an unexpected keyword argument {name!r}{_nearest(name, known)}"
            )
        init(*args, **kwargs)

    return checked


def check_flag(name: str, value: object) -> None:
    """Refuse what is neither True nor False: a word counts as true, `"false"` too."""
    if not isinstance(value, bool):
        raise OptionError(f"{name}={value!r}: expected True or False")


def check_choice(name: str, value: object, allowed: Sequence[str]) -> None:
    """Refuse a word that is not among `allowed`, naming the nearest."""
    if isinstance(value, str) and value in allowed:
        return
    choices = ", ".join(map(repr, allowed))
    raise OptionError(f"{name}={value!r}: expected one of {choices}{_nearest(value, allowed)}")


def _nearest(value: object, allowed: Sequence[str]) -> str:
    found = difflib.get_close_matches(str(value), allowed, n=1)
    return f"; did you mean {found[0]!r}?" if found else ""


def check_number(
    name: str,
    value: object,
    *,
    low: float,
    high: float = math.inf,
    open_low: bool = False,
    open_high: bool = False,
    hint: str = "",
) -> None:
    """Refuse what is no number between `low` and `high`, themselves included unless open."""
    if isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value):
        above = value > low if open_low else value >= low
        below = value < high if open_high else value <= high
        if above and below:
            return
    bounds = ("above " if open_low else "at least ") + f"{low:g}"
    if high < math.inf:
        bounds += (" and below " if open_high else " and at most ") + f"{high:g}"
    note = f" ({hint})" if hint else ""
    raise OptionError(f"{name}={value!r}: expected a number {bounds}{note}")


def check_count(name: str, value: object, *, low: int) -> None:
    """Refuse what is no whole number of at least `low`."""
    if not isinstance(value, int) or isinstance(value, bool) or value < low:
        raise OptionError(f"{name}={value!r}: expected a whole number of at least {low}")


def check_places(name: str, value: object) -> None:
    """Refuse what lists no places of optimizers; how many there are is known when a fit starts."""
    if value is None:
        return
    if not isinstance(value, Sequence) or not value or any(type(i) is not int for i in value):
        raise OptionError(
            f"{name}={value!r}: expected a list of places in what configure_optimizers() returned, "
            "such as [0], or None for all; for none of them, enabled=False"
        )
