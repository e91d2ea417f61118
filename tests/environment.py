"""A Python environment of its own, which shares what is installed here, but not ngplugin."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import venv
from collections.abc import Iterable
from pathlib import Path

REPOSITORY = Path(__file__).parents[1]


class Environment:
    """A new virtual environment in `folder`, with every package of this one but those left out.

    Nothing is copied: its packages are links to those of this one.
    """

    def __init__(self, folder: Path, without: Iterable[str] = ()) -> None:
        venv.EnvBuilder(symlinks=True).create(folder)
        self._python = str(folder / "bin" / "python")
        self._shared = folder / "shared"
        self._shared.mkdir()
        left_out = {"ngplugin", "hydra_plugins", *without}
        for site in (Path(p) for p in sys.path if Path(p).name == "site-packages"):
            for entry in site.iterdir():
                link = self._shared / entry.name
                name = re.split(r"[-.]", entry.name)[0]  # of a package or of its *.dist-info
                if entry.suffix != ".pth" and name not in left_out and not link.exists():
                    link.symlink_to(entry)
        (site_packages,) = folder.glob("lib/python*/site-packages")
        (site_packages / "shared.pth").write_text(f"{self._shared}\n")

    def install(self, *what: str | Path) -> Environment:
        """What `pip install` does with it, except that nothing is fetched."""
        pip = ["-m", "pip", "--python", self._python, "install", "--quiet", "--no-index"]
        options = ["--no-deps", "--no-build-isolation", "--disable-pip-version-check"]
        subprocess.run([sys.executable, *pip, *options, *map(str, what)], check=True)
        return self

    def run(self, folder: Path, *arguments: str | Path, refused: bool = False, **more: str) -> str:
        """What this Python prints in a folder, to either stream; it has to succeed unless refused.

        Args:
            folder: to run in.
            arguments: of the interpreter.
            refused: it has to fail instead.
            more: environment variables.
        """
        variables = {**os.environ, "OMP_NUM_THREADS": "1", **more}
        variables.pop("PYTHONPATH", None)  # it may name this checkout
        done = subprocess.run(
            [self._python, *map(str, arguments)],
            cwd=folder, env=variables, text=True, check=False,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )  # fmt: skip
        assert (done.returncode != 0) == refused, done.stdout
        return done.stdout
