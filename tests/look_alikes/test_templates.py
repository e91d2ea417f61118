"""Shaped like project templates: how modules get their loss, and when."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import pytorch_lightning as pl
import torch
import torchmetrics
from lightning.pytorch.callbacks import BaseFinetuning, LearningRateMonitor, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from ngplugin import NaturalGradient
from ngplugin.errors import UnsupportedTrainerError
from tests.look_alikes.look_alike import look_alike, one_run, point
from tests.oracle import generator

X = torch.randn(128, 10, generator=generator(1))
CLASSES = (X[:, :4].sum(1) > 0).long() + (X[:, 4:].sum(1) > 0).long()


def classes() -> DataLoader[Any]:
    return DataLoader(TensorDataset(X, CLASSES), batch_size=32)


def network(outputs: int = 3) -> nn.Module:
    return nn.Sequential(
        nn.Linear(10, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(),
        nn.Linear(16, outputs),
    )  # fmt: skip


class Template(L.LightningModule):
    """Takes network, optimizer and scheduler as partial functions from a config; meters metrics."""

    def __init__(self, net: nn.Module, optimizer: Any, scheduler: Any, compile: bool) -> None:
        super().__init__()
        self.save_hyperparameters(logger=False, ignore=["net"])
        self.net = net
        self.criterion = nn.CrossEntropyLoss()
        self.train_acc = torchmetrics.Accuracy(task="multiclass", num_classes=3)
        self.val_acc = torchmetrics.Accuracy(task="multiclass", num_classes=3)
        self.train_loss = torchmetrics.MeanMetric()
        self.val_acc_best = torchmetrics.MaxMetric()
        self.metered: list[tuple[int, float]] = []

    def model_step(self, batch: Any) -> tuple[Tensor, Tensor, Tensor]:
        x, y = batch
        logits = self.net(x)
        return self.criterion(logits, y), logits.argmax(dim=1), y

    def on_train_start(self) -> None:
        self.val_acc.reset()

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss, predicted, y = self.model_step(batch)
        self.train_loss(loss)
        self.train_acc(predicted, y)
        self.log("train/loss", self.train_loss, on_step=False, on_epoch=True, prog_bar=True)
        self.log("train/acc", self.train_acc, on_step=False, on_epoch=True, prog_bar=True)
        return loss

    def on_train_epoch_end(self) -> None:
        self.metered.append((self.train_acc.update_count, float(self.train_loss.compute())))

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        loss, predicted, y = self.model_step(batch)
        self.val_acc(predicted, y)
        self.log("val/loss", loss, on_step=False, on_epoch=True)

    def on_validation_epoch_end(self) -> None:
        self.val_acc_best(self.val_acc.compute())

    def val_dataloader(self) -> Any:
        return classes()

    def setup(self, stage: str) -> None:
        if self.hparams.compile and stage == "fit":
            self.net = torch.compile(self.net, backend="eager")

    def configure_optimizers(self) -> dict[str, Any]:
        optimizer = self.hparams.optimizer(params=self.trainer.model.parameters())
        scheduler = self.hparams.scheduler(optimizer=optimizer)
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": scheduler, "monitor": "val/loss", "frequency": 1},
        }


@point(9, "ReduceLROnPlateau from a config")
@point(10, "functools.partial(Optimizer, ...)(params=...)")
@point(6, "torchmetrics that are updated in the step")
@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_a_template_trains_and_meters_each_batch_once(compiled: bool) -> None:
    def make() -> Template:
        adam = partial(torch.optim.Adam, lr=1e-3, weight_decay=0.0)
        plateau = partial(torch.optim.lr_scheduler.ReduceLROnPlateau, patience=10)
        return Template(network(), adam, plateau, compiled)

    run = look_alike(make, classes(), 0.5)
    for epoch, (batches, mean) in enumerate(run.module.metered):
        assert batches == 4
        assert mean == pytest.approx(sum(run.losses[4 * epoch : 4 * epoch + 4]) / 4)
    net = run.module.net
    assert int(getattr(net, "_orig_mod", net)[1].num_batches_tracked) == 20


class WithLoss(L.LightningModule):
    """Scores logits of one number by some function that it was given."""

    def __init__(self, score: Any, outputs: int = 1) -> None:
        super().__init__()
        self.loss_func = score
        self.net = network(outputs)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, y = batch
        return self.loss_func(self.net(x), y)

    def configure_optimizers(self) -> Any:
        return torch.optim.Adam(self.parameters(), lr=1e-3)


class ByKeyword(WithLoss):
    def __init__(self) -> None:
        super().__init__(F.binary_cross_entropy_with_logits)  # a reference from before the fit

    def training_step(self, batch: Any, batch_idx: int) -> dict[str, Tensor]:
        x, y = batch
        target = (y > 0).float()
        return {"loss": self.loss_func(input=self.net(x).squeeze(1), target=target)}


class Reconstruction(WithLoss):
    def __init__(self) -> None:
        super().__init__(None, outputs=10)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, _ = batch
        return F.mse_loss(x, self.net(x))  # the network's output is called the target


class Probabilities(WithLoss):
    def __init__(self) -> None:
        super().__init__(nn.NLLLoss(weight=torch.tensor([1.0, 2.0, 1.0])), outputs=3)
        self.net.append(nn.LogSoftmax(dim=1))


@pytest.mark.parametrize(
    ("make", "loss"),
    [
        pytest.param(
            ByKeyword,
            "binary_cross_entropy_with_logits",
            marks=point(2, "a loss function saved in __init__ and called by keyword"),
        ),
        pytest.param(Reconstruction, "mse_loss", marks=point(3, "mse_loss(target, prediction)")),
        pytest.param(Probabilities, "nll_loss", marks=point(2, "a loss module with class weights")),
    ],
)
def test_a_loss_is_seen_however_it_is_called(make: Any, loss: str) -> None:
    run = look_alike(make, classes(), 0.8)
    assert run.coverage.losses == (loss,)


def dice(logits: Tensor, y: Tensor) -> Tensor:
    p, target = logits.softmax(1), F.one_hot(y, 3).float()
    overlap = 2 * (p * target).sum(0) + 1.0
    return (1 - overlap / (p.sum(0) + target.sum(0) + 1.0)).mean()


def contrastive(z: Tensor, y: Tensor) -> Tensor:
    """NT-Xent over the pairs of a batch; those of one class are the positive ones."""
    z = F.normalize(z, dim=1)
    similar = (z @ z.T / 0.5).masked_fill(torch.eye(len(z)).bool(), -1e9)
    same = (y[:, None] == y) & ~torch.eye(len(z)).bool()
    return -(similar.log_softmax(1) * same).sum(1).div(same.sum(1).clamp_min(1)).mean()


def energy_score(samples: Tensor, y: Tensor) -> Tensor:
    """Three samples of a number for each example, scored against it."""
    target = y.float()[:, None]
    apart = (samples[:, :, None] - samples[:, None, :]).abs().mean((1, 2))
    return ((samples - target).abs().mean(1) - 0.5 * apart).mean()


@pytest.mark.parametrize(
    ("loss", "fall"),
    [
        pytest.param(loss, fall, marks=point(5, what))
        for loss, fall, what in (
            (dice, 0.8, "soft Dice"),
            (contrastive, 0.97, "a contrastive loss over pairs (NT-Xent)"),
            (energy_score, 0.8, "an energy score of samples"),
        )
    ],
)
def test_a_loss_without_a_likelihood_trains_all_the_same(loss: Any, fall: float) -> None:
    run = look_alike(partial(WithLoss, loss, outputs=3), classes(), fall, max_epochs=8)
    (source,) = run.coverage.losses
    assert "loss" in source  # by the name of what stands in for a Fisher matrix


class Probe(L.LightningModule):
    """A frozen backbone; only what requires a gradient is in the optimizer, in another order."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone, self.head = nn.Linear(10, 16).requires_grad_(False), network(3)
        self.head[0] = nn.Linear(16, 16)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, y = batch
        with torch.no_grad():
            features = self.backbone(x).tanh()
        return F.cross_entropy(self.head(features), y)

    def configure_optimizers(self) -> Any:
        trained = [p for p in self.parameters() if p.requires_grad]
        optimizer = torch.optim.Adam(trained[::-1], lr=1e-3)
        return [optimizer], [torch.optim.lr_scheduler.MultiStepLR(optimizer, [2, 4], gamma=0.1)]


@point(8, "a frozen backbone, a subset of the parameters in another order")
def test_a_probe_trains_what_its_optimizer_has() -> None:
    run = look_alike(Probe, classes(), 0.7)
    assert set(run.blocks()) == {f"head.{name}" for name, _ in run.module.head.named_parameters()}
    assert next(iter(run.blocks())) == "head.5.bias"
    torch.manual_seed(0)
    assert torch.equal(run.module.backbone.weight, Probe().backbone.weight)


class Thaw(BaseFinetuning):
    """Adds the backbone to the optimizer after two epochs."""

    def freeze_before_training(self, pl_module: Any) -> None:
        self.freeze(pl_module.net[:2])

    def finetune_function(self, pl_module: Any, epoch: int, optimizer: Any) -> None:
        if epoch == 2:
            self.unfreeze_and_add_param_group(pl_module.net[:2], optimizer)


@point(8, "BaseFinetuning, which adds a group in the middle of the fit")
def test_a_group_that_is_added_later_is_trained_from_then_on() -> None:
    class Late(WithLoss):
        def __init__(self) -> None:
            super().__init__(F.cross_entropy, outputs=3)

        def configure_optimizers(self) -> Any:
            trained = filter(lambda p: p.requires_grad, self.parameters())
            return torch.optim.Adam(trained, lr=1e-3)

    run = look_alike(Late, classes(), 0.7, more=lambda: [Thaw()])
    assert [len(rates) for rates in run.rates[::4]] == [1, 1, 2, 2, 2]
    assert run.blocks()["net.0.weight"] == "kronecker"


@point(10, "a checkpoint that is saved and loaded again inside the fit")
def test_a_fit_goes_on_after_it_has_loaded_its_own_checkpoint(tmp_path: Path) -> None:
    class Reloading(WithLoss):
        """As tuners and libraries do that return to the best weights."""

        def __init__(self) -> None:
            super().__init__(F.cross_entropy, outputs=3)

        def on_train_epoch_end(self) -> None:
            path = tmp_path / "inside.ckpt"
            if self.current_epoch == 1:
                self.trainer.save_checkpoint(path)
                self.kept = self.net[0].weight.detach().clone()
            if self.current_epoch == 3:
                saved = torch.load(path, weights_only=True)
                self.load_state_dict(saved["state_dict"])
                self.trainer.strategy.load_optimizer_state_dict(saved)
                assert torch.equal(self.net[0].weight, self.kept)

        def on_train_end(self) -> None:
            best = torch.load(tmp_path / "inside.ckpt", weights_only=True)
            self.load_state_dict(best["state_dict"])

    def saver() -> list[Any]:
        folder = tmp_path / str(len([*tmp_path.iterdir()]))  # each fit has its own
        return [ModelCheckpoint(folder, every_n_train_steps=3, save_last=True)]

    settings = {"more": saver, "enable_checkpointing": True, "max_epochs": 6}
    run = look_alike(Reloading, classes(), 0.7, **settings)
    # The fifth epoch begins where the third did.
    assert run.losses[16] == pytest.approx(run.losses[8], rel=1e-4)


@point(9, "code that edits lr in param_groups, and a monitor of rates")
def test_a_module_may_set_its_own_learning_rate(tmp_path: Path) -> None:
    class Warming(WithLoss):
        def __init__(self) -> None:
            super().__init__(F.cross_entropy, outputs=3)

        def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
            for group in self.optimizers().param_groups:
                group["lr"] = 1e-3 * min(1.0, (self.global_step + 1) / 8)

        def optimizer_step(self, epoch: int, batch_idx: int, optimizer: Any, closure: Any) -> None:
            optimizer.step(closure=closure)
            for group in optimizer.param_groups:
                group["lr"] *= 0.5

    logger = CSVLogger(tmp_path)
    run = look_alike(
        Warming,
        classes(),
        0.8,
        more=lambda: [LearningRateMonitor("step")],
        logger=logger,
        log_every_n_steps=1,
    )
    assert [rates[0] for rates in run.rates[6:9]] == pytest.approx([4.375e-4, 5e-4, 5e-4])


# -- two namespaces --------------------------------------------------------------------------------


class Standalone(pl.LightningModule):
    """A module of `pytorch_lightning`, the other name of the same library."""

    def __init__(self) -> None:
        super().__init__()
        self.net = network()

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, y = batch
        loss = F.cross_entropy(self.net(x), y)
        self.log("train_loss", loss)
        return loss

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.AdamW(self.parameters(), lr=1e-3)
        return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 2)]


def standalone(*callbacks: Any, **settings: Any) -> Any:
    names = ("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary")
    silent = dict.fromkeys(names, False)
    return pl.Trainer(**{"accelerator": "cpu", **silent, "callbacks": [*callbacks], **settings})


own_callbacks_only = pytest.mark.skipif(
    pl.__version__ < "2.5", reason="this pytorch_lightning wants to be imported before ngplugin"
)


@own_callbacks_only
@point(1, "ngplugin.NaturalGradient in a trainer of pytorch_lightning")
def test_the_callback_works_under_either_name_of_lightning() -> None:
    run = look_alike(Standalone, classes(), 0.6, trainer=standalone)
    twin = partial(WithLoss, F.cross_entropy, outputs=3)
    other = one_run(twin, classes(), natural=True)
    assert other.losses[:8] == pytest.approx(run.losses[:8], rel=1e-5)


@own_callbacks_only
@pytest.mark.refuses("Look-alikes", "point 1: a module of pytorch_lightning without an optimizer")
def test_what_cannot_be_followed_is_seen_under_either_name() -> None:
    class Empty(Standalone):
        def configure_optimizers(self) -> Any:
            return None

    trainer = standalone(NaturalGradient(), max_epochs=1)
    with pytest.raises(UnsupportedTrainerError, match="no optimizer"):
        trainer.fit(Empty(), classes())
