"""What runs before a change is merged is the same everywhere, and what it names exists."""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).parents[1]


def read(path: str) -> Any:
    return yaml.safe_load((ROOT / path).read_text(encoding="utf-8"))


def test_the_workflow_does_what_make_check_does_and_nothing_else() -> None:
    jobs = read(".github/workflows/check.yml")["jobs"]
    (job,) = jobs.values()
    commands = [step["run"] for step in job["steps"] if "run" in step]
    assert commands == ["make check PYTHON=python"]
    recipes = re.findall(r"^check:.*\n((?:\t.*\n)+)", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert recipes == ["\t.ci/run\n"]
    assert [path.name for path in (ROOT / ".github/workflows").iterdir()] == ["check.yml"]


def test_the_workflow_has_pythons_that_are_admitted_and_files_that_exist() -> None:
    (job,) = read(".github/workflows/check.yml")["jobs"].values()
    pythons = job["strategy"]["matrix"]["python"]
    assert all(isinstance(python, str) for python in pythons)  # a number would lose 3.10's zero
    assert all(tuple(map(int, python.split("."))) >= (3, 11) for python in pythons)
    (setup,) = [s for s in job["steps"] if s.get("uses", "").startswith("actions/setup-python")]
    assert [*ROOT.glob(setup["with"]["cache-dependency-path"])]


def test_ci_run_is_tests_that_passed_then_lint() -> None:
    script = ROOT / ".ci/run"
    assert os.access(script, os.X_OK)
    subprocess.run(["sh", "-n", script], check=True)
    text = script.read_text()
    targets = re.findall(r"^make (\w+)$", text, re.MULTILINE)
    assert targets == ["test", "lint"]
    assert "--junitxml=build/tests.xml" in (ROOT / "Makefile").read_text()  # that it counts


# What `.ci/run` finds on a machine, and whether it then installs the browser.
@pytest.mark.parametrize(
    ("has", "asked"),
    [
        ({"CI": "1", "user": "0", "programs": "apt-get"}, True),
        ({"CI": "1", "user": "0", "programs": "apt-get chromium"}, False),
        ({"CI": "1", "user": "0", "programs": ""}, False),
        ({"CI": "1", "user": "1000", "programs": "apt-get"}, False),
        ({"CI": "", "user": "0", "programs": "apt-get"}, False),
    ],
)
@pytest.mark.parametrize("works", [True, False])
def test_ci_run_gets_a_browser_where_it_may_and_goes_on_without(
    has: dict[str, str], asked: bool, works: bool, tmp_path: Path
) -> None:
    programs = tmp_path / "programs"
    programs.mkdir()
    said = {name: f"exit {int(not works)}" for name in has["programs"].split()}
    said |= {"id": f"echo {has['user']}", "make": "exit 7"}  # ends it where the tests begin
    for name, line in said.items():
        (programs / name).write_text(f'#!/bin/sh\necho "{name} $*" >> {tmp_path}/log\n{line}\n')
        (programs / name).chmod(0o755)
    for name in ("sh", "dirname", "rm"):
        (programs / name).symlink_to(f"/bin/{name}")
    (tmp_path / ".ci").mkdir()
    script = tmp_path / ".ci/run"
    script.write_text((ROOT / ".ci/run").read_text())
    done = subprocess.run(
        ["/bin/sh", script], env={"PATH": str(programs), "CI": has["CI"]},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 7, done.stderr
    log = (tmp_path / "log").read_text()
    assert "make test" in log
    assert ("apt-get update -qq" in log) == asked
    assert ("apt-get install -y -qq chromium" in log) == (asked and works)
    assert ("could not be installed" in done.stderr) == (asked and not works)


def test_pre_commit_has_the_linter_of_the_requirements() -> None:
    repos = {
        repo["repo"].rpartition("/")[2]: repo for repo in read(".pre-commit-config.yaml")["repos"]
    }
    (ruff,) = re.findall(r"^ruff==(\S+)", (ROOT / "requirements.txt").read_text(), re.MULTILINE)
    assert repos["ruff-pre-commit"]["rev"] == f"v{ruff}"
    assert [hook["id"] for hook in repos["ruff-pre-commit"]["hooks"]] == [
        "ruff-check",
        "ruff-format",
    ]


@pytest.mark.parametrize("name", ["bug", "idea"])
def test_issue_forms_are_complete(name: str) -> None:
    form = read(f".github/ISSUE_TEMPLATE/{name}.yml")
    assert {"name", "description", "body"} <= set(form)
    for field in form["body"]:
        assert field["type"] == "textarea"
        assert field["attributes"]["label"]
        assert set(field) <= {"type", "id", "attributes", "validations"}
        assert set(field["attributes"]) <= {
            "label",
            "description",
            "placeholder",
            "value",
            "render",
        }


def test_the_citation_is_of_this_version() -> None:
    citation = read("CITATION.cff")
    (version,) = re.findall(r'^version = "(.*)"', (ROOT / "pyproject.toml").read_text(), re.M)
    assert citation["version"] == version
    assert {"cff-version", "message", "title", "authors"} <= set(citation)
    for reference in citation["references"]:
        assert {"type", "title", "authors", "year"} <= set(reference)
