"""The whole block-diagonal matrix: refreshes, condition numbers, empirical parts, saving."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from ngplugin.curvature.blocks import BlockDamping, DiagonalBlock
from ngplugin.curvature.factorization import Remedy
from ngplugin.curvature.fisher import Fisher, refresh_due, turns
from tests.oracle import dense_average, dense_damped, double, flat, observe, randn

F = torch.nn.functional


def convolutional():
    return double(
        nn.Sequential(
            nn.Conv2d(2, 4, 2, groups=2),
            nn.Tanh(),
            nn.GroupNorm(2, 4),
            nn.Flatten(),
            nn.Linear(16, 3),
        )
    )


def observed(model=None, diagonal=False):
    model = model or convolutional()
    x, y = randn(30, 2, 3, 3, seed=1), torch.arange(30) % 3
    parameters = [*model.parameters()]
    fisher, _ = observe(parameters, lambda: F.cross_entropy(model(x), y), diagonal=diagonal)
    return fisher, parameters


def test_refreshes_come_at_steps_0_1_2_4_8_and_then_every_so_often():
    due = [step for step in range(90) if refresh_due(step, 20)]
    assert due == [0, 1, 2, 4, 8, 16, 20, 40, 60, 80]
    assert all(refresh_due(step, 1) for step in range(50))


@given(st.integers(0, 10_000), st.integers(1, 500))
def test_no_inverse_gets_older_than_asked_for(start, every):
    assert any(refresh_due(step, every) for step in range(start, start + every))


@given(st.lists(st.integers(1, 1000), max_size=30), st.integers(1, 30), st.integers(1, 30))
def test_each_block_has_a_turn_and_no_step_much_more_to_do_than_it_must(works, every, busy):
    found = turns(works, every, busy)
    assert len(found) == len(works)
    assert all(0 <= turn < every for turn in found)
    free = [step for step in range(every) if step % busy > 1] or [*range(every)]
    assert set(found) <= set(free)
    loads = [sum(w for w, t in zip(works, found, strict=True) if t == turn) for turn in free]
    assert max(loads) <= sum(works) / len(free) + max(works, default=0) + 1e-9


def test_after_the_first_steps_blocks_are_inverted_in_turn():
    fisher, _ = observed()
    assert [step for step in range(20) if fisher.due(step, 20, 5) is None] == [0, 1, 2, 4, 8, 16]
    assert all(fisher.due(step, 20, 5) == [] for step in (3, 5, 6, 7, 9, 17, 19))
    for start in (20, 60):
        due = [fisher.due(step, 20, 5) for step in range(start, start + 20)]
        assert sorted(id(b) for blocks in due for b in blocks) == sorted(map(id, fisher.blocks))
        assert max(map(len, due)) == 1
        assert not due[0]
        assert not due[1]


def test_only_those_whose_turn_it_is_are_inverted_and_new_ones():
    fisher, _ = observed()
    first, *others = fisher.blocks
    fisher.refresh(BlockDamping(0.1), [first])  # none has an inverse yet
    before = {block: block._refreshed for block in fisher.blocks}
    fisher.refresh(BlockDamping(0.1), [first])
    assert first._refreshed is not before[first]
    assert all(block._refreshed is before[block] for block in others)


# -- curvature along a direction ------------------------------------------------------------------


def test_the_curvature_of_a_direction_is_its_product_with_f_or_what_that_was_before():
    fisher, parameters = observed()
    fisher.refresh(BlockDamping(0.3))
    one, two = (
        {id(p): randn(*p.shape, seed=k + i) for i, p in enumerate(parameters)} for k in (0, 50)
    )

    def curvatures(vectors, curved):
        natural, products = fisher.precondition(vectors, curved)
        found = fisher.curvature(vectors, natural, products)
        assert [f.block for f in found] == fisher.blocks
        return natural, products, torch.stack([f.value for f in found])

    natural, products, first = curvatures(one, False)  # none is known yet, so all are formed
    assert products.keys() == natural.keys()
    for block, value in zip(fisher.blocks, first, strict=True):
        d, Fd = (flat([part[id(p)] for p in block.parameters]) for part in (natural, products))
        torch.testing.assert_close(value, d @ Fd)
    twice = {key: 2 * part for key, part in one.items()}
    _, products, known = curvatures(twice, False)
    assert products == {}
    torch.testing.assert_close(known, 4 * first)
    _, _, guessed = curvatures(two, False)
    _, _, exact = curvatures(two, True)
    assert (guessed / exact).log().abs().max() < math.log(3)
    assert not torch.allclose(guessed, exact)


def test_the_curvature_grows_with_the_average_and_is_looked_at_anew_after_an_inversion():
    fisher, parameters = observed()
    fisher.refresh(BlockDamping(0.3))
    v = {id(p): randn(*p.shape, seed=i) for i, p in enumerate(parameters)}
    block = fisher.block(parameters[0])
    for curved in (True, False):
        natural, products = fisher.precondition(v, curved)
        value = fisher.curvature(v, natural, products)[0].value
        if curved:
            before = value
            block._growth = torch.full((1, 1, 1), 3.0).double()
    torch.testing.assert_close(value, 3 * before)
    assert block.knows_curvature
    block.refresh(BlockDamping(0.3))
    assert not block.knows_curvature


def test_a_block_of_which_nothing_is_known_counts_all_of_its_gradient_as_curvature():
    block = DiagonalBlock(torch.nn.Parameter(torch.ones(2)))
    assert float(block.curvature(torch.tensor(7.0))) == 7.0
    block.see_curvature(torch.tensor(0.0), torch.tensor(0.0))  # of a gradient of zero
    assert float(block.curvature(torch.tensor(7.0))) == 7.0


def test_eigenvalues_that_cannot_be_had_end_no_run(monkeypatch):
    fisher, _ = observed()
    fisher.refresh(BlockDamping(0.3))
    tried = []

    def fails(matrix):
        tried.append(matrix.dtype)
        raise torch.linalg.LinAlgError("failed to converge")

    exact = fisher.condition(fisher.spectra())
    monkeypatch.setattr(torch.linalg, "eigvalsh", fails)
    found = fisher.condition(fisher.spectra())
    assert tried
    assert exact.damped > 1
    assert math.isnan(found.damped)


@pytest.mark.parametrize("diagonal", [False, True])
@pytest.mark.parametrize(
    "damping",
    [
        BlockDamping(0.1),
        BlockDamping(0.1, sampling=1.0),
        BlockDamping(0.01, "absolute"),
    ],
    ids=str,
)
def test_condition_numbers_are_the_dense_matrices(damping, diagonal):
    fisher, _ = observed(diagonal=diagonal)
    assert fisher.condition(fisher.spectra()) is None
    fisher.refresh(damping)
    eigenvalues, damped = [], []
    for block in fisher.blocks:
        dense = dense_damped(block, damping.value, damping.mode, damping.sampling)
        eigenvalues.append(torch.linalg.eigvalsh(dense_average(block)).clamp_min(0))
        damped.append(torch.linalg.eigvalsh(dense))
    eigenvalues, damped = torch.cat(eigenvalues), torch.cat(damped)
    found = fisher.condition(fisher.spectra())
    assert found.damped == pytest.approx(float(damped.max() / damped.min()), rel=1e-3)
    smallest = eigenvalues.min().clamp_min(torch.finfo(torch.float64).eps * eigenvalues.max())
    assert found.undamped == pytest.approx(float(eigenvalues.max() / smallest), rel=1e-3)


def test_a_matrix_of_known_condition_shows_it():
    scale = nn.Parameter(torch.tensor([1.0, 10.0, 100.0]).double())
    fisher, _ = observe([scale], lambda: 0.5 * F.mse_loss(scale**2 / 2, torch.zeros(3).double()))
    fisher.refresh(BlockDamping(0.0))
    assert fisher.condition(fisher.spectra()).undamped == pytest.approx(1e4)
    assert fisher.condition(fisher.spectra()).damped == pytest.approx(1e4)


def test_preconditioning_is_block_by_block_and_leaves_out_what_has_no_block():
    fisher, parameters = observed()
    fisher.refresh(BlockDamping(0.1))
    g = {id(p): randn(*p.shape, seed=i) for i, p in enumerate(parameters)}
    stranger = nn.Parameter(randn(3))
    direction, product = fisher.precondition({**g, id(stranger): randn(3)})
    assert set(direction) == set(product) == set(g)
    for block in fisher.blocks:
        exact = torch.linalg.solve(
            dense_damped(block, 0.1), flat([g[id(p)] for p in block.parameters])
        )
        torch.testing.assert_close(flat([direction[id(p)] for p in block.parameters]), exact)
        torch.testing.assert_close(
            flat([product[id(p)] for p in block.parameters]), dense_average(block) @ exact
        )


def test_a_missing_part_of_a_block_counts_as_zero():
    layer = double(nn.Linear(3, 2))
    x, y = randn(8, 3, seed=1), randn(8, 2, seed=2)
    fisher, _ = observe([*layer.parameters()], lambda: F.mse_loss(layer(x), y))
    fisher.refresh(BlockDamping(0.1))
    g = randn(2, 3)
    direction, _ = fisher.precondition({id(layer.weight): g})
    full, _ = fisher.precondition({id(layer.weight): g, id(layer.bias): torch.zeros(2).double()})
    assert set(direction) == {id(layer.weight)}
    assert torch.equal(direction[id(layer.weight)], full[id(layer.weight)])


def test_a_new_block_is_inverted_at_once_and_the_others_left_alone():
    fisher, _ = observed()
    fisher.refresh(BlockDamping(0.1))
    before = [id(block._refreshed) for block in fisher.blocks]
    late = nn.Parameter(randn(3))
    observe([late], lambda: F.mse_loss(late * 1, torch.zeros(3).double()), fisher=fisher)
    assert fisher.refresh(BlockDamping(9.9), []) == [Remedy.NONE]
    assert fisher.block(late).inverted
    assert [id(block._refreshed) for block in fisher.blocks][:-1] == before


def test_the_floor_follows_the_largest_block():
    big, dead = nn.Parameter(randn(3)), nn.Parameter(randn(3))
    fisher, _ = observe(
        [big, dead], lambda: F.mse_loss(big + 1e-30 * dead, torch.zeros(3).double())
    )
    fisher.refresh(BlockDamping(0.5))
    g = {id(big): torch.ones(3).double(), id(dead): 1e-16 * torch.ones(3).double()}
    direction, _ = fisher.precondition(g)
    assert direction[id(dead)].abs().max() < 1e15  # not 1e-16 / 1e-60


def test_gradients_of_an_unrecognised_loss_become_an_empirical_block():
    p = nn.Parameter(randn(3))
    p.grad = randn(3, seed=1)
    fisher = Fisher()
    fisher.parameters = [p]
    fisher.fold_empirical([p], 4.0, 0.9)
    block = fisher.block(p)
    assert block.kind == "empirical diagonal"
    assert fisher.reason(p) == "reached by no recognised loss"
    torch.testing.assert_close(block.average("F")[0], p.grad**2 / 4)


def test_an_empirical_block_never_takes_the_place_of_one_that_scores_reach():
    fisher, parameters = observed()
    kinds = [block.kind for block in fisher.blocks]
    for p in parameters:
        p.grad = torch.ones_like(p)
    fisher.fold_empirical(parameters, 1.0, 0.9)
    assert [block.kind for block in fisher.blocks] == kinds


def test_a_saved_matrix_gives_the_same_directions():
    fisher, parameters = observed()
    fisher.refresh(BlockDamping(0.1))
    other = Fisher()
    other.parameters = parameters
    other.load_state_dict(fisher.state_dict())
    g = {id(p): randn(*p.shape, seed=i) for i, p in enumerate(parameters)}
    for ours, theirs in zip(fisher.precondition(g), other.precondition(g), strict=True):
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[key], theirs[key]) for key in ours)
    assert [other.reason(p) for p in parameters] == [fisher.reason(p) for p in parameters]
