"""What is wrong with a command line, told in one line that names the choices.

Hydra tells it in many lines, after it has started; OmegaConf accepts a word where a number is
needed. So every override is checked against the configs before Hydra sees it, and what can only
be known when an object is made is told in the same way.
"""

from __future__ import annotations

import argparse
import contextlib
import difflib
import errno
import itertools
import math
import os
import shlex
import sys
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

from hydra import compose, initialize_config_dir
from hydra._internal.utils import get_args_parser
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException, InstantiationException, MissingConfigException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

# With other configs, or when Hydra only talks to a shell, there is nothing to check against.
_NOT_OURS = ("config_path", "config_name", "config_dir", "shell_completion", "experimental_rerun")
_ONLY_SHOW = ("help", "hydra_help", "cfg", "info")
_HYDRAS_OWN = ("hydra.", "hydra/")
_EACH_WITH_EACH = 32  # runs of a sweep of which every one is known beforehand
#: Of plugins that configs name: what pip is to be told.
_PLUGINS = {
    "hydra/sweeper/optuna": "optuna; pip install --no-deps hydra-optuna-sweeper",
    "hydra/launcher/joblib": "hydra-joblib-launcher",
    "hydra/launcher/submitit_local": "hydra-submitit-launcher",
    "hydra/launcher/submitit_slurm": "hydra-submitit-launcher",
}
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
        sys.stderr.write(f"{program}: error: {one_line(error)}\n")
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
    """Blame what an object's constructor fails by on the part of the config that names it.

    Raises:
        CommandLineError: what is inside refused a value, or missed a file or package.
    """
    try:
        yield
    except CommandLineError:
        raise
    except Exception as error:  # a constructor says it in its own way
        raise CommandLineError(f"{key}: {one_line(error)}") from error


def check(arguments: Sequence[str], config_dir: Path, config_name: str) -> list[list[str]]:
    """Check the overrides among a program's arguments.

    Args:
        arguments: of the program, without its name.
        config_dir: of its configs.
        config_name: of the primary one.

    Returns:
        The overrides of each run that is asked for, as far as they can be known; see `_runs`.

    Raises:
        CommandLineError: an argument is no option of Hydra's; or an override is malformed, names a
            group's option or a key that does not exist, or gives a value of the wrong type.
    """
    options = _options_of_hydra(arguments)
    if any(getattr(options, name) for name in _NOT_OURS):
        return []
    multirun = options.multirun
    with initialize_config_dir(str(config_dir), version_base="1.3"):
        everything = [_parse(argument) for argument in options.overrides]
        overrides = [o for o in everything if not f"{o.key_or_group}.".startswith(_HYDRAS_OWN)]
        for override in (o for o in overrides if not multirun and not o.is_delete()):
            what = "several values are a sweep" if override.is_sweep_override() else None
            what = "a search is a sweep" if override.key_or_group == "hparams_search" else what
            if what:
                raise CommandLineError(f"{override.input_line}: {what}, which needs -m")
        _check_composed(overrides, config_name)
        if any(getattr(options, name) for name in _ONLY_SHOW):
            return []
        return _runs(everything, config_name) if multirun else [list(options.overrides)]


def nearest(word: object, known: Iterable[str]) -> str:
    """The end of a message about a word that is not among those known: which one is like it."""
    found = difflib.get_close_matches(str(word), list(known), n=1)
    return f"; did you mean {found[0]}?" if found else ""


def not_installed(plugin: str) -> str:
    """How to get a plugin of Hydra that a config names."""
    return f"{plugin}: not installed; try: pip install {_PLUGINS[plugin]}"


def composed(config_name: str, overrides: Sequence[str], **options: Any) -> DictConfig:
    """Compose a config inside Hydra's initialization.

    Raises:
        CommandLineError: Hydra stumbles over an override; it has no words for each that it may.
        HydraException: it has.
    """
    try:
        return compose(config_name, list(overrides), **options)
    except (HydraException, OmegaConfBaseException):
        raise
    except Exception as error:
        raise CommandLineError(f"{shlex.join(overrides)}: {one_line(error)}") from error


def _options_of_hydra(arguments: Sequence[str]) -> argparse.Namespace:
    """What Hydra makes of its own options; told in one line what it does not know."""
    parser = get_args_parser()
    names = [name for action in parser._actions for name in action.option_strings]

    def refuse(message: str) -> NoReturn:
        unknown = message.partition("unrecognized arguments: ")[2]
        if unknown.startswith("-"):
            message += nearest(unknown.split()[0], names)
        elif unknown:
            message = f"{unknown}: expected beside the other KEY=VALUE, with -m and the like first"
        raise CommandLineError(message)

    parser.error = refuse  # type: ignore[method-assign]
    options = parser.parse_args(list(arguments))
    modes = [name for name in ("run", "multirun", "cfg", "info") if getattr(options, name)]
    if len(modes) > 1:
        raise CommandLineError(f"--{modes[0]} with --{modes[1]}: expected one of them")
    rerun = options.experimental_rerun
    if rerun is not None and not Path(rerun).is_file():
        raise CommandLineError(f"--experimental-rerun={rerun}: expected a pickle of Hydra's")
    if options.resolve and not (options.cfg or options.help):
        raise CommandLineError("--resolve: expected beside --cfg, of whose values it is one")
    return options


def _parse(argument: str) -> Override:
    if "=" not in argument and not argument.startswith("~"):
        raise CommandLineError(f"{argument}: expected KEY=VALUE, such as optimizer=adamw")
    try:
        override = OverridesParser.create().parse_override(argument)
        override.config_loader = GlobalHydra.instance().config_loader()  # which glob() asks
        return override
    except HydraException as error:
        raise CommandLineError(
            f"{argument}: not KEY=VALUE as Hydra reads it ({one_line(error)}); "
            f"try quotes: '{argument}'"
        ) from error


def _check_composed(overrides: Sequence[Override], config_name: str) -> None:
    loader = GlobalHydra.instance().config_loader()
    groups = {group: loader.get_group_options(group) for group in loader.list_groups("")}
    chosen = [o for o in overrides if o.key_or_group in groups and not o.is_delete()]
    values = [o for o in overrides if o.key_or_group not in groups]
    for override in chosen:
        options = groups[override.key_or_group]
        for option in _options(override):
            if option not in options:
                raise CommandLineError(
                    f"{override.key_or_group}={_text(option)}: expected one of "
                    f"{', '.join(options)}{nearest(_text(option), options)}"
                )
    given = " ".join(str(o.input_line) for o in overrides)
    # A key may exist with one option of a group and not with another.
    lines = [[f"{o.get_key_element()}={text}" for text in _texts(o)] for o in chosen]
    for combination in itertools.product(*lines):
        config = composed(config_name, combination)
        keys = dict(_flat(config))
        for override in values:
            if not (override.is_add() or override.is_force_add() or override.is_delete()):
                _check_value(override, keys, groups)
                _check_resolved(override, keys, combination, config_name)
            elif not override.is_delete():
                _check_added(override, keys, groups, given)


def _runs(overrides: Sequence[Override], config_name: str) -> list[list[str]]:
    """The overrides of each run of a sweep, as far as they are known before it begins.

    What a search proposes from an interval is not. Of more than a few runs each value is in one,
    but not each combination of them.
    """
    config = composed(
        config_name,
        [str(o.input_line) for o in overrides if not o.is_sweep_override()],
        return_hydra_config=True,
    )
    params = config.hydra.sweeper.get("params") or {}
    searched = [_parse(f"{key}={value}") for key, value in params.items()]
    lines: dict[str, list[str]] = {}
    for override in (*searched, *overrides):  # the command line's come last and count
        if override.is_sweep_override():
            key = override.get_key_element()
            lines[key] = [f"{key}={text}" for text in _texts(override)]
        else:
            lines[str(override.get_key_element())] = [str(override.input_line)]
    choices = [line for line in lines.values() if line]
    if math.prod(map(len, choices)) <= _EACH_WITH_EACH:
        return [list(run) for run in itertools.product(*choices)]
    first = [line[0] for line in choices]
    others = [
        [*first[:i], value, *first[i + 1 :]] for i, line in enumerate(choices) for value in line[1:]
    ]
    return [first, *others]


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
    if not override.is_sweep_override():
        return [override.get_value_element_as_str()]
    return [] if override.is_interval_sweep() else list(override.sweep_string_iterator())


def _check_value(
    override: Override, keys: Mapping[str, Any], groups: Mapping[str, Sequence[str]]
) -> None:
    key = override.key_or_group
    if key not in keys:
        known = [*dict.fromkeys((*keys, *groups))]
        raise CommandLineError(f"{override.input_line}: {_no_such_key(key, known)}")
    for value in _values(override):
        expected = expected_instead(value, keys[key], may_be_null="." in key)
        if expected:
            raise CommandLineError(
                f"{key}={_text(value)}: expected {expected}, such as {_text(keys[key])}"
            )


def _check_resolved(
    override: Override, keys: Mapping[str, Any], chosen: Sequence[str], config_name: str
) -> None:
    """Of an interpolation, what it comes to, where that is known already."""
    line, key = str(override.input_line), override.key_or_group
    if "${" not in line or override.is_sweep_override():
        return
    config = composed(config_name, [*chosen, line])
    value = OmegaConf.select(config, key, throw_on_resolution_failure=False)
    if value is not None and not OmegaConf.is_config(value):
        expected = expected_instead(value, keys[key], may_be_null=True)
        if expected:
            such = f"{expected}, such as {_text(keys[key])}"
            raise CommandLineError(f"{line}: expected {such}, and not {value!r}")


def _check_added(
    override: Override, keys: Mapping[str, Any], groups: Collection[str], given: str
) -> None:
    """A new key that nothing reads is misspelled; what objects take is told where one is made."""
    parent = override.key_or_group.rpartition(".")[0]
    if keys.get(parent) is not None and not isinstance(keys[parent], Mapping):
        raise CommandLineError(
            f"{override.input_line}: {parent} is one value, such as {_text(keys[parent])}, and has "
            "no keys below it"
        )
    top, known = override.key_or_group.partition(".")[0], {*keys, *groups}
    if top not in known and f"${{{top}" not in given:
        choices = [name for name in known if "." not in name]
        raise CommandLineError(
            f"{override.input_line}: nothing reads a key {top}; expected below one of "
            f"{', '.join(sorted(choices))}{nearest(top, choices)}"
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
    meant = f"; did you mean {' or '.join(elsewhere)}?" if elsewhere else nearest(key, keys)
    if not choices:
        return f"no such key, {parent} has none below it{meant}"
    return f"no such key, expected one of {', '.join(prefix + c for c in choices)}{meant}"


def expected_instead(value: Any, default: Any, *, may_be_null: bool) -> str | None:
    """What kind of value should be there; None if this one will do, or only its user can tell."""
    if value is None:
        return None if may_be_null else "a value"
    if default is None or (isinstance(value, str) and "${" in value):
        return None
    if isinstance(value, Mapping):  # an object may be made of it
        known = isinstance(default, Mapping) or "_target_" in value
        return None if known else "one value"
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


def one_line(error: BaseException) -> str:
    """The message of what first went wrong, without line breaks."""
    while isinstance(error, InstantiationException) and error.__cause__ is not None:
        error = error.__cause__
    if isinstance(error, OmegaConfBaseException) and error.full_key and error.msg:
        return f"{error.full_key}: {error.msg.splitlines()[0]}"
    if isinstance(error, MissingConfigException) and error.missing_cfg_file in _PLUGINS:
        return not_installed(error.missing_cfg_file)
    if isinstance(error, MissingConfigException) and error.options:
        return f"{error.missing_cfg_file}: expected one of {', '.join(error.options)}"
    text = " ".join(str(error).split()) or type(error).__name__
    if isinstance(error, HydraException) and isinstance(error.__cause__, OmegaConfBaseException):
        text += f" ({str(error.__cause__).splitlines()[0]})"  # which says why
    return text
