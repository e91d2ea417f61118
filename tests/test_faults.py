"""Faults of a batch, a loss or a gradient: refused or harmless, counted, and soon over."""

from __future__ import annotations

import csv
import math
from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.loggers import CSVLogger
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from ngplugin import NaturalGradient, NaturalGradientOptimizer
from ngplugin.tracking.metrics import metrics
from tests.oracle import flat, generator

F = torch.nn.functional
X = torch.randn(24, 16, generator=generator(1))
PROBLEMS: dict[str, tuple[Any, Tensor]] = {
    "cross entropy": (F.cross_entropy, torch.arange(24) % 4),
    "mse": (F.mse_loss, torch.stack([X[:, 0].sin(), X[:, 1] * X[:, 2], X[:, 3], X[:, 4].abs()], 1)),
}
MODELS: dict[str, Callable[[], nn.Module]] = {
    "mlp": lambda: nn.Sequential(nn.Linear(16, 12), nn.ReLU(), nn.Linear(12, 4)),
    "conv": lambda: nn.Sequential(
        nn.Unflatten(1, (1, 4, 4)), nn.Conv2d(1, 4, 3, padding=1), nn.BatchNorm2d(4), nn.Tanh(),
        nn.Flatten(), nn.Linear(64, 4),
    ),
    "transformer": lambda: nn.Sequential(
        nn.Unflatten(1, (4, 4)), nn.Linear(4, 8),
        nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True),
        nn.Flatten(), nn.Linear(32, 4),
    ),
}  # fmt: skip


@dataclass(frozen=True)
class Fault:
    """What is wrong with one training step, and where."""

    batch: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]] = lambda x, y: (x, y)
    objective: Callable[[Any, Tensor, Tensor], Tensor] = lambda loss, z, y: loss(z, y)
    gradient: Callable[[Tensor], Any] = lambda first_parameter: None


GOOD = Fault()


def example(value: float, t: Tensor) -> Tensor:
    return t.index_fill(0, torch.tensor(3), value)


def scaled(factor: float) -> Fault:
    return Fault(objective=lambda loss, z, y: factor * loss(z, y))


def by_hand(value: float) -> Fault:
    return Fault(gradient=lambda p: p.grad.view(-1)[:1].fill_(value))


REFUSED = {
    "nan in the inputs": Fault(lambda x, y: (example(math.nan, x), y)),
    "inf in the inputs": Fault(lambda x, y: (example(math.inf, x), y)),
    "nan in the targets": Fault(lambda x, y: (x, example(math.nan, y))),
    "a target of 1e30": Fault(lambda x, y: (x, example(1e30, y))),
    "loss times 1e30": scaled(1e30),
    "gradient of nan": by_hand(math.nan),
    "gradient of 1e30": by_hand(1e30),
}
# The step may be made: it is one like others.
TAKEN = {
    "an input of 1e30": Fault(lambda x, y: (example(1e30, x), y)),
    "loss times 1e-30": scaled(1e-30),
    "identical inputs": Fault(lambda x, y: (x[:1].repeat(24, 1), y)),
    "one example": Fault(lambda x, y: (x[:1], y[:1])),
    "seven examples": Fault(lambda x, y: (x[:7], y[:7])),
    "a parameter without gradient": Fault(gradient=lambda p: setattr(p, "grad", None)),
}
# There is nothing to learn from the batch.
WEIGHTLESS = {
    "loss times zero": scaled(0.0),
    "loss times 1e-46": scaled(1e-46),
    "no examples": Fault(lambda x, y: (x[:0], y[:0])),
}
# No loss is left; logits of ±1e4 leave no Fisher information either.
SURE = {
    "saturated softmax": Fault(
        objective=lambda loss, z, y: loss(z + 1e4 * (2 * F.one_hot(y, 4) - 1), y)
    ),
    "noise-free squares": Fault(objective=lambda loss, z, y: loss(z, z.detach())),
}
ALL = {**REFUSED, **TAKEN, **WEIGHTLESS, **SURE}

in_all_models = pytest.mark.parametrize("model", MODELS)
in_all_problems = pytest.mark.parametrize("problem", PROBLEMS)
at_first_and_later = pytest.mark.parametrize("at", [0, 4])
#: Each two of model, problem and time together, in half as many runs as there are of all three.
PAIRS = [(m, p, 4 * ((i + j) % 2)) for i, m in enumerate(MODELS) for j, p in enumerate(PROBLEMS)]
in_pairs = pytest.mark.parametrize(("model", "problem", "at"), PAIRS)


def learnt(optimizer: NaturalGradientOptimizer) -> dict[str, Any]:
    """All that training has taught the optimizer, as copies; blocks by their first parameter."""
    state = optimizer.state_dict()["natgrad"]
    kept = {key: state[key] for key in ("momentum", "bound", "nat_worth", "weight", "solver")}
    averages = {b["parameters"][0]: b["averages"] for b in state["fisher"] if b.get("averages")}
    return deepcopy({**kept, "fisher": averages})


class Run:
    """A network, its optimizer and its data."""

    def __init__(self, model: str, problem: str, **options: Any) -> None:
        torch.manual_seed(0)
        self.model = MODELS[model]()
        self.loss, self.y = PROBLEMS[problem]
        self.optimizer = NaturalGradientOptimizer(self.model.parameters(), **options)

    def step(self, *faults: Fault) -> float:
        """One step, of a micro-batch for each fault."""
        self.optimizer.zero_grad()
        for fault in faults or (GOOD,):
            x, y = fault.batch(X, self.y)
            with self.optimizer.observe():
                value = fault.objective(self.loss, self.model(x), y)
            value.backward()
            fault.gradient(next(self.model.parameters()))
        self.optimizer.step()
        self.report = self.optimizer.report
        return value.item()

    def steps(self, count: int) -> list[float]:
        return [self.step() for _ in range(count)]

    def weights(self) -> Tensor:
        return flat([*self.model.parameters()])

    def learnt(self) -> dict[str, Any]:
        return learnt(self.optimizer)

    def assert_safe(self) -> None:
        """The last step kept to its radius, in a network of numbers."""
        assert self.weights().isfinite().all()
        assert self.report.kl_predicted <= self.report.kl_radius * (1 + 1e-6)
        assert self.report.kl is None or self.report.kl <= 1.5 * self.report.kl_radius

    def assert_learns(self, steps: int = 5, share: float = 0.9) -> None:
        losses = self.steps(steps)
        assert losses[-1] < share * losses[0]
        assert self.report.skipped == 0


def same(one: Any, other: Any) -> bool:
    """Bit for bit."""
    if type(one) is not type(other):
        return False
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    if isinstance(one, (list, tuple)):
        return len(one) == len(other) and all(map(same, one, other))
    return torch.equal(one, other) if isinstance(one, Tensor) else one == other


# -- refused -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fault", "model", "problem", "at"),
    [(f, m, p, at) for f in REFUSED for m, p, at in PAIRS if "target" not in f or p == "mse"],
)
def test_a_batch_of_no_numbers_is_refused_whole_and_training_goes_on(fault, model, problem, at):
    run = Run(model, problem, noise_variance="running")
    run.steps(at)
    weights, learnt = run.weights(), run.learnt()
    run.step(REFUSED[fault])
    assert torch.equal(run.weights(), weights)
    assert same(run.learnt(), learnt)
    assert (run.report.step, run.report.skipped, run.report.step_scale) == (at, 1, 0.0)
    logged = metrics(run.report)
    assert logged["natgrad/skipped"] == logged["natgrad/dropped_statistics"] == 1
    run.assert_learns()


def test_a_bad_micro_batch_spoils_the_step_it_is_in_and_no_other():
    run = Run("mlp", "cross entropy")
    run.steps(2)
    learnt = run.learnt()
    run.step(GOOD, REFUSED["nan in the inputs"], GOOD)
    assert run.report.skipped == 1
    assert same(run.learnt(), learnt)
    run.assert_learns()


@in_all_problems
def test_an_objective_of_another_scale_is_a_step_like_any_other(problem):
    """The momentum of before is 1e30 times what this gradient is."""
    run, usual = Run("mlp", problem), Run("mlp", problem)
    for each, batch in ((run, scaled(1e-30)), (usual, GOOD)):
        each.steps(4)
        each.step(batch)
        assert each.report.skipped == 0
    torch.testing.assert_close(run.weights(), usual.weights(), rtol=1e-4, atol=1e-6)
    run.assert_learns()


def test_bad_batches_in_a_row_at_the_start_do_not_end_the_run():
    run = Run("mlp", "mse")
    for name in list(REFUSED)[:4] + list(WEIGHTLESS):
        run.step(ALL[name])
        assert (run.report.skipped, run.report.dropped_statistics) == (1, 1)
    run.assert_learns()


class Tempered(nn.Module):
    """Beside a layer, a parameter of which a function is taken before it meets the data."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(16, 4)
        self.rho = nn.Parameter(torch.zeros(4))

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x) / F.softplus(self.rho)


@pytest.mark.parametrize("measured", [False, True])
def test_a_step_that_led_to_no_number_is_taken_back_unless_it_was_measured(monkeypatch, measured):
    monkeypatch.setitem(MODELS, "tempered", Tempered)
    run = Run("tempered", "cross entropy", measure_every=1 if measured else None)
    run.steps(3)
    before = run.weights()
    run.step()
    after = run.weights()
    bad = REFUSED["nan in the inputs"]
    run.step(bad)
    assert torch.equal(run.weights(), after)  # one batch may be bad by itself
    run.step(bad)
    assert torch.equal(run.weights(), after if measured else before)
    run.step(bad)
    assert torch.equal(run.weights(), after if measured else before)
    run.assert_learns(20)


# -- taken ---------------------------------------------------------------------------------------


@in_pairs
@pytest.mark.parametrize("fault", TAKEN)
def test_an_odd_batch_keeps_to_the_radius_and_training_goes_on(fault, model, problem, at):
    run = Run(model, problem)
    run.steps(at)
    before = run.weights()
    run.step(TAKEN[fault])
    run.assert_safe()
    if "without" in fault:
        first = next(run.model.parameters()).numel()
        assert torch.equal(run.weights()[:first], before[:first])
        assert not torch.equal(run.weights(), before)
    run.assert_learns()


@at_first_and_later
@in_all_models
@pytest.mark.parametrize("fault", WEIGHTLESS)
def test_a_batch_that_weighs_nothing_leaves_the_fisher_alone_and_measures_no_kl(fault, model, at):
    run = Run(model, "cross entropy")
    run.steps(at)
    weights, fisher = run.weights(), run.learnt()["fisher"]
    run.step(WEIGHTLESS[fault])
    run.assert_safe()
    assert run.report.dropped_statistics == 1
    assert run.report.kl is None
    assert same(run.learnt()["fisher"], fisher)
    assert run.report.skipped == int(at == 0)  # later the momentum goes on
    assert torch.equal(run.weights(), weights) == (at == 0)
    run.assert_learns()


@at_first_and_later
@in_all_models
@pytest.mark.parametrize("fault", SURE)
def test_a_prediction_that_is_right_for_sure_moves_nothing(fault, model, at):
    run = Run(model, "mse" if "squares" in fault else "cross entropy")
    run.steps(at)
    weights = run.weights()
    assert run.step(SURE[fault]) == 0
    assert run.report.kl_radius == 0
    assert torch.equal(run.weights(), weights)
    run.assert_learns()


@at_first_and_later
@in_all_problems
def test_a_singular_fisher_without_damping_fails_to_factorize_and_is_counted(problem, at):
    run = Run("mlp", problem, damping=0.0, sampling_damping=0.0)
    run.steps(at)
    run.step(TAKEN["identical inputs"])
    run.assert_safe()
    if not at:
        assert metrics(run.report)["natgrad/failed_factorizations"] >= 1
    losses = run.steps(20)  # of which some may be skipped: what is next to singular is not
    assert losses[-1] < 0.9 * losses[0]
    run.assert_safe()


@at_first_and_later
def test_a_dead_network_stays_where_it_is_until_it_is_revived(at):
    run = Run("mlp", "mse", momentum=0.0)
    run.model.append(nn.ReLU())
    run.steps(at)
    bias = run.model[2].bias.detach().clone()
    run.model[2].bias.data.fill_(-1e3)
    weights = run.weights()
    run.step()
    assert run.report.grad_norm == 0
    assert torch.equal(run.weights(), weights)
    run.model[2].bias.data.copy_(bias)
    run.assert_learns()


# -- of every structure --------------------------------------------------------------------------


@pytest.mark.parametrize("at", [0, 10])
@pytest.mark.parametrize("structure", ["exact", "eigen", "diagonal", "matrix-free", "identity"])
@pytest.mark.parametrize(
    "fault", ["nan in the inputs", "loss times 1e30", *WEIGHTLESS, "saturated softmax"]
)
@pytest.mark.filterwarnings("ignore:ngplugin. structure='matrix-free' has to step like")
def test_every_structure_gets_over_a_bad_batch(fault, structure, at):
    run = Run("mlp", "cross entropy", structure=structure)
    run.steps(at)
    weights = run.weights()
    run.step(ALL[fault])
    run.assert_safe()
    if fault in REFUSED:
        assert run.report.skipped == 1
        assert torch.equal(run.weights(), weights)
    run.assert_learns(12)


@pytest.mark.parametrize("fault", [*WEIGHTLESS, "noise-free squares"])
def test_an_exact_block_neither_moves_nor_learns_from_a_gradient_of_zero(fault):
    run = Run("mlp", "mse", structure="exact")
    run.steps(4)
    weights, damping = run.weights(), run.report.damping
    run.step(ALL[fault])
    assert torch.equal(run.weights(), weights)
    assert (run.report.damping, run.report.rejected) == (damping, 0)


# -- with Lightning ------------------------------------------------------------------------------


@pytest.mark.parametrize("bad", [0, 5])
def test_a_fit_gets_over_a_bad_batch_and_logs_it(tmp_path: Path, bad: int) -> None:
    class Module(L.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net, self.losses = MODELS["mlp"](), []

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            x, y = batch
            loss = F.cross_entropy(self.net(x * math.nan if batch_idx == bad else x), y)
            self.losses.append(loss.item())
            return loss

        def configure_optimizers(self) -> Any:
            return torch.optim.AdamW(self.parameters(), lr=1e-3)

    torch.manual_seed(0)
    data = TensorDataset(X.repeat(16, 1), PROBLEMS["cross entropy"][1].repeat(16))
    module, callback = Module(), NaturalGradient(show_coverage=False)
    logger = CSVLogger(tmp_path, name="logs")
    L.Trainer(
        max_epochs=1, accelerator="cpu", callbacks=[callback], logger=logger, log_every_n_steps=1,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
    ).fit(module, DataLoader(data, batch_size=24))  # fmt: skip
    rows = csv.DictReader((Path(logger.log_dir) / "metrics.csv").open())
    assert [float(row["natgrad/skipped"]) for row in rows] == [float(i == bad) for i in range(16)]
    assert callback.summary()["skipped"] == 1
    assert module.losses[-1] < 0.5 * module.losses[1]
