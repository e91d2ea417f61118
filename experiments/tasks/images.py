"""Labelled images in memory, split and normalised."""

from __future__ import annotations

from abc import abstractmethod
from typing import Any

import torch
from torch import Tensor

from experiments.tasks.splits import Examples, SplitData
from ngplugin.options import check_choice


class ImageData(SplitData):
    """Images and what they show: subclasses say where they come from.

    Attributes:
        shape: channels, height and width of an image.
        classes: how many there are.
        largest: value of a pixel.

    Args:
        batch_size: images in a training step.
        val_size: images held out of training to choose by.
        test_size: images held out of everything; 0 if the data set comes with a test set.
        split_seed: which images these are. Part of the task, not of a run: keep it.
        seed: of the order in which training images are drawn.
        pixels: "standardized" shifts and scales all images alike, so that the training pixels
            have mean 0 and variance 1; "unit" scales them into [0, 1].

    Raises:
        ValueError: a size is no positive whole number, or leaves nothing to train on; or there
            are no such pixels.
    """

    shape: tuple[int, int, int]
    classes: int = 10
    largest: int = 255

    def __init__(
        self,
        batch_size: int = 128,
        val_size: int = 500,
        test_size: int = 500,
        split_seed: int = 0,
        seed: int = 0,
        pixels: str = "standardized",
    ) -> None:
        super().__init__(batch_size, seed)
        if val_size < 1 or test_size < 0:
            raise ValueError(
                f"val_size={val_size}, test_size={test_size}: expected positive numbers of images "
                "(0 only for a test set that comes with the data)"
            )
        check_choice("pixels", pixels, ("standardized", "unit"))
        self.val_size = val_size
        self.test_size = test_size
        self.split_seed = split_seed
        self.pixels = pixels

    @property
    def dimensions(self) -> dict[str, Any]:
        """The shape of an image, and the number of classes."""
        return {"shape": self.shape, "classes": self.classes}

    @abstractmethod
    def load(self) -> tuple[Tensor, Tensor]:
        """All images, uint8 or float [n, height, width], and their labels [n]."""

    def load_test(self) -> tuple[Tensor, Tensor] | None:
        """The test set that comes with the data; None to split one off."""
        return None

    def make_splits(self) -> dict[str, Examples]:
        """Load, split and normalise."""
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
        shift, scale = torch.tensor(0.0), torch.tensor(float(self.largest))
        if self.pixels == "standardized":
            train_pixels = parts["train"][0].float()
            shift, scale = train_pixels.mean(), train_pixels.std()
        return {
            name: Examples(((x.float() - shift) / scale).reshape(-1, *self.shape), y.long())
            for name, (x, y) in parts.items()
        }
