"""Which classes a config may name: those that train.py needs, and no other code."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from hydra.utils import get_object
from omegaconf import DictConfig, OmegaConf

from experiments.command_line import CommandLineError

#: What a name begins with, and the module that the object itself is from.
_ALLOWED = {
    "experiments.tasks.": "experiments.tasks.",
    "experiments.muon.": "experiments.muon",
    "experiments.median_stopping.": "experiments.median_stopping",
    "ngplugin.": "ngplugin.",
    "lightning.Trainer": "lightning.pytorch.trainer.",
    "lightning.pytorch.callbacks.": "lightning.pytorch.callbacks.",
    "lightning.pytorch.loggers.": "lightning.pytorch.loggers.",
    "lightning.pytorch.profilers.": "lightning.pytorch.profilers.",
    "lightning.pytorch.strategies.": "lightning.pytorch.strategies.",
    "lightning.pytorch.plugins.": "lightning.pytorch.plugins.",
    "torch.optim.": "torch.optim.",
    "torch.nn.": "torch.nn.modules.",
}


def check_targets(cfg: DictConfig) -> None:
    """Refuse a config that names anything else, before anything is made of it.

    What is named has to be defined there, too: a module's own imports are no part of it. Of
    `ngplugin` it is what `import ngplugin` has; of Lightning and torch it is classes.

    Raises:
        CommandLineError: with the key, what it names, and what it may.
    """
    container = OmegaConf.to_container(cfg, resolve=True)
    assert isinstance(container, dict)
    container.pop("hydra", None)  # Hydra's own classes, which it has made by now
    for key, target in _targets(container, ""):
        beginning = next((b for b in _ALLOWED if target.startswith(b)), None)
        if beginning is None or not _is_of(target, beginning):
            choices = ", ".join(b.rstrip(".") for b in _ALLOWED)
            raise CommandLineError(
                f"{key}={target}: a config may name only what train.py needs, from {choices}; "
                "experiments/targets.py has the list"
            )


def _is_of(target: str, beginning: str) -> bool:
    if beginning == "ngplugin." and target.count(".") > 1:
        return False
    try:
        found = get_object(target)
    except Exception:  # it does not exist, which is told where it is made
        return True
    of_others = beginning.startswith(("lightning", "torch"))
    return f"{found.__module__}.".startswith(_ALLOWED[beginning]) and (
        isinstance(found, type) or not of_others
    )


def _targets(node: Any, key: str) -> Iterator[tuple[str, str]]:
    if isinstance(node, dict):
        if "_target_" in node:
            yield f"{key}_target_", str(node["_target_"])
        for name, value in node.items():
            yield from _targets(value, f"{key}{name}.")
    elif isinstance(node, list):
        for i, value in enumerate(node):
            yield from _targets(value, f"{key}{i}.")
