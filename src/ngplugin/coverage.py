"""Which block every parameter of an optimizer has, read off its Fisher matrix."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ngplugin.curvature.fisher import Fisher
from ngplugin.curvature.pace import Pace
from ngplugin.options import Options
from ngplugin.report import Coverage, CoverageRow


def coverage_of(
    groups: Sequence[Mapping[str, Any]],
    fisher: Fisher,
    options: Options,
    losses: Sequence[str],
    pace: Pace,
    names: Mapping[int, str] | None = None,
) -> Coverage:
    """One row for each parameter, in the order of the groups.

    Args:
        groups: an optimizer's parameter groups.
        fisher: has the blocks.
        options: what the optimizer was made with.
        losses: what the Fisher information was read from, in words.
        pace: how often it is seen and inverted.
        names: id of a parameter to its name; otherwise names given in the parameter groups,
            otherwise numbers.
    """
    rows: list[CoverageRow] = []
    counted = set()
    for group in groups:
        given = group.get("param_names", [None] * len(group["params"]))
        for p, name in zip(group["params"], given, strict=True):
            block = fisher.block(p)
            kind, reason, kept = "none", fisher.reason(p), 0
            if not p.requires_grad:
                reason = "frozen"
            elif options.structure == "identity":
                kind, reason = "identity", "structure='identity'"
            elif block is not None:
                kind = block.kind
                if options.fisher == "empirical" and "empirical" not in kind:
                    kind = f"empirical {kind}"
                kept = 0 if id(block) in counted else block.numel()
                counted.add(id(block))
            label = (names or {}).get(id(p)) or name or f"parameter {len(rows)}"
            rows.append(CoverageRow(label, tuple(p.shape), kind, reason, kept))
    return Coverage(rows, tuple(losses), pace.statistics_every, pace.refresh_every)
