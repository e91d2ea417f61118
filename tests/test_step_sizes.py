"""How long a step is, by which rule; what measuring alone changes, and what a refusal."""

import copy
import math

import lightning as L
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from ngplugin import NaturalGradient, NaturalGradientOptimizer
from ngplugin.proposal import Model
from ngplugin.step_length import Applied
from ngplugin.trust_region import TrustRegion
from tests.oracle import double, flat, jacobian, randn

F = torch.nn.functional
X, Y = randn(40, 4, seed=1), randn(40, 2, seed=2)


def network():
    return double(nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 2)))


def step(model, optimizer, loss=F.mse_loss, x=X, y=Y):
    optimizer.zero_grad()
    with optimizer.observe():
        value = loss(model(x), y)
    value.backward()
    optimizer.step()
    return value.item()


# -- the quadratic model --------------------------------------------------------------------------


def test_a_quadratic_step_minimises_the_model_over_the_last_step_and_the_direction():
    """2x2 by brute force, with the dense Fisher matrix of the batch."""
    model = network()
    parameters = [*model.parameters()]
    optimizer = NaturalGradientOptimizer(
        parameters, step_size="quadratic", kl_radius=None, damping=0.05, damping_mode="absolute",
        structure="kronecker", noise_variance=1.0,
    )  # fmt: skip
    before = flat(parameters)
    step(model, optimizer)
    for _ in range(3):
        last = flat(parameters) - before
        before = flat(parameters)
        J = jacobian(model(X), parameters)
        fisher = 2 / 80 * J.T @ J + 2 * 0.05 * torch.eye(len(before))  # Σw = 2: of the objective
        step(model, optimizer)
        g = flat([p.grad for p in parameters])
        natural, _ = optimizer._engine.fisher.precondition({id(p): p.grad for p in parameters})
        d = flat([natural[id(p)] for p in parameters])
        basis = torch.stack([d, last])
        best = -basis.T @ torch.linalg.solve(basis @ fisher @ basis.T, basis @ g)
        torch.testing.assert_close(flat(parameters) - before, best, rtol=1e-6, atol=1e-9)


def test_on_least_squares_the_model_is_the_loss_and_steps_go_to_its_minimum():
    layer = double(nn.Linear(4, 1, bias=False))
    y = randn(40, 1, seed=3)
    optimizer = NaturalGradientOptimizer(
        layer.parameters(), step_size="quadratic", kl_radius=None, damping=0.0,
        sampling_damping=0.0, structure="diagonal",
    )  # fmt: skip
    exact = torch.linalg.lstsq(X, y).solution.reshape(-1)
    start = (flat([*layer.parameters()]) - exact).norm()
    for _ in range(10):
        step(layer, optimizer, y=y)
        assert optimizer.report.reduction_ratio in (None, pytest.approx(1.0, rel=1e-6))
    assert (flat([*layer.parameters()]) - exact).norm() < 1e-2 * start


def test_a_resumed_quadratic_run_goes_on_bit_by_bit():
    model = network()
    make = {"step_size": "quadratic", "structure": "kronecker"}
    optimizer = NaturalGradientOptimizer(model.parameters(), **make)
    for _ in range(4):
        step(model, optimizer)
    twin = copy.deepcopy(model)
    other = NaturalGradientOptimizer(twin.parameters(), **make)
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for m, o in ((model, optimizer), (twin, other)):
        step(m, o)
    assert torch.equal(flat([*model.parameters()]), flat([*twin.parameters()]))


# -- line search ----------------------------------------------------------------------------------


@pytest.mark.parametrize("lr", [0.05, 1.0, 20.0])
def test_a_line_search_finds_the_minimum_of_a_parabola_from_any_first_length(lr):
    layer = double(nn.Linear(4, 2))
    optimizer = NaturalGradientOptimizer(
        layer.parameters(), lr=lr, momentum=0.0, step_size="line-search", kl_radius=None
    )
    before = flat([*layer.parameters()])
    step(layer, optimizer)
    taken = flat([*layer.parameters()]) - before
    design = torch.cat([X, torch.ones(40, 1).double()], 1)
    W = torch.cat([layer.weight, layer.bias[:, None]], 1).detach()
    D = torch.cat([taken[:8].reshape(2, 4), taken[8:, None]], 1)
    # Along the step the squared error is least where the parameters are now.
    slope = ((design @ W.T - Y) * (design @ D.T)).sum()
    curve = (design @ D.T).square().sum()
    assert abs(slope / curve) < 0.1


def test_a_line_search_keeps_to_the_radius_and_never_goes_up():
    model = network()
    optimizer = NaturalGradientOptimizer(
        model.parameters(), lr=50.0, step_size="line-search", structure="kronecker"
    )
    losses = [step(model, optimizer) for _ in range(15)]
    assert losses == sorted(losses, reverse=True)
    assert losses[-1] < 0.6 * losses[0]
    assert optimizer.report.kl <= optimizer.report.kl_radius


def test_a_line_search_that_finds_no_fall_moves_nothing(monkeypatch):
    model = network()
    optimizer = NaturalGradientOptimizer(
        model.parameters(), step_size="line-search", structure="kronecker"
    )
    measure = type(optimizer._engine._length._measurement).measure
    monkeypatch.setattr(
        type(optimizer._engine._length._measurement), "measure",
        lambda self, taped: (measure(self, taped)[0], -1.0),
    )  # fmt: skip
    before = flat([*model.parameters()])
    step(model, optimizer)
    assert torch.equal(flat([*model.parameters()]), before)
    assert optimizer.report.rejected == 1


# -- measuring, enforcing -------------------------------------------------------------------------


@pytest.mark.parametrize("structure", ["kronecker", "eigen", "diagonal"])
def test_measuring_every_step_and_enforcing_nothing_changes_no_bit(structure):
    ends = []
    for every in (None, 1):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Dropout(0.2), nn.Tanh(),
                              nn.Linear(8, 3))  # fmt: skip
        optimizer = NaturalGradientOptimizer(
            model.parameters(), lr=1e-3, kl_radius=None, measure_every=every, structure=structure
        )
        measured = 0
        for seed in range(12):
            x = randn(24, 4, seed=seed).float()
            step(model, optimizer, F.cross_entropy, x, torch.arange(24) % 3)
            measured += optimizer.report.kl is not None
        assert measured == (0 if every is None else 12)
        ends.append([*model.parameters(), *model.buffers(), torch.get_rng_state()])
    for one, other in zip(*ends, strict=True):
        assert torch.equal(one, other)


class Module(L.LightningModule):
    def __init__(self):
        super().__init__()
        self.network = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Dropout(0.2),
                                     nn.Linear(8, 3))  # fmt: skip

    def training_step(self, batch, index):
        return F.cross_entropy(self.network(batch[0]), batch[1])

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=1e-3)


def test_the_callback_that_measures_and_enforces_nothing_changes_no_bit(tmp_path):
    ends = []
    for every in (None, 1):
        L.seed_everything(0, verbose=False)
        module = Module()
        data = DataLoader(TensorDataset(X.float(), torch.arange(40) % 3), batch_size=8)
        callback = NaturalGradient(
            lr=1e-2,
            kl_radius=None,
            measure_every=every,
            structure="kronecker",
            show_coverage=False,
        )
        trainer = L.Trainer(
            max_epochs=3, callbacks=[callback], logger=False, enable_checkpointing=False,
            enable_progress_bar=False, enable_model_summary=False, accelerator="cpu",
            default_root_dir=tmp_path,
        )  # fmt: skip
        trainer.fit(module, data)
        assert (callback.summary()["kl_max"] is None) == (every is None)
        ends.append([*module.state_dict().values(), torch.get_rng_state()])
    for one, other in zip(*ends, strict=True):
        assert torch.equal(one, other)


def learnt(optimizer):
    """What a refused step must leave alone: momentum, Fisher averages apart from this batch's."""
    state = optimizer.state_dict()["natgrad"]
    return [m.clone() for m in state["momentum"] if m is not None]


def test_a_refused_step_leaves_parameters_momentum_and_buffers_bit_by_bit(monkeypatch):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Linear(8, 3))
    optimizer = NaturalGradientOptimizer(model.parameters(), measure_every=1)
    batches = [randn(24, 4, seed=seed).float() for seed in range(5)]
    for x in batches[:4]:
        step(model, optimizer, F.cross_entropy, x, torch.arange(24) % 3)
    twin = copy.deepcopy(model)
    twin(batches[4])  # what the user's own forward pass does to the buffers
    before, momentum = flat([*model.parameters()]), learnt(optimizer)
    with monkeypatch.context() as hostile:
        hostile.setattr(TrustRegion, "shrink", lambda *_: 0.5)
        step(model, optimizer, F.cross_entropy, batches[4], torch.arange(24) % 3)
    assert optimizer.report.rejected == 1
    assert torch.equal(flat([*model.parameters()]), before)
    for one, other in zip(momentum, learnt(optimizer), strict=True):
        assert torch.equal(one, other)
    for one, other in zip(model.buffers(), twin.buffers(), strict=True):
        assert torch.equal(one, other)
    step(model, optimizer, F.cross_entropy, batches[0], torch.arange(24) % 3)
    assert not any(
        torch.equal(one, other) for one, other in zip(momentum, learnt(optimizer), strict=True)
    )


def test_a_step_that_raises_its_own_loss_by_more_than_the_radius_is_shortened():
    bound = TrustRegion(0.03)
    assert bound.shrink(0.02, 1.0, rise=0.02) is None
    assert bound.shrink(0.02, 1.0, rise=0.04) == 0.5
    assert bound.shrink(0.02, 1.0, rise=-math.inf) is None
    bound.calibrate(20, 1.0, 2.0)
    bound.calibrate(21, 1.0, 2.0, surprise=True)
    assert bound.measurement_due(22)


# -- between the steps that are measured ----------------------------------------------------------


@pytest.mark.parametrize("decay", [0.0, 0.1])
@pytest.mark.parametrize("rates", [(1.0, 1.0), (1.0, 0.3)])
def test_the_predicted_kl_of_a_step_between_is_about_that_of_its_whole_product(decay, rates):
    """½ΔᵀFΔ with the blocks as they are, of the step that was made."""
    model = network()
    weights, biases = ([p for p in model.parameters() if p.dim() == d] for d in (2, 1))
    optimizer = NaturalGradientOptimizer(
        [
            {"params": group, "lr": lr, "weight_decay": decay}
            for group, lr in zip((weights, biases), rates, strict=True)
        ],
        kl_radius=0.01,
        structure="kronecker",
        noise_variance=1.0,
    )
    checked = {True: 0, False: 0}
    parameters = weights + biases
    for seed in range(40):
        before = [p.detach().clone() for p in parameters]
        step(model, optimizer, x=randn(40, 4, seed=seed), y=randn(40, 2, seed=seed + 1))
        delta = {id(p): p.detach() - old for p, old in zip(parameters, before, strict=True)}
        fisher = optimizer._engine.fisher
        exact = 0.5 * sum(
            float((delta[key] * part).sum()) for key, part in fisher.product(delta).items()
        )
        measured = optimizer.report.kl is not None
        ratio = optimizer.report.kl_predicted / exact
        assert abs(math.log(ratio)) < (1e-6 if measured else math.log(2))
        checked[measured] += 1
    assert min(checked.values()) > 8


def test_differences_of_losses_that_rounding_may_have_made_say_nothing():
    applied = Applied(1.0, kl=1e-9, reduction=-1e-7)
    assert applied.ratio(Model(slope=1e-6, nats=2.0, rounding=1e-5)) is None
    assert applied.ratio(Model(slope=1e-4, nats=2.0, rounding=1e-5)) == pytest.approx(-1e-3)
    # float32 has seven digits, and a saturated classifier's losses are differences of large ones.
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 32), nn.ReLU(), nn.Linear(32, 3))
    x, y = randn(60, 4).float(), torch.arange(60) % 3
    x = x + 8 * F.one_hot(y, 4)
    optimizer = NaturalGradientOptimizer(model.parameters(), structure="kronecker")
    reports = []
    for _ in range(150):
        loss = step(model, optimizer, F.cross_entropy, x, y)
        reports.append(optimizer.report)
    assert loss < 1e-5
    late = [r for r in reports[100:] if r.kl is not None]
    assert len(late) < 25
    assert all(r.reduction_ratio is None for r in late)
    assert sum(r.shrinks for r in late) == 0
