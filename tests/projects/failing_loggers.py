"""Fits whose loggers fail from the sixth step on, each in turn; one line of JSON each.

A program of its own: what fails is all that this process writes, and the service of wandb.
"""

from __future__ import annotations

import json
import os
import resource
import signal
import sys
import time
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import lightning as L
import torch
import wandb
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger, WandbLogger
from torch.utils.data import DataLoader
from wandb.sdk.wandb_run import Run

from ngplugin import NaturalGradient
from ngplugin.reporting import wandb_file
from tests.oracle import flat
from tests.projects.wandb_server import WandbServer
from tests.small_fits import POINTS, Points, quiet

STEPS, FAULT, MENDED = 24, 5, 20


class Happening(L.Callback):
    """Does something before a step."""

    def __init__(self, acts: Mapping[int, Callable[[], Any]]) -> None:
        self.acts = acts

    def on_train_batch_start(self, trainer: L.Trainer, *_: Any) -> None:
        if trainer.global_step in self.acts:
            self.acts[trainer.global_step]()


def fit(loggers: Any, acts: Mapping[int, Callable[[], Any]]) -> dict[str, Any]:
    module, error = Points(), None
    natural = NaturalGradient(show_coverage=False, show_summary=False, spectrum_every=10)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer = quiet(natural, Happening(acts), max_steps=STEPS, logger=loggers)
        try:
            trainer.fit(module, DataLoader(POINTS, batch_size=16))
        except OSError as raised:
            error = str(raised)
        allow()
    told = [str(each.message) for each in caught]
    return {
        "steps": len(module.losses),
        "weights": flat([*module.parameters()]).tolist(),
        "told": [text for text in told if text.startswith("ngplugin:")],
        "raised": error,
    }


def fill() -> None:
    """No file of this process can grow any more, as on a disk without room."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, resource.RLIM_INFINITY))


def allow() -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))


def steps_written() -> int:
    """Of which there are metrics of ours in what wandb has written, once it has."""
    assert wandb.run is not None
    file, until, count = Path(wandb.run.settings.sync_file), time.monotonic() + 20, 0
    while count < STEPS and time.monotonic() < until:
        time.sleep(0.1)
        count = sum("natgrad/kl_predicted" in row for row in wandb_file.read(file)[0])
    return count


def refuse(*_: Any, **__: Any) -> None:
    raise ConnectionError("Network is unreachable")


def without_the_server(server: WandbServer) -> None:
    """Nor does wandb ask it for leave to log a table, for which it would wait for 20 seconds."""
    until = time.monotonic() + 20
    while not server.was_sent_metrics() and time.monotonic() < until:
        time.sleep(0.05)
    server.vanish()
    Run._assert_can_log_artifact = lambda *_: None  # type: ignore[method-assign]


def kill_the_service() -> None:
    """Of wandb, which writes its files and sends them; a process that this one has started."""
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            parent = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
            command = (folder / "cmdline").read_bytes()
        except OSError:  # it has ended
            continue
        if parent == os.getpid() and b"wandb-core" in command:
            os.kill(int(folder.name), signal.SIGKILL)


def main(folder: str) -> None:
    torch.set_num_threads(1)

    def offline() -> WandbLogger:
        return WandbLogger(save_dir=folder, offline=True, mode="offline", project="test")

    def online() -> WandbLogger:
        settings = wandb.Settings(base_url=server.address, api_key=40 * "0")
        return WandbLogger(save_dir=folder, project="test", mode="online", settings=settings)

    def csv(name: str) -> CSVLogger:
        return CSVLogger(folder, name, flush_logs_every_n_steps=1)

    server = WandbServer()
    cases: dict[str, tuple[Callable[[], Any], dict[int, Callable[[], Any]]]] = {
        "none": (lambda: False, {}),
        "csv, no room": (lambda: csv("full"), {FAULT: fill}),
        "csv, no room for a while": (lambda: csv("while"), {FAULT: fill, MENDED: allow}),
        "tensorboard, no room": (lambda: TensorBoardLogger(folder, "board"), {FAULT: fill}),
        "wandb, no room": (offline, {FAULT: fill}),
        "wandb, finished by somebody": (offline, {FAULT: wandb.finish}),
        "wandb, no network": (offline, {FAULT: lambda: setattr(Run, "log", refuse)}),
        "wandb, server gone": (online, {FAULT: lambda: without_the_server(server)}),
        "wandb, service killed": (lambda: WandbLogger(), {FAULT: kill_the_service}),  # of that run
    }
    log = Run.log
    for name, (make, acts) in cases.items():
        found = fit(make(), acts)
        Run.log = log
        if name == "wandb, server gone":  # to finish, wandb would try for hours to send
            found |= {"sent": server.was_sent_metrics(), "written": steps_written()}
        elif name.startswith("wandb") and "killed" not in name:
            wandb.finish()
        print(json.dumps({"case": name, **found}), flush=True)
    os._exit(0)  # wandb would wait for its service


if __name__ == "__main__":
    main(sys.argv[1])
