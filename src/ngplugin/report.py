"""What a step did, and what every parameter is preconditioned with: frozen data."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

from ngplugin.curvature.spectrum import BlockSpectrum


@dataclass(frozen=True)
class StepReport:
    """One optimizer step in numbers. KL is in nats per term.

    Attributes:
        step: optimizer steps before this one.
        kl: measured KL(p_θ ‖ p_θ+Δ) on the step's own batch; None if not measured.
        kl_predicted: ½ΔᵀFΔ/Σw of the step as applied, F undamped; between steps whose KL is
            measured from the share of the damped product that it was then.
        kl_radius: the bound on the KL at this step.
        step_scale: what the trust region multiplied the proposed step by, in [0, 1].
        damping: λ; that of the exact block, if there is one, for the next step.
        condition_number: of the block-diagonal damped F, at the last time it was computed.
        condition_number_undamped: the same without damping.
        reduction_ratio: how far the scored losses fell over how far the quadratic model said;
            None if not measured.
        grad_norm: Euclidean norm of the gradient.
        natural_grad_norm: of the natural gradient d.
        cosine: between the gradient and d.
        overhead: share of `seconds` that went into curvature, in [0, 1].
        seconds: since the end of the last step.
        shrinks: how often a measured step was shortened because its KL was too large.
        skipped: 1 if gradient or step was not finite, or no batch so far has given a Fisher, and
            nothing was moved.
        rejected: 1 if the measured KL stayed too large after every shrink, and nothing was moved.
        failed_factorizations: in this step, of those that float64 did not mend.
        remedy: the gravest that an inversion of this step took: 1 float64, 2 more damping, 3 the
            old inverse stayed, 4 with none, a diagonal.
        dropped_statistics: in this step, not finite.
        spectra: of every block, on steps on which they were computed.
    """

    step: int
    kl: float | None
    kl_predicted: float
    kl_radius: float
    step_scale: float
    damping: float
    condition_number: float | None
    condition_number_undamped: float | None
    reduction_ratio: float | None
    grad_norm: float
    natural_grad_norm: float
    cosine: float
    overhead: float
    seconds: float
    shrinks: int = 0
    skipped: int = 0
    rejected: int = 0
    failed_factorizations: int = 0
    remedy: int = 0
    dropped_statistics: int = 0
    spectra: tuple[BlockSpectrum, ...] = field(default=(), repr=False)


@dataclass(frozen=True)
class CoverageRow:
    """One parameter: which block preconditions it, why, and how many numbers the block keeps."""

    parameter: str
    shape: tuple[int, ...]
    block: str
    reason: str
    numel: int


@dataclass(frozen=True)
class Coverage:
    """Every parameter of an optimizer and its block.

    Attributes:
        rows: one a parameter.
        losses: what the Fisher information was read from, in words.
        statistics_every: steps between statistics; the most of several optimizers'.
        refresh_every: steps between inversions of a block; likewise.
    """

    rows: Sequence[CoverageRow]
    losses: tuple[str, ...] = ()
    statistics_every: int = 1
    refresh_every: int = 1
    columns: tuple[str, ...] = ("parameter", "shape", "block", "why", "numbers kept")

    def cells(self) -> list[tuple[str, ...]]:
        """The table's rows as text; the size of a shared block stands with its first parameter."""
        return [
            (r.parameter, "×".join(map(str, r.shape)) or "1", r.block, r.reason, f"{r.numel:,}")
            for r in self.rows
        ]

    def totals(self) -> str:
        """One line: how many parameters have which block."""
        count: dict[str, list[int]] = {}
        for row in self.rows:
            tensors = count.setdefault(row.block, [0, 0])
            tensors[0] += 1
            tensors[1] += math.prod(row.shape)
        return "; ".join(
            f"{kind}: {numbers:,} numbers in {tensors} tensors"
            for kind, (tensors, numbers) in count.items()
        )

    def memory(self) -> str:
        """One line: what the blocks keep, beside the parameters."""
        kept = sum(row.numel for row in self.rows)
        parameters = sum(math.prod(row.shape) for row in self.rows)
        return (
            f"Curvature keeps {kept:,} numbers, {4e-6 * kept:,.3g} MB in float32, for "
            f"{parameters:,} parameters"
        )

    def pace(self) -> str:
        """One line: how often curvature is seen and inverted."""
        return (
            f"Statistics every {self.statistics_every} steps, inverses every {self.refresh_every}; "
            "oftener at first"
        )

    def sources(self) -> str:
        """One line: which losses the Fisher information comes from."""
        return "Fisher information of: " + ("; ".join(self.losses) or "no loss yet")

    def __str__(self) -> str:
        """A plain text table."""
        lines = [self.columns, *self.cells()]
        widths = [max(len(line[i]) for line in lines) for i in range(len(self.columns))]
        return "\n".join(
            "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
            for line in lines
        )
