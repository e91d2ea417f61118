"""How often curvature is due: what is counted, what follows from it, and that runs keep to it."""

import copy
import dataclasses
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from ngplugin import NaturalGradientOptimizer
from ngplugin.curvature import pace
from ngplugin.curvature.blocks import BlockDamping, EigenBlock, GradientKroneckerBlock
from ngplugin.curvature.blocks import kronecker_product as product
from ngplugin.curvature.pace import _CALLS, _MOST, Pace, Work
from tests.oracle import randn

F = torch.nn.functional
HOW = BlockDamping(0.1)

counts = st.floats(0, 1e15)
works = st.builds(Work, st.floats(1, 1e15), counts, counts, st.integers(1, 100))
paces = st.builds(Pace, st.integers(1, 50), st.integers(1, 200))


@given(paces, works, st.floats(1e-6, 1e9))
def test_it_is_the_shortest_that_stays_within_the_share(asked, work, share):
    found = asked.within(work, share)
    room = share * (work.passing + _CALLS * work.maps)
    for every, fewest, takes in (
        (found.statistics_every, asked.statistics_every, work.statistics),
        (found.refresh_every, asked.refresh_every, work.inversion),
    ):
        assert fewest <= every <= _MOST * fewest
        if every < _MOST * fewest:
            assert takes / every <= room * (1 + 1e-9)
        if every > fewest:
            assert takes / (every - 1) >= room * (1 - 1e-9)


@given(paces, works, st.floats(1e-6, 1.0), st.floats(1.0, 1e6))
def test_more_room_never_makes_it_rarer(asked, work, share, more):
    near, far = asked.within(work, share), asked.within(work, share * more)
    assert far.statistics_every <= near.statistics_every
    assert far.refresh_every <= near.refresh_every


@given(paces, works)
def test_without_room_it_is_as_rare_as_it_gets(asked, work):
    work = dataclasses.replace(work, statistics=work.statistics + 1, inversion=work.inversion + 1)
    rarest = Pace(_MOST * asked.statistics_every, _MOST * asked.refresh_every)
    assert asked.within(work, 0.0) == rarest
    assert asked.within(work, math.inf) == asked


def test_where_no_map_is_known_it_is_as_asked_for():
    assert Pace(5, 20).within(Work(statistics=1e12, inversion=1e12, maps=3), 0.1) == Pace(5, 20)


# -- what is counted ------------------------------------------------------------------------------


class Rows(nn.Module):
    """Layers with a parameter before them, so that gradients and scores go all the way back."""

    def __init__(self, *modules):
        super().__init__()
        self.layers = nn.Sequential(*modules)
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, x):
        return self.layers(self.scale * x)


CASES = {
    "linear": (lambda: Rows(nn.Linear(30, 20, bias=False)), (16, 30)),
    "rows of tokens": (lambda: Rows(nn.Linear(30, 20, bias=False)), (64, 50, 30)),
    "convolution": (lambda: Rows(nn.Conv2d(4, 6, 3, bias=False)), (20, 4, 12, 12)),
}


def flops(run):
    with FlopCounterMode(display=False) as counter:
        run()
    return counter.get_total_flops()


def observed(model, x, **options):
    options = {"structure": "kronecker", "measure_every": None, **options}
    optimizer = NaturalGradientOptimizer(model.parameters(), **options)

    def passes():
        out = model(x)
        loss = F.mse_loss(out, torch.zeros_like(out))
        optimizer.zero_grad()
        loss.backward()

    def all_of_it():
        with optimizer.observe():
            passes()

    return optimizer, passes, all_of_it


def of_weight(optimizer, model):
    return optimizer._engine.fisher.block(model.layers[0].weight)


@pytest.mark.parametrize("name", CASES)
def test_passes_and_statistics_are_those_that_torch_counts(name):
    make, shape = CASES[name]
    model, x = make(), randn(*shape).float()
    optimizer, passes, all_of_it = observed(model, x)
    of_passes, of_all = flops(passes), flops(all_of_it)
    optimizer.step()
    block = of_weight(optimizer, model)
    work = block.work(HOW)
    assert 2 * work.passing == of_passes
    layout = block._layout
    averaged = product._AVERAGED * layout.groups * (layout.inputs**2 + layout.outputs**2)
    assert 2 * (work.statistics - averaged) == of_all - of_passes


def test_groups_are_each_a_map_of_its_own():
    # By hand: torch's counter takes the weight's gradient for one of a whole convolution.
    model, x = Rows(nn.Conv2d(4, 6, 3, groups=2, bias=False)), randn(20, 4, 12, 12).float()
    optimizer, _, all_of_it = observed(model, x)
    all_of_it()
    optimizer.step()
    work = of_weight(optimizer, model).work(HOW)
    rows, inputs, outputs = 20 * 100, 2 * 9, 3
    assert work.passing == 3 * rows * 2 * inputs * outputs
    taken = 10 * 100  # of every second example
    moments = 2 * (inputs**2 + outputs**2) * (taken + 32)
    assert work.statistics == work.passing / 3 + moments
    assert work.inversion == 2 * (inputs**3 + outputs**3)


def test_a_lookup_multiplies_nothing_and_an_output_layer_does():
    table = nn.Embedding(50, 8)
    tokens = torch.arange(40).reshape(4, 10)
    for tied in (False, True):
        optimizer = NaturalGradientOptimizer(table.parameters(), measure_every=None)
        with optimizer.observe():
            out = table(tokens)
            out = F.linear(out, table.weight) if tied else out
            out.square().mean().backward()
        optimizer.step()
        (block,) = optimizer._engine.fisher.blocks
        assert block.work(HOW).passing == (3 * 1024 * 400 if tied else 0)


def test_factors_that_are_kept_as_diagonals_take_nothing():
    model = Rows(nn.Linear(30, 20, bias=False))
    optimizer, _, all_of_it = observed(model, randn(16, 30).float(), max_factor=1)
    all_of_it()
    optimizer.step()
    work = of_weight(optimizer, model).work(HOW)
    assert work.statistics == work.passing / 3
    assert work.inversion == 0


def test_an_inversion_is_a_cube_or_a_sweep_or_six_cubes():
    block = GradientKroneckerBlock(torch.zeros(200, 150))
    block.add_gradient_scores([torch.randn(200, 150)], 1.0)
    block.fold(1.0, 0.5)
    assert block.work(HOW).inversion == 200**3 + 150**3
    assert block.work(HOW).statistics == pytest.approx(
        1024 * 200 * 150 + 150**2 * (200 + 32) + 200**2 * (150 + 32)
    )
    # No room for more than 32, and 64 would be as much work as 128.
    sweep = sum(2 * 32 * d**2 + 4 * d * 32**2 for d in (200, 150))
    assert block.work(dataclasses.replace(HOW, share=0.0)).inversion == sweep

    model = Rows(nn.Linear(30, 20, bias=False))
    optimizer, _, all_of_it = observed(model, randn(16, 30).float(), structure="eigen")
    all_of_it()
    optimizer.step()
    eigen = of_weight(optimizer, model)
    assert isinstance(eigen, EigenBlock)
    assert eigen.work(HOW).inversion == 6 * (30**3 + 20**3)


# -- keeping to it ---------------------------------------------------------------------------------


def wide():
    """For a batch of eight examples: curvature is more than the passes."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(100, 300), nn.Tanh(), nn.Linear(300, 4))


@pytest.fixture
def counted(monkeypatch):
    """Without what calls take, multiplications decide in a network as small as this."""
    monkeypatch.setattr(pace, "_CALLS", 0)


def trained(steps, state=None, **options):
    """The steps with statistics, and what there is to go on with."""
    model = wide()
    optimizer = NaturalGradientOptimizer(model.parameters(), **options)
    start, seen = 0, []
    if state is not None:
        start = state[0]
        model.load_state_dict(state[1])
        optimizer.load_state_dict(copy.deepcopy(state[2]))
    for i in range(start, steps):
        x = randn(8, 100, seed=i).float()
        if optimizer._engine._needs().statistics:
            seen.append(i)
        with optimizer.observe():
            loss = F.cross_entropy(model(x), (x[:, 0] > 0).long())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return optimizer, seen, (steps, model.state_dict(), optimizer.state_dict())


@pytest.mark.usefixtures("counted")
def test_a_budget_makes_statistics_and_inversions_rarer():
    asked = Pace(3, 6)
    options = {"statistics_every": 3, "refresh_every": 6, "measure_every": None}
    generous, seen, _ = trained(22, overhead=1e9, **options)
    assert generous.pace == asked
    assert seen == [0, 1, 2, 3, 4, 6, 9, 12, 15, 18, 21]
    tight, seen, _ = trained(22, overhead=0.6, **options)
    every = tight.pace.statistics_every
    assert asked.statistics_every < every
    assert asked.refresh_every < tight.pace.refresh_every
    assert seen == [0, 1, 2, 3, 4, *range(every * math.ceil(5 / every), 22, every)]
    rows = tight.coverage()
    assert (rows.statistics_every, rows.refresh_every) == dataclasses.astuple(tight.pace)
    assert f"Statistics every {every} steps" in rows.pace()


@pytest.mark.usefixtures("counted")
def test_a_resumed_run_keeps_to_it_and_a_new_budget_counts():
    whole, seen, _ = trained(20, statistics_every=3)
    _, first, state = trained(8, statistics_every=3)
    resumed, rest, _ = trained(20, state, statistics_every=3)
    assert first + rest == seen
    assert resumed.pace == whole.pace != Pace(3, 20)
    changed, _, _ = trained(9, state, statistics_every=3, overhead=1e9)
    assert changed.pace == Pace(3, 20)
