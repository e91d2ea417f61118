"""Shaped like message passing on molecules: a metric for a loss, masks, a Noam schedule."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import lightning as L
import pytest
import torch
import torchmetrics
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset

from tests.look_alikes.look_alike import look_alike, point
from tests.oracle import generator


class Molecules(NamedTuple):
    """A batch of graphs in one: `atoms [atoms, 4]`, and for each directed bond where it starts."""

    atoms: Tensor
    bonds: Tensor  # [bonds, 2]
    sources: Tensor  # [bonds], the atom
    targets: Tensor
    reverse: Tensor  # [bonds], the same bond the other way
    molecule: Tensor  # [atoms]
    y: Tensor  # [molecules, tasks], nan where it was not measured
    weights: Tensor  # [molecules, 1]


class Rings(Dataset[Any]):
    """Rings of 3 to 7 atoms of four kinds; how many of a kind they have, some counts missing."""

    def __init__(self, tasks: int, classify: bool) -> None:
        g = generator(7)
        self.items = []
        for _ in range(64):
            n = int(torch.randint(3, 8, (1,), generator=g))
            kinds = torch.randint(4, (n,), generator=g)
            y = F.one_hot(kinds, 4).sum(0)[:tasks].float()
            y = (y > 1).float() if classify else y - n / 4
            y[torch.rand(tasks, generator=g) < 0.2] = math.nan
            self.items.append((F.one_hot(kinds, 4).float(), y))

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, i: int) -> tuple[Tensor, Tensor]:
        return self.items[i]


def collate(items: list[tuple[Tensor, Tensor]]) -> Molecules:
    sources, targets, reverse, start = [], [], [], 0
    for atoms, _ in items:
        n, around = len(atoms), torch.arange(len(atoms))
        bonds = 2 * start
        sources += [start + around, start + (around + 1) % n]
        targets += [start + (around + 1) % n, start + around]
        reverse += [bonds + n + around, bonds + around]
        start += n
    molecule = torch.cat([torch.full((len(a),), i) for i, (a, _) in enumerate(items)])
    source = torch.cat(sources)
    return Molecules(
        torch.cat([a for a, _ in items]),
        torch.ones(len(source), 2),
        source,
        torch.cat(targets),
        torch.cat(reverse),
        molecule,
        torch.stack([y for _, y in items]),
        torch.linspace(0.5, 1.5, len(items))[:, None],
    )


class Criterion(torchmetrics.Metric):
    """A loss of which every element counts by its own mask and weights."""

    is_differentiable = True
    higher_is_better = False
    full_state_update = False
    outputs = 1

    def __init__(self, task_weights: Tensor) -> None:
        super().__init__()
        self.register_buffer("task_weights", task_weights.view(1, -1))
        self.add_state("total_loss", default=torch.tensor(0.0), dist_reduce_fx="sum")
        self.add_state("num_samples", default=torch.tensor(0), dist_reduce_fx="sum")

    def unreduced(self, predicted: Tensor, targets: Tensor) -> Tensor:
        raise NotImplementedError

    def update(self, predicted: Tensor, targets: Tensor, mask: Tensor, weights: Tensor) -> None:
        each = self.unreduced(predicted, targets) * weights * self.task_weights * mask
        self.total_loss += each.sum()
        self.num_samples += mask.sum()

    def compute(self) -> Tensor:
        return self.total_loss / self.num_samples


class SquaredError(Criterion):
    def unreduced(self, predicted: Tensor, targets: Tensor) -> Tensor:
        return F.mse_loss(predicted[..., 0], targets, reduction="none")


class MeanAndVariance(Criterion):
    """The negative log-likelihood of a normal distribution, written out."""

    outputs = 2

    def unreduced(self, predicted: Tensor, targets: Tensor) -> Tensor:
        mean, variance = predicted[..., 0], F.softplus(predicted[..., 1]) + 1e-4
        return (mean - targets) ** 2 / (2 * variance) + (2 * torch.pi * variance).log() / 2


class CrossEntropy(Criterion):
    def unreduced(self, predicted: Tensor, targets: Tensor) -> Tensor:
        return F.binary_cross_entropy_with_logits(predicted[..., 0], targets, reduction="none")


class MessagePassing(L.LightningModule):
    """Messages along bonds, by one layer that is used `depth` times."""

    def __init__(self, criterion: Any, tasks: int, depth: int = 3, hidden: int = 16) -> None:
        super().__init__()
        self.enter = nn.Linear(4 + 2, hidden, bias=False)
        self.message = nn.Linear(hidden, hidden, bias=False)
        self.leave = nn.Linear(4 + hidden, hidden)
        self.norm = nn.BatchNorm1d(hidden)
        self.criterion = criterion(torch.linspace(1.0, 2.0, tasks))
        self.predictor = nn.Sequential(
            nn.Linear(hidden, hidden), nn.ReLU(), nn.Linear(hidden, tasks * criterion.outputs)
        )
        self.depth, self.tasks = depth, tasks

    def forward(self, m: Molecules) -> Tensor:
        start = self.enter(torch.cat([m.atoms[m.sources], m.bonds], dim=1))
        h = start.relu()
        for _ in range(1, self.depth):
            index = m.targets[:, None].expand(-1, h.shape[1])
            at_atoms = torch.zeros(len(m.atoms), h.shape[1]).scatter_reduce_(
                0, index, h, reduce="sum", include_self=False
            )
            h = (start + self.message(at_atoms[m.sources] - h[m.reverse])).relu()
        at_atoms = torch.zeros(len(m.atoms), h.shape[1]).index_add_(0, m.targets, h)
        atoms = self.leave(torch.cat([m.atoms, at_atoms], dim=1)).relu()
        index = m.molecule[:, None].expand(-1, atoms.shape[1])
        molecules = torch.zeros(len(m.y), atoms.shape[1]).scatter_reduce_(
            0, index, atoms, reduce="mean", include_self=False
        )
        return self.predictor(self.norm(molecules)).reshape(len(m.y), self.tasks, -1)

    def training_step(self, batch: Molecules, batch_idx: int) -> Tensor:
        mask = batch.y.isfinite()
        targets = batch.y.nan_to_num(nan=0.0)
        loss = self.criterion(self(batch), targets, mask, batch.weights)
        self.log("train_loss", self.criterion, prog_bar=True, on_epoch=True, batch_size=len(mask))
        return loss

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.Adam(self.parameters(), 1e-4)
        assert self.trainer.estimated_stepping_batches > 0  # has the data loaded
        warmup = 2 * self.trainer.num_training_batches
        cooldown = (self.trainer.max_epochs - 2) * self.trainer.num_training_batches
        decay = (1e-4 / 1e-3) ** (1 / cooldown)

        def noam(step: int) -> float:
            if step < warmup:
                return 1.0 + 9.0 * step / warmup
            return 10.0 * decay ** min(step - warmup, cooldown)

        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, noam)
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": schedule, "interval": "step"},
        }


@pytest.mark.parametrize(
    ("criterion", "fall", "source"),
    [
        pytest.param(
            SquaredError,
            0.5,
            "mse_loss",
            marks=point(4, "a torchmetrics.Metric as loss: unreduced squares, masks, weights"),
        ),
        pytest.param(
            MeanAndVariance,
            0.8,
            "the Gauss-Newton matrix of a loss of its own",
            marks=point(2, "mean and variance with a likelihood by hand, masked"),
        ),
        pytest.param(
            CrossEntropy,
            0.6,
            "binary_cross_entropy_with_logits",
            marks=point(4, "unreduced binary cross entropy with missing labels"),
        ),
    ],
)
@point(7, "one layer used several times, with as many rows as bonds")
@point(9, "a schedule of the Noam kind, each step, from trainer.num_training_batches")
def test_message_passing_trains_on_targets_that_are_partly_missing(
    criterion: Any, fall: float, source: str
) -> None:
    data = DataLoader(Rings(3, criterion is CrossEntropy), batch_size=16, collate_fn=collate)
    run = look_alike(lambda: MessagePassing(criterion, 3), data, fall, max_epochs=8)
    assert run.blocks()["message.weight"] == run.blocks()["enter.weight"] == "kronecker"
    assert run.coverage.losses == (source,)
    assert max(rates[0] for rates in run.rates) == pytest.approx(1e-3)
