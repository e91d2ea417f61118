"""Fashion-MNIST, 70,000 articles of clothing of 28 x 28 pixels, from files on this machine."""

from __future__ import annotations

import gzip
import struct
from pathlib import Path

import torch
from torch import Tensor

from experiments.tasks.images import ImageData

_UNSIGNED_BYTES = 0x08  # the only element type these data sets use


class FashionMNIST(ImageData):
    """Ten kinds of clothing in 28 x 28 pixels, with a test set of 10,000.

    Args:
        folder: holds the four files `train-images-idx3-ubyte`, `train-labels-idx1-ubyte`,
            `t10k-images-idx3-ubyte` and `t10k-labels-idx1-ubyte`, each of them plain or `.gz`.
        batch_size: images in a training step.
        val_size: images held out of training to choose by.
        split_seed: which images these are. Part of the task, not of a run: keep it.
        seed: of the order in which training images are drawn.
        pixels: "standardized" or "unit", see `ImageData`.

    Raises:
        FileNotFoundError: the files are not there.
        ValueError: a size cannot work, or a file is not in the idx format.
    """

    shape = (1, 28, 28)

    def __init__(
        self,
        folder: str = "/usr/share/datasets/fashion-mnist",
        batch_size: int = 128,
        val_size: int = 5000,
        split_seed: int = 0,
        seed: int = 0,
        pixels: str = "standardized",
    ) -> None:
        super().__init__(batch_size, val_size, 0, split_seed, seed, pixels)
        self.folder = Path(folder)
        # Here and not in setup: what is missing should be told before anything else is built.
        self._files = {split: self._find(split) for split in ("train", "t10k")}

    def load(self) -> tuple[Tensor, Tensor]:
        """Pixels 0 to 255 of the 60,000 training images."""
        return self._read("train")

    def load_test(self) -> tuple[Tensor, Tensor]:
        """Pixels 0 to 255 of the 10,000 test images."""
        return self._read("t10k")

    def _find(self, split: str) -> tuple[Path, Path]:
        names = (f"{split}-images-idx3-ubyte", f"{split}-labels-idx1-ubyte")
        found = [
            path
            for name in names
            for path in (self.folder / name, self.folder / f"{name}.gz")
            if path.is_file()
        ]
        if len(found) < 2:
            raise FileNotFoundError(
                f"No {names[0]}(.gz) with its labels in data.folder={str(self.folder)!r}; on "
                "Debian they come with 'apt install dataset-fashion-mnist', elsewhere give the "
                "folder that has them: data.folder=PATH"
            )
        return found[0], found[-1]

    def _read(self, split: str) -> tuple[Tensor, Tensor]:
        images, labels = self._files[split]
        return read_idx(images), read_idx(labels)


def read_idx(path: Path) -> Tensor:
    """Read one array of unsigned bytes in the idx format, plain or gzipped.

    The file has two zero bytes, one for the element type, one for the number of dimensions, the
    dimensions as big-endian 32-bit numbers, then the elements.

    Args:
        path: the file; compressed if its name ends in `.gz`.

    Returns:
        uint8, of the shape that the file states.

    Raises:
        ValueError: it is not such a file, or is cut off.
    """
    content = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    if len(content) < 4 or content[:3] != bytes((0, 0, _UNSIGNED_BYTES)):
        raise ValueError(
            f"{path} begins with {content[:4]!r}, expected the idx format's 00 00 08 and the "
            "number of dimensions; a file compressed without '.gz' in its name?"
        )
    start = 4 + 4 * content[3]
    if len(content) < start:
        raise ValueError(f"{path} ends inside its header; copy it again")
    shape = struct.unpack(f">{content[3]}I", content[4:start])
    elements = torch.frombuffer(bytearray(content[start:]), dtype=torch.uint8)
    if elements.numel() != torch.Size(shape).numel():
        raise ValueError(
            f"{path} states the shape {shape} but has {elements.numel()} elements; copy it again"
        )
    return elements.reshape(shape)
