"""Two classes of points in the plane, in the shapes that the template gives to such things."""

import lightning as L
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset


class PointsDataModule(L.LightningDataModule):
    def __init__(self, batch_size: int) -> None:
        super().__init__()
        self.save_hyperparameters(logger=False)

    def setup(self, stage: str | None = None) -> None:
        x = torch.randn(256, 2, generator=torch.Generator().manual_seed(0))
        self.points = TensorDataset(x, (x[:, 0] * x[:, 1] > 0).long())

    def train_dataloader(self) -> DataLoader:
        return DataLoader(self.points, self.hparams.batch_size, shuffle=True)

    def val_dataloader(self) -> DataLoader:
        return DataLoader(self.points, self.hparams.batch_size)


class PointsModule(L.LightningModule):
    def __init__(self, width: int, optimizer, scheduler, compile: bool) -> None:
        super().__init__()
        self.save_hyperparameters(logger=False)
        self.net = nn.Sequential(nn.Linear(2, width), nn.Tanh(), nn.Linear(width, 2))
        self.criterion = nn.CrossEntropyLoss()

    def training_step(self, batch, batch_idx: int) -> torch.Tensor:
        loss = self.criterion(self.net(batch[0]), batch[1])
        self.log("train/loss", loss, on_epoch=True)
        return loss

    def validation_step(self, batch, batch_idx: int) -> None:
        self.log("val/loss", self.criterion(self.net(batch[0]), batch[1]))

    def configure_optimizers(self):
        optimizer = self.hparams.optimizer(params=self.trainer.model.parameters())
        scheduler = self.hparams.scheduler(optimizer=optimizer)
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": scheduler, "monitor": "val/loss", "interval": "epoch"},
        }
