"""Torch's global settings, memory formats, late initialisation and precisions."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from ngplugin import NaturalGradient, NaturalGradientOptimizer
from ngplugin.errors import StepOrderError
from tests.oracle import generator
from tests.small_fits import POINTS, Points, blocks, fit, quiet

supports = pytest.mark.supports
IMAGES = TensorDataset(torch.randn(64, 3, 8, 8, generator=generator(3)), torch.arange(64) % 4)


def weights(module: nn.Module) -> Tensor:
    return torch.cat([p.detach().flatten().double() for p in module.parameters()])


def averages(callback: NaturalGradient) -> list[Tensor]:
    """The factors of all Kronecker blocks."""
    blocks = callback._ng_optimizers[0]._engine.fisher.blocks
    return [factor for b in blocks if b.kind == "kronecker" for factor in b.averaged_factors()]


# -- how matrices are multiplied -------------------------------------------------------------------


@pytest.fixture(name="matmul_precision", params=["high", "medium"])
def float32_matmul_precision(request: pytest.FixtureRequest) -> Iterator[str]:
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(request.param)
    yield request.param
    torch.set_float32_matmul_precision(before)


@pytest.fixture(scope="module", name="exact_products")
def a_fit_with_full_products() -> list[Tensor]:
    assert torch.get_float32_matmul_precision() == "highest"
    return averages(fit(Points(), steps=1))


@supports("Torch settings", "torch.set_float32_matmul_precision('high' or 'medium')")
def test_quick_products_of_the_user_s_change_the_fisher_by_their_rounding(
    exact_products: list[Tensor], matmul_precision: str
) -> None:
    for found, exact in zip(averages(fit(Points(), steps=1)), exact_products, strict=True):
        assert (found - exact).norm() < 0.02 * exact.norm()
    module = Points()
    fit(module, steps=25)
    assert module.losses[-1] < 0.5 * module.losses[0]
    assert torch.get_float32_matmul_precision() == matmul_precision


# -- channels last ---------------------------------------------------------------------------------


class Images(Points):
    """Convolutions with and without groups, batch normalization and pooling."""

    memory_format = torch.contiguous_format

    def build(self) -> nn.Module:
        net = nn.Sequential(
            nn.Conv2d(3, 8, 3, padding=1),
            nn.BatchNorm2d(8),
            nn.ReLU(),
            nn.Conv2d(8, 8, 3, stride=2, groups=2),
            nn.ReLU(),
            nn.AvgPool2d(3),
            nn.Flatten(),
            nn.Linear(8, 4),
        )
        return net.to(memory_format=self.memory_format)

    def loss(self, batch: Any) -> Tensor:
        x, y = batch
        return F.cross_entropy(self.net(x.to(memory_format=self.memory_format)), y)


class ChannelsLast(Images):
    memory_format = torch.channels_last


@supports("Torch settings", "memory_format=torch.channels_last, of weights and inputs")
@pytest.mark.parametrize("structure", ["auto", "diagonal", "matrix-free"])
def test_channels_last_makes_the_same_steps(structure: Any) -> None:
    runs = []
    for kind in (Images, ChannelsLast):
        module, callback = kind(), NaturalGradient(show_coverage=False, structure=structure)
        data = DataLoader(IMAGES, batch_size=32)
        # In float64, since conjugate gradients multiply rounding errors.
        quiet(callback, max_steps=8, precision="64-true").fit(module, data)
        assert module.net[0].weight.is_contiguous(memory_format=kind.memory_format)
        runs.append((weights(module), callback.coverage()))
    (contiguous, coverage), (last, same_coverage) = runs
    torch.testing.assert_close(last, contiguous, rtol=1e-5, atol=1e-6)
    assert same_coverage == coverage


# -- parameters that get their values late ---------------------------------------------------------


class OnMeta(Points):
    """Shapes in the constructor, values in `configure_model`."""

    def __init__(self) -> None:
        super().__init__()
        with torch.device("meta"):
            self.net = self.build()

    def configure_model(self) -> None:
        if not self.net[0].weight.is_meta:
            return
        self.net.to_empty(device="cpu")
        torch.manual_seed(0)
        for layer in (self.net[0], self.net[2]):
            layer.reset_parameters()


@supports("Late initialisation", "torch.device('meta') in __init__, values in configure_model()")
def test_a_module_that_begins_on_meta_trains_as_if_it_had_not() -> None:
    late, ready = OnMeta(), Points()
    fit(late)
    fit(ready)
    assert late.losses == ready.losses


@pytest.mark.refuses("Late initialisation", "an optimizer of parameters that stayed on meta")
@pytest.mark.parametrize(
    "make", [lambda p: torch.optim.SGD(p, lr=0.1), NaturalGradientOptimizer], ids=["SGD", "own"]
)
def test_an_optimizer_of_parameters_on_meta_says_what_has_become_of_them(
    make: Callable[[Any], torch.optim.Optimizer],
) -> None:
    class TooEarly(OnMeta):
        def __init__(self) -> None:
            super().__init__()
            self.made = make(self.net.parameters())

        def configure_optimizers(self) -> Any:
            return self.made

    match = r"parameter 0 .*shape \(16, 6\).*meta.*configure_optimizers\(\)"
    with pytest.raises(StepOrderError, match=match):
        fit(TooEarly())


@supports("Late initialisation", "trainer.init_module(empty_init=True), then load_state_dict()")
def test_a_module_that_was_made_empty_trains_from_loaded_weights() -> None:
    ready, callback = Points(), NaturalGradient(show_coverage=False)
    trainer = quiet(callback, max_steps=10)
    with trainer.init_module(empty_init=True):
        module = Points()
    module.load_state_dict(ready.state_dict())
    trainer.fit(module, DataLoader(POINTS, batch_size=16))
    fit(ready)
    assert module.losses == ready.losses


class Lazy(Points):
    """The optimizer is built before the first batch says how large the layers are."""

    def build(self) -> nn.Module:
        return nn.Sequential(
            nn.Unflatten(1, (1, 6)),
            nn.LazyConv1d(4, 3),
            nn.LazyBatchNorm1d(),
            nn.Tanh(),
            nn.Flatten(),
            nn.LazyLinear(2),
        )

    def __init__(self) -> None:
        super().__init__()
        self.made = torch.optim.SGD(self.net.parameters(), lr=0.1)

    def configure_optimizers(self) -> Any:
        return self.made


@supports("Late initialisation", "LazyLinear, LazyConv, LazyBatchNorm, shaped by the first batch")
def test_lazy_layers_are_trained_once_a_batch_has_shaped_them() -> None:
    module = Lazy()
    callback = fit(module, steps=25)
    assert module.losses[-1] < 0.6 * module.losses[0]
    assert blocks(callback) == {"kronecker", "unit-wise"}


# -- precision -------------------------------------------------------------------------------------


PRECISIONS = {
    "32-true": torch.float32,
    "64-true": torch.float64,
    "bf16-mixed": torch.float32,
    "bf16-true": torch.float32,
}
every_precision = pytest.mark.parametrize(
    "precision",
    [
        pytest.param(precision, marks=supports("Precision", f"Trainer(precision={precision!r})"))
        for precision in PRECISIONS
    ],
)


@every_precision
def test_every_precision_trains_with_factors_of_float32_at_least(precision: Any) -> None:
    module = Points()
    callback = fit(module, steps=25, precision=precision)
    assert module.losses[-1] < 0.5 * module.losses[0]
    assert {t.dtype for t in averages(callback)} == {PRECISIONS[precision]}
    assert blocks(callback) == {"kronecker"}
    assert callback.summary()["kl_max"] <= 0.05


@every_precision
def test_a_resumed_fit_is_the_whole_one_bit_by_bit(precision: Any, tmp_path: Path) -> None:
    class Doubled(Points):
        """Lightning reads a checkpoint into the module as it was built, and converts it then."""

        def build(self) -> nn.Module:
            return super().build().double() if precision == "64-true" else super().build()

    def run(epochs: int, checkpoint: Path | None = None) -> tuple[Tensor, Path]:
        L.seed_everything(0, verbose=False)
        module, saver = Doubled(), ModelCheckpoint(tmp_path / f"{epochs}", save_last=True)
        trainer = quiet(
            NaturalGradient(show_coverage=False),
            saver,
            max_epochs=epochs,
            precision=precision,
            enable_checkpointing=True,
        )
        trainer.fit(module, DataLoader(POINTS, batch_size=16), ckpt_path=checkpoint)
        return weights(module), Path(saver.last_model_path)

    whole, _ = run(4)
    _, half = run(2)
    resumed, _ = run(4, half)
    assert torch.equal(resumed, whole)
