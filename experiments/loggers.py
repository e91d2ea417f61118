"""The loggers of a run; and what they are told of where it comes from."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from hydra.utils import instantiate
from lightning.pytorch.loggers import Logger
from omegaconf import DictConfig, OmegaConf

from experiments.command_line import CommandLineError, made_from

#: What wandb's own variable WANDB_MODE may be, and whether a run may then be sent.
_MAY_SEND = {
    "online": True, "shared": True, "run": True,
    "offline": False, "dryrun": False, "disabled": False,
}  # fmt: skip


@contextlib.contextmanager
def made_loggers(cfg: DictConfig) -> Iterator[list[Logger]]:
    """The loggers; wandb's run is closed in the end, else the next job of a sweep goes on in it.

    Raises:
        CommandLineError: a logger cannot be made, or wandb cannot do what it is asked to.
    """
    nodes = OmegaConf.to_container(cfg.get("logger") or OmegaConf.create({}), resolve=True)
    assert isinstance(nodes, dict)
    mode = os.environ.get("WANDB_MODE")
    for name, node in [*nodes.items()]:
        if not isinstance(node, dict) or "_target_" not in node:
            raise CommandLineError(f"logger.{name}={node}: expected a _target_, and its arguments")
        if str(node["_target_"]).endswith(".WandbLogger"):
            if _prepare_wandb(f"logger.{name}", node):
                node.update(_identity(node))
            else:
                del nodes[name]
    wandb = sys.modules.get("wandb")  # not imported: not used
    with made_from("logger"):
        loggers = [instantiate(node, _convert_="all") for node in nodes.values()]
        for name, made in zip(nodes, loggers, strict=True):
            if not isinstance(made, Logger):
                raise TypeError(f"{name}: expected a Logger, not a {type(made).__name__}")
    failed = True
    try:
        yield loggers
        failed = False
    except Exception as error:
        if wandb is not None and isinstance(error, wandb.Error):
            raise CommandLineError(f"logger.wandb: {error}") from error
        raise
    finally:
        if wandb is not None and wandb.run is not None:
            wandb.finish(exit_code=int(failed))
        if mode is None:  # Lightning sets it for a run that is offline
            os.environ.pop("WANDB_MODE", None)


def _prepare_wandb(key: str, node: dict[str, Any]) -> bool:
    """See to it that wandb neither asks nor waits; False if there can or shall be no run of it.

    A run is sent only where both the config and `WANDB_MODE` let it be.

    Raises:
        CommandLineError: it is to be sent, and there is no account or no way to the server.
    """
    mode = os.environ.get("WANDB_MODE") or "online"
    if mode not in _MAY_SEND:
        raise CommandLineError(f"WANDB_MODE={mode}: expected online, offline or disabled")
    if mode == "disabled":
        return False
    try:
        import wandb
    except ModuleNotFoundError:
        print(f"{key}: wandb is not installed (pip install wandb); this run has metrics.csv only")
        return False
    os.environ.setdefault("WANDB_SILENT", "true")  # no greetings
    if not os.access(Path.home(), os.W_OK):  # where it keeps what it sends, and its own log
        for folder in ("WANDB_CACHE_DIR", "WANDB_DATA_DIR"):
            os.environ.setdefault(folder, str(node.get("save_dir", ".")))
    if not _MAY_SEND[mode]:
        node["offline"] = True
    elif not node.get("offline", False):
        _sign_in(f"{key}.offline=false", wandb)
    elif "WANDB_MODE" in os.environ:
        print(f"WANDB_MODE={mode}: the run stays offline, {key}.offline=false sends it")
    return True


def _sign_in(key: str, wandb: Any) -> None:
    """Sign in to wandb with the account that is there; it is never asked for.

    Raises:
        CommandLineError: there is none, or nobody answers. wandb itself would ask, or go on trying
            for minutes.
    """
    import requests  # which wandb needs too

    try:
        found = wandb.login(prompt=False, verify=False)
    except wandb.Error as error:  # a key that cannot be one
        raise CommandLineError(f"{key}: {error}; offline=true needs none") from error
    if not found:
        raise CommandLineError(
            f"{key}: no account found, expected a key in WANDB_API_KEY or from "
            "'wandb login'; offline=true needs none"
        )
    address = wandb.setup().settings.base_url
    try:
        requests.head(address, timeout=10)  # seconds
    except requests.exceptions.SSLError:  # it has answered
        pass
    except requests.RequestException as error:
        raise CommandLineError(
            f"{key}: {address} does not answer; offline=true needs no network"
        ) from error


def _identity(node: Mapping[str, Any]) -> dict[str, Any]:
    """What a run is called in wandb, and what it belongs with, where the config leaves it open."""
    hydra = HydraConfig.get()
    group = Path(hydra.sweep.dir).name if hydra.mode == RunMode.MULTIRUN else None
    return {
        "name": node.get("name") or Path(hydra.runtime.output_dir).name,
        "group": node.get("group") or group,
        "tags": [tag for tag in node.get("tags") or () if tag is not None],
    }


def origin() -> dict[str, Any]:
    """Of a run: its folder, what was overridden on the command line, and the commit, if any."""
    hydra = HydraConfig.get()
    command = ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    commit = None
    with contextlib.suppress(OSError):  # no git
        done = subprocess.run(
            command, cwd=Path(__file__).parent, capture_output=True, text=True, check=False
        )
        commit = done.stdout.strip() or None  # no repository
    return {
        "output_dir": hydra.runtime.output_dir,
        "overrides": list(hydra.overrides.task),
        "commit": commit,
    }
