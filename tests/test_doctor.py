"""What the doctor says of this machine, and of modules."""

from __future__ import annotations

import logging
import re
from types import SimpleNamespace
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


@pytest.mark.parametrize(
    ("capability", "products"), [((9, 0), "bfloat16"), ((7, 5), "float32, bfloat16 not")]
)
def test_it_names_gpus_and_answers_for_the_first(
    capability: tuple[int, int], products: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from ngplugin.curvature.products import multiplies_bfloat16

    cuda = {
        "is_available": True,
        "device_count": 2,
        "get_device_name": "A GPU",
        "get_device_properties": SimpleNamespace(total_memory=80e9),
        "get_device_capability": capability,
    }
    for name, value in cuda.items():
        monkeypatch.setattr(torch.cuda, name, lambda *_, value=value: value)
    multiplies_bfloat16.cache_clear()
    found = doctor.environment()
    multiplies_bfloat16.cache_clear()
    assert found["devices"] == "cpu, A GPU (80 GB), A GPU (80 GB)"
    assert found["products with inverses"].startswith(products)


def test_a_module_is_tried_and_left_as_it_was() -> None:
    module = doctored.Classifier()
    before = {name: t.clone() for name, t in module.state_dict().items()}
    found = doctor.dry_run(module)
    assert found.refused is None
    assert found.natural_seconds > 0
    assert found.plain_seconds > 0
    assert found.steps == 20  # it is quick enough for a mean
    assert all(torch.equal(t, module.state_dict()[name]) for name, t in before.items())
    assert found.coverage is not None
    assert found.coverage.sources() == "Fisher information of: cross_entropy"
    said = "\n".join(doctor.describe(found))
    assert "with natural gradient, on average over 20 steps" in said
    assert "Without a block, so that they do not move: unused" in said
    assert "FSDP, DeepSpeed" in said


def test_a_module_that_takes_its_time_is_tried_for_two_steps(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(doctor, "_SECONDS", 0.0)
    found = doctor.dry_run(doctored.Classifier())
    assert found.steps == 0
    assert "which later ones have rarely" in doctor.describe(found)[0]


def test_what_is_refused_is_said(capsys: Any) -> None:
    assert main(["doctor", "--module", f"{HERE}:Sparse"]) == 1
    assert (
        "Natural gradient refuses this: training_step gave no gradient" in capsys.readouterr().out
    )


@pytest.mark.parametrize(
    ("module", "said"),
    [
        ("Broken", "either: KeyError: 'label' (doctored.py, line "),
        ("Detached", "either: RuntimeError: element 0 of tensors does not require grad"),
        ("WithoutData", "data that the module has not are given as --data package.module:"),
        ("NotANumber", "Natural gradient refuses this: the first batches gave no Fisher"),
    ],
)
def test_what_fails_by_itself_is_told_apart_from_what_is_refused(
    module: str, said: str, capsys: Any
) -> None:
    assert main(["doctor", "--module", f"{HERE}:{module}"]) == 1
    assert said in capsys.readouterr().out


def test_it_is_quiet_about_trainers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each tells of devices, and advises, and there are two."""
    told: list[str] = []
    logger = logging.getLogger("lightning.pytorch")
    handler = logging.Handler()
    monkeypatch.setattr(handler, "emit", lambda record: told.append(record.getMessage()))
    monkeypatch.setattr(logger, "handlers", [handler])
    logger.setLevel(level := logging.INFO)  # whatever ran before
    assert doctor.dry_run(doctored.Classifier()).refused is None
    assert not told
    assert logger.level == level


def test_the_table_says_what_curvature_keeps(capsys: Any) -> None:
    assert main(["doctor", "--module", f"{HERE}:Classifier"]) == 0
    said = " ".join(capsys.readouterr().out.split())
    found = re.search(r"Curvature keeps ([\d,]+) numbers, (\S+) MB in float32, for (\d+)", said)
    assert found is not None
    kept, megabytes, parameters = (float(text.replace(",", "")) for text in found.groups())
    assert megabytes == pytest.approx(4e-6 * kept, rel=0.01)
    assert parameters == sum(p.numel() for p in doctored.Classifier().parameters())


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
        (["--module", f"{HERE}:loader"], "DataLoader is no LightningModule"),
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
