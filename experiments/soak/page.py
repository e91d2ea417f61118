"""The soak's page of the documentation, from its results."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

_JUDGED = ("train loss", "train accuracy", "val accuracy", "test accuracy")
_HELD_OUT = 1000  # images, of validation and test together
_MIB = 2**20


def page(results: dict[str, Any]) -> str:
    """docs/soak.md."""
    return "\n".join(_lines(results)) + "\n"


def _lines(results: dict[str, Any]) -> Iterator[str]:
    clean, faulty = results["clean"], results["faulty"]
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
    yield f"| | {' | '.join(results)} |"
    yield "|---|" + "--:|" * len(results)
    for name in _JUDGED:
        yield f"| {name} | " + " | ".join(_number(run[name]) for run in results.values()) + " |"
    yield "| processes | " + " | ".join(str(run["processes"]) for run in results.values()) + " |"
    yield ""
    yield (
        "Both are judged with running statistics of BatchNorm taken anew over the training images. "
        f"Of the {_HELD_OUT:,} images held out, {_held_out(faulty):.1%} are recognised after the "
        f"faulty run and {_held_out(clean):.1%} after the clean one; of so many the standard error "
        f"of the difference is {_error(clean, faulty):.1%}."
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
    yield (
        "A fault of curvature counts where statistics or inverses were due in that step. What a "
        "process had counted in its last steps before a `kill -9` is lost."
    )
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


def _number(value: float) -> str:
    return f"{value:.3g}" if value < 0.1 else f"{value:.3f}"


def _held_out(run: dict[str, Any]) -> float:
    return float(run["val accuracy"] + run["test accuracy"]) / 2


def _error(*runs: dict[str, Any]) -> float:
    return math.sqrt(sum(p * (1 - p) for p in map(_held_out, runs)) / _HELD_OUT)
