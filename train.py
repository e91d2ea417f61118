"""Train a network: `python train.py optimizer=natgrad`; `--help` lists all there is to choose."""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException

from experiments.command_line import CommandLineError, check, errors_in_one_line, one_line
from experiments.finished import finished_results
from experiments.sweep import leaderboard_of_what_there_is

CONF = Path(__file__).parent / "conf"
_begun: list[Path] = []  # folders of this process's runs


@hydra.main(version_base="1.3", config_path="conf", config_name="train")
def job(cfg: DictConfig) -> float | None:
    """One run; returns `cfg.metric` for sweepers, None if it is not finite."""
    hydra_config = HydraConfig.get()
    folder = Path(hydra_config.runtime.output_dir)
    _begun.append(folder)
    with errors_in_one_line("train.py"):
        in_sweep = hydra_config.mode == RunMode.MULTIRUN
        results = finished_results(cfg, folder) if in_sweep else None
        if results is not None:
            print(f"Finished before, not run again: {folder}")
        else:
            # Here, because it takes seconds: a misspelled word is told at once.
            from experiments.summary import show_results, write_report
            from experiments.training import train

            results = train(cfg, folder)
            chosen = hydra_config.runtime.choices
            title = f"{chosen.optimizer} on {chosen.data} with {chosen.model}, seed {cfg.seed}"
            page = write_report(title, folder) if cfg.report else None
            show_results(title, results, folder, page)
        return _metric(cfg.metric, results)


def _metric(name: str, results: Mapping[str, Any]) -> float | None:
    # A number that is not finite is null in results.json.
    if not isinstance(results.get(name, ""), (int, float, type(None))):
        numbers = (n for n, value in results.items() if isinstance(value, (int, float)))
        raise CommandLineError(f"metric={name}: expected one of {', '.join(sorted(numbers))}")
    value = results[name]
    if value is None or not math.isfinite(value):
        return None
    return float(results.get("stopped/counts_as", value))


def main() -> None:
    """Check the command line, rehearse what it asks for, then run one job, or with -m many."""
    with errors_in_one_line("train.py"):
        runs = check(sys.argv[1:], CONF, "train")
        if runs:
            from experiments.rehearsal import rehearse  # takes seconds to import

            in_sweep = bool({"-m", "--multirun"} & set(sys.argv))
            rehearse(runs, CONF, "train", in_sweep)
        with leaderboard_of_what_there_is(sys.argv[1:]):
            _start()


def _start() -> None:
    _begun.clear()
    try:
        job()
    except (CommandLineError, HydraException, OmegaConfBaseException, OSError):
        raise
    except Exception as error:
        if _begun:
            raise
        raise CommandLineError(f"hydra: {one_line(error)}") from error  # as it prepares


if __name__ == "__main__":
    main()
