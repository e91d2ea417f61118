"""NGPLUGIN_AUTO=1: what the entry point gives to a trainer, and when it steps aside."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.demos.boring_classes import BoringModel

from ngplugin import NaturalGradient, NaturalGradientOptimizer, OptionError
from ngplugin.callbacks_factory import callbacks
from ngplugin.lightning.automatic import AutomaticNaturalGradient
from ngplugin.options import Options


class WithoutOptimizer(BoringModel):
    """Which natural gradient refuses."""

    def configure_optimizers(self) -> None:
        return None


class Own(BoringModel):
    """Which has a natural-gradient optimizer with options of its own."""

    def configure_optimizers(self) -> Any:
        return NaturalGradientOptimizer(self.parameters(), kl_radius=0.01)


@pytest.fixture(autouse=True)
def _wanted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NGPLUGIN_AUTO", "1")
    monkeypatch.delenv("NGPLUGIN_OPTIONS", raising=False)


def fit(model: L.LightningModule, tmp_path: Path, *more: L.Callback) -> L.Trainer:
    """In a trainer as Lightning makes it where the entry point is installed."""
    trainer = L.Trainer(
        default_root_dir=tmp_path, accelerator="cpu", max_steps=4, logger=False,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
        callbacks=[*more],
    )  # fmt: skip
    ours = [c for c in trainer.callbacks if isinstance(c, AutomaticNaturalGradient)]
    if not ours:  # ngplugin is not installed here, but on the path
        trainer.callbacks.extend(callbacks())
    trainer.fit(model)
    return trainer


def test_it_trains_by_natural_gradient_and_says_so(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NGPLUGIN_OPTIONS", " kl_radius=0.1, structure=eigen,nesterov=false ")
    trainer = fit(BoringModel(), tmp_path)
    (optimizer,) = trainer.strategy.optimizers
    assert isinstance(optimizer, NaturalGradientOptimizer)
    assert optimizer.options == Options(kl_radius=0.1, structure="eigen", nesterov=False)
    assert "this fit is by natural gradient" in capsys.readouterr().out


def test_a_value_may_be_null(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NGPLUGIN_OPTIONS", "kl_radius=null,measure_every=3,lr=1e-1")
    (callback,) = callbacks()
    assert callback.options == Options(kl_radius=None, measure_every=3)
    assert callback.lr == 0.1


@pytest.mark.supports("NGPLUGIN_AUTO=1", "Steps aside for a NaturalGradient put there by hand")
def test_it_leaves_to_one_that_was_put_there_by_hand(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    by_hand = NaturalGradient(kl_radius=0.02, show_coverage=False)
    trainer = fit(BoringModel(), tmp_path, by_hand)
    assert [c for c in trainer.callbacks if isinstance(c, NaturalGradient)] == [by_hand]
    assert by_hand.summary()["steps"] == 4
    assert "has a NaturalGradient already" in capsys.readouterr().out


@pytest.mark.supports("NGPLUGIN_AUTO=1", "Steps aside where NaturalGradient refuses the fit")
@pytest.mark.parametrize(
    ("model", "options", "why"),
    [
        (WithoutOptimizer, "", "no optimizer from configure_optimizers()"),
        (Own, "kl_radius=0.1", "Give them in one place"),
    ],
)
def test_it_leaves_a_fit_that_is_refused(
    model: type[L.LightningModule], options: str, why: str, tmp_path: Path,
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setenv("NGPLUGIN_OPTIONS", options)
    trainer = fit(model(), tmp_path)
    assert trainer.global_step == 4
    assert not [c for c in trainer.callbacks if isinstance(c, NaturalGradient)]
    (line,) = (li for li in capsys.readouterr().out.splitlines() if "NGPLUGIN_AUTO" in li)
    assert why in line


def test_it_takes_an_optimizer_of_the_module_as_it_is(tmp_path: Path) -> None:
    (optimizer,) = fit(Own(), tmp_path).strategy.optimizers
    assert optimizer.options == Options(kl_radius=0.01)


def test_the_callbacks_after_it_keep_their_hooks_where_it_leaves(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Last(L.Callback):
        started = False

        def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
            self.started = True

    last, (first,) = Last(), callbacks()
    monkeypatch.delenv("NGPLUGIN_AUTO")  # the trainer would add another, at the end
    trainer = L.Trainer(
        default_root_dir=tmp_path, accelerator="cpu", max_steps=1, logger=False,
        enable_checkpointing=False, callbacks=[first, last],
    )  # fmt: skip
    trainer.fit(WithoutOptimizer())
    assert last.started


@pytest.mark.refuses("NGPLUGIN_AUTO=1", "A wrong option in NGPLUGIN_OPTIONS")
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("kl_raduis=0.1", "NGPLUGIN_OPTIONS.*did you mean 'kl_radius'"),
        ("kl_radius", "'kl_radius' has no value; expected a list such as"),
        ("kl_radius=-1", "NGPLUGIN_OPTIONS: kl_radius=-1: expected a number above 0"),
        ("structure=eign", "NGPLUGIN_OPTIONS: structure='eign'.*did you mean 'eigen'"),
    ],
)
def test_a_wrong_option_is_told(
    options: str, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NGPLUGIN_OPTIONS", options)
    with pytest.raises(OptionError, match=message):
        callbacks()


@pytest.mark.parametrize("value", ["", "0", "false", "False"])
def test_it_is_off_unless_wanted(value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NGPLUGIN_AUTO", value)
    monkeypatch.setenv("NGPLUGIN_OPTIONS", "nonsense")  # is not even looked at
    assert callbacks() == []
    monkeypatch.delenv("NGPLUGIN_AUTO")
    assert callbacks() == []


def test_what_is_neither_on_nor_off_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NGPLUGIN_AUTO", "always")
    with pytest.raises(OptionError, match="NGPLUGIN_AUTO='always': expected 1"):
        callbacks()


def test_what_cannot_be_imported_is_a_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ngplugin.lightning.automatic", None)
    with pytest.warns(UserWarning, match=r"no natural gradient.*ngplugin.lightning.automatic"):
        assert callbacks() == []


def test_nothing_is_imported_unless_wanted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NGPLUGIN_AUTO", "0")
    code = "import sys; from ngplugin.callbacks_factory import callbacks; print(callbacks(), "
    code += "*[name for name in ('torch', 'lightning') if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_leaving_a_fit_changes_none_of_its_numbers(tmp_path: Path) -> None:
    def weights(**environment: str) -> torch.Tensor:
        with pytest.MonkeyPatch.context() as patch:
            for name, value in environment.items():
                patch.setenv(name, value)
            L.seed_everything(0, verbose=False)
            model = Own()
            fit(model, tmp_path)
            return torch.cat([p.detach().flatten() for p in model.parameters()])

    left = weights(NGPLUGIN_OPTIONS="kl_radius=0.1")
    assert torch.equal(left, weights(NGPLUGIN_AUTO="0"))
