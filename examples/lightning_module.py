"""Digits by natural gradient in Lightning, one line: python examples/lightning_module.py."""

import lightning as L
import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset, random_split

from ngplugin import NaturalGradient


class Digits(L.LightningModule):
    """An ordinary module, with an optimizer and a schedule of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
        self.criterion = nn.CrossEntropyLoss()

    def training_step(self, batch: list[torch.Tensor], batch_idx: int) -> torch.Tensor:
        x, y = batch
        return self.criterion(self.net(x), y)

    def test_step(self, batch: list[torch.Tensor], batch_idx: int) -> None:
        x, y = batch
        self.log("accuracy", (self.net(x).argmax(1) == y).float().mean())

    def configure_optimizers(self) -> tuple[list, list]:
        optimizer = torch.optim.AdamW(self.parameters(), lr=1e-3)
        return [optimizer], [torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=5)]


def main() -> None:
    L.seed_everything(0)
    digits = load_digits()
    images = torch.tensor(digits.data / 16, dtype=torch.float32)  # 1797×64
    data = TensorDataset(images, torch.tensor(digits.target))
    train, test = random_split(data, [1500, 297])

    module = Digits()
    trainer = L.Trainer(
        max_epochs=5,
        callbacks=[NaturalGradient()],  # the one line
        logger=False,
        enable_checkpointing=False,
    )
    trainer.fit(module, DataLoader(train, batch_size=100, shuffle=True))
    (result,) = trainer.test(module, DataLoader(test, batch_size=297), verbose=False)
    print(f"accuracy {result['accuracy']:.3f}")


if __name__ == "__main__":
    main()
