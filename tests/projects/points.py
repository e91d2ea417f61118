"""An ordinary Lightning script, under the name of Lightning that is its first argument."""

import importlib
import json
import sys

import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

L = importlib.import_module(sys.argv[1])


class Points(L.LightningModule):
    """Two classes of points in the plane."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(2, 16), nn.Tanh(), nn.Linear(16, 2))
        self.loss = nn.CrossEntropyLoss()

    def training_step(self, batch, batch_idx: int) -> torch.Tensor:
        loss = self.loss(self.net(batch[0]), batch[1])
        self.log("loss", loss, on_step=False, on_epoch=True)
        return loss

    def configure_optimizers(self):
        optimizer = torch.optim.AdamW(self.parameters(), lr=1e-3)
        return [optimizer], [torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=6)]

    def train_dataloader(self) -> DataLoader:
        x = torch.randn(256, 2, generator=torch.Generator().manual_seed(0))
        return DataLoader(TensorDataset(x, (x[:, 0] * x[:, 1] > 0).long()), batch_size=32)


def main() -> None:
    L.seed_everything(0)
    trainer = L.Trainer(max_epochs=3, accelerator="cpu", logger=False, enable_progress_bar=False)
    trainer.fit(Points())
    print(json.dumps({
        "loss": float(trainer.callback_metrics["loss"]),
        "callbacks": [type(callback).__name__ for callback in trainer.callbacks],
        "optimizer": type(trainer.strategy.optimizers[0]).__name__,
        "lightning": sorted({"lightning", "pytorch_lightning"} & set(sys.modules)),
    }))  # fmt: skip


if __name__ == "__main__":
    main()
