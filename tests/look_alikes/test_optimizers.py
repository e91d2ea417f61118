"""Ways in which projects build their optimizer."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import lightning as L
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ngplugin import NaturalGradient, NaturalGradientOptimizer
from tests.look_alikes.look_alike import look_alike, one_run, point
from tests.look_alikes.test_templates import classes, network
from tests.small_fits import quiet

Forms = Callable[[Any], torch.optim.Optimizer]

FORMS: dict[str, Forms] = {
    "Class(params=..., lr=...)": lambda p: NaturalGradientOptimizer(params=p, lr=0.5),
    "Class(iterable, lr=, weight_decay=)": lambda p: NaturalGradientOptimizer(
        (q for q in p), lr=0.5, weight_decay=1e-2
    ),
    "functools.partial(Class, lr=...)": lambda p: partial(NaturalGradientOptimizer, lr=0.5)(p),
    "Class(groups with their own lr)": lambda p: NaturalGradientOptimizer(
        [{"params": [q], "lr": 0.5, "weight_decay": 0.0} for q in p], lr=1e-3
    ),
    "Class(named_parameters())": lambda p: NaturalGradientOptimizer(
        [(f"p{i}", q) for i, q in enumerate(p)], lr=0.5
    ),
}


class Routine(L.LightningModule):
    """Is given a network and what `configure_optimizers` returns."""

    def __init__(self, net: nn.Module, recipe: Any) -> None:
        super().__init__()
        self.net, self.recipe = net, recipe

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, y = batch
        return F.cross_entropy(self.net(x), y)

    def configure_optimizers(self) -> Any:
        return self.recipe


@pytest.mark.parametrize("form", [pytest.param(f, marks=point(10, f)) for f in FORMS])
@pytest.mark.parametrize("natural", [False, True], ids=["alone", "with the callback"])
def test_our_optimizer_is_built_like_any_other(form: str, natural: bool) -> None:
    def make() -> Routine:
        net = network()
        return Routine(net, FORMS[form](net.parameters()))

    run = one_run(make, classes(), natural)
    assert run.calls == len(run.losses) == 20
    assert sum(run.losses[-4:]) / 4 < 0.6 * run.losses[0]
    assert not [text for text in run.warnings if "ngplugin" in text]


RECIPES: dict[str, Callable[[torch.optim.Optimizer], Any]] = {
    "an instance": lambda optimizer: optimizer,
    "a list": lambda optimizer: [optimizer],
    "lists of optimizers and schedulers": lambda optimizer: (
        [optimizer],
        [torch.optim.lr_scheduler.MultiStepLR(optimizer, [2, 4])],
    ),
    "a dict with a schedule for each step": lambda optimizer: {
        "optimizer": optimizer,
        "lr_scheduler": {
            "scheduler": torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 20),
            "interval": "step",
        },
    },
}


@pytest.mark.parametrize("recipe", [
    pytest.param(r, marks=point(8, f"an optimizer built before the module, as {r}"))
    for r in RECIPES
])  # fmt: skip
def test_an_optimizer_from_before_the_module_is_taken_as_any_recipe(recipe: str) -> None:
    def make() -> Routine:
        net = network()
        adam = torch.optim.Adam(net.parameters(), lr=1e-3, weight_decay=1e-4)
        return Routine(net, RECIPES[recipe](adam))

    look_alike(make, classes(), 0.6)


@point(9, "a schedule that was built from the optimizer itself stays valid")
@pytest.mark.parametrize(
    "schedule",
    [
        lambda o: torch.optim.lr_scheduler.ConstantLR(o, 0.5, 3),
        lambda o: torch.optim.lr_scheduler.StepLR(o, 2),
        lambda o: torch.optim.lr_scheduler.SequentialLR(
            o,
            [
                torch.optim.lr_scheduler.LinearLR(o, 0.1, total_iters=2),
                torch.optim.lr_scheduler.ExponentialLR(o, 0.9),
            ],
            [2],
        ),
    ],
    ids=["ConstantLR", "StepLR", "SequentialLR"],
)
def test_schedules_step_as_without_us(schedule: Any) -> None:
    def make() -> Routine:
        net = network()
        adam = torch.optim.Adam(net.parameters(), lr=1e-3)
        return Routine(net, ([adam], [schedule(adam)]))

    run = look_alike(make, classes(), 0.8)
    assert len({rates[0] for rates in run.rates}) > 1


# -- several optimizers ----------------------------------------------------------------------------


class Adversarial(L.LightningModule):
    """A generator and a discriminator of points on a circle, each with its own optimizer."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.generator = nn.Sequential(nn.Linear(4, 16), nn.LeakyReLU(0.2), nn.Linear(16, 10))
        self.discriminator = nn.Sequential(nn.Linear(10, 16), nn.LeakyReLU(0.2), nn.Linear(16, 1))
        self.scores: list[tuple[float, float]] = []

    def score(self, points: Tensor, real: bool) -> Tensor:
        logits = self.discriminator(points)
        target = torch.full_like(logits, float(real))
        return F.binary_cross_entropy_with_logits(logits, target)

    def training_step(self, batch: Any, batch_idx: int) -> None:
        x, _ = batch
        for_generator, for_discriminator = self.optimizers()
        z = torch.randn(len(x), 4)

        self.toggle_optimizer(for_generator)
        fooled = self.score(self.generator(z), real=True)
        self.manual_backward(fooled)
        for_generator.step()
        for_generator.zero_grad()
        self.untoggle_optimizer(for_generator)

        self.toggle_optimizer(for_discriminator)
        told = (self.score(x, True) + self.score(self.generator(z).detach(), False)) / 2
        self.manual_backward(told)
        for_discriminator.step()
        for_discriminator.zero_grad()
        self.untoggle_optimizer(for_discriminator)
        self.scores.append((fooled.item(), told.item()))
        self.log_dict({"g_loss": fooled, "d_loss": told}, prog_bar=True)

    def configure_optimizers(self) -> Any:
        rates = {"lr": 2e-4, "betas": (0.5, 0.999)}
        return [
            torch.optim.Adam(self.generator.parameters(), **rates),
            torch.optim.Adam(self.discriminator.parameters(), **rates),
        ], []


@point(8, "manual optimization of two optimizers with toggle_optimizer, a GAN")
def test_an_adversarial_pair_trains_each_its_own_parameters() -> None:
    torch.manual_seed(0)
    module, callback = Adversarial(), NaturalGradient(show_coverage=False)
    quiet(callback, max_epochs=5).fit(module, classes())
    assert len(module.scores) == 20
    assert all(0 < score < 10 for pair in module.scores for score in pair)
    assert module.scores[-1] != module.scores[0]
    names = {name for name, _ in module.named_parameters()}
    blocks = {row.parameter: row.block for row in callback.coverage().rows}
    assert blocks == dict.fromkeys(names, "kronecker")


class Manual(Routine):
    """One optimizer, whose steps the module makes itself."""

    def __init__(self, net: nn.Module, recipe: Any) -> None:
        super().__init__(net, recipe)
        self.automatic_optimization = False
        self.losses: list[float] = []

    def training_step(self, batch: Any, batch_idx: int) -> None:
        x, y = batch
        optimizer = self.optimizers()
        optimizer.zero_grad()
        loss = F.cross_entropy(self.net(x), y)
        self.manual_backward(loss)
        self.clip_gradients(optimizer, gradient_clip_val=1.0, gradient_clip_algorithm="norm")
        optimizer.step()
        self.losses.append(loss.item())


@point(8, "manual optimization of one optimizer")
def test_manual_optimization_is_followed() -> None:
    torch.manual_seed(0)
    net = network()
    module = Manual(net, torch.optim.Adam(net.parameters(), lr=1e-3))
    callback = NaturalGradient(show_coverage=False)
    quiet(callback, max_epochs=5).fit(module, classes())
    assert sum(module.losses[-4:]) / 4 < 0.6 * module.losses[0]
    assert "none" not in {row.block for row in callback.coverage().rows}
