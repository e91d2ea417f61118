"""What is wrong with a command line, told in one line that names the choices.

Hydra tells it in many lines, after it has started; OmegaConf accepts a word where a number is
needed. So every override is checked against the configs before Hydra sees it, and what can only
be known when an object is made is told in the same way.
"""

from __future__ import annotations

import contextlib
import errno
import itertools
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException, InstantiationException, MissingConfigException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

# With other configs, or when Hydra only talks to a shell, there is nothing to check against.
_NOT_OURS = ("--config-path", "-cp", "--config-name", "-cn", "--config-dir", "-cd")
_NOT_OURS += ("--shell-completion", "-sc")
#: Of plugins that configs name: what pip is to be told.
_PLUGINS = {
    "hydra/sweeper/optuna": "optuna; pip install --no-deps hydra-optuna-sweeper",
    "hydra/launcher/joblib": "hydra-joblib-launcher",
    "hydra/launcher/submitit_local": "hydra-submitit-launcher",
    "hydra/launcher/submitit_slurm": "hydra-submitit-launcher",
}
_TAKE_A_WORD = ("--info", "-i", "--cfg", "-c", "--package", "-p")
_FULL_ERROR = "HYDRA_FULL_ERROR"
_TRACEBACKS = os.environ.get(_FULL_ERROR) == "1"  # asked for by the user, before we set it


class CommandLineError(Exception):
    """The user asked for something that cannot be; the message says what and what can."""


@contextlib.contextmanager
def errors_in_one_line(program: str, *, always: bool = False) -> Iterator[None]:
    """End the process with one line, and status 2, if what is inside fails by the user's choice.

    So it does where a file or folder cannot be written. With HYDRA_FULL_ERROR=1 the traceback is
    left alone. Errors of other kinds always have theirs.

    Args:
        program: its name.
        always: with HYDRA_FULL_ERROR=1 too, for Hydra's callbacks, whose errors become warnings.
    """
    if _TRACEBACKS and not always:
        yield
        return
    before = os.environ.get(_FULL_ERROR)
    os.environ[_FULL_ERROR] = "1"  # else Hydra prints what it is meant to raise
    try:
        yield
    except (CommandLineError, HydraException, OmegaConfBaseException, OSError) as error:
        if not _is_the_users(error):
            raise
        sys.stderr.write(f"{program}: error: {_one_line(error)}\n")
        raise SystemExit(2) from None
    finally:
        os.environ.pop(_FULL_ERROR)
        if before is not None:
            os.environ[_FULL_ERROR] = before


def _is_the_users(error: Exception) -> bool:
    if isinstance(error, HydraException) or not isinstance(error, OSError):  # one of its is both
        return True
    return error.filename is not None or error.errno in (errno.ENOSPC, errno.EDQUOT)


@contextlib.contextmanager
def made_from(key: str) -> Iterator[None]:
    """Blame a value that an object's constructor refuses on the part of the config it came from.

    Raises:
        CommandLineError: what is inside refused a value, or missed a file or package.
    """
    try:
        yield
    except (
        InstantiationException,
        ValueError,
        TypeError,
        LookupError,
        RuntimeError,
        OSError,
        ImportError,
    ) as error:
        raise CommandLineError(f"{key}: {_one_line(error)}") from error


def check(arguments: Sequence[str], config_dir: Path, config_name: str) -> None:
    """Check the overrides among a program's arguments.

    Args:
        arguments: of the program, without its name.
        config_dir: of its configs.
        config_name: of the primary one.

    Raises:
        CommandLineError: an override is malformed, names a group's option or a key that does not
            exist, or gives a value of the wrong type.
    """
    if any(argument.split("=")[0] in _NOT_OURS for argument in arguments):
        return
    overrides = [
        _parse(argument)
        for before, argument in itertools.pairwise(["", *arguments])
        if before not in _TAKE_A_WORD and not argument.startswith(("-", "hydra.", "hydra/"))
    ]
    multirun = bool({"-m", "--multirun"} & set(arguments))
    for override in overrides:
        if override.is_sweep_override() and not multirun:
            raise CommandLineError(
                f"{override.input_line}: several values are a sweep, which needs -m"
            )
        if override.key_or_group == "hparams_search" and not multirun:
            raise CommandLineError(f"{override.input_line}: a search is a sweep, which needs -m")
    with initialize_config_dir(str(config_dir), version_base="1.3"):
        _check_composed(overrides, config_name)


def not_installed(plugin: str) -> str:
    """How to get a plugin of Hydra that a config names."""
    return f"{plugin}: not installed; try: pip install {_PLUGINS[plugin]}"


def _parse(argument: str) -> Override:
    if "=" not in argument and not argument.startswith("~"):
        raise CommandLineError(f"{argument}: expected KEY=VALUE, such as optimizer=adamw")
    try:
        return OverridesParser.create().parse_override(argument)
    except HydraException as error:
        raise CommandLineError(
            f"{argument}: not KEY=VALUE as Hydra reads it ({_one_line(error)}); "
            f"try quotes: '{argument}'"
        ) from error


def _check_composed(overrides: Sequence[Override], config_name: str) -> None:
    loader = GlobalHydra.instance().config_loader()
    groups = {group: loader.get_group_options(group) for group in loader.list_groups("")}
    chosen = [o for o in overrides if o.key_or_group in groups and not o.is_delete()]
    values = [o for o in overrides if o.key_or_group not in groups and _changes(o)]
    for override in chosen:
        options = groups[override.key_or_group]
        for option in _options(override):
            if option not in options:
                raise CommandLineError(
                    f"{override.key_or_group}={_text(option)}: expected one of {', '.join(options)}"
                )
    # A key may exist with one option of a group and not with another.
    lines = [[f"{o.get_key_element()}={text}" for text in _texts(o)] for o in chosen]
    for combination in itertools.product(*lines):
        config = compose(config_name, list(combination))
        for override in values:
            _check_value(override, config)


def _changes(override: Override) -> bool:
    """Whether it changes a value that must be there: what +, ++ and ~ do is Hydra's to judge."""
    return not (override.is_add() or override.is_force_add() or override.is_delete())


def _options(override: Override) -> list[Any]:
    """Every option of a group that an override asks for."""
    asked = _values(override)
    return [option for value in asked for option in (value if isinstance(value, list) else [value])]


def _values(override: Override) -> list[Any]:
    """The value of an override, or each one of a sweep that can be counted out."""
    if not override.is_sweep_override():
        return [override.value()]
    if override.is_interval_sweep():
        return []
    return [Override._convert_value(value) for value in override.sweep_iterator()]


def _texts(override: Override) -> list[str]:
    """The same, as they would be typed."""
    if override.is_sweep_override():
        return list(override.sweep_string_iterator())
    return [override.get_value_element_as_str()]


def _check_value(override: Override, config: DictConfig) -> None:
    key = override.key_or_group
    keys = dict(_flat(config))
    if key not in keys:
        raise CommandLineError(f"{override.input_line}: {_no_such_key(key, list(keys))}")
    for value in _values(override):
        expected = _expected_instead(value, keys[key], may_be_null="." in key)
        if expected:
            raise CommandLineError(
                f"{key}={_text(value)}: expected {expected}, such as {_text(keys[key])}"
            )


def _flat(config: DictConfig, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Every key with its value, in dotted form; None where a value is known only at run time."""
    for name in config:
        key = f"{prefix}{name}"
        value = OmegaConf.select(config, str(name), throw_on_resolution_failure=False)
        yield key, OmegaConf.to_container(value) if OmegaConf.is_config(value) else value
        if isinstance(value, DictConfig):
            yield from _flat(value, f"{key}.")


def _no_such_key(key: str, keys: Sequence[str]) -> str:
    # The longest part of it that does exist, and what that has.
    parent = key
    while parent and parent not in keys:
        parent = parent.rpartition(".")[0]
    prefix = f"{parent}." if parent else ""
    own = [k[len(prefix) :] for k in keys if k.startswith(prefix)]
    choices = [k for k in own if "." not in k and not k.startswith("_")]
    elsewhere = [k for k in keys if k.rpartition(".")[2] == key.rpartition(".")[2]]
    meant = f"; did you mean {' or '.join(elsewhere)}?" if elsewhere else ""
    if not choices:
        return f"no such key, {parent} has none below it{meant}"
    return f"no such key, expected one of {', '.join(prefix + c for c in choices)}{meant}"


def _expected_instead(value: Any, default: Any, *, may_be_null: bool) -> str | None:
    """What kind of value should be there; None if this one will do, or only its user can tell."""
    if value is None:
        return None if may_be_null else "a value"
    if default is None or isinstance(value, Mapping) or (isinstance(value, str) and "${" in value):
        return None
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if isinstance(default, bool):
        return None if isinstance(value, bool) else "true or false"
    if isinstance(default, int):
        return None if number and isinstance(value, int) else "a whole number"
    if isinstance(default, float):
        return None if number else "a number"
    if isinstance(default, list):
        return None if isinstance(value, list) else "a list"
    if isinstance(default, Mapping):
        return "keys and values in braces"
    return "one value" if isinstance(value, list) else None


def _text(value: Any) -> str:
    words = {None: "null", True: "true", False: "false"}
    return words[value] if value is None or isinstance(value, bool) else str(value)


def _one_line(error: BaseException) -> str:
    """The message of what first went wrong, without line breaks."""
    while isinstance(error, InstantiationException) and error.__cause__ is not None:
        error = error.__cause__
    if isinstance(error, OmegaConfBaseException) and error.full_key and error.msg:
        return f"{error.full_key}: {error.msg.splitlines()[0]}"
    if isinstance(error, MissingConfigException) and error.missing_cfg_file in _PLUGINS:
        return not_installed(error.missing_cfg_file)
    if isinstance(error, MissingConfigException) and error.options:
        return f"{error.missing_cfg_file}: expected one of {', '.join(error.options)}"
    return " ".join(str(error).split()) or type(error).__name__
