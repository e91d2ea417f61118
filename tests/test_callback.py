"""The callback in real trainers, with modules that nobody prepared for it."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch.callbacks import LearningRateMonitor, ModelCheckpoint
from lightning.pytorch.demos import LightningTransformer, WikiText2
from lightning.pytorch.demos.boring_classes import BoringModel, DemoModel
from lightning.pytorch.loggers import CSVLogger
from torch import Tensor, nn
from torch.overrides import _len_torch_function_stack
from torch.utils.data import DataLoader, TensorDataset

from ngplugin import NaturalGradient, NaturalGradientOptimizer, OptionError

torch.set_num_threads(1)


def trainer(tmp_path: Path, *callbacks: L.Callback, **settings: Any) -> L.Trainer:
    quiet = {
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    return L.Trainer(
        **{
            "default_root_dir": tmp_path,
            "max_epochs": 3,
            "accelerator": "cpu",
            "callbacks": list(callbacks),
            **quiet,
            **settings,
        }
    )


class Classifier(L.LightningModule):
    """Two classes of points, a scheduler that steps each batch, a metric, a logged loss."""

    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        self.net = nn.Sequential(
            nn.Linear(6, 16), nn.BatchNorm1d(16), nn.Tanh(), nn.Dropout(dropout), nn.Linear(16, 2)
        )
        self.calls = 0

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        self.calls += 1
        x, y = batch
        loss = F.cross_entropy(self.net(x), y)
        self.log("train/loss", loss)
        return loss

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.AdamW(self.parameters(), lr=1e-3, weight_decay=0.1)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=40)
        return [optimizer], [{"scheduler": schedule, "interval": "step"}]

    def train_dataloader(self) -> DataLoader[Any]:
        g = torch.Generator().manual_seed(1)
        x = torch.randn(80, 6, generator=g)
        return DataLoader(TensorDataset(x, (x[:, 0] * x[:, 1] > 0).long()), batch_size=16)


def weights(module: nn.Module) -> Tensor:
    return torch.cat([t.detach().flatten().double() for t in module.state_dict().values()])


def test_boring_model_of_lightning_learns_with_one_added_callback(tmp_path: Path) -> None:
    L.seed_everything(0, verbose=False)
    model = BoringModel()
    data = next(iter(model.train_dataloader()))
    before = float(model.step(data))
    callback = NaturalGradient(show_coverage=False)
    trainer(tmp_path, callback).fit(model)
    assert float(model.step(data)) < 0.2 * before
    assert callback.summary()["steps"] == 3 * 64


def test_transformer_of_lightning_learns_with_one_added_callback(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)  # where the demo keeps its text, and would download it to
    text = Path("data", "wikitext-2.txt")
    text.parent.mkdir()
    text.write_text("the cat sat on the mat and the dog sat on the log\n" * 60)
    L.seed_everything(0, verbose=False)
    data = WikiText2(block_size=8, download=False)
    model = LightningTransformer(vocab_size=data.vocab_size)
    x, y = next(iter(DataLoader(data, batch_size=16)))

    def loss() -> float:
        with torch.no_grad():
            return float(F.nll_loss(model.eval()(x, y), y.view(-1)))

    before = loss()
    model.train()
    callback = NaturalGradient(show_coverage=False)
    trainer(tmp_path, callback, max_steps=12).fit(model, DataLoader(data, batch_size=16))
    assert loss() < 0.7 * before
    # Packed attention projections and norms have a block too: nothing gets a raw gradient.
    assert {row.block for row in callback.coverage().rows} == {
        "kronecker",
        "half-diagonal kronecker",
        "unit-wise",
    }


def test_a_module_with_a_scheduler_keeps_its_learning_rates_and_logs(tmp_path: Path) -> None:
    def run(*callbacks: L.Callback) -> tuple[list[float], int]:
        L.seed_everything(0, verbose=False)
        model = Classifier()
        logger = CSVLogger(tmp_path, name="logs")
        fit = trainer(
            tmp_path,
            *callbacks,
            LearningRateMonitor("step"),
            logger=logger,
            log_every_n_steps=1,
        )
        fit.fit(model)
        rows = list(csv.DictReader((Path(logger.log_dir) / "metrics.csv").open()))
        rates = [float(row["lr-AdamW"]) for row in rows if row.get("lr-AdamW")]
        assert sum(bool(row["train/loss"]) for row in rows) == 15
        return rates, model.calls

    assert run(NaturalGradient(show_coverage=False)) == run()


def test_each_step_is_logged_whatever_log_every_n_steps_is(tmp_path: Path) -> None:
    logger = CSVLogger(tmp_path, name="logs")
    callback = NaturalGradient(show_coverage=False)
    fit = trainer(tmp_path, callback, logger=logger, log_every_n_steps=7)
    fit.fit(Classifier())
    rows = list(csv.DictReader((Path(logger.log_dir) / "metrics.csv").open()))
    ours = [row for row in rows if row["natgrad/kl_predicted"]]
    assert [int(row["step"]) for row in ours] == list(range(15))
    for name in ("kl", "kl_radius", "step_scale", "condition_number", "damping", "overhead"):
        assert ours[0][f"natgrad/{name}"], name
    assert float(fit.callback_metrics["natgrad/kl"]) > 0


def test_disabled_is_bit_identical_to_not_having_the_callback(tmp_path: Path) -> None:
    def run(*callbacks: L.Callback) -> Tensor:
        L.seed_everything(0, verbose=False)
        model = Classifier(dropout=0.3)
        trainer(tmp_path, *callbacks).fit(model)
        return weights(model)

    plain = run()
    assert torch.equal(run(NaturalGradient(enabled=False)), plain)
    assert not torch.equal(run(NaturalGradient(show_coverage=False)), plain)


def test_the_same_seed_gives_the_same_run_and_leaves_the_data_order_alone(tmp_path: Path) -> None:
    def run(**options: Any) -> tuple[Tensor, Tensor]:
        L.seed_everything(0, verbose=False)
        model = Classifier(dropout=0.3)
        trainer(tmp_path, NaturalGradient(show_coverage=False, **options)).fit(model)
        return weights(model), torch.rand(3)

    (first, after), (second, after_too) = run(), run()
    assert torch.equal(first, second)
    assert torch.equal(after, after_too)
    other, after_other = run(seed=1)  # other scores, but the global generator is not ours
    assert not torch.equal(first, other)
    assert torch.equal(after, after_other)


@pytest.mark.parametrize("own", [False, True], ids=["wrapped", "adopted"])
def test_resuming_from_a_checkpoint_is_bit_exact(tmp_path: Path, own: bool) -> None:
    class Model(Classifier):
        def configure_optimizers(self) -> Any:
            if own:
                return NaturalGradientOptimizer(self.parameters(), lr=0.5)
            return super().configure_optimizers()

    def fit(epochs: int, checkpoint: Path | None = None) -> tuple[Tensor, Path]:
        L.seed_everything(0, verbose=False)
        model = Model()
        saver = ModelCheckpoint(tmp_path / f"{epochs}", save_last=True)
        callback = NaturalGradient(show_coverage=False)
        run = trainer(tmp_path, callback, saver, max_epochs=epochs, enable_checkpointing=True)
        run.fit(model, ckpt_path=checkpoint)
        return weights(model), Path(saver.last_model_path)

    whole, _ = fit(4)
    _, half = fit(2)
    resumed, _ = fit(4, half)
    assert torch.equal(resumed, whole)


def test_a_checkpoint_loads_without_the_callback(tmp_path: Path) -> None:
    saver = ModelCheckpoint(tmp_path, save_last=True)
    callback = NaturalGradient(show_coverage=False)
    trainer(tmp_path, callback, saver, max_epochs=1, enable_checkpointing=True).fit(Classifier())
    plain = trainer(tmp_path, max_epochs=2)
    plain.fit(Classifier(), ckpt_path=saver.last_model_path)
    assert plain.global_step == 10


def test_a_natural_gradient_optimizer_of_the_module_is_taken_as_it_is(tmp_path: Path) -> None:
    class Own(Classifier):
        def configure_optimizers(self) -> Any:
            return NaturalGradientOptimizer(self.parameters(), kl_radius=0.001)

    model, callback = Own(), NaturalGradient(show_coverage=False)
    fit = trainer(tmp_path, callback)
    fit.fit(model)
    assert fit.strategy.optimizers[0].report.kl_radius <= 0.001
    with pytest.raises(OptionError, match="in one place"):
        trainer(tmp_path, NaturalGradient(kl_radius=0.1)).fit(Own())


def test_accumulated_micro_batches_make_the_step_of_the_whole_batch(tmp_path: Path) -> None:
    class Line(L.LightningModule):
        """One linear map to one number: its Fisher information does not depend on the draw."""

        def __init__(self) -> None:
            super().__init__()
            self.map = nn.Linear(4, 1).double()

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            x, y = batch
            return F.mse_loss(self.map(x), y)

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), lr=0.1)

    g = torch.Generator().manual_seed(0)
    data = TensorDataset(
        torch.randn(48, 4, generator=g).double(), torch.randn(48, 1, generator=g).double()
    )

    def run(batch_size: int, accumulate: int) -> tuple[Tensor, Any]:
        L.seed_everything(0, verbose=False)
        model, callback = Line(), NaturalGradient(show_coverage=False, sampling_damping=0.0)
        fit = trainer(tmp_path, callback, accumulate_grad_batches=accumulate, max_epochs=2)
        fit.fit(model, DataLoader(data, batch_size=batch_size))
        return weights(model), callback.summary()

    (whole, numbers), (parts, numbers_too) = run(16, 1), run(4, 4)
    assert numbers["steps"] == numbers_too["steps"] == 6
    torch.testing.assert_close(parts, whole, rtol=1e-9, atol=1e-12)
    assert numbers_too["kl_max"] == pytest.approx(numbers["kl_max"], rel=1e-9)


def test_clipping_by_norm_and_bf16_work(tmp_path: Path) -> None:
    model, callback = Classifier(), NaturalGradient(show_coverage=False)
    data = next(iter(model.train_dataloader()))
    before = float(F.cross_entropy(model.net(data[0]), data[1]))
    fit = trainer(tmp_path, callback, gradient_clip_val=0.1, precision="bf16-mixed", max_epochs=20)
    fit.fit(model)
    assert float(F.cross_entropy(model.net(data[0]), data[1])) < 0.5 * before
    assert callback.summary()["kl_max"] is not None


def test_an_exception_leaves_nothing_behind(tmp_path: Path) -> None:
    class Failing(Classifier):
        fail_at = 3

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            loss = super().training_step(batch, batch_idx)
            if self.calls == self.fail_at:
                raise RuntimeError("the user's own")
            return loss

    model, callback = Failing(), NaturalGradient(show_coverage=False)
    with pytest.raises(RuntimeError, match="the user's own"):
        trainer(tmp_path, callback).fit(model)
    assert _len_torch_function_stack() == 0
    model.fail_at = -1
    trainer(tmp_path, callback, max_epochs=1).fit(model)  # callback and module may go on
    assert callback.summary()["steps"] == 5


def test_skipped_batches_and_cut_epochs_do_not_stay_observed(tmp_path: Path) -> None:
    class Skipping(Classifier):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            loss = super().training_step(batch, batch_idx)
            return None if batch_idx == 1 else loss

        def on_train_batch_start(self, batch: Any, batch_idx: int) -> int | None:
            return -1 if batch_idx == 3 else None

        def on_validation_start(self) -> None:
            assert _len_torch_function_stack() == 0

        def validation_step(self, batch: Any, batch_idx: int) -> None:
            self.net(batch[0])

        def val_dataloader(self) -> Any:
            return self.train_dataloader()

    callback = NaturalGradient(show_coverage=False)
    trainer(tmp_path, callback).fit(Skipping())
    assert callback.summary()["steps"] == 6  # batches 0 and 2 of each epoch
    assert _len_torch_function_stack() == 0


def test_the_training_step_runs_once_a_batch(tmp_path: Path) -> None:
    model = Classifier()
    trainer(tmp_path, NaturalGradient(show_coverage=False)).fit(model)
    assert model.calls == 15
    assert int(model.net[1].num_batches_tracked) == 15


def test_the_coverage_table_names_every_parameter(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model, callback = DemoModel(), NaturalGradient()

    class Classes(DemoModel):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            return F.cross_entropy(self(batch[0]), batch[1])

        def train_dataloader(self) -> Any:
            return DataLoader(TensorDataset(torch.randn(8, 32), torch.zeros(8).long()))

    model = Classes()
    trainer(tmp_path, callback, max_epochs=1).fit(model)
    shown = capsys.readouterr().out
    for name, _ in model.named_parameters():
        assert name in shown
    assert "kronecker" in shown
    assert [row.parameter for row in callback.coverage().rows] == [
        name for name, _ in model.named_parameters()
    ]


def test_measuring_the_kl_leaves_running_statistics_alone(tmp_path: Path) -> None:
    class Recording(Classifier):
        """Notes what the module's own forward passes left in the running mean."""

        def on_before_backward(self, loss: Tensor) -> None:
            self.left = self.net[1].running_mean.clone()

        def on_after_backward(self) -> None:
            assert _len_torch_function_stack() == 0  # only the forward pass is watched

        def on_train_batch_end(self, *_: Any) -> None:
            assert torch.equal(self.net[1].running_mean, self.left)

    callback = NaturalGradient(show_coverage=False)
    trainer(tmp_path, callback).fit(Recording())
    assert callback.summary()["kl_max"] is not None
