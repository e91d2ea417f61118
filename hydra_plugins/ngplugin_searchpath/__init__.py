"""Lets every Hydra application find ngplugin's config groups, such as `optimizer=natgrad`.

Hydra imports this file at the start of every application in the environment, so it must stay
light: `pkg://ngplugin.conf` names the same configs, but looking there imports ngplugin and with it
torch and Lightning, which takes seconds.
"""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

from hydra.core.config_search_path import ConfigSearchPath
from hydra.plugins.search_path_plugin import SearchPathPlugin


class NgpluginSearchPath(SearchPathPlugin):
    """Appends our configs to the end of the search path, so that a project's own files win."""

    def manipulate_search_path(self, search_path: ConfigSearchPath) -> None:
        """Append the folder of our configs, if there is one."""
        folder = config_folder()
        if folder is not None:
            search_path.append(provider="ngplugin", path=folder.as_uri())


def config_folder() -> Path | None:
    """The installed package's `conf`, or that of the checkout an editable installation points to.

    None if ngplugin is not installed: a plugin that raised would break other applications.
    """
    package = find_spec("ngplugin")
    for location in (package and package.submodule_search_locations) or ():
        for folder in (Path(location, "conf"), Path(location).parents[1] / "conf"):
            if (folder / "optimizer" / "natgrad.yaml").is_file():
                return folder.resolve()
    return None
