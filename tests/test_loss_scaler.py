"""16-bit training with a loss scaler: its factor changes nothing, its overflows leave no trace."""

from __future__ import annotations

import itertools
import warnings
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.plugins.precision import MixedPrecision
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from ngplugin import NaturalGradient, NaturalGradientOptimizer
from tests.oracle import flat
from tests.test_faults import learnt, same

supports = pytest.mark.supports


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 2))


def batch(seed: int) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(16, 6, generator=g)
    return x, (x[:, 0] * x[:, 1] > 0).long()


def train(
    scaler: torch.amp.GradScaler | None, skipped: tuple[int, ...] = (), **options: Any
) -> tuple[Tensor, Any]:
    """Some steps in float32; at `skipped` the gradient is infinite."""
    model = network()
    optimizer = NaturalGradientOptimizer(model.parameters(), **options)
    for seed in range(14):
        if scaler is None and seed in skipped:
            continue
        x, y = batch(seed)
        with optimizer.observe(scaler):
            loss = F.cross_entropy(model(x), y)
        optimizer.zero_grad()
        if scaler is None:
            loss.backward()
            optimizer.step()
            continue
        scaler.scale(loss).backward()
        if seed in skipped:
            model[0].weight.grad[0, 0] = torch.inf
        scaler.step(optimizer)
        scaler.update()
    return flat([*model.parameters()]), optimizer.report


@supports("Precision", "torch.amp.GradScaler in a plain loop")
@pytest.mark.parametrize("structure", ["kronecker", "exact"])
def test_a_scale_that_is_a_power_of_two_changes_no_bit(structure: str) -> None:
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=3)
    scaled, report = train(scaler, structure=structure)
    plain, plain_report = train(None, structure=structure)
    assert scaler.get_scale() > 2.0**12  # it grew on the way
    torch.testing.assert_close(scaled, plain, rtol=1e-4, atol=1e-5)
    if structure == "kronecker":
        assert torch.equal(scaled, plain)
        assert report.kl_predicted == plain_report.kl_predicted


@supports("Precision", "steps skipped for an overflow leave no trace")
def test_skipped_steps_are_as_if_their_batches_had_not_been() -> None:
    """But for the draws, so that the Fisher takes none."""
    skipped = (0, 3, 4, 5, 9)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    scaled, report = train(scaler, skipped, fisher="exact")
    plain, plain_report = train(None, skipped, fisher="exact")
    assert scaler.get_scale() < 2.0**10
    assert report.step == plain_report.step == 8
    assert torch.equal(scaled, plain)


HEAVY = 1e7  # what makes gradients overflow until the scale is below one


class Scales:
    """What each step of a run in float16 made of the scale, the weights and all averages."""

    def __init__(self) -> None:
        self.notes: list[tuple[float, Tensor, dict[str, Any]]] = []

    def note(self, scale: float, model: nn.Module, optimizer: NaturalGradientOptimizer) -> None:
        self.notes.append((scale, flat([*model.parameters()]).clone(), learnt(optimizer)))

    def assert_overflows_left_no_trace(self, first: int) -> None:
        """There were many in a row from the step `first` on, until the scale was below one."""
        scales = [scale for scale, _, _ in self.notes]
        overflowed = [i for i in range(len(scales)) if scales[i] < scales[i - 1] and i > 0]
        assert overflowed[:7] == [*range(first, first + 7)]
        assert len(overflowed) < len(scales) / 2
        assert scales[-1] < 1 < scales[0]
        for i in range(1, len(scales)):
            (_, before, knew), (_, weights, knows) = self.notes[i - 1 : i + 1]
            assert torch.equal(weights, before) == (i in overflowed)
            assert same(knows, knew) == (i in overflowed)


@supports("Precision", "overflows in a row, until the scale is below one")
@pytest.mark.parametrize("first", [1, 6])
def test_overflows_in_a_row_leave_no_trace_and_training_goes_on(first: int) -> None:
    model, seen = network(), Scales()
    optimizer = NaturalGradientOptimizer(model.parameters())
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**6)
    seen.note(scaler.get_scale(), model, optimizer)
    for step in range(1, 26):
        x, y = batch(0)
        with optimizer.observe(scaler), torch.autocast("cpu", torch.float16):
            value = F.cross_entropy(model(x), y) * (HEAVY if step >= first else 1.0)
        optimizer.zero_grad()
        scaler.scale(value).backward()
        scaler.step(optimizer)
        scaler.update()
        seen.note(scaler.get_scale(), model, optimizer)
    seen.assert_overflows_left_no_trace(first)
    assert optimizer.report is not None
    assert optimizer.report.skipped == 0
    assert F.cross_entropy(model(x), y) < 0.5 * F.cross_entropy(network()(x), y)


def test_a_scaler_that_is_not_told_of_is_asked_for() -> None:
    model, (x, y) = network(), batch(0)
    optimizer = NaturalGradientOptimizer(model.parameters())
    with optimizer.observe(), torch.autocast("cpu", torch.float16):
        loss = F.cross_entropy(model(x), y)
    with pytest.warns(UserWarning, match=r"observe\(scaler=scaler\)"):
        loss.backward()


def test_scores_that_float16_could_not_hold_are_enlarged_on_their_way() -> None:
    """Σ over a million terms gives each a weight of 1e-6, and its score a root of 1e-3."""

    def mean_eigenvalues(half: bool) -> list[float]:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 1))
        with torch.no_grad():
            model[2].weight.mul_(1e-4)
        optimizer = NaturalGradientOptimizer(model.parameters(), fisher="exact")
        x = torch.randn(64, 8, generator=torch.Generator().manual_seed(1))
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**16)
        with optimizer.observe(scaler), torch.autocast("cpu", torch.float16, enabled=half):
            loss = 1e-6 * F.mse_loss(model(x), x[:, :1])
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        return [float(b.mean_eigenvalue()) for b in optimizer._engine.fisher.blocks]

    half, full = mean_eigenvalues(True), mean_eigenvalues(False)
    assert len(half) == 2
    assert half == pytest.approx(full, rel=0.05)


class Classifier(L.LightningModule):
    def __init__(self, bad: tuple[int, ...] = ()) -> None:
        super().__init__()
        self.net = network()
        self.bad, self.dtypes = bad, set()

    def training_step(self, some: Any, batch_idx: int) -> Tensor:
        x, y = some
        logits = self.net(x)
        self.dtypes.add(logits.dtype)
        loss = F.cross_entropy(logits, y)
        return loss * float("inf") if self.trainer.global_step in self.bad else loss

    def on_after_backward(self) -> None:
        assert all(p.dtype == torch.float32 for p in self.parameters())

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.AdamW(self.parameters(), lr=1e-3, weight_decay=0.0)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 100)
        return [optimizer], [{"scheduler": schedule, "interval": "step"}]

    def train_dataloader(self) -> DataLoader[Any]:
        x, y = (torch.cat(t) for t in zip(*(batch(i) for i in range(8)), strict=True))
        return DataLoader(TensorDataset(x, y), batch_size=16)


def fit(
    folder: Path,
    epochs: int = 3,
    bad: tuple[int, ...] = (),
    checkpoint: str | None = None,
    module: Classifier | None = None,
    scale: float = 2.0**12,
    **settings: Any,
) -> tuple[Classifier, NaturalGradient, str]:
    module, natural = module or Classifier(bad), NaturalGradient(show_coverage=False)
    saver = ModelCheckpoint(folder / str(epochs), save_last=True)
    # Steps that overflow are followed by none that lets the scale grow again.
    growth = 5 if scale > 2.0**6 else 1000
    scaler = torch.amp.GradScaler("cpu", init_scale=scale, growth_interval=growth)
    trainer = L.Trainer(
        default_root_dir=folder,
        accelerator="cpu",
        max_epochs=epochs,
        callbacks=[natural, saver],
        plugins=[MixedPrecision("16-mixed", "cpu", scaler=scaler)],
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **settings,
    )
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*no loss scaler is known.*")
        trainer.fit(module, ckpt_path=checkpoint)
    return module, natural, saver.last_model_path


def loss(module: Classifier) -> float:
    with torch.no_grad():
        return float(F.cross_entropy(module.net(batch(0)[0]), batch(0)[1]))


@supports("Precision", "16-mixed with a GradScaler")
def test_half_precision_of_lightning_trains(tmp_path: Path) -> None:
    module, natural, _ = fit(tmp_path, 6)
    assert module.dtypes == {torch.float16}
    assert loss(module) < 0.5 * loss(Classifier())
    assert 44 <= natural.summary()["steps"] <= 48  # the scale grows until it is too large
    assert natural.summary()["kl_mean"] > 1e-4
    (optimizer,) = natural._ng_optimizers
    assert optimizer._engine._weight.total == pytest.approx(1.0, rel=1e-3)
    for block in optimizer._engine.fisher.blocks:
        assert {t.dtype for t in block.sums()} == {torch.float32}


@supports("Precision", "16-mixed: accumulation, clipping by norm, overflows")
def test_overflows_are_skipped_while_micro_batches_are_accumulated(tmp_path: Path) -> None:
    bad = (2, 3)  # as Lightning counts steps, skipped ones too
    module, natural, _ = fit(tmp_path, 6, bad, accumulate_grad_batches=2, gradient_clip_val=1.0)
    assert natural.summary()["steps"] == 6 * 4 - len(bad)
    assert natural.summary()["skipped"] == 0
    assert loss(module) < 0.7 * loss(Classifier())
    (optimizer,) = natural._ng_optimizers
    assert optimizer._engine._weight.total == pytest.approx(1.0, rel=1e-3)


class Heavy(Classifier):
    def __init__(self) -> None:
        super().__init__()
        self.seen = Scales()

    def training_step(self, some: Any, batch_idx: int) -> Tensor:
        return HEAVY * super().training_step(some, batch_idx)

    def on_train_batch_start(self, *_: Any) -> None:
        if not self.seen.notes:
            self.note()

    def on_train_batch_end(self, *_: Any) -> None:
        self.note()

    def note(self) -> None:
        scale = self.trainer.precision_plugin.scaler.get_scale()
        self.seen.note(scale, self.net, self.trainer.optimizers[0])


@supports("Precision", "16-mixed: overflows in a row, until the scale is below one")
def test_overflows_in_a_row_in_lightning_leave_no_trace(tmp_path: Path) -> None:
    module = Heavy()
    _, natural, _ = fit(tmp_path, 4, module=module, scale=2.0**6)
    module.seen.assert_overflows_left_no_trace(1)
    scales = [scale for scale, _, _ in module.seen.notes]
    overflows = sum(now < then for then, now in itertools.pairwise(scales))
    assert natural.summary()["steps"] == 4 * 8 - overflows
    assert natural.summary()["skipped"] == 0
    assert loss(module) < 0.7 * loss(Classifier())


@supports("Checkpoints", "16-mixed: resuming bit by bit")
def test_resuming_in_half_precision_is_bit_exact(tmp_path: Path) -> None:
    whole, _, _ = fit(tmp_path, 4)
    _, _, half = fit(tmp_path, 2)
    resumed, _, _ = fit(tmp_path, 4, checkpoint=half)
    assert torch.equal(flat([*resumed.parameters()]), flat([*whole.parameters()]))
