"""Steps with the whole Fisher matrix of a batch: what they are, and what they need."""

import copy
import warnings

import lightning as L
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from ngplugin import NaturalGradient, NaturalGradientOptimizer
from tests.oracle import FAMILIES, dense_fisher, double, flat, randn

X, Y = randn(40, 4, seed=1), torch.arange(40) % 3


def network():
    return double(nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)))


def made(model, **options):
    return NaturalGradientOptimizer(
        model.parameters(), **{"structure": "matrix-free", "cg_iterations": 200, **options}
    )


def step(optimizer, model, *micro_batches, scale=1.0):
    """One step; each micro-batch counts with its share of the examples."""
    micro_batches = micro_batches or (slice(None),)
    rows = sum(len(Y[rows]) for rows in micro_batches)
    optimizer.zero_grad()
    for batch in micro_batches:
        with optimizer.observe():
            loss = F.cross_entropy(model(X[batch]), Y[batch])
        (scale * loss * len(Y[batch]) / rows).backward()
    optimizer.step()
    return optimizer.report


def exact(model):
    """F/Σw of all data, and the gradient."""
    parameters = [*model.parameters()]
    z = model(X)
    gradient = flat(torch.autograd.grad(F.cross_entropy(z, Y), parameters))
    fisher = dense_fisher(
        FAMILIES["categorical"], model(X), parameters, torch.ones(len(X)).double()
    )
    return fisher, gradient


@pytest.mark.parametrize("scale", [1.0, 7.0])
def test_an_unbounded_step_is_a_dense_solve(scale):
    model = network()
    fisher, gradient = exact(model)
    before = flat([*model.parameters()])
    optimizer = made(model, kl_radius=None, damping=0.1, damping_mode="absolute")
    report = step(optimizer, model, scale=scale)
    moved = flat([*model.parameters()]) - before
    solved = -torch.linalg.solve(fisher + 0.1 * torch.eye(len(fisher)), gradient)
    assert float((moved - solved).norm() / solved.norm()) < 2e-3
    assert report.kl_predicted == pytest.approx(float(0.5 * moved @ fisher @ moved), rel=1e-6)


def test_relative_damping_is_in_units_of_each_block_s_mean_eigenvalue():
    model = network()
    fisher, gradient = exact(model)
    before = flat([*model.parameters()])
    optimizer = made(model, kl_radius=None, damping=0.3, sampling_damping=0.0)
    step(optimizer, model)
    moved = flat([*model.parameters()]) - before
    means = [float(optimizer._engine.fisher.block(p).mean_eigenvalue()) for p in model.parameters()]
    damping = torch.cat(
        [
            torch.full((p.numel(),), 0.3 * mean).double()
            for p, mean in zip(model.parameters(), means, strict=True)
        ]
    )
    solved = -torch.linalg.solve(fisher + damping.diag(), gradient)
    assert float((moved - solved).norm() / solved.norm()) < 5e-3


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_the_predicted_kl_is_that_of_the_step_with_the_batch_s_matrix(weight_decay):
    model = network()
    optimizer = made(model, kl_radius=1e-4, cg_iterations=3, weight_decay=weight_decay)
    for _ in range(4):
        fisher, _ = exact(model)
        before = flat([*model.parameters()])
        report = step(optimizer, model)
        moved = flat([*model.parameters()]) - before
        assert report.kl_predicted == pytest.approx(float(0.5 * moved @ fisher @ moved), rel=1e-6)
        assert report.kl == pytest.approx(report.kl_predicted, rel=0.1)


def test_micro_batches_make_the_step_of_their_whole():
    models = [network(), network()]
    micro_batches = [slice(0, 10), slice(10, 25), slice(25, 40)]
    options = {"damping": 0.1, "damping_mode": "absolute"}  # which no draw enters
    step(made(models[0], **options), models[0])
    step(made(models[1], **options), models[1], *micro_batches)
    one, other = (flat([*model.parameters()]) for model in models)
    start = flat([*network().parameters()])
    assert float((one - other).norm() / (one - start).norm()) < 5e-3


@pytest.mark.parametrize("cg_iterations", [1, 4, 50])
def test_the_quadratic_model_of_an_unbounded_step_falls_further_with_more_iterations(cg_iterations):
    def fall(iterations):
        model = network()
        fisher, gradient = exact(model)
        before = flat([*model.parameters()])
        options = {"damping": 1e-3, "damping_mode": "absolute"}
        step(made(model, kl_radius=None, cg_iterations=iterations, **options), model)
        moved = flat([*model.parameters()]) - before
        fisher = fisher + 1e-3 * torch.eye(len(fisher))
        return float(gradient @ moved + 0.5 * moved @ fisher @ moved)

    assert fall(cg_iterations + 1) <= fall(cg_iterations) < 0


def test_a_run_goes_on_bit_for_bit_from_a_checkpoint():
    model = network()
    optimizer = made(model, cg_iterations=3)
    for _ in range(3):
        step(optimizer, model)
    other = copy.deepcopy(model)
    resumed = made(other, cg_iterations=3)
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for _ in range(3):
        step(optimizer, model)
        step(resumed, other)
    for p, q in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(p, q)


class Hidden(torch.autograd.Function):
    """Doubles its input where no observer sees it."""

    @staticmethod
    def forward(ctx, x):
        return torch.from_numpy(2 * x.detach().numpy())

    @staticmethod
    def backward(ctx, g):
        return 2 * g


class Straight(torch.autograd.Function):
    """Rounds, with the derivative of what it does not do."""

    @staticmethod
    def forward(ctx, x):
        return (8 * x).round() / 8

    @staticmethod
    def backward(ctx, g):
        return g


def segments(x):
    # Their backward pass has no derivative.
    return torch.segment_reduce(x, "sum", lengths=torch.ones(len(x), dtype=torch.long))


@pytest.mark.parametrize(
    ("last", "reason"),
    [
        (Hidden.apply, "cannot be run again"),
        (Straight.apply, "custom autograd.Function"),
        (segments, "not implemented"),
    ],
)
def test_where_the_prediction_cannot_be_linearized_the_blocks_step_and_one_warning_says_so(
    last, reason
):
    model = network()
    other = copy.deepcopy(model)
    optimizer = made(model, measure_every=1)
    # The same measurements, and no momentum.
    blocks = NaturalGradientOptimizer(other.parameters(), momentum=0.0, measure_every=1)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(3):
            step(optimizer, lambda x: last(model(x)))
            step(blocks, lambda x: last(other(x)))
    messages = [str(w.message) for w in caught if "matrix-free" in str(w.message)]
    assert len(messages) == 1
    assert reason in messages[0]
    for p, q in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(p, q)


class Module(L.LightningModule):
    def __init__(self):
        super().__init__()
        self.network = network()

    def training_step(self, batch, index):
        x, y = batch
        return F.cross_entropy(self.network(x), y)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def fitted(batch_size, accumulate, tmp_path):
    module = Module()
    options = {"damping": 0.1, "damping_mode": "absolute", "cg_iterations": 200}
    trainer = L.Trainer(
        max_epochs=2,
        accumulate_grad_batches=accumulate,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=tmp_path,
        callbacks=[NaturalGradient(structure="matrix-free", show_coverage=False, **options)],
    )
    trainer.fit(module, DataLoader(TensorDataset(X, Y), batch_size))
    return flat([*module.network.parameters()])


def test_a_trainer_that_accumulates_makes_the_steps_of_the_whole_batch(tmp_path):
    start = flat([*network().parameters()])
    whole, parted = fitted(40, 1, tmp_path), fitted(10, 4, tmp_path)
    assert float((whole - parted).norm() / (whole - start).norm()) < 1e-2
