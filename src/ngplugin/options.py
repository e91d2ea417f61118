"""The options of a natural-gradient optimizer, checked where they are given."""

from __future__ import annotations

import difflib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

from ngplugin.curvature.block_choice import BlockRule, BlockStructure
from ngplugin.curvature.blocks import DampingMode, WeightSharing
from ngplugin.curvature.observe import FisherKind
from ngplugin.curvature.products import Products
from ngplugin.damping import Damping, as_schedule
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
        self._check_measured()
        for name in ("draws", "statistics_every", "refresh_every"):
            check_count(name, getattr(self, name), low=1)
        check_count("spectrum_every", self.spectrum_every, low=1)
        check_count("cg_iterations", self.cg_iterations, low=1)
        check_count("burn_in", self.burn_in, low=0)
        check_count("seed", self.seed, low=0)

    def _check_measured(self) -> None:
        """Refuse what needs measurements where there are to be none, and what has F twice."""
        if self.step_size == "line-search" and self.measure_every is None:
            raise OptionError(
                "step_size='line-search' with measure_every=None: a line search measures every "
                "step; leave measure_every at a number"
            )
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

    def block_rule(self) -> BlockRule:
        """How blocks are to be chosen; `"identity"` and `"matrix-free"` have some beside them."""
        structure: BlockStructure = "auto"
        if self.structure in ("kronecker", "eigen", "diagonal"):
            structure = self.structure
        return BlockRule(structure, self.weight_sharing, self.max_factor)


def check_choice(name: str, value: object, allowed: Sequence[str]) -> None:
    """Refuse a word that is not among `allowed`, naming the nearest."""
    if value in allowed:
        return
    nearest = difflib.get_close_matches(str(value), allowed, n=1)
    hint = f"; did you mean {nearest[0]!r}?" if nearest else ""
    raise OptionError(f"{name}={value!r}: expected one of {', '.join(map(repr, allowed))}{hint}")


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
