"""Which runs of a sweep need not be run again."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from experiments.command_line import CommandLineError

CONFIG, RESULTS = "config.yaml", "results.json"
_AFTERWARDS = ("metric", "report")  # used once a run has ended; another value changes nothing in it
_HYDRAS_OWN = (".hydra", "train.log")  # written before a run begins
_ASIDE = "interrupted-"


def finished_results(cfg: DictConfig, folder: Path) -> dict[str, Any] | None:
    """What the same run came to, if it came to its end in this folder; None if it is to be run.

    What one that did not come to its end has left goes into a folder of its own, `interrupted-1`
    and so on, for nothing of it to be taken for the new one's.

    Raises:
        CommandLineError: a run with another config came to its end here.
    """
    if not (folder / CONFIG).exists():
        return None
    if not (folder / RESULTS).exists():
        if _first_process():
            _set_aside(folder)
        return None
    before = _flat(OmegaConf.to_container(OmegaConf.load(folder / CONFIG)))
    now = _flat(OmegaConf.to_container(OmegaConf.create(OmegaConf.to_yaml(cfg, resolve=True))))
    for key in {**before, **now}:
        if before.get(key) != now.get(key) and key not in _AFTERWARDS:
            raise CommandLineError(
                f"{folder}: the finished run in it had {key}={before.get(key)}, not "
                f"{now.get(key)}; choose another hydra.sweep.dir, or delete that folder"
            )
    return dict(json.loads((folder / RESULTS).read_text()))


def _set_aside(folder: Path) -> None:
    found = [p for p in folder.iterdir() if not p.name.startswith((*_HYDRAS_OWN, _ASIDE))]
    place = folder / f"{_ASIDE}{1 + len(list(folder.glob(f'{_ASIDE}*')))}"
    place.mkdir()
    for path in found:
        path.rename(place / path.name)


def _first_process() -> bool:
    """Of a run; Lightning starts the others from within it, a Slurm cluster beside it."""
    return os.environ.get("LOCAL_RANK", os.environ.get("SLURM_PROCID", "0")) == "0"


def _flat(node: Any) -> dict[str, Any]:
    return dict(_leaves(node, ""))


def _leaves(node: Any, prefix: str) -> Iterator[tuple[str, Any]]:
    for name, value in node.items():
        if isinstance(value, Mapping) and value:
            yield from _leaves(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value
