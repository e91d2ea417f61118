"""The callback in both Lightnings: `lightning` and the same under the name `pytorch_lightning`."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lightning.pytorch
import pytest
import pytorch_lightning
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import ngplugin
from ngplugin.lightning import namespace

LIGHTNINGS = {"lightning": lightning.pytorch, "pytorch_lightning": pytorch_lightning}
both = pytest.mark.parametrize("name", LIGHTNINGS)


@pytest.fixture
def callback(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The class as a program gets it that has imported both; other tests have it without."""
    for name in [name for name in sys.modules if name.startswith("ngplugin.lightning")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.delattr(ngplugin, "lightning")
    return ngplugin.NaturalGradient


def module(library: Any) -> Any:
    """A LightningModule of that Lightning; those of the other are refused by its trainer."""

    class Points(library.LightningModule):  # type: ignore[misc, name-defined]
        def __init__(self) -> None:
            super().__init__()
            self.net = nn.Sequential(nn.Linear(2, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Linear(8, 2))

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            return F.cross_entropy(self.net(batch[0]), batch[1])

        def configure_optimizers(self) -> Any:
            optimizer = torch.optim.AdamW(self.parameters(), lr=1e-3, weight_decay=0.1)
            schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=16)
            return [optimizer], [{"scheduler": schedule, "interval": "step"}]

        def train_dataloader(self) -> DataLoader[Any]:
            x = torch.randn(64, 2, generator=torch.Generator().manual_seed(1))
            return DataLoader(TensorDataset(x, (x[:, 0] * x[:, 1] > 0).long()), batch_size=16)

    library.seed_everything(0)
    return Points()


def fit(
    library: Any, callback: Any, folder: Path, epochs: int, checkpoint: Path | None = None
) -> tuple[Tensor, Any, Path]:
    saver = library.callbacks.ModelCheckpoint(folder / f"{epochs}", save_last=True)
    points = module(library)
    trainer = library.Trainer(
        max_epochs=epochs, accelerator="cpu", logger=False, enable_progress_bar=False,
        enable_model_summary=False, callbacks=[callback(show_coverage=False), saver],
    )  # fmt: skip
    trainer.fit(points, ckpt_path=checkpoint)
    weights = torch.cat([t.detach().double().flatten() for t in points.state_dict().values()])
    return weights, trainer, Path(saver.last_model_path)


@pytest.mark.supports("Namespaces", "lightning and pytorch_lightning, to the same numbers")
def test_both_namespaces_train_alike(callback: Any, tmp_path: Path) -> None:
    results = {
        name: fit(library, callback, tmp_path / name, 3) for name, library in LIGHTNINGS.items()
    }
    for _, trainer, _ in results.values():
        assert type(trainer.strategy.optimizers[0]).__name__ == "WrappedNaturalGradient"
        assert "natgrad/kl" in trainer.callback_metrics
    ours, theirs = (weights for weights, *_ in results.values())
    assert torch.equal(ours, theirs)


@pytest.mark.supports("Namespaces", "Resuming bit for bit in either")
@both
def test_resuming_is_bit_exact(name: str, callback: Any, tmp_path: Path) -> None:
    library = LIGHTNINGS[name]
    whole, *_ = fit(library, callback, tmp_path / "whole", 4)
    *_, half = fit(library, callback, tmp_path / "half", 2)
    resumed, *_ = fit(library, callback, tmp_path / "resumed", 4, half)
    assert torch.equal(resumed, whole)


@both
def test_the_callback_is_of_each_imported_class(name: str) -> None:
    bases = bases_with(name)
    assert LIGHTNINGS[name].callbacks.Callback in bases
    assert len(bases) == 2  # that and object


def bases_with(*imported: str) -> tuple[type, ...]:
    """Ancestors of our base class where only so many Lightnings are imported."""
    with pytest.MonkeyPatch.context() as patch:
        for module_name in ("lightning.pytorch", "pytorch_lightning"):
            if module_name.removesuffix(".pytorch") not in imported:
                patch.delitem(sys.modules, module_name)
        found: tuple[type, ...] = namespace._callback().__mro__
        return found


def test_with_both_imported_it_is_of_both_classes() -> None:
    bases = bases_with("lightning", "pytorch_lightning")
    assert {library.callbacks.Callback for library in LIGHTNINGS.values()} < set(bases)


@pytest.fixture
def nothing_installed() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.delitem(sys.modules, "lightning.pytorch")
        patch.delitem(sys.modules, "pytorch_lightning")
        patch.setattr(namespace, "find_spec", lambda name: None)
        yield


@pytest.mark.usefixtures("nothing_installed")
def test_without_lightning_the_message_says_what_to_install() -> None:
    with pytest.raises(ImportError, match=r"pip install lightning.*NaturalGradientOptimizer"):
        namespace._callback()
