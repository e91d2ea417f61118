"""What the numbers of a fit say, in words, and what to change about it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

#: `Summary.numbers`.
Numbers = Mapping[str, float | None]

#: `"trouble"`: the run is worse for it. `"notice"`: it could be better or cheaper. `"good"`.
Weight = Literal["trouble", "notice", "good"]


@dataclass(frozen=True)
class Finding:
    """One thing that the numbers say.

    Attributes:
        rule: the name of the rule that found it.
        weight: how much it matters.
        text: what was found, with its numbers.
        advice: what to try; empty for nothing.
    """

    rule: str
    weight: Weight
    text: str
    advice: str = ""

    def __str__(self) -> str:
        return f"{self.text}: {self.advice}" if self.advice else self.text


@dataclass(frozen=True)
class Rule:
    """When something is said, and what.

    Attributes:
        name: of the rule.
        weight: how much it matters.
        needs: numbers that have to be known.
        holds: whether it is to be said, of these numbers in their order.
        text: with them in braces, by name.
        advice: what to try.
        why: the reasoning, for the documentation.
    """

    name: str
    weight: Weight
    needs: tuple[str, ...]
    holds: Callable[..., bool]
    text: str
    advice: str
    why: str

    def find(self, numbers: Numbers) -> Finding | None:
        """The finding, if it is one."""
        values = [numbers.get(name) for name in self.needs]
        if any(value is None for value in values) or not self.holds(*values):
            return None
        text = self.text.format(**dict(zip(self.needs, values, strict=True)))
        return Finding(self.name, self.weight, text, self.advice)


RULES = (
    Rule(
        "skipped", "trouble", ("skipped", "steps"),
        lambda skipped, steps: skipped > 0,
        "{skipped:.0f} of {steps:.0f} steps were skipped, loss or gradient not being finite",
        "look for nan or inf in the data, logarithms and divisions by zero in the loss; in 16-bit "
        "training a few at the start are usual",
        "A step from a gradient that is not finite would end the run. It is left out, and no "
        "average learns from its batch; but a batch that does this is seldom meant.",
    ),
    Rule(
        "rejected", "trouble", ("rejected", "steps"),
        lambda rejected, steps: rejected > 0.01 * steps,
        "{rejected:.0f} of {steps:.0f} steps were taken back, their KL being too large even after "
        "they had been shortened four times",
        "raise damping (0.3, 1), or lower momentum; in models with dropout or noise in the forward "
        "pass measured predictions may differ for that alone",
        "A step is shortened to the length at which its KL should be two thirds of the radius. "
        "Where that fails four times, predictions do not depend smoothly on the parameters along "
        "it.",
    ),
    Rule(
        "failed factorizations", "trouble", ("failed_factorizations", "steps"),
        lambda failed, steps: failed > 0,
        "{failed_factorizations:.0f} inversions of a block failed in {steps:.0f} steps, and were "
        "mended by more damping, by keeping the old inverse or by a diagonal",
        "raise damping, or train in float32 instead of 16 bits",
        "A damped average is positive definite but for rounding; where it is not, even in float64, "
        "its eigenvalues span more digits than there are.",
    ),
    Rule(
        "dropped statistics", "notice", ("dropped_statistics", "steps"),
        lambda dropped, steps: dropped > 0.01 * steps,
        "{dropped_statistics:.0f} statistics of the Fisher information were not finite and left "
        "out, in {steps:.0f} steps",
        "look for saturated outputs, and targets outside of what the loss is for",
        "A statistic that is not finite would spoil its running average for good.",
    ),
    Rule(
        "shrinks to nothing", "trouble", ("kl_used", "measured"),
        lambda used, measured: used < 0.05 and measured > 0,
        "the typical measured step used only {kl_used:.1%} of its KL radius",
        "the prediction of the KL is too unsteady to aim with; try measure_every=1, a larger "
        "damping, or batches of more examples",
        "Steps are meant to use two thirds of the radius. After one that was far too long, those "
        "that follow are shorter until measurements agree again.",
    ),
    Rule(
        "lr decides", "notice", ("bound_active", "kl_used"),
        lambda active, used: active < 0.05,
        "the KL bound shortened only {bound_active:.0%} of the steps; the typical one used "
        "{kl_used:.0%} of its radius",
        "lr sets the pace: raise it if the loss falls slowly and smoothly, or lower kl_radius if "
        "it does not",
        "With the bound hardly ever active, steps are lr times the damped natural gradient, as in "
        "a Gauss-Newton method, and nothing but lr holds them.",
    ),
    Rule(
        "the bound decides", "good", ("bound_active", "kl_used"),
        lambda active, used: active > 0.8 and used >= 0.05,
        "the KL bound set the length of {bound_active:.0%} of the steps; the typical one used "
        "{kl_used:.0%} of its radius",
        "as it is meant to be: kl_radius is the option that sets the pace, and lr only its "
        "schedule",
        "With the default lr of 1 most steps are longer than the radius admits, and become as long "
        "as it does.",
    ),
    Rule(
        "never measured", "notice", ("measured", "steps"),
        lambda measured, steps: measured == 0 and steps > 5,
        "no step's KL was measured",
        "steps are much shorter for it, since the prediction alone is no bound: leave "
        "measure_every at a number, and see the warning for why the forward pass could not be run "
        "again",
        "On deep networks the blocks predict a KL that is 30 to 1,000 times too small; without "
        "measurements the larger factor has to be assumed.",
    ),
    Rule(
        "poor model", "notice", ("reduction_ratio",),
        lambda ratio: ratio < 0.25,
        "the loss fell by {reduction_ratio:.2f} of what the quadratic model said, at the median",
        "lower kl_radius or raise damping: steps go further than the model reaches",
        "Near 1 the model is right. Below a quarter a trust-region method would shrink its radius "
        "(Nocedal & Wright 2006, algorithm 4.1).",
    ),
    Rule(
        "good model", "good", ("reduction_ratio", "bound_active"),
        lambda ratio, active: ratio > 0.75 and active > 0.8,
        "the loss fell by {reduction_ratio:.2f} of what the quadratic model said, at the median",
        "there is room for longer steps if the data have little noise: try kl_radius=0.2",
        "Above three quarters, with the bound active, a trust-region method would double its "
        "radius; noise in the gradient may forbid what the model allows.",
    ),
    Rule(
        "little curvature", "notice", ("cosine", "overhead"),
        lambda cosine, overhead: cosine > 0.9,
        "natural gradient and gradient point the same way, with a cosine of {cosine:.2f}, for "
        "{overhead:.0%} of the time",
        "curvature changes little here: lower damping, or structure='diagonal' for less time",
        "Where F is near a multiple of the identity, or damping far above its eigenvalues, its "
        "inverse only scales the gradient.",
    ),
    Rule(
        "badly conditioned", "notice", ("condition_number", "damping"),
        lambda condition, damping: condition > 1e10,
        "the damped Fisher matrix has a condition number of {condition_number:.0e} at a damping of "
        "{damping:.2g}",
        "its inverse is mostly rounding in float32: raise damping",
        "A system of condition number κ is solved to about κ ε; ε is 1e-7 in float32. Blocks of "
        "different size count together, so this is an upper limit.",
    ),
    Rule(
        "dear", "notice", ("overhead",),
        lambda overhead: overhead > 0.6,
        "curvature took {overhead:.0%} of the time",
        "larger batches share it among more examples; or statistics_every=20, measure_every=12, or "
        "structure='diagonal'",
        "A step's curvature costs about the same however many examples the batch has.",
    ),
)  # fmt: skip


def diagnose(numbers: Numbers) -> list[Finding]:
    """What the rules find, troubles first.

    Args:
        numbers: of a fit, see `Summary.numbers`.
    """
    found = [finding for rule in RULES if (finding := rule.find(numbers)) is not None]
    order = {"trouble": 0, "notice": 1, "good": 2}
    return sorted(found, key=lambda finding: order[finding.weight])
