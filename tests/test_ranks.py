"""Two processes with half a batch each measure, and step, as one with all of it.

All scenarios are run by one pair of processes, since starting them takes seconds; what they found
is compared here with one process that has whole batches.
"""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from ngplugin import KlMatching, NaturalGradientOptimizer, OptionError
from ngplugin.curvature import sharing
from ngplugin.curvature.fisher import Fisher
from tests.oracle import double, flat, randn

F = torch.nn.functional
STEPS, BATCH = 9, 24
#: Without a draw, whose noise two processes would have another of.
EXACT = {
    "fisher": "exact",
    "refresh_every": 4,
    "statistics_every": 2,
    "measure_every": 2,
    "spectrum_every": 1,
}


def layers(*modules: nn.Module) -> nn.Module:
    return double(nn.Sequential(*modules))


def network() -> nn.Module:
    return layers(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3))


class Tokens(nn.Module):
    """An embedding that the output is tied to, and a norm; every third token is masked."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(12, 5)
        self.norm = nn.LayerNorm(5)
        self.hidden = nn.Linear(5, 5)
        double(self)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(self.norm(self.hidden(self.table(x)).tanh()), self.table.weight)


class Branches(nn.Module):
    """One of two ways, by the batch: each process may see another."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.last = nn.Linear(4, 6), nn.Linear(4, 6), nn.Linear(6, 3)
        double(self)

    def forward(self, x: Tensor) -> Tensor:
        way = self.first if dist.is_initialized() and dist.get_rank() == 1 else self.second
        return self.last(way(x).tanh())


def points(model: nn.Module, seed: int, share: slice) -> Tensor:
    x, y = randn(BATCH, 4, seed=seed)[share], (torch.arange(BATCH) % 3)[share]
    return F.cross_entropy(model(x), y)


def squared(model: nn.Module, seed: int, share: slice) -> Tensor:
    x = randn(BATCH, 4, seed=seed)[share]
    return F.mse_loss(model(x), x[:, :3].sin())


def sequences(model: nn.Module, seed: int, share: slice) -> Tensor:
    x = torch.arange(BATCH * 3).reshape(BATCH, 3).add(seed).mul(7) % 12
    y = x.roll(1, 1).clone()
    y[:, 2] = -100  # counts for nothing, in either half
    return F.cross_entropy(model(x[share]).flatten(0, 1), y[share].flatten())


def first_half_alone_has_labels(model: nn.Module, seed: int, share: slice) -> Tensor:
    x, y = randn(BATCH, 4, seed=seed), torch.arange(BATCH) % 3
    if seed == 3:
        y[1::2] = -100
    logits = model(x[share])
    total = F.cross_entropy(logits, y[share], reduction="sum")
    return total / len(logits)


def nan_in_one_rank(model: nn.Module, seed: int, share: slice) -> Tensor:
    x, y = randn(BATCH, 4, seed=seed), torch.arange(BATCH) % 3
    if seed == 4:
        x[1] = torch.nan
    return F.cross_entropy(model(x[share]), y[share])


def nothing_in_one_rank(model: nn.Module, seed: int, share: slice) -> Tensor:
    if seed == 4 and dist.get_rank() == 1:  # as where a filter has left no example
        model(randn(2, 4, seed=seed))  # DistributedDataParallel wants to see a forward pass
        return torch.stack([0.0 * p.sum() for p in model.parameters()]).sum()
    return points(model, seed, share)


def no_loss_in_one_rank(model: nn.Module, seed: int, share: slice) -> Tensor:
    if seed == 4 and dist.is_initialized():
        first = dist.get_rank() == 0
        return points(model, seed, slice(None)) if first else torch.zeros((), requires_grad=True)
    return (0.5 if seed == 4 else 1) * points(model, seed, share)


def frozen_later(model: nn.Module, seed: int, share: slice) -> Tensor:
    model[0].requires_grad_(seed < 5)
    return points(model, seed, share)


@dataclasses.dataclass
class Scenario:
    """What is trained, and by what.

    Attributes:
        rounding: what the second process makes of the predicted KL by mistake, relatively.
        same: the steps are those of one process with whole batches, up to rounding.
    """

    model: Callable[[], nn.Module] = network
    loss: Callable[[nn.Module, int, slice], Tensor] = points
    options: dict[str, Any] = dataclasses.field(default_factory=dict)
    parallel: dict[str, Any] | None = dataclasses.field(default_factory=dict)
    micro_batches: int = 1
    rounding: float = 0.0
    same: bool = True


SCENARIOS = {
    "kronecker": Scenario(options=EXACT),
    "long steps, shortened": Scenario(options={**EXACT, "lr": 30.0, "kl_radius": 0.3}),
    "squared error": Scenario(loss=squared, options=EXACT),
    "eigen": Scenario(options={**EXACT, "structure": "eigen"}),
    "diagonal": Scenario(options={**EXACT, "structure": "diagonal"}, same=False),
    "matrix-free": Scenario(options={**EXACT, "structure": "matrix-free", "measure_every": 1}),
    "quadratic": Scenario(options={**EXACT, "step_size": "quadratic"}),
    "line search": Scenario(options={**EXACT, "step_size": "line-search"}),
    "steered damping": Scenario(options={**EXACT, "damping": KlMatching(), "structure": "eigen"}),
    "steered damping of a diagonal": Scenario(
        options={**EXACT, "damping": KlMatching(), "structure": "diagonal"}, same=False
    ),
    "natural, absolute": Scenario(
        options={**EXACT, "layer_balance": "natural", "damping_mode": "absolute", "damping": 0.01}
    ),
    # The norm's block is of one gradient of the whole batch, so it is another estimate in halves.
    "tied tokens": Scenario(Tokens, sequences, EXACT, same=False),
    "drawn": Scenario(same=False),
    "masked in one rank": Scenario(loss=first_half_alone_has_labels, options=EXACT),
    "nan in one rank": Scenario(loss=nan_in_one_rank, options=EXACT),
    "nothing in one rank": Scenario(loss=nothing_in_one_rank, options=EXACT, same=False),
    # Without DistributedDataParallel, which would not have it.
    "no loss in one rank": Scenario(
        loss=no_loss_in_one_rank, options=EXACT, parallel=None, same=False
    ),
    "frozen later": Scenario(loss=frozen_later, options=EXACT, parallel=None),
    "unused, found": Scenario(
        Branches, options=EXACT, parallel={"find_unused_parameters": True}, same=False
    ),
    "static graph": Scenario(options=EXACT, parallel={"static_graph": True}),
    "accumulated without sync": Scenario(options=EXACT, micro_batches=2),
    "devices that round differently": Scenario(options=EXACT, rounding=1e-6, same=False),
    "buckets as views": Scenario(options=EXACT, parallel={"gradient_as_bucket_view": True}),
}


def train(scenario: Scenario, model: nn.Module, share: slice) -> dict[str, Any]:
    """Parameters and reports after some steps on a share of the batches."""
    parameters = [*model.parameters()]
    if scenario.rounding and dist.get_rank() == 1:
        precondition = Fisher.precondition
        wrong = 1 + scenario.rounding

        def rounded(self: Fisher, vectors: Any, curved: bool = True) -> Any:
            natural, products = precondition(self, vectors, curved)
            return natural, {key: wrong * part for key, part in products.items()}

        Fisher.precondition = rounded  # type: ignore[method-assign]
    optimizer = NaturalGradientOptimizer(parameters, **scenario.options)
    reports = []
    for seed in range(STEPS):
        optimizer.zero_grad()
        for part in range(scenario.micro_batches):
            last = part == scenario.micro_batches - 1
            parallel = isinstance(model, DistributedDataParallel)
            with model.no_sync() if parallel and not last else torch.enable_grad():
                with optimizer.observe():
                    loss = scenario.loss(model, seed + 100 * part, share) / scenario.micro_batches
                loss.backward()
        if scenario.parallel is None and dist.is_initialized():
            for p in filter(lambda p: p.requires_grad, parameters):
                p.grad = torch.zeros_like(p) if p.grad is None else p.grad
                dist.all_reduce(p.grad)
                p.grad /= 2
        optimizer.step()
        report = dataclasses.asdict(optimizer.report)
        reports.append({k: v for k, v in report.items() if k not in ("seconds", "overhead")})
    if scenario.rounding and dist.get_rank() == 1:
        Fisher.precondition = precondition  # type: ignore[method-assign]
    fisher = optimizer._engine.fisher
    return {
        "weights": flat(parameters),
        "reports": reports,
        "seed": optimizer._engine.watch.generator(parameters[0].device).initial_seed(),
        "blocks": sorted(f"{b.kind} {len(b.parameters)}" for b in fisher.blocks),
    }


def half(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    found = {}
    for name, scenario in SCENARIOS.items():
        model = scenario.model()
        if scenario.parallel is not None:
            model = DistributedDataParallel(model, **scenario.parallel)
        found[name] = train(scenario, model, slice(rank, None, 2))
    torch.save(found, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def halves(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    folder = tmp_path_factory.mktemp("ranks")
    mp.start_processes(half, (str(folder),), nprocs=2, start_method="fork")  # imports nothing
    return [torch.load(folder / f"{rank}.pt") for rank in range(2)]


@pytest.mark.supports("Distributed", "DDP: ranks stay equal bit by bit")
@pytest.mark.parametrize("name", SCENARIOS)
def test_both_ranks_take_the_same_decisions(halves: list[dict[str, Any]], name: str) -> None:
    one, other = (found[name] for found in halves)
    assert torch.equal(one["weights"], other["weights"])
    assert one["reports"] == other["reports"]
    assert one["blocks"] == other["blocks"]
    assert torch.isfinite(one["weights"]).all()
    bounded = [r for r in one["reports"] if r["kl"] is not None]
    assert len(bounded) >= 4
    assert all(r["kl"] <= r["kl_radius"] for r in bounded)


@pytest.mark.supports("Distributed", "2 ranks with half a batch = 1 rank with the whole")
@pytest.mark.parametrize("name", [name for name, s in SCENARIOS.items() if s.same])
def test_two_halves_are_a_whole(halves: list[dict[str, Any]], name: str) -> None:
    scenario, found = SCENARIOS[name], halves[0][name]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        # Micro-batches of a half are told from those of a whole by nothing but their size.
        whole = train(scenario, scenario.model(), slice(None))
    torch.testing.assert_close(found["weights"], whole["weights"], rtol=1e-6, atol=1e-7)
    for mine, all_ in zip(found["reports"], whole["reports"], strict=True):
        assert (mine["shrinks"], mine["skipped"]) == (all_["shrinks"], all_["skipped"])
        for key in ("kl", "kl_predicted", "kl_radius", "step_scale", "condition_number"):
            if all_[key] is not None:
                assert mine[key] == pytest.approx(all_[key], rel=1e-5), key


@pytest.mark.supports("Distributed", "DDP: find_unused_parameters")
def test_a_branch_that_one_rank_alone_uses_has_a_block_in_both(
    halves: list[dict[str, Any]],
) -> None:
    assert halves[0]["unused, found"]["blocks"] == ["kronecker 2"] * 3


@pytest.mark.supports("Distributed", "DDP: static_graph")
def test_a_static_graph_trains(halves: list[dict[str, Any]]) -> None:
    assert len(halves[0]["static graph"]["reports"]) == STEPS


@pytest.mark.supports("Distributed", "DDP: no_sync, accumulation")
def test_micro_batches_without_sync_are_counted(halves: list[dict[str, Any]]) -> None:
    assert halves[0]["accumulated without sync"]["reports"][-1]["kl_predicted"] > 0


def test_a_bad_batch_in_one_rank_is_skipped_by_both(halves: list[dict[str, Any]]) -> None:
    for found in halves:
        assert [r["skipped"] for r in found["nan in one rank"]["reports"]] == [
            int(step == 4) for step in range(STEPS)
        ]


def test_each_rank_draws_for_itself(halves: list[dict[str, Any]]) -> None:
    assert halves[0]["drawn"]["seed"] != halves[1]["drawn"]["seed"]


@given(st.lists(st.integers(1, 1000), min_size=1, max_size=30), st.integers(1, 8))
def test_work_is_spread_evenly(works: list[int], ranks: int) -> None:
    owners = sharing.assigned(works, ranks)
    loads = [sum(w for w, o in zip(works, owners, strict=True) if o == r) for r in range(ranks)]
    assert len(owners) == len(works)
    assert sum(loads) == sum(works)
    # No process has more than the others by more than one piece of its own, the smallest.
    busiest = max(range(ranks), key=lambda r: loads[r])
    smallest = min(w for w, o in zip(works, owners, strict=True) if o == busiest)
    assert loads[busiest] - smallest <= min(loads)


def shared_work(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    inverted: list[tuple[int, ...]] = []
    from ngplugin.curvature.blocks import KroneckerBlock

    invert = KroneckerBlock.invert
    KroneckerBlock.invert = lambda block, damping: (  # type: ignore[method-assign]
        inverted.append(tuple(block.parameters[0].shape)) or invert(block, damping)
    )
    scenario = Scenario(options={**EXACT, "refresh_every": 100})
    model = layers(*[m for _ in range(4) for m in (nn.Linear(4, 4), nn.Tanh())], nn.Linear(4, 3))
    train(scenario, DistributedDataParallel(model), slice(rank, None, 2))
    torch.save(inverted, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.supports("Distributed", "factorizations sharded over ranks")
def test_each_block_is_inverted_by_one_rank(tmp_path: Path) -> None:
    mp.start_processes(shared_work, (str(tmp_path),), nprocs=2, start_method="fork")
    one, other = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    refreshes = 5  # at steps 0, 1, 2, 4, 8
    assert len(one) + len(other) == 5 * refreshes
    assert len(one) in (2 * refreshes, 3 * refreshes)


@pytest.mark.refuses("Distributed", "sharded parameters (DTensor) in a plain loop")
def test_sharded_parameters_are_refused(tmp_path: Path) -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/meet", rank=0, world_size=1)
    try:
        model = nn.Linear(4, 3)
        fully_shard(model, mesh=init_device_mesh("cpu", (1,)))
        optimizer = NaturalGradientOptimizer(model.parameters())
        with (
            pytest.raises(OptionError, match=r"DTensor.*DistributedDataParallel"),
            optimizer.observe(),
        ):
            pass
    finally:
        dist.destroy_process_group()
