"""Optuna as the sweeper: which way its metric is better, and what is left to do of a study."""

from __future__ import annotations

import importlib.util
import warnings
from typing import Any

from hydra.experimental.callback import Callback
from omegaconf import DictConfig, OmegaConf, open_dict, read_write

from experiments.command_line import CommandLineError, errors_in_one_line, not_installed

#: Metrics of which less is better; `higher_is_better` knows those of which more is.
_LESS_IS_BETTER = ("loss", "error", "rmse", "mae", "bits", "nats", "perplexity", "seconds", "steps")
_RUNS = "runs"  # what those of a study have in common, kept with it


class Study(Callback):
    """Prepares the sweeper, which asks no questions: it minimizes whatever it is given."""

    def on_multirun_start(self, config: DictConfig, **kwargs: Any) -> None:
        """Settle the direction; of a study that a storage has, do only what is left."""
        if not config.hydra.sweeper._target_.endswith(".OptunaSweeper"):
            return
        with errors_in_one_line("train.py", always=True), read_write(config), open_dict(config):
            if importlib.util.find_spec("optuna") is None:
                raise CommandLineError(not_installed("hydra/sweeper/optuna"))
            sweeper = config.hydra.sweeper
            sweeper.direction = direction_of(config.metric, sweeper.direction)
            _leave_out_what_is_deprecated()
            if sweeper.storage is not None:
                _go_on(config)


def direction_of(metric: str, asked: Any) -> str:
    """Of the search.

    Raises:
        CommandLineError: the name of the metric does not say, or says otherwise.
    """
    from ngplugin.reporting.leaderboard import higher_is_better

    known = None
    if higher_is_better(metric):
        known = "maximize"
    elif any(word in metric.lower() for word in _LESS_IS_BETTER):
        known = "minimize"
    name = getattr(asked, "name", asked)  # the sweeper's own default is an enum's member
    if name is None and known is None:
        raise CommandLineError(
            f"metric={metric}: its name does not say which way is better, expected "
            "hydra.sweeper.direction=minimize or maximize beside it"
        )
    if name is not None and name not in ("minimize", "maximize"):
        raise CommandLineError(f"hydra.sweeper.direction={name}: expected minimize or maximize")
    if known is not None and name not in (None, known):
        raise CommandLineError(
            f"hydra.sweeper.direction={name}: of metric={metric} one wants to {known}; say so, or "
            "choose another metric"
        )
    return known or str(name)


def _leave_out_what_is_deprecated() -> None:
    """The sweeper's calls of Optuna are those of years ago; they work, and say so each time."""
    import optuna

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    warnings.filterwarnings("ignore", ".*will be removed in v6", FutureWarning)


def _go_on(config: DictConfig) -> None:
    """Count off what a study has; a study of other runs is none to go on with.

    Raises:
        CommandLineError: the storage cannot be used, or has another study of that name.
    """
    import optuna

    sweeper = config.hydra.sweeper
    runs = {
        "metric": config.metric,
        "overrides": list(config.hydra.overrides.task),
        "params": OmegaConf.to_container(sweeper.params or OmegaConf.create({})),
    }
    try:
        study = optuna.create_study(
            storage=sweeper.storage, study_name=sweeper.study_name, direction=sweeper.direction,
            load_if_exists=True,
        )  # fmt: skip
    except Exception as error:  # each storage has errors of its own
        reason = str(error).splitlines()[0]
        raise CommandLineError(f"hydra.sweeper.storage={sweeper.storage}: {reason}") from error
    sweeper.study_name = study.study_name
    before = study.user_attrs.get(_RUNS, runs)
    different = [key for key in runs if before.get(key) != runs[key]]
    if different or study.direction.name.lower() != sweeper.direction:
        key = different[0] if different else "direction"
        raise CommandLineError(
            f"hydra.sweeper.study_name={study.study_name}: the study of that name was begun with "
            f"another {key} ({before.get(key, study.direction.name.lower())}); choose another name"
        )
    study.set_user_attr(_RUNS, runs)
    there = len(study.trials)
    if there == 0:
        return
    finished = sum(trial.state.is_finished() for trial in study.trials)
    sweeper.n_trials = max(0, sweeper.n_trials - finished)
    print(f"{study.study_name} has {finished} finished trials, {sweeper.n_trials} are left to run")
    if sweeper.sampler.get("seed") is not None:
        sweeper.sampler.seed += there  # else it would propose the first ones again
    # Runs are counted from 0 each time; in the same folder they would take each other's place.
    subdir = OmegaConf.to_container(config.hydra.sweep)["subdir"]  # type: ignore[call-overload, index]
    config.hydra.overrides.hydra.append(f"hydra.sweep.subdir='{there}+{subdir}'")
