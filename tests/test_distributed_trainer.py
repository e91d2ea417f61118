"""Lightning's own strategies in two processes, as `torchrun` would start them.

All scenarios are run by one pair of processes, since to start them takes time.
"""

from __future__ import annotations

import os
import socket
import warnings
from typing import Any

import lightning as L
import pytest
import torch
import torch.multiprocessing as mp
import torch.nn.functional as F
from lightning.pytorch.plugins.precision import MixedPrecision
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.utils.data import DataLoader, Subset, TensorDataset

from ngplugin import NaturalGradient, UnsupportedTrainerError
from tests.oracle import flat
from tests.test_several_optimizers import Adversaries

supports, refuses = pytest.mark.supports, pytest.mark.refuses
SHARDS_ON_CPU = hasattr(torch.cpu.Stream, "record_event")
shards = pytest.mark.skipif(not SHARDS_ON_CPU, reason="this torch shards on other devices only")
EPOCHS, EXAMPLES = 3, 96
#: Without a draw, whose noise two processes would have another of.
EXACT = {"fisher": "exact", "refresh_every": 4, "statistics_every": 2, "measure_every": 2}


class Module(L.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 2))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return F.cross_entropy(self.net(batch[0]), batch[1])

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters(), lr=1e-3, weight_decay=0.0)


class Whole(Module):
    """For a strategy that would shard, and need not."""

    def configure_model(self) -> None:
        pass


class Sharded(Module):
    def configure_model(self) -> None:
        for layer in self.net:
            fully_shard(layer, mesh=self.device_mesh["data_parallel"])
        fully_shard(self.net, mesh=self.device_mesh["data_parallel"])


class HalfSharded(Whole):
    """The sharded part has an optimizer of its own, which stays as it is."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.body = nn.Linear(6, 6)

    def configure_model(self) -> None:
        fully_shard(self.body, mesh=self.device_mesh["data_parallel"])

    def training_step(self, batch: Any, batch_idx: int) -> None:
        body, head = self.optimizers()
        for optimizer in (body, head):
            optimizer.zero_grad()
        self.manual_backward(F.cross_entropy(self.net(self.body(batch[0])), batch[1]))
        for p in self.net.parameters():  # what the strategy does for sharded parameters only
            torch.distributed.all_reduce(p.grad)
            p.grad /= self.trainer.world_size
        for optimizer in (body, head):
            optimizer.step()

    def configure_optimizers(self) -> Any:
        return [
            torch.optim.SGD(self.body.parameters(), lr=0.1),
            torch.optim.SGD(self.net.parameters(), lr=0.1),
        ], []


def data(processes: int) -> DataLoader[Any]:
    """Batches that make up the same 16 examples, however many processes there are."""
    g = torch.Generator().manual_seed(1)
    x = torch.randn(EXAMPLES, 6, generator=g)
    examples = TensorDataset(x, (x[:, 0] * x[:, 1] > 0).long())
    rank = int(os.environ["RANK"]) if processes > 1 else 0
    share = Subset(examples, range(rank, EXAMPLES, processes))
    return DataLoader(share, batch_size=16 // processes)


def fit(
    module: L.LightningModule,
    folder: str,
    processes: int = 1,
    checkpoint: str | None = None,
    save: str | None = None,
    epochs: int = EPOCHS,
    options: dict[str, Any] | None = None,
    **settings: Any,
) -> dict[str, Any]:
    natural = NaturalGradient(show_coverage=False, **(EXACT if options is None else options))
    trainer = L.Trainer(
        default_root_dir=folder,
        accelerator="cpu",
        devices=processes,
        max_epochs=epochs,
        callbacks=[natural],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
        **settings,
    )
    trainer.fit(module, data(processes), ckpt_path=checkpoint)
    if save:
        trainer.save_checkpoint(f"{folder}/{save}")
    engines = [o._engine for o in natural._ng_optimizers]
    whole = [p.full_tensor() if hasattr(p, "full_tensor") else p for p in module.parameters()]
    return {
        "weights": flat(whole),
        "summary": natural.summary(),
        "steps": trainer.global_step,
        "made": [engine.steps for engine in engines],
        "momentum": [sum(1 for m in e._momentum._average.values() if m.any()) for e in engines],
    }


def refused(module: L.LightningModule, folder: str, **settings: Any) -> str:
    with pytest.raises(UnsupportedTrainerError) as error:
        fit(module, folder, **settings)
    return str(error.value)


def half_precision() -> MixedPrecision:
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    return MixedPrecision("16-mixed", "cpu", scaler=scaler)


def sharded(two: dict[str, Any]) -> dict[str, Any]:
    """Runs of a strategy that shards, refused and taken."""
    return {
        "sharded": refused(Sharded(), **two, strategy=ModelParallelStrategy(2, 1)),
        "half sharded": fit(
            HalfSharded(),
            **two,
            strategy=ModelParallelStrategy(2, 1),
            options={**EXACT, "optimizers": [1]},
            save="half.ckpt",
        ),
        "half sharded, resumed": fit(
            HalfSharded(),
            **two,
            strategy=ModelParallelStrategy(2, 1),
            options={**EXACT, "optimizers": [1]},
            checkpoint=f"{two['folder']}/half.ckpt",
            epochs=EPOCHS + 1,
        ),
    }


def both(rank: int, folder: str, port: int) -> None:
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    os.environ.update(
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE="2",
        LOCAL_WORLD_SIZE="2",
        GROUP_RANK="0",
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
        TORCHELASTIC_RUN_ID="test",
    )
    two: dict[str, Any] = {"folder": folder, "processes": 2}
    found = {
        "ddp": fit(Module(), **two, strategy="ddp", save="two.ckpt"),
        "unused": fit(Module(), **two, strategy="ddp_find_unused_parameters_true"),
        "static": fit(Module(), **two, strategy=DDPStrategy(static_graph=True)),
        "accumulated": fit(Module(), **two, strategy="ddp", accumulate_grad_batches=2),
        "half": fit(Module(), **two, strategy="ddp", plugins=[half_precision()], options={}),
        "bf16": fit(Module(), **two, strategy="ddp", precision="bf16-mixed", options={}),
        "adversaries": fit(
            Adversaries(), **two, strategy="ddp_find_unused_parameters_true", options={}
        ),
        "resumed": fit(
            Module(), **two, strategy="ddp", checkpoint=f"{folder}/one.ckpt", epochs=EPOCHS + 1
        ),
    }
    if SHARDS_ON_CPU:
        found |= sharded(two)
    torch.save(found, f"{folder}/{rank}.pt")


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    folder = str(tmp_path_factory.mktemp("trainer"))
    fit(Module(), folder, save="one.ckpt")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    mp.start_processes(both, (folder, port), nprocs=2, start_method="fork")  # imports nothing
    return [{**torch.load(f"{folder}/{rank}.pt"), "folder": folder} for rank in range(2)]


def once(ranks: list[dict[str, Any]], name: str) -> dict[str, Any]:
    """What both ranks found, which is the same."""
    one, other = (found[name] for found in ranks)
    assert torch.equal(one["weights"], other["weights"])
    assert one["summary"]["kl_mean"] == other["summary"]["kl_mean"] > 0
    assert torch.isfinite(one["weights"]).all()
    return one


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        pytest.param("ddp", {}, marks=supports("Distributed", "strategy='ddp'")),
        pytest.param(
            "unused", {}, marks=supports("Distributed", "ddp_find_unused_parameters_true")
        ),
        pytest.param("static", {}, marks=supports("Distributed", "DDPStrategy(static_graph=True)")),
        pytest.param(
            "accumulated",
            {"accumulate_grad_batches": 2},
            marks=supports("Distributed", "ddp with accumulate_grad_batches"),
        ),
    ],
)
def test_two_processes_train_as_one_with_their_batches_together(
    ranks: list[dict[str, Any]], name: str, settings: dict[str, Any]
) -> None:
    found, whole = once(ranks, name), fit(Module(), ranks[0]["folder"], **settings)
    torch.testing.assert_close(found["weights"], whole["weights"], rtol=1e-3, atol=1e-3)
    assert found["steps"] == whole["steps"]
    assert found["summary"]["kl_mean"] == pytest.approx(whole["summary"]["kl_mean"], rel=1e-2)


@supports("Distributed", "ddp with 16-mixed or bf16-mixed")
@pytest.mark.parametrize("name", ["half", "bf16"])
def test_half_precision_in_two_processes(ranks: list[dict[str, Any]], name: str) -> None:
    assert once(ranks, name)["summary"]["steps"] == EPOCHS * EXAMPLES // 16


@supports("Distributed", "ddp with two optimizers and manual optimization")
def test_adversaries_in_two_processes(ranks: list[dict[str, Any]]) -> None:
    assert once(ranks, "adversaries")["summary"]["steps"] == EPOCHS * EXAMPLES // 16


@supports("Checkpoints", "resuming with another number of processes")
def test_a_checkpoint_goes_on_in_more_or_fewer_processes(ranks: list[dict[str, Any]]) -> None:
    more = once(ranks, "resumed")
    folder = ranks[0]["folder"]
    assert more["steps"] == (EPOCHS + 1) * EXAMPLES // 16
    whole = fit(Module(), folder, epochs=EPOCHS + 1)
    torch.testing.assert_close(more["weights"], whole["weights"], rtol=0.05, atol=0.05)
    fewer = fit(Module(), folder, checkpoint=f"{folder}/two.ckpt", epochs=EPOCHS + 1)
    torch.testing.assert_close(fewer["weights"], whole["weights"], rtol=0.05, atol=0.05)


@shards
@refuses("Distributed", "ModelParallelStrategy with fully_shard (FSDP2), tensor parallelism")
def test_sharded_parameters_are_refused_by_name(ranks: list[dict[str, Any]]) -> None:
    for found in ranks:
        assert (
            "sharded parameter net.0.weight and 3 more (ModelParallelStrategy)"
            in (found["sharded"])
        )
        assert "NaturalGradient(optimizers=[...])" in found["sharded"]


@shards
@supports("Distributed", "ModelParallelStrategy, an optimizer of layers that are whole")
def test_layers_that_are_whole_beside_sharded_ones(ranks: list[dict[str, Any]]) -> None:
    found = once(ranks, "half sharded")
    assert found["summary"]["steps"] == EPOCHS * EXAMPLES // 16
    resumed = once(ranks, "half sharded, resumed")
    assert resumed["summary"]["steps"] == EXAMPLES // 16
    assert resumed["made"] == [(EPOCHS + 1) * EXAMPLES // 16]  # saving makes none
