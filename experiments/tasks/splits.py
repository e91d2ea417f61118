"""Data in memory, in three parts, served in batches."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any

import lightning as L
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, RandomSampler

Batch = tuple[Tensor, ...]


class Examples(Dataset[Batch]):
    """Tensors that have an example in each row, such as inputs [n, ...] and targets [n].

    A batch is taken with one indexing operation and not an example at a time: collating would
    cost more than a step of a small network.
    """

    def __init__(self, *tensors: Tensor) -> None:
        self.tensors = tensors

    def __len__(self) -> int:
        return len(self.tensors[0])

    def __getitem__(self, index: int) -> Batch:
        return tuple(tensor[index] for tensor in self.tensors)

    def __getitems__(self, indices: Sequence[int]) -> Batch:
        """Called by torch's loader with the indices of a whole batch."""
        return tuple(tensor[indices] for tensor in self.tensors)


class SplitData(L.LightningDataModule, ABC):
    """Three data sets, made once: subclasses say of what.

    A data set makes a whole batch at a time, in its `__getitems__`.

    Attributes:
        splits: the data sets "train", "val" and "test", after `setup`.
        evaluation_size: examples in a batch outside training; no gradients, so memory is plenty.

    Args:
        batch_size: examples in a training step.
        seed: of the order in which training examples are drawn.
        steps: batches in an epoch, each passing over the examples as often as that takes; None
            for one pass, which leaves a smaller last batch out.

    Raises:
        ValueError: a size is not a positive whole number.
    """

    evaluation_size = 1000

    def __init__(self, batch_size: int, seed: int = 0, steps: int | None = None) -> None:
        super().__init__()
        if batch_size < 1 or (steps is not None and steps < 1):
            raise ValueError(
                f"batch_size={batch_size}, steps={steps}: expected positive whole numbers"
            )
        self.batch_size = batch_size
        self.seed = seed
        self.steps = steps
        self.splits: Mapping[str, Dataset[Any]] = {}

    @abstractmethod
    def make_splits(self) -> Mapping[str, Dataset[Any]]:
        """The three data sets."""

    @property
    @abstractmethod
    def dimensions(self) -> dict[str, Any]:
        """What a network may have to know of the data, by the names of its arguments."""

    @property
    def facts(self) -> dict[str, str | int]:
        """What to keep with results, so that they can be compared; after `setup`."""
        return {}

    def setup(self, stage: str | None = None) -> None:
        """Make the data sets, once.

        Raises:
            ValueError: there are fewer training examples than in a batch.
        """
        if not self.splits:
            self.splits = self.make_splits()
        count = len(self.splits["train"])  # type: ignore[arg-type]
        if self.steps is None and count < self.batch_size:
            raise ValueError(
                f"batch_size={self.batch_size}: expected at most {count}, the training examples; "
                "a smaller last batch is left out, so there would be none"
            )

    def train_dataloader(self) -> DataLoader[Any]:
        """Batches in a new random order every epoch."""
        examples = self.splits["train"]
        generator = torch.Generator().manual_seed(self.seed)
        drawn = None if self.steps is None else self.steps * self.batch_size
        order = RandomSampler(examples, num_samples=drawn, generator=generator)  # type: ignore[arg-type]
        options = {"sampler": order, "generator": generator, "drop_last": True}
        return self._loader(examples, self.batch_size, **options)

    def val_dataloader(self) -> DataLoader[Any]:
        """The validation examples, in order."""
        return self.in_order("val")

    def test_dataloader(self) -> DataLoader[Any]:
        """The test examples, in order."""
        return self.in_order("test")

    def in_order(self, split: str) -> DataLoader[Any]:
        """Every example of a split once."""
        return self._loader(self.splits[split], self.evaluation_size)

    def _loader(self, examples: Dataset[Any], size: int, **options: Any) -> DataLoader[Any]:
        return DataLoader(examples, batch_size=size, collate_fn=_as_is, **options)


def shares(count: int, val_size: int, test_size: int, seed: int) -> dict[str, Tensor]:
    """Which of `count` examples are trained on and which are held out, as indices.

    Raises:
        ValueError: a size is not positive, or nothing would be left to train on.
    """
    if val_size < 1 or test_size < 1 or val_size + test_size >= count:
        raise ValueError(
            f"val_size={val_size} and test_size={test_size}: the data set has {count} examples, "
            "expected some of them for each split"
        )
    # Files may be sorted: never split without shuffling.
    order = torch.randperm(count, generator=torch.Generator().manual_seed(seed))
    held_out = val_size + test_size
    return {"train": order[held_out:], "val": order[:val_size], "test": order[val_size:held_out]}


def _as_is(batch: Any) -> Any:
    return batch
