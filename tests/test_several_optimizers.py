"""Several optimizers, optimizers of some parameters, and steps that the module makes by itself."""

from __future__ import annotations

import csv
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch.callbacks import BaseFinetuning, LearningRateMonitor, ModelCheckpoint
from lightning.pytorch.demos.boring_classes import ManualOptimBoringModel
from lightning.pytorch.loggers import CSVLogger
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from ngplugin import NaturalGradient, NaturalGradientOptimizer
from ngplugin.natural_step import NaturalGradientStep
from tests.oracle import flat
from tests.small_fits import quiet

supports = pytest.mark.supports
BATCHES, EPOCHS = 8, 3


def data(n: int = 16 * BATCHES) -> DataLoader[Any]:
    g = torch.Generator().manual_seed(1)
    x = torch.randn(n, 6, generator=g)
    return DataLoader(TensorDataset(x, (x[:, 0] * x[:, 1] > 0).long()), batch_size=16)


def fit(
    tmp_path: Path,
    module: L.LightningModule,
    *callbacks: L.Callback,
    natural: NaturalGradient | None = None,
    **settings: Any,
) -> tuple[NaturalGradient, L.Trainer]:
    natural = natural or NaturalGradient(show_coverage=False)
    settings = {"default_root_dir": tmp_path, "max_epochs": EPOCHS, **settings}
    trainer = quiet(natural, *callbacks, **settings)
    trainer.fit(module, data())
    return natural, trainer


def assert_resuming_is_bit_exact(
    tmp_path: Path, make: Callable[[], L.LightningModule], *callbacks: Callable[[], L.Callback]
) -> None:
    """From the end of any epoch, with every module and callback made anew."""

    def run(epochs: int, checkpoint: str | None = None) -> tuple[Tensor, str]:
        module, natural = make(), NaturalGradient(show_coverage=False)
        saver = ModelCheckpoint(tmp_path / str(epochs), save_last=True)
        others = [callback() for callback in callbacks]
        trainer = quiet(
            natural,
            *others,
            saver,
            default_root_dir=tmp_path,
            max_epochs=epochs,
            enable_checkpointing=True,
        )
        trainer.fit(module, data(), ckpt_path=checkpoint)
        return flat([*module.parameters()]), saver.last_model_path

    whole, _ = run(4)
    for epochs in (1, 2, 3):
        _, part = run(epochs)
        resumed, _ = run(4, part)
        assert torch.equal(resumed, whole), epochs


def accuracy(module: Any) -> float:
    x, y = data().dataset.tensors
    with torch.no_grad():
        return float((module(x).argmax(1) == y).float().mean())


class Adversaries(L.LightningModule):
    """A generator of a distribution, and a discriminator that tells it from the data."""

    def __init__(self, toggle: bool = True, reuse: bool = False) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.toggle, self.reuse = toggle, reuse
        torch.manual_seed(0)
        self.generator = nn.Sequential(nn.Linear(4, 16), nn.Tanh(), nn.Linear(16, 6))
        self.discriminator = nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 1))
        self.calls = 0

    @contextmanager
    def of(self, optimizer: Any) -> Iterator[None]:
        if self.toggle:
            self.toggle_optimizer(optimizer)
        yield
        if self.toggle:
            self.untoggle_optimizer(optimizer)

    def judged(self, x: Tensor, label: float) -> Tensor:
        logits = self.discriminator(x)
        return F.binary_cross_entropy_with_logits(logits, torch.full_like(logits, label))

    def training_step(self, batch: Any, batch_idx: int) -> None:
        self.calls += 1
        generator, discriminator = self.optimizers()
        g = torch.Generator().manual_seed(self.trainer.current_epoch * BATCHES + batch_idx)
        z = torch.randn(len(batch[0]), 4, generator=g)
        with self.of(generator):
            fake = self.generator(z)
            loss = self.judged(fake, 1.0)
            generator.zero_grad()
            self.manual_backward(loss)
            generator.step()
        with self.of(discriminator):
            fake = fake if self.reuse else self.generator(z)
            loss = 0.5 * (self.judged(batch[0], 1.0) + self.judged(fake.detach(), 0.0))
            discriminator.zero_grad()
            self.manual_backward(loss)
            discriminator.step()
        self.log("d_loss", loss)

    def configure_optimizers(self) -> Any:
        return [
            torch.optim.Adam(self.generator.parameters(), lr=1e-3),
            torch.optim.AdamW(self.discriminator.parameters(), lr=1e-3),
        ], []


@supports("Optimizers", "two optimizers, manual optimization (GAN), toggled or not")
@pytest.mark.parametrize("toggle", [True, False], ids=["toggled", "not toggled"])
def test_adversaries_each_step_by_their_own_fisher(tmp_path: Path, toggle: bool) -> None:
    module = Adversaries(toggle)
    logger = CSVLogger(tmp_path, name="logs")
    natural, trainer = fit(tmp_path, module, logger=logger)
    assert module.calls == EPOCHS * BATCHES
    for i in range(2):
        assert natural.summary(i)["steps"] == EPOCHS * BATCHES
        assert natural.summary(i)["kl_mean"] > 0
        assert {row.block for row in natural.coverage(i).rows} == {"kronecker"}
    names = [{row.parameter.split(".")[0] for row in natural.coverage(i).rows} for i in range(2)]
    assert names == [{"generator"}, {"discriminator"}]
    # A step is weighed by its own loss alone: one mean over the batch, and 0.5 of two.
    weights = [o._engine._weight.total for o in trainer.strategy.optimizers]
    assert weights == pytest.approx([1.0, 1.0])
    rows = list(csv.DictReader((Path(logger.log_dir) / "metrics.csv").open()))
    for name in ("natgrad/kl_predicted", "natgrad-1/kl_predicted"):
        assert len([row for row in rows if row[name]]) == EPOCHS * BATCHES
    assert trainer.callback_metrics["natgrad-1/kl"] > 0


class ZeroedFirst(Adversaries):
    """Gradients are zeroed before all else, and the discriminator steps first."""

    def __init__(self, by_hand: bool) -> None:
        super().__init__()
        self.by_hand = by_hand

    def judged(self, x: Tensor, label: float) -> Tensor:
        if not self.by_hand:
            return super().judged(x, label)
        return F.softplus((1 - 2 * label) * self.discriminator(x)).mean()

    def training_step(self, batch: Any, batch_idx: int) -> None:
        generator, discriminator = self.optimizers()
        generator.zero_grad()
        discriminator.zero_grad()
        fake = self.generator(torch.randn(len(batch[0]), 4))
        loss = self.judged(batch[0], 1.0) + self.judged(fake.detach(), 0.0)
        self.manual_backward(loss)
        discriminator.step()
        self.manual_backward(self.judged(fake, 1.0))
        generator.step()


@pytest.mark.parametrize("by_hand", [False, True], ids=["cross entropy", "by hand"])
def test_a_loss_that_does_not_reach_an_optimizer_s_parameters_is_not_its_own(
    tmp_path: Path, by_hand: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    scored: dict[int, set[int]] = {}
    weigh = NaturalGradientStep._weigh

    def counted(engine: NaturalGradientStep, observations: Any) -> Any:
        if observations:
            count = sum(len(o.scored) for o in observations)
            scored.setdefault(id(engine), set()).add(count)
        return weigh(engine, observations)

    monkeypatch.setattr(NaturalGradientStep, "_weigh", counted)
    natural, trainer = fit(tmp_path, ZeroedFirst(by_hand))
    assert natural.summary(0)["kl_mean"] > 0
    # The generator's one loss, and not the discriminator's two, which by hand are one objective.
    generator, discriminator = (o._engine for o in trainer.strategy.optimizers)
    assert scored[id(generator)] == {1}
    assert scored[id(discriminator)] == {1 if by_hand else 2}


def test_what_one_optimizer_computes_for_its_step_is_not_seen_by_another_s_observer() -> None:
    module = Adversaries()
    one, other = (
        NaturalGradientOptimizer(m.parameters()) for m in (module.generator, module.discriminator)
    )
    with one.observe(), other.observe():
        loss = module.judged(module.generator(torch.randn(8, 4)), 1.0)
        loss.backward()
        seen = len(other._engine.watch.observer.observation.tape.calls)
        one.step()
        assert one.report.kl > 0
        assert len(other._engine.watch.observer.observation.tape.calls) == seen


def test_what_another_optimizer_s_parameters_made_before_they_changed_stays_as_it_was(
    tmp_path: Path,
) -> None:
    """Otherwise the discriminator's step would be measured on the fakes of another generator."""
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*predicted, not measured.*")
        natural, _ = fit(tmp_path, Adversaries(toggle=False, reuse=True))
    for i in range(2):
        assert natural.summary(i)["kl_mean"] > 0
        assert natural.summary(i)["kl_max"] <= 0.05


@supports("Optimizers", "some of several: NaturalGradient(optimizers=[1])")
def test_only_the_chosen_one_is_natural(tmp_path: Path) -> None:
    chosen = NaturalGradient(show_coverage=False, optimizers=[1])
    natural, trainer = fit(tmp_path, Adversaries(), natural=chosen)
    kinds = [isinstance(o, NaturalGradientOptimizer) for o in trainer.strategy.optimizers]
    assert kinds == [False, True]
    assert {row.parameter.split(".")[0] for row in natural.coverage().rows} == {"discriminator"}


@supports("Optimizers", "manual optimization")
def test_manual_optimization_steps_as_automatic_optimization_does(tmp_path: Path) -> None:
    class Manual(Automatic):
        def __init__(self) -> None:
            super().__init__()
            self.automatic_optimization = False

        def training_step(self, batch: Any, batch_idx: int) -> None:
            optimizer = self.optimizers()
            optimizer.zero_grad()
            self.manual_backward(super().training_step(batch, batch_idx))
            optimizer.step()

    one, other = Automatic(), Manual()
    fit(tmp_path, one)
    fit(tmp_path, other)
    assert torch.equal(flat([*one.parameters()]), flat([*other.parameters()]))


@supports("Optimizers", "ManualOptimBoringModel of Lightning")
def test_the_manual_demo_of_lightning_learns(tmp_path: Path) -> None:
    torch.manual_seed(0)
    module = ManualOptimBoringModel()
    x = torch.cat([*module.train_dataloader()])
    before = float(module.step(x))
    natural = NaturalGradient(show_coverage=False)
    quiet(natural, default_root_dir=tmp_path, max_epochs=2).fit(module)
    assert float(module.step(x)) < 0.5 * before
    assert natural.summary()["steps"] == 2 * 64


class Automatic(L.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.last = nn.Linear(6, 16), nn.Linear(16, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.first(x).tanh())

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return F.cross_entropy(self(batch[0]), batch[1])

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters(), lr=1e-3, weight_decay=0.0)


class Repeating(Automatic):
    """Several steps a batch, by hand; the gradient of every second is accumulated first."""

    def __init__(self, repeats: int) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.repeats = repeats

    def training_step(self, batch: Any, batch_idx: int) -> None:
        optimizer = self.optimizers()
        for _ in range(self.repeats):
            optimizer.zero_grad()
            for half in (slice(None, 8), slice(8, None)):
                self.manual_backward(F.cross_entropy(self(batch[0][half]), batch[1][half]) / 2)
            optimizer.step()


@supports("Optimizers", "several steps a batch, accumulation by hand")
@pytest.mark.parametrize("repeats", [2, 3])
def test_every_step_of_a_batch_is_observed_when_it_is_due(tmp_path: Path, repeats: int) -> None:
    module = Repeating(repeats)
    natural, trainer = fit(tmp_path, module)
    steps = EPOCHS * BATCHES * repeats
    assert natural.summary()["steps"] == steps
    engine = trainer.strategy.optimizers[0]._engine
    # Statistics are not lost for being due in the middle of a batch; a few are late.
    assert engine.steps - engine._statistics_step <= 5 + repeats
    average = engine.fisher.blocks[0]._averages["G"]
    assert average._weight > 1 - 0.95 ** (5 + (steps - 5) // (5 + repeats))
    assert engine._weight.total == pytest.approx(1.0)
    assert accuracy(module) > 0.8


@supports("Optimizers", "optimizers that step every so many batches")
def test_an_optimizer_that_steps_seldom_does_not_learn_from_batches_it_let_pass(
    tmp_path: Path,
) -> None:
    class Seldom(Adversaries):
        def training_step(self, batch: Any, batch_idx: int) -> None:
            generator, discriminator = self.optimizers()
            z = torch.randn(len(batch[0]), 4)
            loss = self.judged(batch[0], 1.0) + self.judged(self.generator(z).detach(), 0.0)
            discriminator.zero_grad()
            self.manual_backward(loss)
            discriminator.step()
            if batch_idx % 4 == 0:
                loss = self.judged(self.generator(z), 1.0)
                generator.zero_grad()
                self.manual_backward(loss)
                generator.step()

    natural, trainer = fit(tmp_path, Seldom())
    assert natural.summary(0)["steps"] == EPOCHS * BATCHES // 4
    assert natural.summary(1)["steps"] == EPOCHS * BATCHES
    # The generator's loss puts gradients into the discriminator, which zeroes them first.
    assert trainer.strategy.optimizers[1]._engine._weight.total == pytest.approx(2.0)
    assert trainer.strategy.optimizers[0]._engine.watch.observations == []


def test_a_raw_reference_that_bypasses_the_natural_optimizer_is_told(tmp_path: Path) -> None:
    class Keeps(Automatic):
        def __init__(self) -> None:
            super().__init__()
            self.automatic_optimization = False

        def configure_optimizers(self) -> Any:
            self.kept = super().configure_optimizers()
            return self.kept

        def training_step(self, batch: Any, batch_idx: int) -> None:
            self.kept.zero_grad()
            self.manual_backward(super().training_step(batch, batch_idx))
            self.kept.step()

    with pytest.warns(UserWarning, match=r"optimizer 0 made no step.*self.optimizers\(\)"):
        fit(tmp_path, Keeps(), max_epochs=2)


@supports("Optimizers", "an optimizer of some parameters only (linear probe)")
def test_parameters_of_no_optimizer_stay_as_they_are(tmp_path: Path) -> None:
    class Probe(Automatic):
        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.last.parameters(), lr=0.1)

    module = Probe()
    before = module.first.weight.clone()
    natural, _ = fit(tmp_path, module)
    assert torch.equal(module.first.weight, before)
    assert [row.parameter for row in natural.coverage().rows] == ["last.weight", "last.bias"]


class Thawing(BaseFinetuning):
    """Trains the head first; the body's parameters join as a group in the second epoch."""

    def freeze_before_training(self, pl_module: Any) -> None:
        self.freeze(pl_module.first)

    def finetune_function(self, pl_module: Any, epoch: int, optimizer: Any) -> None:
        if epoch == 1:
            self.unfreeze_and_add_param_group(pl_module.first, optimizer, lr=1e-3)
        elif epoch > 1:  # Lightning restores the groups on resuming, and not what requires grad
            self.make_trainable(pl_module.first)


class Thawed(Automatic):
    def configure_optimizers(self) -> Any:
        trained = filter(lambda p: p.requires_grad, self.parameters())
        return torch.optim.AdamW(trained, lr=1e-3, weight_decay=0.0)


@supports("Optimizers", "groups added in the middle of a run (BaseFinetuning)")
def test_a_group_that_joins_in_the_middle_gets_blocks(tmp_path: Path) -> None:
    module = Thawed()
    natural, trainer = fit(tmp_path, module, Thawing(), max_epochs=6)
    assert len(trainer.optimizers[0].param_groups) == 2
    assert {row.block for row in natural.coverage().rows} == {"kronecker"}
    assert len(natural.coverage().rows) == 4
    assert accuracy(module) > 0.8


@supports("Checkpoints", "resuming after a group was added")
def test_resuming_after_a_group_has_joined_is_bit_exact(tmp_path: Path) -> None:
    assert_resuming_is_bit_exact(tmp_path, Thawed, Thawing)


def built_before() -> Any:
    module = Automatic()
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1, momentum=0.9)
    return module, optimizer


RETURNED = {
    "an optimizer": lambda o: o,
    "a list": lambda o: [o],
    "two lists": lambda o: ([o], [torch.optim.lr_scheduler.StepLR(o, 1)]),
    "two lists, scheduler as a dictionary": lambda o: (
        [o],
        [{"scheduler": torch.optim.lr_scheduler.StepLR(o, 1), "interval": "step"}],
    ),
    "a dictionary": lambda o: {"optimizer": o},
    "a dictionary with a scheduler": lambda o: {
        "optimizer": o,
        "lr_scheduler": torch.optim.lr_scheduler.CosineAnnealingLR(o, 10),
    },
    "a dictionary with a scheduler's settings": lambda o: {
        "optimizer": o,
        "lr_scheduler": {
            "scheduler": torch.optim.lr_scheduler.ReduceLROnPlateau(o),
            "monitor": "loss",
            "interval": "epoch",
            "frequency": 1,
            "strict": False,
        },
    },
    "a tuple of dictionaries": lambda o: ({"optimizer": o},),
}


@supports("Optimizers", "configure_optimizers() in all its return forms, an optimizer built before")
@pytest.mark.parametrize("form", RETURNED)
def test_every_return_form_is_wrapped_and_keeps_its_schedule(tmp_path: Path, form: str) -> None:
    def rates(*callbacks: L.Callback, enabled: bool) -> list[float]:
        module, optimizer = built_before()
        seen: list[float] = []

        class Watch(L.Callback):
            def on_train_batch_end(self, trainer: Any, *args: Any) -> None:
                seen.append(trainer.optimizers[0].param_groups[0]["lr"])

        module.configure_optimizers = lambda: RETURNED[form](optimizer)
        step = module.training_step

        def training_step(batch: Any, batch_idx: int) -> Tensor:
            loss = step(batch, batch_idx)
            module.log("loss", loss)
            return loss

        module.training_step = training_step
        natural = NaturalGradient(show_coverage=False, enabled=enabled)
        fit(tmp_path, module, Watch(), natural=natural, max_epochs=2)
        if enabled:
            assert natural.summary()["steps"] == 2 * BATCHES
        return seen

    assert rates(enabled=True) == rates(enabled=False)


@supports("Optimizers", "optimizer_step overridden: warm-up by hand, skipped steps")
def test_an_overridden_optimizer_step_is_followed(tmp_path: Path) -> None:
    class Warm(Automatic):
        def optimizer_step(
            self, epoch: int, batch_idx: int, optimizer: Any, optimizer_closure: Any = None
        ) -> None:
            for group in optimizer.param_groups:
                group["lr"] = 1e-3 * min(1.0, (self.trainer.global_step + 1) / 6)
            if batch_idx % 4 == 3:
                optimizer_closure()  # looks at the batch, and lets it pass
            else:
                optimizer.step(closure=optimizer_closure)

    module = Warm()
    natural, trainer = fit(tmp_path, module, max_epochs=6)
    assert natural.summary()["steps"] == 6 * BATCHES * 3 // 4
    assert trainer.strategy.optimizers[0]._engine._weight.total == pytest.approx(1.0)
    assert accuracy(module) > 0.8


@supports("Callbacks", "LearningRateMonitor: names unchanged, of several optimizers too")
def test_rates_are_logged_under_the_names_of_the_wrapped_optimizers(tmp_path: Path) -> None:
    def names(*, enabled: bool) -> set[str]:
        logger = CSVLogger(tmp_path, name="logs")
        monitor = LearningRateMonitor("step", log_momentum=True)
        natural = NaturalGradient(show_coverage=False, enabled=enabled)
        fit(tmp_path, Adversaries(), monitor, natural=natural, logger=logger, log_every_n_steps=1)
        with (Path(logger.log_dir) / "metrics.csv").open() as file:
            return {n for n in csv.DictReader(file).fieldnames or () if n.startswith("lr-")}

    assert names(enabled=True) == names(enabled=False) != set()


@supports("Checkpoints", "resuming with several optimizers, with several steps a batch")
@pytest.mark.parametrize("kind", [Adversaries, lambda: Repeating(2)], ids=["two", "two steps"])
def test_resuming_manual_optimization_is_bit_exact(tmp_path: Path, kind: Any) -> None:
    assert_resuming_is_bit_exact(tmp_path, kind)
