"""Labelled images in memory, split, normalised and served in batches."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

import lightning as L
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

Batch = tuple[Tensor, Tensor]


class Examples(Dataset[Batch]):
    """Images [n, channels, height, width] and their labels [n].

    A batch is taken with one indexing operation and not an image at a time: collating would cost
    more than a step of a small network.
    """

    def __init__(self, images: Tensor, labels: Tensor) -> None:
        self.images = images
        self.labels = labels

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> Batch:
        return self.images[index], self.labels[index]

    def __getitems__(self, indices: Sequence[int]) -> Batch:
        """Called by torch's loader with the indices of a whole batch."""
        return self.images[indices], self.labels[indices]


class ImageData(L.LightningDataModule, ABC):
    """Classification of images: subclasses say where they come from.

    Attributes:
        shape: channels, height and width of an image.
        classes: how many there are.

    Args:
        batch_size: images in a training step.
        val_size: images held out of training to choose by.
        test_size: images held out of everything; 0 if the data set comes with a test set.
        split_seed: which images these are. Part of the task, not of a run: keep it.
        seed: of the order in which training images are drawn.

    Raises:
        ValueError: a size is no positive whole number, or leaves nothing to train on.
    """

    shape: tuple[int, int, int]
    classes: int = 10

    def __init__(
        self,
        batch_size: int = 128,
        val_size: int = 500,
        test_size: int = 500,
        split_seed: int = 0,
        seed: int = 0,
    ) -> None:
        super().__init__()
        if batch_size < 1 or val_size < 1 or test_size < 0:
            raise ValueError(
                f"batch_size={batch_size}, val_size={val_size}, test_size={test_size}: expected "
                "positive numbers of images (0 only for a test set that comes with the data)"
            )
        self.batch_size = batch_size
        self.val_size = val_size
        self.test_size = test_size
        self.split_seed = split_seed
        self.seed = seed
        self.splits: dict[str, Examples] = {}

    @abstractmethod
    def load(self) -> tuple[Tensor, Tensor]:
        """All images, uint8 or float [n, height, width], and their labels [n]."""

    def load_test(self) -> tuple[Tensor, Tensor] | None:
        """The test set that comes with the data; None to split one off."""
        return None

    def setup(self, stage: str | None = None) -> None:
        """Load, split and normalise, once.

        Every image is shifted and scaled alike, so that the training pixels have mean 0 and
        variance 1.
        """
        if self.splits:
            return
        images, labels = self.load()
        own_test = self.load_test()
        held_out = self.val_size + (0 if own_test else self.test_size)
        if held_out >= len(labels) or not (own_test or self.test_size):
            raise ValueError(
                f"val_size={self.val_size} and test_size={self.test_size}: the data set has "
                f"{len(labels)} images, expected some of them for each split"
            )
        # Files may be sorted by class: never split without shuffling.
        order = torch.randperm(
            len(labels), generator=torch.Generator().manual_seed(self.split_seed)
        )
        train, rest = order[held_out:], order[:held_out]
        parts = {
            "train": (images[train], labels[train]),
            "val": (images[rest[: self.val_size]], labels[rest[: self.val_size]]),
            "test": own_test or (images[rest[self.val_size :]], labels[rest[self.val_size :]]),
        }
        pixels = parts["train"][0].float()
        mean, std = pixels.mean(), pixels.std()
        self.splits = {
            name: Examples(((x.float() - mean) / std).reshape(-1, *self.shape), y.long())
            for name, (x, y) in parts.items()
        }

    def train_dataloader(self) -> DataLoader[Batch]:
        """Batches in a new random order every epoch; a smaller last batch is left out."""
        generator = torch.Generator().manual_seed(self.seed)
        return self._loader("train", shuffle=True, drop_last=True, generator=generator)

    def val_dataloader(self) -> DataLoader[Batch]:
        """The validation images, in order."""
        return self._loader("val")

    def test_dataloader(self) -> DataLoader[Batch]:
        """The test images, in order."""
        return self._loader("test")

    def _loader(self, split: str, **options: object) -> DataLoader[Batch]:
        size = self.batch_size if split == "train" else 1000  # no gradients: memory is plenty
        return DataLoader(
            self.splits[split],
            batch_size=size,
            collate_fn=_as_is,
            **options,  # type: ignore[arg-type]
        )


def _as_is(batch: Batch) -> Batch:
    return batch
