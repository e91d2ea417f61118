"""Conjugate gradients against a dense solve."""

import itertools

import pytest
import torch

from ngplugin.curvature.conjugate_gradients import conjugate_gradients
from ngplugin.curvature.parameter_vector import combined, inner
from tests.oracle import flat, randn, unflat

LIKE = [torch.zeros(3, 2).double(), torch.zeros(4).double()]
N = 10
IDENTITY = torch.eye(N).double()


def parts(vector):
    return dict(enumerate(unflat(vector, LIKE)))


def by(matrix):
    return lambda v: parts(matrix @ flat([*v.values()]))


def problem(seed, rank=N, damping=0.1):
    R = randn(N, rank, seed=seed)
    return R @ R.T + damping * IDENTITY, randn(N, seed=seed + 100)


def phi(A, b, x):
    x = flat([*x.values()])
    return float(0.5 * x @ A @ x - b @ x)


@pytest.mark.parametrize("rank", [2, N])
@pytest.mark.parametrize("started", [False, True])
def test_the_solution_is_the_dense_one(rank, started):
    A, b = problem(1, rank)
    M = torch.diag(1 / A.diagonal())
    start = parts(randn(N, seed=7)) if started else None
    found = conjugate_gradients(by(A), parts(b), by(M), 60, 1e-12, start)
    exact = parts(torch.linalg.solve(A, b))
    for key, part in exact.items():
        torch.testing.assert_close(found.x[key], part, rtol=1e-8, atol=1e-10)
        torch.testing.assert_close(found.product[key], parts(b)[key], rtol=1e-8, atol=1e-10)
    assert found.error <= 1e-12


def test_the_exact_preconditioner_needs_one_iteration():
    A, b = problem(2)
    found = conjugate_gradients(by(A), parts(b), by(torch.linalg.inv(A)), 60, 1e-8)
    assert found.iterations == 1


@pytest.mark.parametrize("started", [False, True])
def test_the_quadratic_falls_with_every_iteration_and_begins_at_no_more_than_zero(started):
    A, b = problem(3, damping=1e-3)
    start = parts(randn(N, seed=7)) if started else None
    values = [
        phi(A, b, conjugate_gradients(by(A), parts(b), by(IDENTITY), k, 0.0, start).x)
        for k in range(N)
    ]
    assert values[0] <= 0
    assert (values[0] < 0) == started
    assert all(later < earlier for earlier, later in itertools.pairwise(values))


def test_the_start_counts_by_its_direction_alone():
    A, b = problem(4)
    x = parts(torch.linalg.solve(A, b))
    found = conjugate_gradients(by(A), parts(b), by(IDENTITY), 60, 1e-8, combined(x, 6.0, x))
    assert found.iterations == 0
    for key, part in x.items():
        torch.testing.assert_close(found.x[key], part)


def test_a_direction_without_curvature_ends_the_search():
    A, b = problem(5, rank=2, damping=0.0)
    found = conjugate_gradients(by(A), parts(b), by(IDENTITY), 60, 1e-12)
    assert all(part.isfinite().all() for part in found.x.values())


def test_the_error_is_that_of_the_quadratic_where_the_preconditioner_is_exact():
    A, b = problem(6)
    inverse = torch.linalg.inv(A)
    found = conjugate_gradients(by(A), parts(b), by(inverse), 0, 1e-12, parts(randn(N, seed=7)))
    least = phi(A, b, parts(inverse @ b))
    share = (phi(A, b, found.x) - least) / -least
    assert found.error == pytest.approx(share**0.5)
    assert float(inner(found.product, found.x)) > 0
