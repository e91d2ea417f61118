"""The eigen block against the dense Fisher matrix along its own eigenvectors."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from ngplugin.curvature.block_choice import BlockRule
from ngplugin.curvature.blocks import BlockDamping
from ngplugin.curvature.blocks import eigen as eigen_module
from ngplugin.curvature.blocks.eigen import squared_gradients
from ngplugin.curvature.factorization import Remedy
from tests.oracle import (
    FAMILIES,
    assert_mean_is,
    dense_average,
    dense_fisher,
    double,
    eigen_dense,
    flat,
    observe,
    randn,
    unflat,
)

EIGEN, KRONECKER = BlockRule("eigen"), BlockRule("kronecker")


def perceptron(outputs=1):
    return double(nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, outputs)))


def tokens():
    return double(nn.Sequential(perceptron(), nn.Flatten(), nn.Linear(4, 1)))


class Convolutional(nn.Module):
    """One output an example, of a convolution whose positions share the weight."""

    def __init__(self, groups=1):
        super().__init__()
        self.convolution = nn.Conv2d(2, 4, 2, groups=groups)
        self.head = nn.Linear(4, 1)

    def forward(self, x):
        return self.head(self.convolution(x).tanh().mean((2, 3)))


CASES = {
    "perceptron": (perceptron, (7, 3)),
    "tokens": (
        lambda: double(nn.Sequential(perceptron(), nn.Flatten(), nn.Linear(4, 1))),
        (7, 4, 3),
    ),
    "convolution": (lambda: double(Convolutional()), (7, 2, 3, 3)),
    "grouped convolution": (lambda: double(Convolutional(2)), (7, 2, 4, 3)),
}


def twice_observed(model, x, rule):
    """Blocks of a network with one output, where every draw of squared error is exact.

    The first statistic is for the eigenvectors, the second one takes its place.
    """
    parameters = [*model.parameters()]

    def objective():
        return 0.5 * F.mse_loss(model(x), torch.zeros_like(model(x)), reduction="sum")

    fisher, _ = observe(parameters, objective, rule=rule)
    fisher.refresh(BlockDamping(0.1))
    observe(parameters, objective, fisher=fisher)
    natural = model(x).reshape(-1)
    dense = dense_fisher(FAMILIES["gaussian"], natural, parameters, torch.ones(len(x)).double())
    return fisher, dense, parameters


def part(dense, parameters, block):
    """The block's own part of the dense matrix."""
    chosen = torch.cat(
        [torch.full((p.numel(),), any(p is q for q in block.parameters)) for p in parameters]
    )
    return dense[chosen][:, chosen]


@pytest.mark.parametrize("case", CASES)
def test_the_eigenvalues_are_the_fisher_s_along_the_eigenvectors(case):
    make, shape = CASES[case]
    fisher, dense, parameters = twice_observed(make(), randn(*shape, seed=1), EIGEN)
    assert {block.kind for block in fisher.blocks} == {"eigen"}
    for block in fisher.blocks:
        count = block.average("M").numel()
        exact = part(dense, parameters, block)
        for place in range(count):  # one eigenvector u after another: uᵀ F u
            one = torch.zeros(count).double()
            one[place] = 1
            projector = eigen_dense(block, one.reshape(block.average("M").shape))
            found = block.average("M").reshape(-1)[place]
            torch.testing.assert_close(found, (projector @ exact).trace())


@pytest.mark.parametrize("case", CASES)
def test_it_is_never_further_from_the_fisher_than_the_kronecker_block(case):
    make, shape = CASES[case]
    model, x = make(), randn(*shape, seed=1)
    eigen, dense, parameters = twice_observed(model, x, EIGEN)
    kronecker, _, _ = twice_observed(model, x, KRONECKER)
    nearer = []
    for ours, theirs in zip(eigen.blocks, kronecker.blocks, strict=True):
        exact = part(dense, parameters, ours)
        off, their_off = ((dense_average(b) - exact).norm() for b in (ours, theirs))
        assert off <= their_off + 1e-12 * exact.norm()
        nearer.append(bool(off < their_off - 1e-3 * exact.norm()))
    assert any(nearer)


@pytest.mark.parametrize("kind", ["sampled", "propagated"])
def test_sampled_eigenvalues_are_right_in_the_mean(kind):
    model, x = perceptron(3), randn(5, 3, seed=1)
    parameters, y = [*model.parameters()], torch.arange(5) % 3

    def objective():
        return F.cross_entropy(model(x), y, reduction="sum")

    dense = dense_fisher(FAMILIES["categorical"], model(x), parameters, torch.ones(5).double())
    fisher, _ = observe(parameters, objective, rule=EIGEN)
    fisher.refresh(BlockDamping(0.1))
    samples = []
    for seed in range(30):
        observe(parameters, objective, kind, 4, 100 + seed, fisher=fisher)
        samples.append([block.average("M").reshape(-1) for block in fisher.blocks])
    for block, found in zip(fisher.blocks, zip(*samples, strict=True), strict=True):
        U_A, U_G = block._bases()
        U = torch.kron(U_G[0].contiguous(), U_A[0].contiguous())
        exact = part(dense, parameters, block)
        numbers = unflat(torch.arange(len(exact)), block.parameters)
        places = block._layout.matrix(numbers, torch.int64).reshape(-1)
        along = (U.T @ exact[places[:, None], places] @ U).diagonal()
        assert_mean_is(torch.stack(found), along)


def test_before_the_second_statistic_it_is_the_kronecker_block():
    model, x = perceptron(3), randn(6, 3, seed=1)
    parameters, y = [*model.parameters()], torch.arange(6) % 3
    g = {id(p): randn(*p.shape, seed=i) for i, p in enumerate(parameters)}
    results = []
    for rule in (EIGEN, KRONECKER):
        fisher, _ = observe(parameters, lambda: F.cross_entropy(model(x), y), rule=rule)
        fisher.refresh(BlockDamping(0.1, sampling=1.0))
        results.append(fisher.precondition(g))
    for ours, theirs in zip(*results, strict=True):
        for key in g:
            torch.testing.assert_close(ours[key], theirs[key])


def test_a_new_basis_takes_the_matrix_over_as_its_diagonal_there():
    fisher, _, _ = twice_observed(perceptron(), randn(7, 3, seed=1), EIGEN)
    block = fisher.blocks[0]
    before = dense_average(block)
    block._averages["inputs"]._sum += torch.diag_embed(randn(1, 4, seed=5).abs())
    block.refresh(BlockDamping(0.1))
    U = torch.kron(*(U[0].contiguous() for U in block._bases()[::-1]))
    places = torch.cat([torch.arange(12).reshape(4, 3), torch.arange(12, 16)[:, None]], 1).flatten()
    along = U.T @ before[places[:, None], places] @ U
    assert (along - torch.diag(along.diagonal())).norm() > 1e-3 * along.norm()  # it did turn
    torch.testing.assert_close(block.average("M").reshape(-1), along.diagonal())


@pytest.mark.parametrize("shared", [1, 2, 40])
def test_squared_gradients_are_those_of_each_example_by_itself(shared, monkeypatch):
    a, g = randn(2, 5, shared, 3, seed=1), randn(2, 5, shared, 4, seed=2)
    U_A, U_G = torch.linalg.qr(randn(2, 3, 3))[0], torch.linalg.qr(randn(2, 4, 4))[0]
    for basis_A in (U_A, torch.ones(2, 3).double()):
        exact = torch.zeros(2, 4, 3).double()
        for group in range(2):
            right = basis_A[group] if basis_A.dim() == 3 else torch.eye(3).double()
            for n in range(5):
                S = g[group, n].T @ a[group, n]
                exact[group] += (U_G[group].T @ S @ right) ** 2
        torch.testing.assert_close(squared_gradients(a, g, basis_A, U_G), exact)
        monkeypatch.setattr(eigen_module, "_MOST_AT_ONCE", 50)
        torch.testing.assert_close(squared_gradients(a, g, basis_A, U_G), exact)


def test_a_saved_block_goes_on_as_it_was():
    model, x = double(Convolutional(2)), randn(7, 2, 3, 3, seed=1)
    fisher, _, parameters = twice_observed(model, x, EIGEN)
    other = type(fisher)(EIGEN)
    other.parameters = parameters
    other.load_state_dict(fisher.state_dict())
    g = {id(p): randn(*p.shape, seed=i) for i, p in enumerate(parameters)}
    for turn in range(3):
        results = []
        for each in (fisher, other):
            observe(parameters, lambda: F.mse_loss(model(x), randn(7, 1)), seed=turn, fisher=each)
            if turn == 1:
                each.refresh(BlockDamping(0.3))
            results.append(flat([*each.precondition(g)[0].values()]))
        assert torch.equal(*results)


def test_a_factorization_that_fails_keeps_the_old_basis(monkeypatch):
    fisher, _, _ = twice_observed(perceptron(), randn(7, 3, seed=1), EIGEN)
    before = [dense_average(block) for block in fisher.blocks]

    def fails(X):
        raise RuntimeError("linalg.eigh: failed to converge")

    monkeypatch.setattr(torch.linalg, "eigh", fails)
    assert fisher.refresh(BlockDamping(0.1)) == [Remedy.OLD_INVERSE] * 2
    assert all(
        torch.equal(dense_average(b), old) for b, old in zip(fisher.blocks, before, strict=True)
    )
