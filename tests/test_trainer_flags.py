"""A trainer's flags and its user's own contexts, one at a time."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Iterator
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import GradientAccumulationScheduler
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode, _len_torch_function_stack
from torch.utils.data import DataLoader, TensorDataset

from ngplugin import NaturalGradient, NaturalGradientOptimizer
from tests.oracle import randn
from tests.small_fits import POINTS, Points, X, Y, fit, quiet

STEPS = 10  # two and a half epochs


def supports(what: str, area: str = "Trainer flags") -> Any:
    return pytest.mark.supports(area, what)


contexts = "Users' contexts"


@pytest.fixture(scope="module", name="usual")
def losses_of_the_usual_run() -> list[float]:
    module = Points()
    fit(module)
    assert len(module.losses) == STEPS
    return module.losses


# -- flags that change nothing of the steps --------------------------------------------------------


UNCHANGED: dict[str, dict[str, Any]] = {
    "detect_anomaly=True": {"detect_anomaly": True},
    "profiler='simple'": {"profiler": "simple"},
    "profiler='advanced'": {"profiler": "advanced"},
    "deterministic=True": {"deterministic": True},
    "deterministic='warn'": {"deterministic": "warn"},
    "benchmark=True": {"benchmark": True},
    "num_sanity_val_steps=0": {"num_sanity_val_steps": 0},
    "min_epochs, max_epochs": {"min_epochs": 1, "max_epochs": 5, "max_steps": STEPS},
    "reload_dataloaders_every_n_epochs=1": {"reload_dataloaders_every_n_epochs": 1},
    "enable_autolog_hparams=False": {"enable_autolog_hparams": False},
}


@pytest.fixture(name="deterministic_again")
def _algorithms_as_they_were() -> Iterator[None]:
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.filterwarnings("error:.*ngplugin")
@pytest.mark.usefixtures("deterministic_again")
@pytest.mark.parametrize("flag", [pytest.param(flag, marks=supports(flag)) for flag in UNCHANGED])
def test_the_steps_are_the_usual_ones(flag: str, usual: list[float]) -> None:
    if unknown := UNCHANGED[flag].keys() - inspect.signature(L.Trainer).parameters.keys():
        pytest.skip(f"this Lightning has no {unknown}")
    module = Points()
    fit(module, **UNCHANGED[flag])
    assert module.losses == usual


@supports("barebones=True")
def test_a_bare_trainer_makes_the_usual_steps_and_is_not_told_of_metrics(
    usual: list[float],
) -> None:
    module, callback = Points(), NaturalGradient(show_coverage=False)
    left_out = ("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary")
    bare = quiet(callback, barebones=True, max_steps=STEPS, **dict.fromkeys(left_out))
    with warnings.catch_warnings():
        warnings.filterwarnings("error", ".*barebones.*")
        bare.fit(module, DataLoader(POINTS, batch_size=16))
    assert module.losses == usual


# -- flags that choose batches and epochs ----------------------------------------------------------


@pytest.mark.parametrize(
    ("flag", "value", "steps"),
    [
        pytest.param(flag, value, steps, marks=supports(f"{flag}={value}"))
        for flag, value, steps in (
            ("overfit_batches", 2, 4),
            ("limit_train_batches", 3, 6),
            ("limit_train_batches", 0.5, 4),
            ("fast_dev_run", True, 1),
            ("fast_dev_run", 3, 3),
        )
    ],
)
def test_a_step_is_made_for_each_batch_that_is_left(flag: str, value: Any, steps: int) -> None:
    module = Points()
    callback = fit(module, max_epochs=2, **{flag: value})
    assert callback.summary()["steps"] == len(module.losses) == steps


class Validated(Points):
    """Validates in whatever grad mode the trainer has chosen, and in `inference_mode` itself."""

    def __init__(self) -> None:
        super().__init__()
        self.validated = 0

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        assert not torch.is_grad_enabled()
        assert _len_torch_function_stack() == 0
        x, y = batch
        self.log("val/loss", F.cross_entropy(self.net(x), y))
        with torch.inference_mode():
            self.net(x)
        self.validated += 1

    def val_dataloader(self) -> Any:
        return DataLoader(POINTS, batch_size=64)


@pytest.mark.parametrize(
    ("flags", "validated"),
    [
        pytest.param({"val_check_interval": 2}, 1 + 5, marks=supports("val_check_interval=2")),
        pytest.param({"val_check_interval": 0.5}, 1 + 5, marks=supports("val_check_interval=0.5")),
        pytest.param(
            {"val_check_interval": 3, "check_val_every_n_epoch": None},
            1 + 3,
            marks=supports("check_val_every_n_epoch=None"),
        ),
        pytest.param({"inference_mode": False}, 1 + 2, marks=supports("inference_mode=False")),
    ],
)
def test_validation_in_between_changes_no_step(
    flags: dict[str, Any], validated: int, usual: list[float]
) -> None:
    module = Validated()
    fit(module, **flags)
    assert module.losses == usual
    assert module.validated == validated


# -- flags that change the gradient ----------------------------------------------------------------


@supports("gradient_clip_val=0.1, by norm")
def test_clipping_by_norm_shortens_the_gradient_and_keeps_the_run_stable() -> None:
    module = Points()
    callback = fit(module, steps=25, gradient_clip_val=0.1)
    assert module.losses[-1] < 0.7 * module.losses[0]
    assert callback._ng_optimizers[0].report.grad_norm <= 0.1 * (1 + 1e-4)
    assert callback.summary()["kl_max"] <= 0.05


@supports("gradient_clip_algorithm='value', with a warning")
def test_clipping_by_value_trains_and_is_warned_of() -> None:
    module = Points()
    with pytest.warns(UserWarning, match="gradient_clip_algorithm='value'.*clip by norm"):
        fit(module, steps=25, gradient_clip_val=0.1, gradient_clip_algorithm="value")
    assert module.losses[-1] < 0.7 * module.losses[0]


class Line(Points):
    """One linear map to one number: its Fisher information does not depend on the draw."""

    def build(self) -> nn.Module:
        return nn.Linear(6, 1).double()

    def loss(self, batch: Any) -> Tensor:
        x, y = batch
        return F.mse_loss(self.net(x), y)


LINE = TensorDataset(X.double(), randn(64, 1, seed=4))


@supports("accumulate_grad_batches=3, the last window of an epoch incomplete")
def test_an_incomplete_window_makes_the_step_of_its_own_batches() -> None:
    """Lightning divides each loss by 3 there too, which no natural-gradient step depends on."""
    module = Line()
    options = {"kl_radius": None, "momentum": 0.0}  # neither bound nor momentum hides the length
    callback = NaturalGradient(show_coverage=False, **options)
    trainer = quiet(callback, accumulate_grad_batches=3, max_epochs=2)
    trainer.fit(module, DataLoader(LINE, batch_size=16))
    assert (len(module.losses), callback.summary()["steps"]) == (8, 4)

    other = Line()
    sgd = torch.optim.SGD(other.parameters(), lr=0.1)
    optimizer = NaturalGradientOptimizer.wrap(sgd, **options)
    for _ in range(2):
        for window in ([0, 1, 2], [3]):
            optimizer.zero_grad()
            for i in window:
                part = slice(16 * i, 16 * (i + 1))
                with optimizer.observe():
                    loss = other.loss(LINE[part]) / len(window)
                loss.backward()
            optimizer.step()
    torch.testing.assert_close(other.net.weight, module.net.weight)


@supports("GradientAccumulationScheduler")
def test_windows_may_grow_from_epoch_to_epoch() -> None:
    module = Points()
    callback = fit(module, GradientAccumulationScheduler({0: 1, 1: 2, 2: 3}), max_epochs=3)
    assert len(module.losses) == 12
    assert callback.summary()["steps"] == 4 + 2 + 2


# -- users' own contexts ---------------------------------------------------------------------------


class CountsCalls(TorchFunctionMode):
    """A mode of the user's own, as of a library that counts operations."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = 0

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        self.calls += 1
        return func(*args, **(kwargs or {}))


@supports("a TorchFunctionMode inside training_step", contexts)
def test_a_mode_inside_the_training_step_sees_its_calls_and_so_do_we(usual: list[float]) -> None:
    class Counted(Points):
        mode = CountsCalls()

        def loss(self, batch: Any) -> Tensor:
            with self.mode:
                return super().loss(batch)

    module = Counted()
    fit(module)
    assert module.losses == usual
    assert module.mode.calls == STEPS * 4  # two layers, an activation, a loss


@supports("a TorchFunctionMode around trainer.fit", contexts)
def test_a_mode_around_the_fit_changes_nothing(usual: list[float]) -> None:
    module, mode = Points(), CountsCalls()
    with mode:
        fit(module)
    assert module.losses == usual
    assert mode.calls > STEPS * 4


@supports("torch.device(...) as a context, inside training_step and around trainer.fit", contexts)
def test_a_device_context_changes_nothing(usual: list[float]) -> None:
    class Placed(Points):
        def loss(self, batch: Any) -> Tensor:
            with torch.device("cpu"):
                return super().loss(batch) + torch.zeros(())

    module = Placed()
    with torch.device("cpu"):
        fit(module)
    assert module.losses == usual


@supports("torch.inference_mode() inside training_step", contexts)
def test_what_is_computed_in_inference_mode_may_enter_the_loss() -> None:
    class Distilled(Points):
        def __init__(self) -> None:
            super().__init__()
            self.teacher = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 2))

        def loss(self, batch: Any) -> Tensor:
            x, _ = batch
            with torch.inference_mode():
                target = self.teacher(x)
                self.net(x)  # the trained network, too
            return F.mse_loss(self.net(x) - target, torch.zeros_like(target))

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.net.parameters(), lr=0.1)

    module = Distilled()
    callback = fit(module, steps=25)
    assert module.losses[-1] < 0.3 * module.losses[0]
    assert callback.summary()["kl_max"] is not None


@supports("torch.autograd.set_detect_anomaly(True)", contexts)
def test_anomaly_detection_changes_nothing(usual: list[float]) -> None:
    module = Points()
    with torch.autograd.set_detect_anomaly(True):
        fit(module)
    assert module.losses == usual


@supports("DataLoader(num_workers=1, persistent_workers=True)")
def test_workers_that_load_data_change_nothing(usual: list[float]) -> None:
    module = Points()
    fit(module, data=DataLoader(POINTS, 16, num_workers=1, persistent_workers=True))
    assert module.losses == usual


@supports("torch.enable_grad() inside a function under torch.no_grad()", contexts)
def test_a_plain_loop_may_be_in_a_function_that_disables_gradients() -> None:
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 2))
    optimizer = NaturalGradientOptimizer(model.parameters(), measure_every=1)

    @torch.no_grad()
    def epoch() -> float:
        for _ in range(5):
            with torch.enable_grad(), optimizer.observe():
                loss = F.cross_entropy(model(X), Y)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        return loss.item()

    assert epoch() > epoch()
    assert optimizer.report.kl is not None
