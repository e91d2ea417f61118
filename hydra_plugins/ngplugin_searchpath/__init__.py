"""Lets every Hydra application find ngplugin's config groups, such as `optimizer=natgrad`.

Hydra imports this file at the start of every application in the environment, and looks into
`ngplugin.conf`; importing ngplugin imports neither torch nor Lightning, so both are quick.
"""

from hydra.core.config_search_path import ConfigSearchPath
from hydra.plugins.search_path_plugin import SearchPathPlugin


class NgpluginSearchPath(SearchPathPlugin):
    """Appends our configs to the end of the search path, so that a project's own files win."""

    def manipulate_search_path(self, search_path: ConfigSearchPath) -> None:
        """Append the package of our configs."""
        search_path.append(provider="ngplugin", path="pkg://ngplugin.conf")
