"""The figure of `docs/scaling.md`: memory, time, and what more ranks do to a refresh."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from experiments.scaling.page import LEVERS, Study
from experiments.scaling.protocol import Protocol

# Okabe & Ito's colours, which people with any colour vision can tell apart.
_COLOURS = ("#999999", "#0072B2", "#E69F00", "#009E73", "#CC79A7", "#D55E00", "#56B4E9")
_MOST_GB = 200  # that are drawn; higher bars are cut off and say how high they are
_MANY = tuple(2**i for i in range(11))


def plot(path: Path, study: Study) -> None:
    """Draw and save it."""
    import matplotlib

    matplotlib.use("agg")  # no window
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(
        1, 3, figsize=(15, 4.8), layout="constrained", width_ratios=(1, 1.25, 1)
    )
    _memory(axes[0], study)
    _time(axes[1], study)
    _refresh(axes[2], study)
    for axis in axes:
        axis.spines[["top", "right"]].set_visible(False)
        axis.tick_params(labelsize=9)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def _memory(axis: Any, study: Study) -> None:
    """Stacked, AdamW and Kronecker side by side."""
    places = range(len(study.models))
    for side, structure in ((-0.2, "adamw"), (0.2, "kronecker")):
        costs = [study.cost(m, structure, 64) for m in study.models.values()]  # type: ignore[arg-type]
        bottoms = [0.0] * len(costs)
        for colour, part in zip(_COLOURS[1:4], costs[0].memory, strict=True):
            heights = [c.memory[part] / 1e9 for c in costs]
            label = part if structure == "kronecker" else None
            axis.bar(
                [x + side for x in places], heights, 0.36, bottoms, color=colour, label=label,
                alpha=1.0 if structure == "kronecker" else 0.55,
            )  # fmt: skip
            bottoms = [b + h for b, h in zip(bottoms, heights, strict=True)]
        for x, height in zip(places, bottoms, strict=True):
            if height > _MOST_GB:
                axis.text(x + side, _MOST_GB, f"{height:.0f}", fontsize=9, ha="center", va="bottom")
    axis.set_ylim(0, _MOST_GB)
    axis.axhline(80, color="black", linewidth=1, linestyle="--")
    axis.text(-0.45, 82, "80 GB", fontsize=9)
    axis.set_xticks(places, [m.name for m in study.models.values()], rotation=30, ha="right")
    axis.set_ylabel("GB on each of 64 ranks")
    axis.set_title("Memory: AdamW (pale), Kronecker blocks", fontsize=10, pad=18)
    axis.legend(fontsize=8, frameon=False, loc="upper left", bbox_to_anchor=(0.0, 1.0))


#: What is drawn together.
_PARTS = {
    "forward and backward": ("forward and backward",),
    "update": ("update",),
    "statistics": ("statistics",),
    "KL": ("KL",),
    "condition numbers": ("condition numbers",),
    "refresh": ("refresh",),
    "sending": ("gradients", "exchange"),
}


def _time(axis: Any, study: Study) -> None:
    """Stacked, over AdamW's step; as it is, and with settings."""
    places = range(len(study.models))
    for side, lever, hatch in ((-0.2, LEVERS[0], None), (0.2, LEVERS[4], "///")):
        changed = study.with_lever(lever)
        costs = [changed.cost(m, "kronecker", 8) for m in study.models.values()]
        units = [study.cost(m, "adamw", 8).time for m in study.models.values()]
        bottoms = [0.0] * len(costs)
        for colour, (name, parts) in zip(_COLOURS, _PARTS.items(), strict=False):
            heights = [
                sum(c.seconds[part] for part in parts) / unit
                for c, unit in zip(costs, units, strict=True)
            ]
            axis.bar(
                [x + side for x in places], heights, 0.36, bottoms, color=colour, hatch=hatch,
                label=None if hatch else name, edgecolor="white", linewidth=0.3,
            )  # fmt: skip
            bottoms = [b + h for b, h in zip(bottoms, heights, strict=True)]
    axis.axhline(1, color="black", linewidth=1, linestyle="--")
    axis.set_xticks(places, [m.name for m in study.models.values()], rotation=30, ha="right")
    axis.set_ylabel("time of a step over AdamW's, 8 ranks")
    axis.set_title("Time: as it is, and with rarer statistics in TF32 (hatched)", fontsize=10)
    axis.set_ylim(top=1.25 * axis.get_ylim()[1])  # for the legend
    axis.legend(fontsize=8, frameon=False, ncols=3, loc="upper left")


def _refresh(axis: Any, study: Study) -> None:
    """Seconds of a whole refresh against the number of ranks."""
    changed = Study(study.record, study.device, Protocol(refresh_every=1), study.models)
    drawn: list[tuple[Any, list[float]]] = []
    colours = iter(_COLOURS[1:])
    for model in study.models.values():
        costs = [changed.cost(model, "kronecker", ranks) for ranks in _MANY]
        sent = [c.seconds["exchange"] for c in costs]
        both = [c.seconds["refresh"] + c.seconds["exchange"] for c in costs]
        same = next((line for line, other in drawn if _alike(both, other)), None)
        if same is not None:
            same.set_label(f"{same.get_label()}, {model.name}")
            continue
        colour = next(colours)
        (line,) = axis.plot(_MANY, both, color=colour, label=model.name, marker="o", markersize=3)
        axis.plot(_MANY[1:], sent[1:], color=colour, linestyle=":", linewidth=1.2)
        drawn.append((line, both))
    axis.set(xscale="log", yscale="log", xlabel="ranks", ylabel="seconds")
    axis.set_xticks([1, 8, 64, 1024], ["1", "8", "64", "1,024"])
    axis.minorticks_off()
    axis.grid(alpha=0.3)
    axis.set_title("One refresh (dotted: of that, sending)", fontsize=10)
    axis.legend(fontsize=8, frameon=False)


def _alike(one: list[float], other: list[float]) -> bool:
    """Whether two lines would hide one another."""
    return all(abs(a - b) < 0.05 * b for a, b in zip(one, other, strict=True))
