"""The same seed is the same run, bit for bit, and nobody else's random numbers are touched."""

from __future__ import annotations

import hashlib
import json
import os
import random
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ngplugin import NaturalGradientOptimizer
from tests.environment import REPOSITORY
from tests.oracle import flat, generator

X = torch.randn(64, 6, generator=generator(1))
Y = (X[:, 0] * X[:, 1] > 0).long()
KINDS: dict[str, dict[str, Any]] = {
    "automatic": {},
    "sampled": {"fisher": "sampled", "draws": 2},
    "exact labels": {"fisher": "exact"},
    "empirical": {"fisher": "empirical"},
    "ggn": {"fisher": "ggn"},
    "exact": {"structure": "exact"},
    "eigen": {"structure": "eigen"},
    "diagonal": {"structure": "diagonal"},
    "identity": {"structure": "identity"},
    "low rank": {"structure": "kronecker", "overhead": 0.01, "rank": 2},
    "matrix-free": {"structure": "matrix-free", "cg_iterations": 3},
    "quadratic": {"structure": "kronecker", "step_size": "quadratic"},
    "line search": {"structure": "kronecker", "step_size": "line-search"},
}
Random = tuple[Tensor, Any, Any]


def random_states() -> Random:
    _, keys, position, *_ = np.random.get_state()  # noqa: NPY002 (the global one is meant)
    return torch.get_rng_state(), (keys.tolist(), position), random.getstate()


def run(
    make: Callable[[nn.Module], torch.optim.Optimizer], steps: int = 8
) -> tuple[Tensor, list[Random]]:
    """Weights, and the states of the global generators after each step."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    np.random.seed(0)  # noqa: NPY002
    random.seed(0)
    model = nn.Sequential(
        nn.Linear(6, 16), nn.BatchNorm1d(16), nn.Tanh(), nn.Dropout(0.3), nn.Linear(16, 2)
    )
    optimizer, states = make(model), []
    for step in range(steps):
        order = torch.randperm(64)[:32]
        if isinstance(optimizer, NaturalGradientOptimizer) and step != 5:  # one is not observed
            with optimizer.observe():
                loss = F.cross_entropy(model(X[order]), Y[order])
        else:
            loss = F.cross_entropy(model(X[order]), Y[order])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        states.append(random_states())
    return flat([*model.state_dict().values()]), states


def natural(kind: str) -> Callable[[nn.Module], torch.optim.Optimizer]:
    return lambda model: NaturalGradientOptimizer(model.parameters(), **KINDS[kind])


def fingerprint(weights: Tensor) -> str:
    return hashlib.sha256(weights.numpy().tobytes()).hexdigest()


@pytest.fixture(scope="module")
def elsewhere() -> dict[str, str]:
    """Fingerprints of the same runs in another process, where hashes are others."""
    path = f"{REPOSITORY / 'src'}{os.pathsep}{REPOSITORY}"
    variables = {**os.environ, "PYTHONPATH": path, "PYTHONHASHSEED": "7", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-W", "ignore", "-m", "tests.test_determinism"]
    done = subprocess.run(command, env=variables, capture_output=True, text=True, check=True)
    return dict(json.loads(done.stdout))


@pytest.mark.supports("Reuse", "the same seed, the same run: again, and in another process")
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.filterwarnings("ignore:ngplugin. structure='matrix-free' has to step like")
def test_the_same_seed_is_the_same_run(kind: str, elsewhere: dict[str, str]) -> None:
    weights, states = run(natural(kind))
    again, _ = run(natural(kind))
    assert torch.equal(weights, again)
    assert fingerprint(weights) == elsewhere[kind]
    plain, expected = run(lambda model: torch.optim.SGD(model.parameters(), lr=0.1))
    assert not torch.equal(weights, plain)
    for state, other in zip(states, expected, strict=True):
        assert torch.equal(state[0], other[0])
        assert state[1:] == other[1:]


if __name__ == "__main__":
    print(json.dumps({kind: fingerprint(run(natural(kind))[0]) for kind in KINDS}))
