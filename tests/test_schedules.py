"""Learning-rate schedules anneal the steps of an active bound: radius, KL and displacement."""

from __future__ import annotations

import csv
import inspect
import io
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from torch import Tensor, nn
from torch.optim import lr_scheduler
from torch.utils.data import DataLoader, TensorDataset

from ngplugin import NaturalGradient, NaturalGradientOptimizer
from tests.oracle import double, flat, randn

F = torch.nn.functional
RADIUS = 1e-4  # nats; so small that the bound is active all the time
# Squared error under its own variance: the radius depends on nothing but the schedule.
X = randn(24, 4, seed=1)
Y = (X[:, :2] * X[:, 2:]).sin()
BASE = 0.02  # the learning rate that a schedule is given


class ByHand:
    """Code that writes learning rates into the groups: down, up again, to zero, up."""

    RATES = (1.0, 0.5, 0.1, 1.0, 0.0, 0.0, 0.3, 2.0, 1.0)

    def __init__(self, optimizer: Any) -> None:
        self.optimizer = optimizer
        self.count = 0

    def step(self) -> None:
        self.count += 1
        for group in self.optimizer.param_groups:
            group["lr"] = BASE * self.RATES[self.count % len(self.RATES)]

    def state_dict(self) -> dict[str, Any]:
        return {"count": self.count}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.count = state["count"]


class Plateau(lr_scheduler.ReduceLROnPlateau):
    """On a loss that stops falling for good after three epochs of one step."""

    def __init__(self, optimizer: Any) -> None:
        super().__init__(optimizer, factor=0.25, patience=1)

    def step(self) -> None:  # type: ignore[override]
        super().step(max(0.0, 3.0 - self.last_epoch))


def warm_up_and_cosine(optimizer: Any) -> Any:
    parts = [
        lr_scheduler.LinearLR(optimizer, 0.01, 1.0, 4),
        lr_scheduler.CosineAnnealingLR(optimizer, 8),
    ]
    return lr_scheduler.SequentialLR(optimizer, parts, milestones=[4])


SCHEDULES: dict[str, Callable[[Any], Any]] = {
    "plateau": Plateau,
    "one cycle": lambda o: lr_scheduler.OneCycleLR(
        o, 10 * BASE, total_steps=16, pct_start=0.5, cycle_momentum=False
    ),
    "restarts": lambda o: lr_scheduler.CosineAnnealingWarmRestarts(o, 5, 2, eta_min=1e-3 * BASE),
    "warm-up": lambda o: lr_scheduler.LinearLR(o, 0.01, 1.0, 10),
    "warm-up, cosine": warm_up_and_cosine,
    "lambda": lambda o: lr_scheduler.LambdaLR(o, lambda step: 1 / (1 + step)),
    "lambda above one": lambda o: lr_scheduler.LambdaLR(o, lambda step: (1, 3, 9, 3, 1)[step % 5]),
    "by hand": ByHand,
}
HOLDERS: dict[str, Callable[..., NaturalGradientOptimizer]] = {
    "own": lambda p, **options: NaturalGradientOptimizer(p, lr=BASE, **options),
    "wrapped": lambda p, **options: NaturalGradientOptimizer.wrap(
        torch.optim.AdamW(p, lr=BASE, weight_decay=0.0), **options
    ),
}
in_all = pytest.mark.parametrize("schedule", SCHEDULES)
of_both = pytest.mark.parametrize("holder", HOLDERS)


class Run:
    """A regression whose steps are all cut short by the bound and all measured."""

    def __init__(self, holder: str, schedule: str, **options: Any) -> None:
        self.model = double(nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 2)))
        options = {"kl_radius": RADIUS, "measure_every": 1, **options}
        self.optimizer = HOLDERS[holder](self.model.parameters(), **options)
        self.scheduler = SCHEDULES[schedule](self.optimizer)

    @property
    def rate(self) -> float:
        return self.optimizer.param_groups[0]["lr"]

    def weights(self) -> Tensor:
        return flat([*self.model.parameters()])

    def step(self) -> Any:
        """One step and its report, and how far the weights moved."""
        before = self.weights()
        self.optimizer.zero_grad()
        with self.optimizer.observe():
            loss = F.mse_loss(self.model(X), Y)
        loss.backward()
        self.optimizer.step()
        self.scheduler.step()
        return self.optimizer.report, float((self.weights() - before).norm())

    def parts(self) -> list[Any]:
        return [self.model, self.optimizer, self.scheduler]


def share(run: Run, peak: float) -> float:
    """The present rate over its peak, as a schedule says it or as far as it was seen."""
    group = run.optimizer.param_groups[0]
    return run.rate / max(peak, run.rate, group.get("max_lr", group.get("initial_lr", 0.0)))


@of_both
@in_all
def test_radius_and_measured_kl_follow_the_square_of_the_schedule(schedule, holder):
    run, peak, shares = Run(holder, schedule), 0.0, []
    for _ in range(16):
        now = share(run, peak)
        peak = max(peak, run.rate)
        report, moved = run.step()
        shares.append(now)
        assert report.kl_radius == pytest.approx(RADIUS * now**2, rel=1e-9, abs=0)
        assert report.kl_predicted <= report.kl_radius * (1 + 1e-6)
        assert report.kl is None or report.kl <= 1.5 * report.kl_radius
        assert (moved > 0) == (now > 0)
        if now > 0:
            assert report.kl >= 0.2 * report.kl_radius  # and the step is as long as it may be
            assert report.step_scale < 1
    assert min(shares) <= 0.2  # the schedule does something
    assert max(shares) == pytest.approx(1.0)


@of_both
@pytest.mark.parametrize("schedule", ["plateau", "one cycle", "warm-up, cosine", "lambda"])
def test_the_weights_move_in_proportion_to_the_rate(schedule, holder):
    run, constant = Run(holder, schedule), Run(holder, "by hand")
    constant.scheduler.RATES = (1.0,)
    peak, pairs = 0.0, []
    for _ in range(14):
        now = share(run, peak)
        peak = max(peak, run.rate)
        # From the same weights and averages, at the full rate.
        moved, whole = run.step()[1], constant.step()[1]
        pairs.append((now, moved / whole))
    shortest, longest = min(pairs), max(pairs)
    assert shortest[1] / longest[1] == pytest.approx(shortest[0] / longest[0], rel=0.7)
    assert shortest[1] < 0.3 * longest[1]


@of_both
def test_the_first_steps_of_a_warm_up_are_short(holder):
    warm, cold = Run(holder, "warm-up"), Run(holder, "by hand")
    (report, moved), (_, whole) = warm.step(), cold.step()
    assert report.kl_radius == pytest.approx(1e-4 * RADIUS)
    assert moved == pytest.approx(0.01 * whole, rel=0.3)


@of_both
@pytest.mark.parametrize("options", [{}, {"kl_radius": None}, {"structure": "identity"}])
def test_a_rate_of_zero_moves_nothing_bit_by_bit_and_a_later_rate_does(options, holder):
    run = Run(holder, "by hand", **options)
    for rate in (BASE, 0.0, 0.0, BASE):
        run.optimizer.param_groups[0]["lr"] = rate
        before = run.weights()
        report, _ = run.step()
        assert torch.equal(run.weights(), before) == (rate == 0)
        assert report.skipped == report.rejected == 0
        if "kl_radius" not in options:
            assert (report.kl_radius == 0) == (rate == 0)


def test_each_group_follows_its_own_rate_and_the_bound_the_largest_share():
    model = double(nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 2)))
    groups = [{"params": [*layer.parameters()]} for layer in model[::2]]
    optimizer = NaturalGradientOptimizer(groups, lr=BASE, kl_radius=RADIUS)
    schedule = lr_scheduler.LambdaLR(optimizer, [lambda step: 0.0**step, lambda step: 0.5**step])
    for step in range(4):
        first = flat([*model[0].parameters()])
        optimizer.zero_grad()
        with optimizer.observe():
            loss = F.mse_loss(model(X), Y)
        loss.backward()
        optimizer.step()
        assert torch.equal(flat([*model[0].parameters()]), first) == (step > 0)
        assert optimizer.report.kl_radius == pytest.approx(RADIUS * 0.25**step)
        schedule.step()


# -- resuming ------------------------------------------------------------------------------------


def saved(state: Any) -> Any:
    """Through a file."""
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@of_both
@in_all
def test_a_run_resumed_in_the_middle_of_a_schedule_is_the_same_run(schedule, holder):
    def going_on(run: Run) -> list[tuple[float, ...]]:
        reports = [run.step()[0] for _ in range(8)]
        return [(r.kl_radius, r.kl, r.kl_predicted, r.step_scale) for r in reports]

    run, resumed = Run(holder, schedule), Run(holder, schedule)
    for _ in range(5):
        run.step()
    for part, state in zip(resumed.parts(), [saved(p.state_dict()) for p in run.parts()]):  # noqa: B905
        part.load_state_dict(state)
    assert going_on(resumed) == going_on(run)
    assert torch.equal(resumed.weights(), run.weights())


# -- through Lightning ---------------------------------------------------------------------------


class Module(L.LightningModule):
    """Twelve steps in three epochs; the learning rate that the schedule gave each."""

    def __init__(self, schedule: str, own: bool) -> None:
        super().__init__()
        self.net = double(nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 2)))
        self.schedule, self.own = schedule, own
        self.rates: list[float] = []
        self.flat: list[Tensor] = []

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        self.rates.append(self.trainer.optimizers[0].param_groups[0]["lr"])
        self.flat.append(flat([*self.net.parameters()]))
        x, y = batch
        self.log("watched", 1.0, on_epoch=True, on_step=False)  # never falls
        return F.mse_loss(self.net(x), y)

    def configure_optimizers(self) -> Any:
        optimizer = (
            NaturalGradientOptimizer(self.parameters(), lr=BASE, kl_radius=RADIUS, measure_every=1)
            if self.own
            else torch.optim.AdamW(self.parameters(), lr=BASE, weight_decay=0.0)
        )
        if self.schedule == "monitored":
            plateau = lr_scheduler.ReduceLROnPlateau(optimizer, factor=0.1, patience=0)
            how = {"scheduler": plateau, "monitor": "watched", "interval": "epoch"}
        else:
            how = {"scheduler": SCHEDULES[self.schedule](optimizer), "interval": "step"}
        return {"optimizer": optimizer, "lr_scheduler": how}

    def train_dataloader(self) -> Any:
        return DataLoader(TensorDataset(X.repeat(4, 1), Y.repeat(4, 1)), batch_size=24)


def fit(
    folder: Path, schedule: str, own: bool, epochs: int = 3, checkpoint: Path | None = None
) -> tuple[Module, list[dict[str, str]], Path]:
    options = {} if own else {"kl_radius": RADIUS, "measure_every": 1}
    module, saver = Module(schedule, own), ModelCheckpoint(folder / f"{epochs}", save_last=True)
    logger = CSVLogger(folder, name="logs")
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "log_every_n_steps": 1}
    # Since Lightning 2.6 a fit refuses by itself to load pickled schedulers.
    newer = "weights_only" in inspect.signature(L.Trainer.fit).parameters
    loading = {"weights_only": False} if newer else {}
    L.Trainer(
        default_root_dir=folder, max_epochs=epochs, accelerator="cpu", logger=logger,
        callbacks=[NaturalGradient(show_coverage=False, **options), saver], **quiet,
    ).fit(module, ckpt_path=checkpoint, **loading)  # fmt: skip
    rows = list(csv.DictReader((Path(logger.log_dir) / "metrics.csv").open()))
    rows = [row for row in rows if row.get("natgrad/kl_radius")]
    return module, rows, Path(saver.last_model_path)


LIGHTNING = ["monitored", "one cycle", "warm-up, cosine"]


@pytest.mark.parametrize("own", [False, True], ids=["wrapped", "adopted"])
@pytest.mark.parametrize("schedule", LIGHTNING)
def test_a_trainer_s_schedule_shapes_the_logged_radius_and_kl(tmp_path, schedule, own):
    module, rows, _ = fit(tmp_path, schedule, own)
    peak = 10 * BASE if schedule == "one cycle" else BASE
    assert len(rows) == len(module.rates) == 12
    assert min(module.rates) < 0.15 * peak
    for row, rate in zip(rows, module.rates, strict=True):
        radius = RADIUS * (rate / peak) ** 2
        assert float(row["natgrad/kl_radius"]) == pytest.approx(radius, rel=1e-6)
        assert 0.2 * radius <= float(row["natgrad/kl"]) <= 1.5 * radius
    moved = [float((b - a).norm()) for a, b in zip(module.flat, module.flat[1:], strict=False)]
    shortest, longest = min(range(11), key=module.rates.__getitem__), moved.index(max(moved))
    assert moved[shortest] < 0.2 * moved[longest]
    assert math.isclose(module.rates[longest] / peak, 1.0, rel_tol=0.5)


# Lightning saves before a monitored schedule's step at the end of an epoch, and leaves that out.
@pytest.mark.parametrize("schedule", LIGHTNING[1:])
def test_a_trainer_resumes_in_the_middle_of_a_schedule_bit_by_bit(tmp_path, schedule):
    whole, rows, _ = fit(tmp_path / "whole", schedule, False)
    _, _, half = fit(tmp_path / "half", schedule, False, epochs=1)
    resumed, last, _ = fit(tmp_path / "half", schedule, False, checkpoint=half)
    assert torch.equal(flat([*resumed.parameters()]), flat([*whole.parameters()]))
    assert resumed.rates == whole.rates[4:]
    assert [row["natgrad/kl_radius"] for row in last] == [
        row["natgrad/kl_radius"] for row in rows[4:]
    ]
