"""States that are loaded into a model with layers more, or fewer, than when they were saved."""

from __future__ import annotations

import io
import warnings
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from ngplugin import NaturalGradient, NaturalGradientOptimizer
from ngplugin.saved_places import Places
from tests.oracle import flat

supports = pytest.mark.supports


def model(*hidden: str) -> nn.Module:
    torch.manual_seed(0)
    layers = {"first": nn.Linear(6, 8), **{name: nn.Linear(8, 8) for name in hidden}}
    return nn.ModuleDict({**layers, "last": nn.Linear(8, 2)})


def forward(layers: Any, x: Tensor) -> Tensor:
    *hidden, last = layers.values()
    for layer in hidden:
        x = layer(x).tanh()
    return last(x)


def trained(layers: nn.Module, optimizer: NaturalGradientOptimizer, steps: int = 6) -> float:
    for seed in range(steps):
        x = torch.randn(32, 6, generator=torch.Generator().manual_seed(seed))
        with optimizer.observe():
            loss = F.cross_entropy(forward(layers, x), (x[:, 0] > 0).long())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return float(loss)


def saved(state: Any) -> Any:
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def optimizer_of(layers: nn.Module, named: bool) -> NaturalGradientOptimizer:
    return NaturalGradientOptimizer(
        layers.named_parameters() if named else layers.parameters(), structure="kronecker"
    )


@supports("Checkpoints", "a layer added or removed since: reported, the rest taken over")
@pytest.mark.parametrize("named", [True, False], ids=["by name", "by shape"])
@pytest.mark.parametrize(
    ("before", "after"),
    [((), ("new",)), (("old",), ()), (("a", "b"), ("b", "c")), (("a",), ("a",))],
    ids=["added", "removed", "exchanged", "the same"],
)
def test_what_is_still_there_goes_on(
    named: bool, before: tuple[str, ...], after: tuple[str, ...]
) -> None:
    old, new = model(*before), model(*after)
    old_optimizer, new_optimizer = optimizer_of(old, named), optimizer_of(new, named)
    trained(old, old_optimizer)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        new_optimizer.load_state_dict(saved(old_optimizer.state_dict()))
    messages = [str(w.message) for w in said if "parameters have changed" in str(w.message)]
    assert len(messages) == (before != after and (named or len(before) != len(after)))
    if named and before != after:
        for name in {*before} ^ {*after}:
            assert f"{name}.weight" in messages[0]
    fisher = new_optimizer._engine.fisher
    for name in {"first", "last"}:
        mine, theirs = new[name].weight, old[name].weight
        block, other = fisher.block(mine), old_optimizer._engine.fisher.block(theirs)
        assert torch.equal(block.average("G"), other.average("G"))
    trained(new, new_optimizer, 1)
    if messages:  # what was known of how far to go was of another model
        assert new_optimizer.report.kl is not None
    assert trained(new, new_optimizer, 12) < 0.6
    assert {row.block for row in new_optimizer.coverage().rows} == {"kronecker"}


def test_a_layer_of_another_size_is_another_layer() -> None:
    places = Places.find([(3, 2), (5,)], ["w", "b"], [(3, 4), (5,)], ["w", "b"])
    assert places == Places((None, 1), ("w",), ("w",))


@given(
    st.lists(st.sampled_from([(2,), (3,), (2, 3)]), max_size=8),
    st.lists(st.sampled_from([(2,), (3,), (2, 3)]), max_size=8),
)
def test_places_are_distinct_of_equal_shape_and_in_order(
    now: list[tuple[int, ...]], then: list[tuple[int, ...]]
) -> None:
    places = Places.find(now, None, then, None)
    found = [i for i in places.of if i is not None]
    assert found == sorted(set(found))
    assert all(then[i] == now[j] for j, i in enumerate(places.of) if i is not None)
    assert len(places.new) == len(now) - len(found)
    assert len(places.gone) == len(then) - len(found)
    assert places.same == (now == then)


class Module(L.LightningModule):
    strict_loading = False

    def __init__(self, *hidden: str) -> None:
        super().__init__()
        self.layers = model(*hidden)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return F.cross_entropy(forward(self.layers, batch[0]), batch[1])

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.AdamW(self.parameters(), lr=1e-3)
        return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)]


def fit(folder: Path, module: L.LightningModule, epochs: int, ckpt: Any = None, **kw: Any) -> Any:
    x = torch.randn(64, 6, generator=torch.Generator().manual_seed(0))
    saver = ModelCheckpoint(folder, filename=str(epochs), save_weights_only=False)
    natural = NaturalGradient(show_coverage=False, **kw)
    trainer = L.Trainer(
        default_root_dir=folder,
        accelerator="cpu",
        max_epochs=epochs,
        callbacks=[natural, saver],
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    data = DataLoader(TensorDataset(x, (x[:, 0] > 0).long()), batch_size=16)
    trainer.fit(module, data, ckpt_path=ckpt)
    return natural, trainer, saver.best_model_path


@supports("Checkpoints", "through Lightning: a layer added since")
def test_a_layer_added_since_a_checkpoint_is_told_by_its_name(tmp_path: Path) -> None:
    _, _, checkpoint = fit(tmp_path, Module(), 2)
    with pytest.warns(UserWarning, match=r"start anew for: layers\.new\.weight, layers\.new\.bias"):
        natural, trainer, _ = fit(tmp_path, Module("new"), 4, checkpoint)
    assert trainer.global_step == 16
    # The rate that the scheduler had come to is the group's.
    assert trainer.optimizers[0].param_groups[0]["lr"] == pytest.approx(1e-3 * 0.5**4)
    assert len(natural.coverage().rows) == 6


@supports("Checkpoints", "saved without the callback, resumed with it")
def test_a_checkpoint_of_a_plain_run_goes_on_naturally(tmp_path: Path) -> None:
    _, _, checkpoint = fit(tmp_path, Module(), 2, enabled=False)
    natural, trainer, _ = fit(tmp_path, Module(), 4, checkpoint)
    assert trainer.global_step == 16
    assert natural.summary()["steps"] == 8


@supports("Checkpoints", "saved with the callback, resumed without it")
def test_a_checkpoint_of_a_natural_run_goes_on_plainly(tmp_path: Path) -> None:
    _, _, checkpoint = fit(tmp_path, Module(), 2)
    _, trainer, _ = fit(tmp_path, Module(), 4, checkpoint, enabled=False)
    assert trainer.global_step == 16
    assert type(trainer.optimizers[0]) is torch.optim.AdamW


@supports("Checkpoints", "plain tensors and numbers only: torch.load(weights_only=True)")
def test_a_checkpoint_loads_with_weights_only(tmp_path: Path) -> None:
    _, _, checkpoint = fit(tmp_path, Module(), 1)
    content = torch.load(checkpoint, weights_only=True)
    ours = content["optimizer_states"][0]["natgrad"]
    assert ours["names"][0] == "layers.first.weight"
    assert ours["fisher"]


@supports("Checkpoints", "interrupted at any step")
@pytest.mark.parametrize("step", [1, 3, 6, 7])
def test_going_on_from_any_step_is_going_on(tmp_path: Path, step: int) -> None:
    def run(steps: int, checkpoint: str | None = None) -> tuple[Tensor, str]:
        module = Module()
        x = torch.randn(64, 6, generator=torch.Generator().manual_seed(0))
        # An epoch of one batch: Lightning does not go on in the middle of a data loader.
        data = DataLoader(TensorDataset(x, (x[:, 0] > 0).long()), batch_size=64)
        trainer = L.Trainer(
            default_root_dir=tmp_path,
            accelerator="cpu",
            max_epochs=steps,
            callbacks=[NaturalGradient(show_coverage=False, measure_every=3)],
            logger=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            enable_checkpointing=False,
        )
        trainer.fit(module, data, ckpt_path=checkpoint)
        path = str(tmp_path / f"{steps}.ckpt")
        trainer.save_checkpoint(path)
        return flat([*module.parameters()]), path

    whole, _ = run(14)
    _, part = run(step)
    resumed, _ = run(14, part)
    assert torch.equal(resumed, whole)
