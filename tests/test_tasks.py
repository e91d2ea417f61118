"""Data sets, networks, schedules and the optimizers that are not the package's."""

from __future__ import annotations

import gzip
import math
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import nn

from experiments.muon import MuonWithAdamW
from experiments.tasks.digits import Digits
from experiments.tasks.fashion_mnist import FashionMNIST, read_idx
from experiments.tasks.images import ImageData
from experiments.tasks.mnist5k import MNIST5k
from experiments.tasks.networks import cnn, dense, mlp
from experiments.tasks.schedules import constant, cosine


def write_idx(path: Path, values: torch.Tensor) -> None:
    header = bytes((0, 0, 8, values.ndim)) + struct.pack(f">{values.ndim}I", *values.shape)
    content = header + bytes(values.flatten().tolist())
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)


@pytest.fixture
def clothing(tmp_path: Path) -> Path:
    """A folder like Fashion-MNIST's, one half of it compressed."""
    random = torch.Generator().manual_seed(0)
    for split, count, suffix in (("train", 40, ".gz"), ("t10k", 10, "")):
        images = torch.randint(256, (count, 28, 28), generator=random)
        write_idx(tmp_path / f"{split}-images-idx3-ubyte{suffix}", images)
        write_idx(tmp_path / f"{split}-labels-idx1-ubyte{suffix}", torch.arange(count) % 10)
    return tmp_path


@pytest.mark.parametrize(("data", "total"), [(Digits, 1797), (MNIST5k, 5000)])
def test_splits_are_disjoint_normalised_and_hold_every_class(
    data: type[ImageData], total: int
) -> None:
    module = data(val_size=200, test_size=300)
    module.setup()
    sizes = {name: len(split) for name, split in module.splits.items()}
    assert sizes == {"train": total - 500, "val": 200, "test": 300}
    images = torch.cat([split.tensors[0].flatten(1) for split in module.splits.values()])
    whole = data(val_size=1, test_size=1)
    # No image is lost, none is twice: as many different ones as in the data set as it came.
    assert len(images.unique(dim=0)) == len(whole.load()[0].flatten(1).unique(dim=0))
    train = module.splits["train"].tensors[0]
    assert train.mean().item() == pytest.approx(0, abs=1e-5)
    assert train.std().item() == pytest.approx(1, abs=1e-5)
    assert train.shape[1:] == module.shape
    for split in module.splits.values():
        assert split.tensors[1].unique().tolist() == list(range(10))


def test_unit_pixels_reach_from_0_to_1() -> None:
    module = Digits(pixels="unit")
    module.setup()
    pixels = torch.cat([split.tensors[0].flatten() for split in module.splits.values()])
    assert (pixels.min(), pixels.max()) == (0, 1)


def test_the_split_is_the_same_for_every_seed_and_the_order_is_not() -> None:
    first, second = Digits(seed=0), Digits(seed=1)
    for module in (first, second):
        module.setup()
    assert torch.equal(first.splits["test"].tensors[0], second.splits["test"].tensors[0])
    a, b, c = (next(iter(m.train_dataloader()))[1] for m in (first, second, first))
    assert not torch.equal(a, b)
    assert torch.equal(a, c)


def test_another_split_seed_holds_out_others() -> None:
    first, second = Digits(split_seed=0), Digits(split_seed=1)
    for module in (first, second):
        module.setup()
    assert not torch.equal(first.splits["test"].tensors[0], second.splits["test"].tensors[0])


def test_batches_are_whole_and_shuffled_anew_every_epoch() -> None:
    module = Digits(batch_size=100)
    module.setup()
    loader = module.train_dataloader()
    epochs = [list(loader), list(loader)]
    assert [len(labels) for _, labels in epochs[0]] == [100] * 7  # of 797, the rest is left out
    assert not torch.equal(epochs[0][0][1], epochs[1][0][1])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 0}, "batch_size=0"),
        ({"val_size": 1500}, "the data set has 1797 images"),
        ({"test_size": 0}, "some of them for each split"),
        ({"pixels": "big"}, "pixels='big': expected one of 'standardized', 'unit'"),
    ],
)
def test_sizes_that_cannot_be_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Digits(**options).setup()


def test_idx_files_are_read_plain_and_compressed(tmp_path: Path) -> None:
    values = torch.arange(24, dtype=torch.uint8).reshape(2, 3, 4)
    for name in ("a", "a.gz"):
        write_idx(tmp_path / name, values)
        assert torch.equal(read_idx(tmp_path / name), values)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"\x1f\x8b\x08\x00", "expected the idx format's 00 00 08"),
        (b"\x00\x00\x08\x02\x00\x00", "ends inside its header"),
        (b"\x00\x00\x08\x01\x00\x00\x00\x05abc", r"states the shape \(5,\) but has 3 elements"),
    ],
)
def test_other_files_are_refused(content: bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(content)
    with pytest.raises(ValueError, match=message):
        read_idx(tmp_path / "file")


def test_fashion_mnist_has_its_own_test_set(clothing: Path) -> None:
    module = FashionMNIST(str(clothing), val_size=5, batch_size=5)
    module.setup()
    assert {k: len(v) for k, v in module.splits.items()} == {"train": 35, "val": 5, "test": 10}
    assert torch.equal(module.splits["test"].tensors[1], torch.arange(10))


def test_missing_fashion_mnist_says_how_to_get_it(clothing: Path) -> None:
    (clothing / "t10k-labels-idx1-ubyte").unlink()
    with pytest.raises(FileNotFoundError, match=r"apt install dataset-fashion-mnist.*data\.folder"):
        FashionMNIST(str(clothing))


@pytest.mark.parametrize("shape", [(1, 28, 28), (1, 8, 8)])
def test_the_cnn_is_small(shape: tuple[int, int, int]) -> None:
    network = cnn(shape, 10)
    assert network(torch.zeros(2, *shape)).shape == (2, 10)
    assert 20_000 <= sum(p.numel() for p in network.parameters()) <= 60_000


def test_networks_refuse_layers_that_cannot_be() -> None:
    with pytest.raises(ValueError, match=r"hidden=\[0\]"):
        mlp((1, 8, 8), 10, [0])
    with pytest.raises(ValueError, match=r"activation='sigmoid': expected one of 'relu', 'tanh'"):
        dense(2, 1, [4], "sigmoid")
    with pytest.raises(ValueError, match="can be halved 3 times"):
        cnn((1, 8, 8), 10, [4, 4, 4, 4])


def test_cosine_needs_to_know_where_the_run_ends() -> None:
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    with pytest.raises(MisconfigurationException, match=r"schedule=cosine: .* schedule=constant"):
        cosine(optimizer, math.inf)
    assert constant(optimizer, math.inf).get_last_lr() == [1.0]


def test_cosine_rises_falls_and_stays_at_the_floor() -> None:
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
    scheduler = cosine(optimizer, steps=14, warmup=4, floor=0.1)
    rates = []
    for _ in range(16):
        rates.append(scheduler.get_last_lr()[0])
        optimizer.step()
        scheduler.step()
    assert rates[:5] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0])
    assert rates[9] == pytest.approx(0.55)
    assert rates[14:] == pytest.approx([0.1, 0.1])


def muon_run(steps: int, saved: dict | None = None) -> tuple[MuonWithAdamW, nn.Module]:
    torch.manual_seed(0)
    network = cnn((1, 8, 8), 10, (4,))
    optimizer = MuonWithAdamW(network.parameters(), lr=0.01)
    if saved:
        network.load_state_dict(saved["network"])
        optimizer.load_state_dict(saved["optimizer"])
    for step in range(steps):
        x = torch.randn(8, 1, 8, 8, generator=torch.Generator().manual_seed(step))
        optimizer.zero_grad()
        network(x).square().mean().backward()
        optimizer.step()
    return optimizer, network


def test_muon_moves_matrices_alone_and_adamw_the_rest() -> None:
    optimizer, network = muon_run(1)
    keys = {p.ndim: set(state) for p, state in optimizer.state.items()}
    assert keys[2] == {"momentum_buffer"}
    assert "exp_avg" in keys[1]
    assert "exp_avg" in keys[4]
    assert len(optimizer.state) == len(list(network.parameters()))


def test_muon_follows_schedules_and_checkpoints() -> None:
    optimizer, network = muon_run(2)
    saved = {"optimizer": optimizer.state_dict(), "network": network.state_dict()}
    again, copy = muon_run(0, saved)
    for group in again.param_groups:
        group["lr"] = 0.0
    before = [p.detach().clone() for p in copy.parameters()]
    copy(torch.randn(8, 1, 8, 8)).square().mean().backward()
    again.step()
    assert all(torch.equal(a, b) for a, b in zip(before, copy.parameters(), strict=True))
    steps = [s["step"].item() for s in again.state.values() if "step" in s]
    assert set(steps) == {3.0}
