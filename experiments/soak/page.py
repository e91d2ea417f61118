"""The soak's page of the documentation, from its results."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

_JUDGED = ("train loss", "train accuracy", "val accuracy", "test accuracy")
_LONG = ("clean", "faulty")
_OPTIMIZERS = {"natgrad": "natural gradient", "adamw": "AdamW", "sgd": "SGD with momentum"}
_HELD_OUT = 1000  # images, of validation and test together
_MIB = 2**20


def page(results: dict[str, Any]) -> str:
    """docs/soak.md."""
    return "\n".join(_lines(results)) + "\n"


def held_out(run: dict[str, Any]) -> float:
    """Share of the images held out that are recognised."""
    return float(run["val accuracy"] + run["test accuracy"]) / 2


def standard_error(*runs: dict[str, Any]) -> float:
    """Of the difference of two such shares."""
    return math.sqrt(sum(p * (1 - p) for p in map(held_out, runs)) / _HELD_OUT)


def _lines(results: dict[str, Any]) -> Iterator[str]:
    clean, faulty = (results[name] for name in _LONG)
    share = sum(faulty["faults"].values()) / faulty["steps"]
    yield "# A long run in which much goes wrong"
    yield ""
    yield (
        f"The convolutional network on 5,000 digits, batches of 32, for {faulty['steps']:,} steps "
        "with natural gradient and a rate that falls to zero. In the faulty run there is a fault "
        f"in {share:.1%} of the steps, of a kind drawn at random, and its process is ended "
        f"{sum(faulty['ended'].values())} times at random moments, to go on from the last "
        "checkpoint, one an epoch. `make soak` runs it again; this page is written by it."
    )
    yield ""
    yield f"| | {' | '.join(_LONG)} |"
    yield "|---|--:|--:|"
    for name in _JUDGED:
        yield f"| {name} | {_number(clean[name])} | {_number(faulty[name])} |"
    yield f"| processes | {clean['processes']} | {faulty['processes']} |"
    yield ""
    yield (
        f"Of the {_HELD_OUT:,} images held out, {held_out(faulty):.1%} are recognised after the "
        f"faulty run and {held_out(clean):.1%} after the clean one; of so many the standard error "
        f"of the difference is {standard_error(clean, faulty):.1%}."
    )
    yield ""
    yield "## What went wrong"
    yield ""
    yield "| in the run | times |"
    yield "|---|--:|"
    for name, count in sorted(faulty["faults"].items()):
        yield f"| {name} | {count:,} |"
    for name, count in sorted(faulty["ended"].items()):
        yield f"| the process ended by {name} | {count} |"
    yield ""
    yield "A fault of curvature counts where statistics or inverses were due in that step."
    yield ""
    yield from _nonsense(results)
    yield ""
    yield "## Memory"
    yield ""
    yield "Of the longest process of the clean run:"
    yield ""
    yield "| step | tensors alive | MiB resident |"
    yield "|--:|--:|--:|"
    memory = clean["memory"]
    for i in sorted({0, 1, *range(3, len(memory), 4), len(memory) - 1}):
        seen = memory[i]
        yield f"| {seen['step']:,} | {seen['tensors']:,} | {seen['bytes'] / _MIB:.0f} |"
    yield ""
    yield (
        "What is added are the spectra for the pictures at the end: of each block some 5 KB every "
        "`spectrum_every` steps, and of the steps' reports some 0.5 KB each. Both are thinned out, "
        "so that a run of any length keeps 4,000 of each at most, some 22 MiB."
    )


def _nonsense(results: dict[str, Any]) -> Iterator[str]:
    runs = {name: results[f"nonsense, {name}"] for name in _OPTIMIZERS}
    first = next(iter(runs.values()))
    with_ = [_WITH[kind] for kind in sorted(first["faults"])]
    yield "## Batches that are numbers and mean nothing"
    yield ""
    yield (
        "A batch of nan teaches nothing and is left out. From one with "
        f"{', '.join(with_[:-1])} or {with_[-1]} every optimizer learns. In "
        f"{first['steps']:,} steps of the same network some {_rounded(runs)} batches are of these "
        "kinds. Rates are those of `conf/optimizer`, nothing was tuned for this. All three are "
        "judged with the running averages of BatchNorm taken anew over the training images: an "
        "input of 1e30 leaves averages from which they do not recover, whatever the optimizer."
    )
    yield ""
    yield "| | train loss | train accuracy | held out |"
    yield "|---|--:|--:|--:|"
    for name, run in runs.items():
        judged = [_number(run["train loss"]), _number(run["train accuracy"])]
        yield f"| {_OPTIMIZERS[name]} | {' | '.join(judged)} | {held_out(run):.1%} |"


_WITH = {
    "an input of 1e30": "an image of 1e30",
    "identical examples": "the same image 32 times",
    "one example": "one image",
    "seven examples": "seven images",
}


def _rounded(runs: dict[str, Any]) -> int:
    counts = [sum(run["faults"].values()) for run in runs.values()]
    return 10 * round(sum(counts) / len(counts) / 10)


def _number(value: float) -> str:
    return f"{value:.3g}" if value < 0.1 else f"{value:.3f}"
