"""The optimizer as users meet it: loops, groups, schedulers, checkpoints, and what goes wrong."""

import io
import math
import warnings

import pytest
import torch
from torch import nn
from torch.optim import lr_scheduler

from ngplugin import NaturalGradientOptimizer, OptionError, StepOrderError
from ngplugin.objective_check import ObjectiveCheck
from tests.oracle import dense_damped, double, flat, randn, unflat

F = torch.nn.functional
X, Y = randn(24, 4, seed=1), torch.arange(24) % 3


def network(seed=0):
    return double(nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3)), seed)


def convolutional():
    return double(
        nn.Sequential(
            nn.Unflatten(1, (1, 2, 2)),
            nn.Conv2d(1, 4, 2, padding=1),
            nn.GroupNorm(2, 4),
            nn.Tanh(),
            nn.Flatten(),
            nn.Linear(36, 3),
        )
    )


def train(model, optimizer, steps, scheduler=None, x=X, y=Y, loss=F.cross_entropy):
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        with optimizer.observe():
            value = loss(model(x), y)
        value.backward()
        optimizer.step()
        if scheduler:
            scheduler.step()
        losses.append(value.item())
    return losses


# -- what a step is ------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [network, convolutional])
@pytest.mark.parametrize("structure", ["auto", "diagonal"])
@pytest.mark.parametrize(
    ("mode", "sampling"), [("relative", 0.0), ("relative", 1.0), ("absolute", 0)]
)
def test_a_step_solves_the_damped_block_diagonal_system(mode, sampling, structure, make):
    model = make()
    optimizer = NaturalGradientOptimizer(
        model.parameters(),
        lr=1.0,
        momentum=0.0,
        kl_radius=None,
        damping=0.2,
        damping_mode=mode,
        sampling_damping=sampling,
        structure=structure,
        layer_balance="natural",
        refresh_every=1,
    )
    for _ in range(3):
        before = {id(p): p.detach().clone() for p in model.parameters()}
        train(model, optimizer, 1, loss=lambda z, y: 5 * F.cross_entropy(z, y))
        seen = 0
        for block in optimizer._engine.fisher.blocks:
            # The objective weighs 5 in all: F = 5 F/Σw.
            dense = 5.0 * dense_damped(block, 0.2, mode, sampling)
            g = flat([p.grad for p in block.parameters])
            moved = flat([p.detach() - before[id(p)] for p in block.parameters])
            torch.testing.assert_close(moved, -torch.linalg.solve(dense, g), rtol=1e-8, atol=1e-11)
            seen += g.numel()
        assert seen == sum(p.numel() for p in model.parameters())


def test_one_undamped_step_solves_linear_least_squares():
    layer, x, y = double(nn.Linear(4, 1)), X, randn(24, 1, seed=3)
    optimizer = NaturalGradientOptimizer(
        layer.parameters(), momentum=0, kl_radius=None, damping=0.0, sampling_damping=0.0
    )
    train(layer, optimizer, 1, x=x, y=y, loss=F.mse_loss)
    design = torch.cat([x, torch.ones(24, 1).double()], 1)
    exact = torch.linalg.lstsq(design, y).solution.reshape(-1)
    torch.testing.assert_close(flat([*layer.parameters()]), exact)


def test_weight_decay_is_decoupled_and_per_unit_of_lr():
    one, other = network(), network()
    options = {"kl_radius": None, "momentum": 0.5, "lr": 0.1}
    a = NaturalGradientOptimizer(one.parameters(), **options)
    b = NaturalGradientOptimizer(other.parameters(), weight_decay=0.3, **options)
    start = flat([*one.parameters()])
    train(one, a, 1)
    train(other, b, 1)
    difference = flat([*other.parameters()]) - flat([*one.parameters()])
    torch.testing.assert_close(difference, -0.1 * 0.3 * start)


@pytest.mark.parametrize("nesterov", [False, True])
@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_the_identity_is_stochastic_gradient_descent(momentum, nesterov):
    one, other = network(), network()

    def groups(model):
        layers = [model[0], model[2]]
        return [
            {"params": [*layer.parameters()], "lr": lr}
            for layer, lr in zip(layers, (0.1, 0.03), strict=True)
        ]

    ours = NaturalGradientOptimizer(
        groups(one), momentum=momentum, nesterov=nesterov, structure="identity", kl_radius=None
    )
    sgd = torch.optim.SGD(
        groups(other), lr=1.0, momentum=momentum, nesterov=nesterov and momentum > 0, foreach=False
    )
    for i in range(15):
        x = randn(10, 4, seed=i)
        for model, optimizer in ((one, ours), (other, sgd)):
            optimizer.zero_grad()
            F.cross_entropy(model(x), Y[:10]).backward()
            optimizer.step()
        for p, q in zip(one.parameters(), other.parameters(), strict=True):
            torch.testing.assert_close(p, q, rtol=1e-12, atol=1e-14)
    assert ours.report.kl_radius == math.inf


def test_the_identity_s_steps_keep_to_a_kl_radius_too():
    model = network()
    optimizer = NaturalGradientOptimizer(
        model.parameters(), lr=100.0, structure="identity", kl_radius=0.01
    )
    losses = train(model, optimizer, 30)
    assert losses[-1] < losses[0]
    assert optimizer.report.kl_predicted <= optimizer.report.kl_radius * (1 + 1e-6)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("structure", ["auto", "diagonal", "identity"])
def test_a_plain_loop_learns_in_any_precision(structure, dtype):
    model = convolutional().to(dtype)
    optimizer = NaturalGradientOptimizer(model.parameters(), structure=structure)
    losses = train(model, optimizer, 25, x=X.to(dtype))
    assert losses[-1] < 0.8 * losses[0]
    assert all(p.dtype == dtype for p in model.parameters())


def test_equal_seeds_make_equal_runs_and_other_seeds_other_runs():
    ends = []
    for seed in (0, 0, 1):
        model = network()
        train(model, NaturalGradientOptimizer(model.parameters(), seed=seed), 4)
        ends.append(flat([*model.parameters()]))
    assert torch.equal(ends[0], ends[1])
    assert not torch.equal(ends[0], ends[2])


def test_training_uses_no_global_random_numbers():
    model = network()
    optimizer = NaturalGradientOptimizer(model.parameters(), fisher="sampled")
    before = torch.get_rng_state()
    train(model, optimizer, 4)
    assert torch.equal(torch.get_rng_state(), before)


def test_burn_in_gathers_statistics_and_moves_nothing():
    model = network()
    optimizer = NaturalGradientOptimizer(model.parameters(), burn_in=14, statistics_every=100)
    start = flat([*model.parameters()])
    train(model, optimizer, 14)
    assert torch.equal(flat([*model.parameters()]), start)
    (block, *_) = optimizer._engine.fisher.blocks
    assert block.effective_count("G") > 10  # 14 statistics, not the ten of the first steps
    assert optimizer.report.step_scale == 0
    train(model, optimizer, 1)
    assert not torch.equal(flat([*model.parameters()]), start)


def test_the_first_five_steps_give_a_statistic_each_and_then_every_so_many(monkeypatch):
    model = network()
    optimizer = NaturalGradientOptimizer(model.parameters(), statistics_every=5)
    seen, fold = [], optimizer._engine.fisher.fold
    monkeypatch.setattr(
        optimizer._engine.fisher, "fold",
        lambda *args: (seen.append(optimizer._engine.steps), fold(*args))[1],
    )  # fmt: skip
    train(model, optimizer, 22)
    assert seen == [*range(5), 5, 10, 15, 20]


# -- groups --------------------------------------------------------------------------------------


def test_groups_have_their_own_rates_and_momentum():
    model = network()
    optimizer = NaturalGradientOptimizer(
        [
            {"params": [*model[0].parameters()], "lr": 0.0},
            {"params": [*model[2].parameters()], "lr": 0.5, "momentum": 0.0},
        ],
        kl_radius=None,
    )
    frozen = flat([*model[0].parameters()])
    train(model, optimizer, 3)
    assert torch.equal(flat([*model[0].parameters()]), frozen)
    assert optimizer._engine._momentum.state_dict([model[2].weight]) == [None]


@pytest.mark.parametrize("wrapped", [False, True])
def test_a_group_added_in_mid_run_is_trained_from_then_on(wrapped):
    model = network()
    first = [*model[2].parameters()]
    optimizer = (
        NaturalGradientOptimizer.wrap(torch.optim.SGD(first, lr=0.1))
        if wrapped
        else NaturalGradientOptimizer(first)
    )
    train(model, optimizer, 13)
    before = model[0].weight.detach().clone()
    optimizer.add_param_group({"params": [*model[0].parameters()]})
    train(model, optimizer, 8)
    assert not torch.equal(model[0].weight, before)
    assert optimizer.coverage().totals() == "kronecker: 51 numbers in 4 tensors"


def test_a_group_taken_away_in_mid_run_stays_and_is_not_saved():
    model = network()
    groups = [{"params": [*layer.parameters()]} for layer in model[::2]]
    optimizer = NaturalGradientOptimizer(groups)
    train(model, optimizer, 3)
    optimizer.param_groups.pop(0)
    before, last = flat([*model[0].parameters()]), flat([*model[2].parameters()])
    train(model, optimizer, 3)
    assert torch.equal(flat([*model[0].parameters()]), before)
    assert not torch.equal(flat([*model[2].parameters()]), last)
    state = saved(optimizer.state_dict())
    NaturalGradientOptimizer(model[2].parameters()).load_state_dict(state)


def test_frozen_parameters_stay_and_are_shown_as_frozen():
    model = network()
    model[0].weight.requires_grad_(False)
    optimizer = NaturalGradientOptimizer(model.parameters())
    before = model[0].weight.clone()
    train(model, optimizer, 5)
    assert torch.equal(model[0].weight, before)
    rows = optimizer.coverage().rows
    assert [row.reason for row in rows][:1] == ["frozen"]
    assert [row.block for row in rows] == ["none", "diagonal", "kronecker", "kronecker"]


def test_parameters_that_no_loss_reaches_stay():
    model, unused = network(), nn.Linear(3, 3).double()
    optimizer = NaturalGradientOptimizer([*model.parameters(), *unused.parameters()])
    before = flat([*unused.parameters()])
    losses = train(model, optimizer, 12)
    assert losses[-1] < losses[0]
    assert torch.equal(flat([*unused.parameters()]), before)
    assert optimizer.coverage().rows[-1].reason == "no observed loss depends on it yet"


def test_a_step_without_any_gradient_is_none():
    model = network()
    optimizer = NaturalGradientOptimizer(model.parameters())
    optimizer.step()
    assert optimizer.report is None
    train(model, optimizer, 2)
    optimizer.zero_grad()
    report, start = optimizer.report, flat([*model.parameters()])
    optimizer.step()
    assert optimizer.report is report
    assert torch.equal(flat([*model.parameters()]), start)


# -- schedulers ----------------------------------------------------------------------------------

SCHEDULERS = {
    "warm-up": lambda o: lr_scheduler.LinearLR(o, 0.1, 1.0, 8),
    "cosine": lambda o: lr_scheduler.CosineAnnealingLR(o, 20),
    "one cycle": lambda o: lr_scheduler.OneCycleLR(o, 0.3, total_steps=20, cycle_momentum=False),
    "sequence": lambda o: lr_scheduler.SequentialLR(
        o,
        [lr_scheduler.LinearLR(o, 0.2, 1.0, 5), lr_scheduler.CosineAnnealingLR(o, 10)],
        milestones=[5],
    ),
}
INNER = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.7, weight_decay=0.01),
    "adam": lambda p: torch.optim.AdamW(p, lr=3e-4, weight_decay=0.1),
}


@pytest.mark.parametrize("holder", ["wrapper", "wrapped"])
@pytest.mark.parametrize("inner", INNER)
@pytest.mark.parametrize("schedule", SCHEDULERS)
def test_a_wrapped_optimizer_s_schedule_shapes_step_and_radius(schedule, inner, holder):
    p = nn.Parameter(randn(3))
    base = INNER[inner]([p])
    base.param_groups[0]["weight_decay"] = 0.0
    optimizer = NaturalGradientOptimizer.wrap(
        base, lr=0.5, structure="identity", kl_radius=None, momentum=0.0
    )
    scheduler = SCHEDULERS[schedule](base if holder == "wrapped" else optimizer)
    group = base.param_groups[0]
    peak = 0.3 if schedule == "one cycle" else group["initial_lr"]
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*lr_scheduler.step.*before")
        for _ in range(19):
            before, p.grad = p.detach().clone(), torch.ones(3).double()
            optimizer.step()
            torch.testing.assert_close(before - p.detach(), 0.5 * group["lr"] / peak * p.grad)
            scheduler.step()


def test_a_schedule_that_rises_above_its_initial_rate_lengthens_no_step():
    p = nn.Parameter(randn(3))
    base = torch.optim.SGD([p], lr=1e-4)
    optimizer = NaturalGradientOptimizer.wrap(
        base, structure="identity", kl_radius=None, momentum=0.0
    )
    factors = (1.0, 4.0, 10.0, 5.0, 1.0)  # a warm-up to ten times the rate that was given
    scheduler = lr_scheduler.LambdaLR(base, lambda step: factors[min(step, 4)])
    for share in (1.0, 1.0, 1.0, 0.5, 0.1):
        before, p.grad = p.detach().clone(), torch.ones(3).double()
        optimizer.step()
        torch.testing.assert_close(before - p.detach(), share * p.grad)
        scheduler.step()


def test_without_a_scheduler_the_peak_is_the_largest_rate_seen():
    p = nn.Parameter(randn(3))
    base = torch.optim.SGD([p], lr=0.1)
    optimizer = NaturalGradientOptimizer.wrap(
        base, structure="identity", kl_radius=None, momentum=0.0
    )
    for lr, share in ((0.1, 1.0), (0.05, 0.5), (0.2, 1.0), (0.1, 0.5)):
        base.param_groups[0]["lr"] = lr
        before, p.grad = p.detach().clone(), torch.ones(3).double()
        optimizer.step()
        torch.testing.assert_close(before - p.detach(), share * p.grad)
    resumed = NaturalGradientOptimizer.wrap(
        torch.optim.SGD([p], lr=9.0), structure="identity", kl_radius=None, momentum=0.0
    )
    resumed.load_state_dict(saved(optimizer.state_dict()))
    before = p.detach().clone()
    resumed.step()
    torch.testing.assert_close(before - p.detach(), 0.5 * p.grad)


def test_wrapping_keeps_the_wrapped_optimizer_s_objects_and_its_decay():
    model = network()
    base = torch.optim.AdamW(model.parameters(), lr=0.01, weight_decay=0.5)
    optimizer = NaturalGradientOptimizer.wrap(base, kl_radius=None)
    assert optimizer.param_groups is base.param_groups
    assert optimizer.state is base.state
    assert optimizer.defaults is base.defaults
    assert optimizer.optimizer is base
    plain = network()
    other = NaturalGradientOptimizer.wrap(
        torch.optim.AdamW(plain.parameters(), lr=0.01, weight_decay=0.0), kl_radius=None
    )
    start = flat([*model.parameters()])
    train(model, optimizer, 1)
    train(plain, other, 1)
    difference = flat([*model.parameters()]) - flat([*plain.parameters()])
    torch.testing.assert_close(difference, -0.01 * 0.5 * start)
    assert not base.state


# -- ways to step --------------------------------------------------------------------------------


def test_a_closure_is_called_once_and_observed():
    one, other, calls = network(), network(), []
    a = NaturalGradientOptimizer(one.parameters())
    b = NaturalGradientOptimizer(other.parameters())

    def closure():
        calls.append(1)
        a.zero_grad()
        loss = F.cross_entropy(one(X), Y)
        loss.backward()
        return loss

    values = [a.step(closure).item() for _ in range(12)]
    assert values == train(other, b, 12)
    assert len(calls) == 12
    assert torch.equal(flat([*one.parameters()]), flat([*other.parameters()]))


def test_a_nested_observation_does_nothing_more():
    one, other = network(), network()
    a = NaturalGradientOptimizer(one.parameters())
    train(other, NaturalGradientOptimizer(other.parameters()), 3)
    for _ in range(3):
        a.zero_grad()
        with a.observe(), a.observe():
            loss = F.cross_entropy(one(X), Y)
            loss.backward()
        a.step()
    assert torch.equal(flat([*one.parameters()]), flat([*other.parameters()]))


def test_steps_inside_one_long_observation_are_observed_one_by_one():
    one, other = network(), network()
    a = NaturalGradientOptimizer(one.parameters())
    losses = train(other, NaturalGradientOptimizer(other.parameters()), 4)
    seen = []
    with a.observe():
        for _ in range(4):
            a.zero_grad()
            loss = F.cross_entropy(one(X), Y)
            loss.backward()
            a.step()
            seen.append(loss.item())
            assert a.report.kl is not None
    assert seen == losses


def test_forgotten_observations_leave_no_trace():
    one, other = network(), network()
    a = NaturalGradientOptimizer(one.parameters(), structure="diagonal", fisher="propagated")
    b = NaturalGradientOptimizer(other.parameters(), structure="diagonal", fisher="propagated")
    train(one, a, 2)
    train(other, b, 2)
    state = a._engine.watch.generator_state()
    with a.observe():
        loss = F.cross_entropy(one(3 * X), Y)
    loss.backward()
    a.forget_observations()
    a._engine.watch._generator.set_state(state)
    assert train(one, a, 3) == train(other, b, 3)


def test_unobserved_steps_between_statistics_are_made_with_the_last_ones():
    model = network()
    optimizer = NaturalGradientOptimizer(model.parameters(), measure_every=100)
    train(model, optimizer, 11)
    optimizer.zero_grad()
    F.cross_entropy(model(X), Y).backward()
    before = flat([*model.parameters()])
    optimizer.step()
    assert not torch.equal(flat([*model.parameters()]), before)
    assert optimizer.report.kl is None


def test_a_model_seen_through_compile_is_observed():
    model = network()
    compiled = torch.compile(model, backend="eager")
    optimizer = NaturalGradientOptimizer(model.parameters())
    losses = train(compiled, optimizer, 3)
    assert losses[-1] < losses[0]
    assert optimizer.coverage().totals() == "kronecker: 51 numbers in 4 tensors"
    assert optimizer.report.kl is not None


# -- what goes wrong -----------------------------------------------------------------------------


def test_a_step_before_any_observation_says_how_to_observe():
    model = network()
    optimizer = NaturalGradientOptimizer(model.parameters())
    F.cross_entropy(model(X), Y).backward()
    with pytest.raises(StepOrderError, match=r"with optimizer.observe\(\)"):
        optimizer.step()


def test_an_objective_that_cannot_be_seen_says_which_can():
    class Hidden(torch.autograd.Function):
        @staticmethod
        def forward(ctx, z):
            ctx.save_for_backward(z)
            return z.square().sum()

        @staticmethod
        def backward(ctx, gradient):
            return 2 * gradient * ctx.saved_tensors[0]

    model = network()
    optimizer = NaturalGradientOptimizer(model.parameters())
    with pytest.raises(StepOrderError, match=r"custom autograd\.Function") as refusal:
        train(model, optimizer, 1, loss=lambda z, y: Hidden.apply(z))
    assert "cross_entropy, nll_loss, binary_cross_entropy" in str(refusal.value)


def test_where_none_of_the_first_batches_is_finite_it_says_so():
    model = network()
    optimizer = NaturalGradientOptimizer(model.parameters())
    train(model, optimizer, 10, x=X * math.nan)  # any batch may be bad
    assert (optimizer.report.skipped, optimizer.report.dropped_statistics) == (1, 1)
    with pytest.raises(StepOrderError, match="not finite"):
        train(model, optimizer, 1, x=X * math.nan)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("structure", ["auto", "diagonal"])
def test_a_batch_that_is_not_finite_is_skipped_and_training_goes_on(structure, bad):
    model = network()
    optimizer = NaturalGradientOptimizer(model.parameters(), structure=structure)
    train(model, optimizer, 5)
    before, spoiled = flat([*model.parameters()]), X.clone()
    spoiled[3, 1] = bad
    if bad == math.inf:  # a prediction that is infinite, not only an input
        spoiled[:, :] = bad
    train(model, optimizer, 1, x=spoiled)
    assert optimizer.report.skipped == 1
    assert optimizer.report.dropped_statistics >= 1
    assert optimizer.report.kl_predicted == 0
    assert torch.equal(flat([*model.parameters()]), before)
    losses = train(model, optimizer, 15)
    assert losses[-1] < losses[0]
    assert optimizer.report.skipped == 0


def train_beside(model, extra, optimizer, steps):
    for _ in range(steps):
        with optimizer.observe():
            loss = 2 * F.cross_entropy(model(X), Y)
        optimizer.zero_grad()
        (loss + (extra**2).sum()).backward()
        optimizer.step()


def test_what_is_added_outside_the_observed_region_gets_the_empirical_fisher_and_says_so():
    model, extra = network(), nn.Parameter(torch.ones(3).double())
    optimizer = NaturalGradientOptimizer([*model.parameters(), extra])
    train_beside(model, extra, optimizer, 1)
    block = optimizer._engine.fisher.block(extra)
    # 24 terms that weigh 2/24 each: the squared gradient over the sum of squared weights.
    torch.testing.assert_close(block.average("F")[0], extra.grad**2 / (24 * (2 / 24) ** 2))
    before = extra.square().sum().item()
    train_beside(model, extra, optimizer, 20)
    assert extra.square().sum() < before
    row = optimizer.coverage().rows[-1]
    assert (row.block, row.reason) == ("empirical diagonal", "reached by no recognised loss")


def test_the_coverage_names_every_parameter_and_counts_a_shared_block_once():
    model = network()
    optimizer = NaturalGradientOptimizer(
        [{"params": [*model.parameters()], "param_names": [n for n, _ in model.named_parameters()]}]
    )
    train(model, optimizer, 1)
    rows = optimizer.coverage().rows
    assert [row.parameter for row in rows] == ["0.weight", "0.bias", "2.weight", "2.bias"]
    assert [row.numel for row in rows] == [3 * (25 + 36) + 3, 0, 3 * (49 + 9) + 3, 0]
    assert rows[1].reason == "bias of linear, an input of value 1"
    names = {id(model[0].weight): "first"}
    assert optimizer.coverage(names).rows[0].parameter == "first"
    text = str(optimizer.coverage())
    assert len(text.splitlines()) == 5
    identity = NaturalGradientOptimizer(model.parameters(), structure="identity")
    assert {row.block for row in identity.coverage().rows} == {"identity"}


def test_a_report_is_consistent():
    model = network()
    optimizer = NaturalGradientOptimizer(model.parameters(), damping=lambda step: 1 / (1 + step))
    for step in range(12):
        start = flat([*model.parameters()])
        train(model, optimizer, 1)
        report = optimizer.report
        g = flat([p.grad for p in model.parameters()])
        assert report.step == step
        assert report.damping == 1 / (1 + step)
        assert report.grad_norm == pytest.approx(float(g.norm()))
        assert -1 <= report.cosine <= 1
        assert 0 < report.overhead <= 1
        moved = float((flat([*model.parameters()]) - start).norm())
        assert moved == pytest.approx(report.step_scale * report.natural_grad_norm)
        assert report.condition_number < report.condition_number_undamped


# -- saving --------------------------------------------------------------------------------------


def saved(state):
    """Through a file, as plain tensors and numbers."""
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def with_dropout():
    return nn.Sequential(
        network()[0], nn.Dropout(0.3), nn.Tanh(), network()[2], nn.LayerNorm(3).double()
    )


@pytest.mark.parametrize("split", [6, 13])
@pytest.mark.parametrize("wrapped", [False, True])
@pytest.mark.parametrize("structure", ["auto", "eigen", "diagonal", "identity"])
def test_a_run_that_is_interrupted_and_resumed_is_the_same_run(structure, wrapped, split):
    def fresh():
        model = with_dropout()
        options = {"structure": structure, "statistics_every": 3, "refresh_every": 4}
        options |= {"fisher": "sampled"}
        if wrapped:
            base = torch.optim.SGD(model.parameters(), lr=0.1, weight_decay=0.01)
            optimizer = NaturalGradientOptimizer.wrap(base, **options)
        else:
            base = optimizer = NaturalGradientOptimizer(
                model.parameters(), weight_decay=0.01, **options
            )
        return model, optimizer, lr_scheduler.CosineAnnealingLR(base, 40)

    torch.manual_seed(0)
    model, optimizer, scheduler = fresh()
    train(model, optimizer, split, scheduler)
    random = torch.get_rng_state()
    states = [saved(o.state_dict()) for o in (model, optimizer, scheduler)]
    straight = train(model, optimizer, 12, scheduler)

    resumed, other, other_scheduler = fresh()
    for o, state in zip((resumed, other, other_scheduler), states, strict=True):
        o.load_state_dict(state)
    torch.set_rng_state(random)
    assert train(resumed, other, 12, other_scheduler) == straight
    assert torch.equal(flat([*resumed.parameters()]), flat([*model.parameters()]))
    times = ("seconds", "overhead")
    one, two = (
        {k: v for k, v in vars(o.report).items() if k not in times} for o in (optimizer, other)
    )
    assert one == two


def test_a_resumed_empirical_block_is_still_one():
    def fresh():
        model, extra = network(), nn.Parameter(torch.ones(3).double())
        return model, extra, NaturalGradientOptimizer([*model.parameters(), extra])

    def loss(extra):
        return lambda z, y: F.cross_entropy(z, y) + (extra - 3).abs().sum()

    model, extra, optimizer = fresh()
    train(model, optimizer, 4, loss=loss(extra))
    other, other_extra, second = fresh()
    other.load_state_dict(model.state_dict())
    with torch.no_grad():
        other_extra.copy_(extra)
    second.load_state_dict(saved(optimizer.state_dict()))
    assert train(other, second, 8, loss=loss(other_extra)) == train(
        model, optimizer, 8, loss=loss(extra)
    )
    assert second.coverage().rows == optimizer.coverage().rows


def test_a_plain_optimizer_s_state_is_taken_over_and_f_starts_anew():
    model = network()
    sgd = torch.optim.SGD(model.parameters(), lr=0.123, momentum=0.9)
    F.cross_entropy(model(X), Y).backward()
    sgd.step()
    optimizer = NaturalGradientOptimizer.wrap(
        torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    )
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        optimizer.load_state_dict(saved(sgd.state_dict()))
    assert optimizer.param_groups[0]["lr"] == 0.123
    losses = train(model, optimizer, 10)
    assert losses[-1] < losses[0]


def test_a_plain_optimizer_loads_our_state():
    model = network()
    optimizer = NaturalGradientOptimizer.wrap(torch.optim.SGD(model.parameters(), lr=0.5))
    train(model, optimizer, 3)
    sgd = torch.optim.SGD(model.parameters(), lr=0.1)
    sgd.load_state_dict(saved(optimizer.state_dict()))
    assert sgd.param_groups[0]["lr"] == 0.5


def test_a_state_of_another_model_warns_and_all_starts_anew():
    model = network()
    optimizer = NaturalGradientOptimizer(model.parameters())
    train(model, optimizer, 3)
    wider = double(nn.Sequential(nn.Linear(4, 7), nn.Tanh(), nn.Linear(7, 5)))
    other = NaturalGradientOptimizer(wider.parameters())
    with pytest.warns(UserWarning, match=r"start anew for: no. 0, \(7, 4\)"):
        other.load_state_dict(saved(optimizer.state_dict()))
    losses = train(wider, other, 10)
    assert losses[-1] < losses[0]
    assert other.report.step == 9


def test_an_empty_parameter_list_is_refused():
    with pytest.raises((ValueError, OptionError), match="empty"):
        NaturalGradientOptimizer([])


def test_vectors_taken_apart_are_put_together_again():
    like = [randn(2, 3), randn(4)]
    assert all(torch.equal(a, b) for a, b in zip(unflat(flat(like), like), like, strict=True))


def variational_autoencoder():
    encoder, decoder = nn.Linear(20, 16), nn.Linear(8, 20)
    x = (torch.rand(64, 20) > 0.5).float()

    def objective():
        mean, log_variance = encoder(x).chunk(2, -1)
        z = mean + torch.randn_like(mean) * (log_variance / 2).exp()
        prior = 0.5 * (mean.square() + log_variance.exp() - 1 - log_variance).sum()
        return (F.binary_cross_entropy_with_logits(decoder(z), x, reduction="sum") + prior) / 64

    return [*encoder.parameters(), *decoder.parameters()], objective


def test_a_variational_autoencoder_trains_with_its_prior_written_by_hand():
    torch.manual_seed(0)
    parameters, objective = variational_autoencoder()
    optimizer = NaturalGradientOptimizer(parameters)
    losses = []
    for _ in range(60):
        with optimizer.observe():
            loss = objective()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert max(losses) < 1.2 * losses[0]
    assert sum(losses[-10:]) < sum(losses[:10])
    assert optimizer.coverage().losses == (
        "the Gauss-Newton matrix of a loss of its own",
        "binary_cross_entropy_with_logits",
    )


def test_steps_that_keep_gaining_too_little_are_warned_of_once():
    check = ObjectiveCheck()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for ratio in [0.05] * 4 + [None, 0.5] + [0.05] * 4:
            check.see(ratio)
        assert not caught
        for _ in range(10):
            check.see(0.05)
    assert len(caught) == 1
    assert "quadratic model" in str(caught[0].message)


def test_a_step_without_gradients_in_a_watched_region_does_not_end_the_watching():
    model = network()
    optimizer = NaturalGradientOptimizer(model.parameters())
    with optimizer.observe():
        optimizer.step()  # nothing to do yet
        loss = F.cross_entropy(model(X), Y)
    loss.backward()
    optimizer.step()
    assert optimizer.report.step == 0
    assert optimizer.report.kl is not None


def test_a_step_made_to_have_a_state_made_leaves_no_trace():
    """`torch.distributed.checkpoint` makes one when it reads a state: zero gradients, rate 0."""
    from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict

    def run(asked_after):
        model = network()
        optimizer = NaturalGradientOptimizer(model.parameters())
        for step in range(8):
            if step in asked_after:
                optimizer.zero_grad()
                get_optimizer_state_dict(model, optimizer)
            train(model, optimizer, 1)
        return flat([*model.parameters()])

    assert torch.equal(run((0, 3, 7)), run(()))
