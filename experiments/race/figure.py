"""The figure of the race: loss against the processor's seconds."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from experiments.race.field import FIELD
from experiments.race.results import Record


def plot(path: Path, records: Mapping[str, Record]) -> None:
    """A panel a course, a line a contestant: the run of the first seed."""
    from matplotlib import colormaps
    from matplotlib.figure import Figure  # without pyplot: no window, nothing global

    rows = -(-len(records) // 2)
    figure = Figure(figsize=(11, 3.6 * rows + 0.8), layout="constrained")
    axes = figure.subplots(rows, 2, squeeze=False).flatten()
    lines = {}
    for axis in axes[len(records) :]:
        axis.axis("off")
    for axis, (course, record) in zip(axes, records.items(), strict=False):
        for i, name in enumerate(FIELD):
            if name not in record.curves:
                continue
            curve = record.curves[name][0]
            ours = name.startswith("natgrad")
            style = {"color": "black", "linewidth": 1.8} if ours else {"linewidth": 1.0}
            style.setdefault("color", colormaps["tab20"](i))  # type: ignore[arg-type]
            linestyle = "--" if name == "natgrad-tuned" else "-"
            (lines[FIELD[name].title],) = axis.plot(
                curve.seconds[1:], curve.losses[1:], linestyle=linestyle, **style
            )
        axis.axhline(record.target, color="grey", linewidth=0.6)
        start = record.curves["adamw"][0].losses[0]
        axis.set(title=course, xscale="log", yscale="log", xlabel="seconds of the processor")
        axis.set_ylim(top=3 * start)
        axis.grid(alpha=0.3)
    figure.legend(lines.values(), lines.keys(), loc="outside lower center", ncols=5, fontsize=9)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
