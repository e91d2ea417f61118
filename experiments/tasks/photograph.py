"""A photograph of a Chinese temple, inside scikit-learn, as places and their colours."""

from __future__ import annotations

from typing import Any

import torch
from sklearn.datasets import load_sample_image
from torch import Tensor
from torch.nn import functional as F

from experiments.tasks.splits import Examples, SplitData


class Photograph(SplitData):
    """Places [2] in [-1, 1], down and to the right, and colours [3] in [0, 1].

    There is one picture, to be fitted: it is also what is validated and tested on, whole.

    Args:
        batch_size: pixels in a training step.
        height: of the picture; the original has 427.
        width: of the picture; the original has 640.
        steps: batches of random pixels in an epoch.
        seed: of the order in which pixels are drawn.

    Raises:
        ValueError: a size is out of range.
    """

    def __init__(
        self,
        batch_size: int = 4096,
        height: int = 107,
        width: int = 160,
        steps: int = 100,
        seed: int = 0,
    ) -> None:
        super().__init__(batch_size, seed, steps)
        if not (1 < height <= 427 and 1 < width <= 640):
            raise ValueError(
                f"height={height}, width={width}: expected 2 to 427 and 2 to 640 pixels"
            )
        self.height = height
        self.width = width
        self.evaluation_size = height * width

    @property
    def dimensions(self) -> dict[str, Any]:
        """Two coordinates, three colours."""
        return {"inputs": 2, "outputs": 3}

    def make_splits(self) -> dict[str, Examples]:
        """All pixels, for each purpose."""
        original = torch.tensor(load_sample_image("china.jpg")).permute(2, 0, 1)[None] / 255
        # The mean over the area of a pixel: no moiré.
        small = F.interpolate(original, (self.height, self.width), mode="area")[0]
        whole = Examples(places(self.height, self.width), small.flatten(1).T.contiguous())
        return {"train": whole, "val": whole, "test": whole}

    def picture(self, colours: Tensor) -> Tensor:
        """Colours [height * width, 3] in order -> [height, width, 3] in [0, 1]."""
        return colours.reshape(self.height, self.width, 3).clamp(0, 1)


def places(height: int, width: int) -> Tensor:
    """The middles of pixels, row by row [height * width, 2]; the picture reaches from -1 to 1."""
    down = (torch.arange(height) + 0.5) * 2 / height - 1
    right = (torch.arange(width) + 0.5) * 2 / width - 1
    return torch.cartesian_prod(down, right)
