"""Spectra of all blocks, to loggers that can show them, and to a file beside a CSV logger's."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ngplugin.curvature.spectrum import EDGES, LOWEST, PER_DECADE, BlockSpectrum
from ngplugin.tracking.kinds import kind
from ngplugin.tracking.metrics import prefix

FILE = "natgrad-spectra.jsonl"  # a line for each time and optimizer


def log_spectra(
    loggers: Iterable[Any], spectra: Sequence[BlockSpectrum], step: int, optimizer: int = 0
) -> None:
    """Write the spectra of one step.

    For each block wandb and TensorBoard get a histogram of the decimal logarithms, the condition
    number and the effective rank; beside the file of a `CSVLogger` a line is written. Other loggers
    have nothing to show them with.

    Args:
        loggers: a trainer's.
        spectra: of a report; if there are none, nothing is done.
        step: on the loggers' axis.
        optimizer: whose, of several.
    """
    if not spectra:
        return
    for logger in loggers:
        match kind(logger):
            case "wandb":
                _to_wandb(logger.experiment, spectra, step, optimizer)
            case "tensorboard":
                _to_tensorboard(logger.experiment, spectra, step, optimizer)
            case "csv":
                _to_file(Path(logger.log_dir) / FILE, spectra, step, optimizer)


def read_spectra(path: Path) -> Iterator[tuple[int, int, list[BlockSpectrum]]]:
    """Step, optimizer and spectra of each line; a last line that was cut off is left out."""
    for line in path.read_text().splitlines():
        try:
            found = json.loads(line)
        except json.JSONDecodeError:
            return
        yield found["step"], found["optimizer"], [_whole(block) for block in found["blocks"]]


def from_histogram(
    name: str, edges: Sequence[float], counts: Sequence[float], condition: float
) -> BlockSpectrum:
    """Of a block, from what wandb was given; of its eigenvalues only their bins are known.

    Args:
        name: of the block.
        edges: of the bins, decimal logarithms, one more than there are bins.
        counts: of eigenvalues in each.
        condition: number of the damped block.
    """
    first = 1 + round((edges[0] - LOWEST) * PER_DECADE)
    bins = [0.0] * len(EDGES)
    bins[first : first + len(counts)] = counts
    return BlockSpectrum(name, tuple(bins), math.nan, math.nan, 1.0, condition)


def _name(block: BlockSpectrum, optimizer: int) -> str:
    return f"{prefix(optimizer)}spectrum/{block.name}"


def _numbers(block: BlockSpectrum, optimizer: int) -> dict[str, float]:
    values = {"condition": block.condition, "effective_rank": block.effective_rank}
    return {
        f"{prefix(optimizer)}{name}/{block.name}": value
        for name, value in values.items()
        if math.isfinite(value)
    }


def _to_wandb(run: Any, spectra: Sequence[BlockSpectrum], step: int, optimizer: int) -> None:
    import wandb

    found: dict[str, Any] = {"trainer/global_step": step}
    for block in spectra:
        first, counts = _occupied(block)
        edges = [math.log10(edge) for edge in EDGES[first : first + len(counts) + 1]]
        if counts:
            histogram = wandb.Histogram(np_histogram=(counts, edges))  # type: ignore[arg-type]
            found[_name(block, optimizer)] = histogram
        found |= _numbers(block, optimizer)
    run.log(found)


def _to_tensorboard(
    writer: Any, spectra: Sequence[BlockSpectrum], step: int, optimizer: int
) -> None:
    for block in spectra:
        for name, value in _numbers(block, optimizer).items():
            writer.add_scalar(name, value, global_step=step)
        first, counts = _occupied(block)
        if not counts:
            continue
        edges = [math.log10(edge) for edge in EDGES[first : first + len(counts) + 1]]
        middles = [(a + b) / 2 for a, b in itertools.pairwise(edges)]
        writer.add_histogram_raw(
            _name(block, optimizer), min=edges[0], max=edges[-1], num=int(sum(counts)),
            sum=sum(n * x for n, x in zip(counts, middles, strict=True)),
            sum_squares=sum(n * x * x for n, x in zip(counts, middles, strict=True)),
            bucket_limits=edges[1:], bucket_counts=counts, global_step=step,
        )  # fmt: skip


def _to_file(path: Path, spectra: Sequence[BlockSpectrum], step: int, optimizer: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    line = {"step": step, "optimizer": optimizer, "blocks": [_short(block) for block in spectra]}
    with path.open("a") as file:
        file.write(json.dumps(line) + "\n")


def _occupied(block: BlockSpectrum) -> tuple[int, list[float]]:
    """The first bin with anything in it, and the counts from there to the last one."""
    bins = block.counts[1:]
    places = [i for i, count in enumerate(bins) if count > 0]
    return (places[0], [*bins[places[0] : places[-1] + 1]]) if places else (0, [])


def _short(block: BlockSpectrum) -> dict[str, Any]:
    """As it is written: without bins that are empty all the way, numbers to six digits."""
    first, counts = _occupied(block)
    values = asdict(block)
    del values["counts"]
    return {
        **{k: v if isinstance(v, str) else _number(v) for k, v in values.items()},
        "zeros": block.counts[0],
        "first": first,
        "counts": [_number(count) for count in counts],
    }


def _number(value: float) -> float | None:
    return float(f"{value:.6g}") if math.isfinite(value) else None


def _whole(block: Mapping[str, Any]) -> BlockSpectrum:
    counts = [0.0] * len(EDGES)
    counts[0] = block["zeros"]
    first = 1 + block["first"]
    counts[first : first + len(block["counts"])] = block["counts"]
    extremes = (block[name] for name in ("low", "high", "damped_low", "damped_high"))
    return BlockSpectrum(
        block["name"], tuple(counts), *(math.nan if x is None else x for x in extremes)
    )
