"""The KL that a step reports, against its models before and after; what measuring leaves alone."""

import copy
import csv
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any, NamedTuple

import lightning as L
import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch.loggers import CSVLogger
from torch import Tensor, nn
from torch import distributions as D
from torch.utils.data import DataLoader, TensorDataset
from torchmetrics.classification import MulticlassAccuracy

from ngplugin import NaturalGradient, NaturalGradientOptimizer
from ngplugin.kl_measurement import KlMeasurement
from tests.oracle import double, moved, observe, randn
from tests.test_callback import trainer

# -- the step as applied ---------------------------------------------------------------------------


class Network(nn.Module):
    def __init__(self, tied: bool = False) -> None:
        super().__init__()
        self.first, self.inner, self.last = nn.Linear(4, 6), nn.Linear(6, 6), nn.Linear(6, 3)
        self.norm, self.drop, self.tied = nn.BatchNorm1d(6), nn.Dropout(0.3), tied

    def forward(self, x: Tensor) -> Tensor:
        h = self.inner(self.drop(self.norm(self.first(x)).tanh()))
        if self.tied:
            h = F.linear(self.drop(h.tanh()), self.inner.weight.T) + self.inner(h)
        return self.last(self.drop(h.tanh()))


class Head(NamedTuple):
    loss: Callable[[Tensor, Tensor], Tensor]  # of what is predicted, and of targets [examples, 3]
    predictive: Callable[[Tensor, Tensor], D.Distribution]  # of that, and of the objective's value
    noise_variance: float | str = "auto"


def normal(z: Tensor) -> D.Distribution:
    wide = z[:, 1:2].to(torch.promote_types(z.dtype, torch.float32))
    return D.Normal(z[:, :1], wide.exp())


HEADS = {
    "cross entropy": Head(
        lambda z, t: F.cross_entropy(z, t.argmax(1)), lambda z, _: D.Categorical(logits=z)
    ),
    "binary cross entropy": Head(
        lambda z, t: F.binary_cross_entropy_with_logits(z, t.sigmoid()),
        lambda z, _: D.Bernoulli(logits=z),
    ),
    "squared error of known variance": Head(F.mse_loss, lambda z, _: D.Normal(z, 0.5), 0.25),
    "squared error": Head(F.mse_loss, lambda z, value: D.Normal(z, value.sqrt())),
    "log_prob": Head(lambda z, t: -normal(z).log_prob(t[:, :1]).mean(), lambda z, _: normal(z)),
}
INPUTS, TARGETS = randn(16, 4, seed=6), randn(16, 3, seed=7)


def divergence(head: Head, before: nn.Module, after: nn.Module, batches: Sequence[Any]) -> float:
    """The mean KL of all batches, each as predicted with the random numbers that it was."""

    def predicted(model: nn.Module, x: Tensor, random: Tensor) -> Tensor:
        torch.set_rng_state(random)
        return model(x)

    with torch.no_grad(), torch.random.fork_rng():
        old, new = ([predicted(m, x, random) for x, _, random in batches] for m in (before, after))
        losses = [head.loss(z, t) for z, (_, t, _) in zip(old, batches, strict=True)]
        value = torch.stack(losses).mean()
        p, q = ([head.predictive(z, value) for z in predictions] for predictions in (old, new))
        return float(torch.stack([kl.mean() for kl in map(D.kl_divergence, p, q)]).mean())


def check_steps(
    head: Head, model: nn.Module, sizes: Sequence[int] = (16,), count: int = 4, **options: Any
) -> None:
    torch.manual_seed(0)
    optimizer = NaturalGradientOptimizer(
        model.parameters(),
        weight_decay=0.1,
        measure_every=1,
        noise_variance=head.noise_variance,
        **options,
    )
    for _ in range(count):
        before, batches = copy.deepcopy(model), []
        optimizer.zero_grad()
        for x, t in zip(INPUTS.split(sizes), TARGETS.split(sizes), strict=True):
            batches.append((x, t, torch.get_rng_state()))
            with optimizer.observe():
                loss = head.loss(model(x), t) / len(sizes)
            loss.backward()
        optimizer.step()
        exact = divergence(head, before, model, batches)
        assert exact > 1e-4
        assert optimizer.report.kl == pytest.approx(exact, rel=1e-6)


@pytest.mark.parametrize("tied", [False, True], ids=["plain", "tied"])
@pytest.mark.parametrize("sizes", [(16,), (10, 6)], ids=["whole", "accumulated"])
@pytest.mark.parametrize("name", HEADS)
def test_the_reported_kl_is_that_of_the_models_before_and_after_the_step(name, sizes, tied):
    check_steps(HEADS[name], double(Network(tied)), sizes, count=12)


@pytest.mark.parametrize("structure", ["eigen", "diagonal", "exact", "matrix-free", "identity"])
def test_the_reported_kl_is_right_however_the_step_was_found(structure):
    check_steps(HEADS["cross entropy"], double(Network()), structure=structure)


# -- what a measurement leaves alone ---------------------------------------------------------------


def test_buffers_gradients_and_random_numbers_are_those_of_an_unobserved_step():
    model = double(
        nn.Sequential(
            nn.utils.parametrizations.spectral_norm(nn.Linear(4, 6)),  # iterates in its buffers
            nn.BatchNorm1d(6),
            nn.Dropout(0.3),
            nn.Unflatten(1, (2, 3)),
            nn.InstanceNorm1d(2, track_running_stats=True),
            nn.Flatten(),
            nn.RReLU(),
            nn.Linear(6, 3),
        )
    )
    optimizer = NaturalGradientOptimizer(
        model.parameters(), lr=10.0, kl_radius=0.2, measure_every=1
    )
    torch.manual_seed(0)
    shrinks = 0
    for _ in range(6):
        twin, random = copy.deepcopy(model), torch.get_rng_state()
        F.cross_entropy(twin(INPUTS), TARGETS.argmax(1)).backward()
        after = torch.get_rng_state()
        torch.set_rng_state(random)
        optimizer.zero_grad()
        with optimizer.observe():
            loss = F.cross_entropy(model(INPUTS), TARGETS.argmax(1))
        loss.backward()
        optimizer.step()
        assert optimizer.report.kl > 0
        shrinks += optimizer.report.shrinks
        assert torch.equal(torch.get_rng_state(), after)
        for ours, theirs in zip(model.buffers(), twin.buffers(), strict=True):
            assert torch.equal(ours, theirs)
        for ours, theirs in zip(model.parameters(), twin.parameters(), strict=True):
            assert torch.equal(ours.grad, theirs.grad)
    assert shrinks > 0  # some steps were measured several times


class Counting(L.LightningModule):
    """Keeps books by hand beside its metrics and logs."""

    def __init__(self) -> None:
        super().__init__()
        self.net = Network().float()
        self.accuracy = MulticlassAccuracy(3, average="micro")
        self.losses, self.right, self.forwards = [], [], 0
        self.net.register_forward_hook(self.count)

    def count(self, *_: Any) -> None:
        self.forwards += 1

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, y = batch
        z = self.net(x)
        loss = F.cross_entropy(z, y)
        self.losses.append(float(loss.detach()))
        self.right += (z.argmax(1) == y).tolist()
        self.accuracy(z, y)
        self.log("loss", loss, on_step=True, on_epoch=True)
        self.log("examples", float(len(x)), on_step=False, on_epoch=True, reduce_fx="sum")
        self.log("accuracy", self.accuracy, on_step=False, on_epoch=True)
        return loss

    def on_train_epoch_end(self) -> None:
        self.updates, self.total = self.accuracy._update_count, int(self.accuracy.tp.sum())

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def test_steps_metrics_hooks_and_logs_count_every_batch_once(tmp_path):
    L.seed_everything(0, verbose=False)
    model, callback = Counting(), NaturalGradient(measure_every=1, show_coverage=False)
    data = TensorDataset(INPUTS.repeat(5, 1).float(), TARGETS.argmax(1).repeat(5))
    logger = CSVLogger(tmp_path)
    fit = trainer(tmp_path, callback, max_epochs=1, logger=logger, log_every_n_steps=1)
    fit.fit(model, DataLoader(data, batch_size=16))
    assert len(model.losses) == model.forwards == model.updates == 5
    assert callback.summary()["kl_max"] > 0
    assert len(model.right) == fit.callback_metrics["examples"] == 80
    assert sum(model.right) == model.total
    assert float(fit.callback_metrics["accuracy"]) == pytest.approx(sum(model.right) / 80)
    assert float(fit.callback_metrics["loss_epoch"]) == pytest.approx(sum(model.losses) / 5)
    rows = list(csv.DictReader((Path(logger.log_dir) / "metrics.csv").open()))
    logged = [float(row["loss_step"]) for row in rows if row["loss_step"]]
    assert logged == pytest.approx(model.losses)
    assert sum(bool(row["natgrad/kl"]) for row in rows) == 5


# -- reduced precision -----------------------------------------------------------------------------


def bf16(model: nn.Module) -> Callable[[Tensor], Tensor]:
    def predict(x: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return model(x)

    return predict


@pytest.mark.parametrize("name", HEADS)
def test_under_autocast_the_kl_is_computed_in_float32(name):
    head, x, t = HEADS[name], INPUTS.float(), TARGETS.float()
    model = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3))
    try:
        head.loss(bf16(model)(x), t).backward()
    except RuntimeError as error:
        pytest.skip(f"this torch: {error}")
    _, observation = observe([*model.parameters()], lambda: head.loss(bf16(model)(x), t))
    ((loss, now),) = observation.replay()
    assert now[0].dtype == torch.bfloat16
    assert loss.kl(now).dtype == torch.float32
    optimizer = NaturalGradientOptimizer(
        model.parameters(), measure_every=1, noise_variance=head.noise_variance
    )
    for _ in range(4):
        before = copy.deepcopy(model)
        optimizer.zero_grad()
        with optimizer.observe(), torch.autocast("cpu", torch.bfloat16):
            loss = head.loss(model(x), t)
        loss.backward()
        optimizer.step()
        with torch.no_grad():
            value = head.loss(bf16(before)(x).float(), t)
            p, q = (head.predictive(bf16(m)(x).float(), value) for m in (before, model))
            exact = float(D.kl_divergence(p, q).mean())
        assert optimizer.report.kl == pytest.approx(exact, rel=1e-3)


# -- predictions whose memory changes ------------------------------------------------------------

Z = nn.Parameter(randn(16, 3, seed=4))
ONES = torch.ones(16, 3).double()
OF_PARAMETERS = {
    "cross entropy": lambda: F.cross_entropy(Z, torch.arange(16) % 3),
    "bce of a piece": lambda: F.binary_cross_entropy_with_logits(Z[:5], ONES[:5]),
    "mse": lambda: F.mse_loss(Z, ONES),
    "place of a normal": lambda: -D.Normal(Z, ONES).log_prob(ONES).mean(),
    "spread by hand": lambda: 0.5 * (4.0 * (-Z).exp() + Z).mean(),
}


@pytest.mark.parametrize("name", OF_PARAMETERS)
def test_a_prediction_that_is_a_parameter_is_seen_to_move(name):
    objective = OF_PARAMETERS[name]
    _, observation = observe([Z], objective)
    before = objective().item()
    with moved([Z], 0.3 * randn(48, seed=5)):
        kl, fall = KlMeasurement().measure([observation])
        assert fall == pytest.approx(before - objective().item(), rel=1e-6)
    assert kl > 1e-3


def test_predictions_that_are_written_to_before_backward_are_not_read():
    model = double(nn.Linear(4, 3))
    optimizer = NaturalGradientOptimizer(model.parameters())
    for spoilt in (False, True):
        optimizer.zero_grad()
        with optimizer.observe():
            z = model(INPUTS)
            loss = F.cross_entropy(z, TARGETS.argmax(1))
            if spoilt:
                z.detach()[:, 0] = -9.0
        context = pytest.warns(UserWarning, match="written to") if spoilt else nullcontext()
        blocks = optimizer._engine.fisher.blocks
        averages = [block.average("G") for block in blocks]
        with context:
            loss.backward()
        optimizer.step()
        if spoilt:
            assert torch.equal(blocks[0].average("G"), averages[0])
            assert optimizer.report.kl is None
