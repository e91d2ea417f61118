"""Trains a project's own module with its own optimizer, and again with one callback more.

A trial is a function that does what a user of the project would do: make module, data and trainer,
and fit. It is called twice with the same seed, the second time with `NaturalGradient()` among the
callbacks, its options at their defaults unless the trial has others. The training loss and the
processor's time of this process, on one thread, are noted after every step; both, with the table of
parameters and blocks and all warnings that came with the callback only, go to
`experiments/results/trials/`.
"""

from __future__ import annotations

import argparse
import json
import logging
import platform
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Sequence
from contextlib import chdir
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback

from ngplugin import NaturalGradient

RESULTS = Path(__file__).parents[1] / "results" / "trials"
QUIET = {  # what every trial's Trainer is given besides
    "accelerator": "cpu",
    "logger": False,
    "enable_checkpointing": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
}

Fit = Callable[[list[Callback]], None]


@dataclass(frozen=True)
class Trial:
    """One module of a project.

    Attributes:
        name: of the trial and its results.
        library: as PyPI calls it.
        task: what is learned, and the loss, in a few words.
        fit: makes everything anew and trains, with these callbacks.
        options: of the callback; the defaults where none are given.
    """

    name: str
    library: str
    task: str
    fit: Fit
    options: dict[str, Any] = field(default_factory=dict)


class LossCurve(Callback):
    """Notes the training loss, before each step, and the processor's time after it."""

    def __init__(self) -> None:
        self.losses: list[float] = []
        self.seconds: list[float] = []

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Start the clock."""
        self._start = time.process_time()

    def on_train_batch_end(
        self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """One step more."""
        self.seconds.append(time.process_time() - self._start)
        self.losses.append(float(outputs["loss"]))


@dataclass
class Run:
    """What one fit gave.

    Attributes:
        losses: of the training batches, in order.
        seconds: of the processor, since training started.
        warnings: each text once.
        error: what it ended with, if it was an exception; the traceback is printed.
    """

    losses: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    error: str | None = None


def _fit(fit: Fit, callbacks: list[Callback], seed: int) -> Run:
    curve, run = LossCurve(), Run()
    L.seed_everything(seed, workers=True, verbose=False)
    with (
        warnings.catch_warnings(record=True) as caught,
        tempfile.TemporaryDirectory() as folder,
        chdir(folder),
    ):
        warnings.simplefilter("always")
        try:
            fit([*callbacks, curve])
        except Exception as error:
            traceback.print_exc()
            run.error = f"{type(error).__name__}: {error}"
    run.losses, run.seconds = curve.losses, [round(s, 4) for s in curve.seconds]
    run.warnings = list(dict.fromkeys(str(w.message) for w in caught))
    return run


def run(trial: Trial, seed: int) -> dict[str, Any]:
    """Train twice; returns what is written to the trial's file."""
    own = _fit(trial.fit, [], seed)
    callback = NaturalGradient(show_coverage=False, **trial.options)
    natural = _fit(trial.fit, [callback], seed)
    result: dict[str, Any] = {
        "trial": trial.name,
        "task": trial.task,
        "library": f"{trial.library} {version(trial.library)}",
        "python": platform.python_version(),  # whose help texts are the words of the demos
        "torch": torch.__version__,
        "lightning": version("lightning"),
        "seed": seed,
        "options": trial.options,
    }
    natural.warnings = [text for text in natural.warnings if text not in own.warnings]
    own.warnings = []
    if natural.losses:
        coverage = callback.coverage()
        result["totals"] = coverage.totals()
        result["sources"] = coverage.sources()
        result["without_block"] = {
            row.parameter: row.reason for row in coverage.rows if row.block == "none"
        }
        result["coverage"] = [asdict(row) for row in coverage.rows]
        result["summary"] = callback.summary()
    return {**result, "own": asdict(own), "natural": asdict(natural)}


def smoothed(losses: Sequence[float], window: int) -> list[float]:
    """The mean of each loss and those before it, up to `window` of them."""
    parts = (losses[max(0, i + 1 - window) : i + 1] for i in range(len(losses)))
    return [sum(part) / len(part) for part in parts]


def verdict(result: dict[str, Any]) -> str:
    """One line for people."""
    own, natural = result["own"], result["natural"]
    if natural["error"]:
        return natural["error"].splitlines()[0]
    window = max(1, len(own["losses"]) // 10)
    ends = [smoothed(r["losses"], window)[-1] for r in (own, natural)]
    reached = smoothed(natural["losses"], window)
    step = next((i + 1 for i, loss in enumerate(reached) if loss <= ends[0]), None)
    return (
        f"loss {own['losses'][0]:.4g} -> {ends[0]:.4g} with its own optimizer "
        f"({own['seconds'][-1]:.1f} s), {ends[1]:.4g} with the callback "
        f"({natural['seconds'][-1]:.1f} s); {len(own['losses'])} steps, its own end "
        f"{'never reached' if step is None else f'reached at step {step}'}"
    )


def main(trials: Sequence[Trial]) -> None:
    """Run a file's trials, or those named on the command line."""
    names = [trial.name for trial in trials]
    parser = argparse.ArgumentParser()
    parser.add_argument("only", nargs="*", help=f"of {', '.join(names)}; default: all of them")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    if unknown := set(arguments.only) - set(names):
        parser.error(f"no trial is called {', '.join(unknown)}; there are {', '.join(names)}")
    torch.set_num_threads(1)
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    RESULTS.mkdir(parents=True, exist_ok=True)
    for trial in trials:
        if arguments.only and trial.name not in arguments.only:
            continue
        result = run(trial, arguments.seed)
        (RESULTS / f"{trial.name}.json").write_text(json.dumps(result, indent=1) + "\n")
        print(f"{trial.name} ({result['library']}): {verdict(result)}", flush=True)
        if "totals" in result:
            print(f"  {result['totals']}\n  {result['sources']}")
            for name, reason in result["without_block"].items():
                print(f"  no block: {name}: {reason}")
        for text in result["natural"]["warnings"]:
            print(f"  warned: {text}")
