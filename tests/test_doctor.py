"""What the doctor says of this machine, and of modules."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from ngplugin.command_line import main
from ngplugin.lightning import doctor
from tests.projects import doctored

HERE = "tests.projects.doctored"


def test_it_names_versions_devices_and_what_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    found = doctor.environment()
    assert found["torch"] == torch.__version__
    assert "cpu" in found["devices"]
    assert found["products with inverses"].split(",")[0] in ("float32", "bfloat16")

    def missing(package: str) -> str:
        raise doctor.PackageNotFoundError(package)

    monkeypatch.setattr(doctor, "version", missing)
    assert doctor.environment()["wandb"] == "not installed (for its logger)"


def test_a_module_is_tried_and_left_as_it_was() -> None:
    module = doctored.Classifier()
    before = {name: t.clone() for name, t in module.state_dict().items()}
    found = doctor.dry_run(module)
    assert found.refused is None
    assert found.natural_seconds > 0
    assert found.plain_seconds > 0
    assert found.parameter_bytes == 4 * sum(p.numel() for p in module.parameters())
    assert found.bytes > 0
    assert all(torch.equal(t, module.state_dict()[name]) for name, t in before.items())
    said = "\n".join(doctor.describe(found))
    assert "Fisher information of: cross_entropy" in said
    assert "Without a block, so that they do not move: unused" in said


def test_what_is_refused_is_said(capsys: Any) -> None:
    assert main(["doctor", "--module", f"{HERE}:Sparse"]) == 1
    assert (
        "Natural gradient refuses this: training_step gave no gradient" in capsys.readouterr().out
    )


def test_the_command_makes_modules_with_arguments_and_options(capsys: Any) -> None:
    arguments = ["--set", "width=16", "--options", "structure=diagonal", "kl_radius=0.1"]
    assert main(["doctor", "--module", f"{HERE}:Classifier", *arguments]) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "16×6" in said
    assert "diagonal: " in said
    assert main(["doctor", "--module", f"{HERE}:wide"]) == 0
    assert "64×6" in capsys.readouterr().out
    arguments = ["--module", f"{HERE}:WithoutData", "--data", f"{HERE}:loader"]
    assert main(["doctor", *arguments]) == 0


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--module", "nothing"], "expected package.module:Class"),
        (["--module", "no.such:Thing"], "No module named 'no'"),
        (["--module", f"{HERE}:Nothing"], "Nothing"),
        (["--module", f"{HERE}:Classifier", "--set", "depth=3"], "--set name=value"),
        (["--module", f"{HERE}:Classifier", "--set", "width"], "width: expected name=value"),
        (["--module", f"{HERE}:Classifier", "--options", "kl_radius=-1"], "kl_radius=-1"),
        (["--module", f"{HERE}:Classifier", "--options", "radius=1"], "radius"),
    ],
)
def test_what_cannot_be_made_is_told_in_a_line(arguments: Any, said: str, capsys: Any) -> None:
    assert main(["doctor", *arguments]) == 1
    assert said in capsys.readouterr().err


def test_without_a_module_it_is_about_the_machine(capsys: Any) -> None:
    assert main(["doctor"]) == 0
    assert torch.__version__ in capsys.readouterr().out
