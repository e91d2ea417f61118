"""Two processes with half a batch each measure, and step, as one with all of it."""

import copy

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from ngplugin import NaturalGradientOptimizer
from tests.oracle import double, flat, randn

F = torch.nn.functional
STEPS = 8
OPTIONS = {"measure_every": 1, "fisher": "exact", "sampling_damping": 0.0, "lr": 5.0}
REPORTED = ("kl", "kl_predicted", "kl_radius", "step_scale", "reduction_ratio", "shrinks")


def network():
    return double(nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3)))


def train(model, parameters, share):
    """Parameters and reports after some steps on a share of the batches."""
    optimizer = NaturalGradientOptimizer(parameters, structure="kronecker", **OPTIONS)
    reports = []
    for seed in range(STEPS):
        x, y = randn(24, 4, seed=seed)[share], (torch.arange(24) % 3)[share]
        optimizer.zero_grad()
        with optimizer.observe():
            loss = F.cross_entropy(model(x), y)
        loss.backward()
        with torch.no_grad():
            before = model(randn(24, 4, seed=seed)).log_softmax(1)
            optimizer.step()
            after = model(randn(24, 4, seed=seed)).log_softmax(1)
        kl = F.kl_div(after, before, log_target=True, reduction="batchmean")
        assert abs(optimizer.report.kl - kl) <= 1e-6 * kl  # of the whole batch
        reports.append([float(getattr(optimizer.report, name)) for name in REPORTED])
    return flat(parameters), torch.tensor(reports, dtype=torch.float64)


def half(rank, folder):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    model = network()
    parallel = DistributedDataParallel(model)
    torch.save(train(parallel, [*model.parameters()], slice(rank, None, 2)), f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def test_two_ranks_with_half_a_batch_each_are_one_with_all_of_it(tmp_path):
    mp.spawn(half, (str(tmp_path),), nprocs=2)
    (one, reports), (other, other_reports) = (torch.load(tmp_path / f"{i}.pt") for i in range(2))
    assert torch.equal(one, other)  # bit by bit: the same decisions
    assert torch.equal(reports, other_reports)
    model = copy.deepcopy(network())
    whole, all_reports = train(model, [*model.parameters()], slice(None))
    # Scores are drawn by each rank for itself, so the average is another estimate of the same F.
    torch.testing.assert_close(reports[:, 2], all_reports[:, 2], rtol=0.2, atol=1e-3)
    assert (one - whole).norm() < 0.2 * (whole - flat([*network().parameters()])).norm()
    assert (reports[:, 0] <= reports[:, 2]).all()
