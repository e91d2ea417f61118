"""Which classes a config may name, and what they take: those that train.py needs, no other code."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from typing import Any

from hydra.utils import get_object
from omegaconf import DictConfig, OmegaConf

from experiments.command_line import CommandLineError, nearest

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
#: Arguments that come from other parts of the config, so that a value for them would be lost.
_GIVEN = {
    "model": ("shape", "classes", "inputs", "outputs", "symbols", "context"),
    "task": ("network", "optimizer", "scheduler"),
    "optimizer": ("params",),
    "schedule": ("optimizer", "steps"),
    "trainer": ("callbacks", "logger", "enable_checkpointing", "enable_progress_bar"),
}


def check_targets(cfg: DictConfig) -> None:
    """Refuse a config that names anything else, or an argument that it does not have.

    What is named has to be defined there, too: a module's own imports are no part of it. Of
    `ngplugin` it is what `import ngplugin` has; of Lightning and torch it is classes.

    Raises:
        CommandLineError: with the key, what it names, and what it may.
    """
    container = OmegaConf.to_container(cfg, resolve=True)
    assert isinstance(container, dict)
    container.pop("hydra", None)  # Hydra's own classes, which it has made by now
    for key, node in _nodes(container, ""):
        target = str(node["_target_"])
        beginning = next((b for b in _ALLOWED if target.startswith(b)), None)
        if beginning is None or not _is_of(target, beginning):
            choices = ", ".join(b.rstrip(".") for b in _ALLOWED)
            raise CommandLineError(
                f"{key}_target_={target}: a config may name only what train.py needs, from "
                f"{choices}; experiments/targets.py has the list"
            )
        _check_arguments(key, target, node)


def _is_of(target: str, beginning: str) -> bool:
    if beginning == "ngplugin." and target.count(".") > 1:
        return False
    found = _found(target)
    if found is None:  # it does not exist, which is told where it is made
        return True
    of_others = beginning.startswith(("lightning", "torch"))
    return f"{getattr(found, '__module__', '')}.".startswith(_ALLOWED[beginning]) and (
        isinstance(found, type) or not of_others
    )


def _found(target: str) -> Any:
    try:
        return get_object(target)
    except Exception:
        return None


def _check_arguments(key: str, target: str, node: Mapping[str, Any]) -> None:
    given = _GIVEN.get(key.rstrip("."), ())
    for name in (n for n in node if n in given):
        raise CommandLineError(f"{key}{name}: train.py gives it, from other parts of the config")
    try:
        parameters = inspect.signature(_found(target)).parameters
    except (TypeError, ValueError):
        return
    for name in (name for name, value in node.items() if value is None and name in parameters):
        annotation = str(parameters[name].annotation)
        if not any(word in annotation for word in ("None", "Optional", "Any", "empty")):
            raise CommandLineError(f"{key}{name}=null: expected a value")
    if any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
        return
    names = [name for name in parameters if name not in given]
    for name in (str(n) for n in node if not str(n).startswith("_") and n not in names):
        choices = ", ".join(names) or "none"
        raise CommandLineError(
            f"{key}{name}: {target} has no such argument, expected one of {choices}"
            f"{nearest(name, names)}"
        )


def _nodes(node: Any, key: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """Everything in a config that names a class, and its key with a dot behind it."""
    if isinstance(node, dict):
        if "_target_" in node:
            yield key, node
        for name, value in node.items():
            yield from _nodes(value, f"{key}{name}.")
    elif isinstance(node, list):
        for i, value in enumerate(node):
            yield from _nodes(value, f"{key}{i}.")
