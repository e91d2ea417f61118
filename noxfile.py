"""The package's tests with the oldest and the newest torch and Lightning: `make matrix`.

    nox -s "tests(oldest)"
    nox -s "tests(oldest)" --force-python 3.10

PyPI's torch for Linux comes with CUDA; where pip knows an index of CPU builds, it takes those.
"""

import re
from pathlib import Path

import nox

nox.options.reuse_existing_virtualenvs = True

#: What tests/ needs besides the package, without what train.py and experiments/ do.
TOOLS = (
    "build", "hatchling", "hydra-core", "hypothesis", "jsonargparse[signatures]", "matplotlib",
    "mpmath", "networkx", "pytest", "pytest-xdist", "requests", "rich", "scikit-learn",
    "tensorboard", "wandb",
)  # fmt: skip
#: They are of train.py and experiments/, whose versions requirements.txt says.
OTHERS = (
    "conf",
    "command_line",
    "commands",
    "explain",
    "fuzz",
    "grid",
    "interrupted_sweeps",
    "median_stopping",
    "mutants",
    "notebook",
    "other_tasks",
    "race",
    "scaling",
    "site",
    "soak",
    "support",
    "surroundings",
    "sweeps",
    "targets",
    "tasks",
    "train",
    "wandb",
)


def lower_bounds() -> list[str]:
    """torch and Lightning, each as old as pyproject.toml admits."""
    text = Path(__file__).with_name("pyproject.toml").read_text()
    found = dict(re.findall(r'^    "(torch|lightning)>=([\d.]+)"', text, re.MULTILINE))
    return [f"{name}=={version}.*" for name, version in found.items()]


@nox.session
@nox.parametrize("age", ["oldest", "newest"], ids=["oldest", "newest"])
def tests(session: nox.Session, age: str) -> None:
    """Run them; more arguments of pytest come after `--`."""
    versions = lower_bounds() if age == "oldest" else ["torch", "lightning"]
    versions += [v.replace("lightning", "pytorch-lightning") for v in versions[1:]]
    session.install("--upgrade", "--editable", ".", *versions, *TOOLS)
    code = "import torch, lightning; print('torch', torch.__version__, lightning.__version__)"
    session.run("python", "-c", code)
    ignored = [f"--ignore=tests/test_{name}.py" for name in OTHERS]
    ignored += ["--ignore=tests/curvature/test_curvlinops.py"]  # curvlinops has bounds of its own
    session.run("python", "-m", "pytest", *ignored, *session.posargs)
