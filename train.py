"""Train a network: `python train.py optimizer=natgrad`; `--help` lists all there is to choose."""

from __future__ import annotations

import sys
from pathlib import Path

import hydra
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig

from experiments.command_line import CommandLineError, check, errors_in_one_line

CONF = Path(__file__).parent / "conf"


@hydra.main(version_base="1.3", config_path="conf", config_name="train")
def job(cfg: DictConfig) -> float:
    """One run; returns `cfg.metric` for sweepers."""
    # Here, because it takes seconds: a misspelled word is told at once.
    from experiments.summary import show_results, write_report
    from experiments.training import train

    hydra_config = HydraConfig.get()
    folder = Path(hydra_config.runtime.output_dir)
    with errors_in_one_line("train.py"):
        results = train(cfg, folder)
        chosen = hydra_config.runtime.choices
        title = f"{chosen.optimizer} on {chosen.data} with {chosen.model}, seed {cfg.seed}"
        page = write_report(title, folder) if cfg.report else None
        show_results(title, results, folder, page)
        numbers = {name for name, value in results.items() if isinstance(value, (int, float))}
        if cfg.metric not in numbers:
            choices = ", ".join(sorted(numbers))
            raise CommandLineError(f"metric={cfg.metric}: expected one of {choices}")
    return float(results[cfg.metric])


def main() -> None:
    """Check the command line, then run one job, or with -m many."""
    with errors_in_one_line("train.py"):
        check(sys.argv[1:], CONF, "train")
        job()


if __name__ == "__main__":
    main()
