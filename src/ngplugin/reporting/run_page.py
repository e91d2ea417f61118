"""The page of one run."""

from __future__ import annotations

import yaml

from ngplugin.diagnosis import diagnose
from ngplugin.reporting.page import Page, Shown, Table
from ngplugin.reporting.pictures import PICTURES
from ngplugin.reporting.run_record import RunRecord

_NUMBERS = {
    "steps": ("steps", ",.0f"),
    "kl_mean": ("KL of a measured step, mean, nats per term", ".3g"),
    "kl_max": ("the largest", ".3g"),
    "kl_radius": ("radius, last", ".3g"),
    "kl_used": ("share of the radius that a measured step used, median", ".0%"),
    "kl_ratio": ("measured over predicted KL, median", ".3g"),
    "measured": ("steps whose KL was measured", ".0%"),
    "bound_active": ("steps that the bound shortened", ".0%"),
    "reduction_ratio": ("reduction ratio, median", ".2f"),
    "cosine": ("cosine of gradient and natural gradient, median", ".2f"),
    "condition_number": ("condition number, damped, last", ".2e"),
    "damping": ("damping, last", ".3g"),
    "overhead": ("time that went into curvature", ".0%"),
    "skipped": ("steps skipped, not being finite", ",.0f"),
    "rejected": ("steps taken back", ",.0f"),
    "failed_factorizations": ("inversions that failed", ",.0f"),
    "dropped_statistics": ("statistics left out, not being finite", ",.0f"),
}


def run_page(run: RunRecord, title: str | None = None) -> Page:
    """Pictures, tables and a diagnosis of a run.

    Args:
        run: what it has left.
        title: instead of the folder's name.
    """
    tables = []
    ends = {n: s.values[-1] for n, s in sorted(run.metrics.items()) if not n.startswith("natgrad")}
    if ends:
        rows = [[name, f"{value:.6g}"] for name, value in ends.items()]
        tables.append(Table("Where it ended", rows, caption="The last value of each metric."))
    findings = []
    if run.natural:
        numbers = run.numbers()
        findings = diagnose(numbers)
        rows = [
            [words, format(value, form)]
            for name, (words, form) in _NUMBERS.items()
            if (value := numbers.get(name)) is not None
        ]
        tables.append(Table("Natural gradient", rows))
    if len(run.coverage) > 1:
        head, *rows = run.coverage
        caption = f"Its block, and why; {len(rows)} parameters."
        tables.append(Table("What preconditions each parameter", rows, head, caption, folded=True))
    pictures = [
        Shown(p.name, p.title, p.caption, figure)
        for p in PICTURES
        if (figure := p.draw(run)) is not None
    ]
    config = yaml.safe_dump(run.config, sort_keys=False) if run.config else ""
    return Page(
        title or run.folder.resolve().name, str(run.folder), findings, tables, pictures, config
    )
