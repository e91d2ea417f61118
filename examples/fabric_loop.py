"""Digits by natural gradient with Lightning Fabric: python examples/fabric_loop.py --help."""

import argparse

import torch
from lightning.fabric import Fabric
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset, random_split

from ngplugin import NaturalGradientOptimizer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--accelerator", default="auto")
    parser.add_argument("--precision", default="32-true", help="or bf16-mixed")
    arguments = parser.parse_args()

    fabric = Fabric(accelerator=arguments.accelerator, devices=1, precision=arguments.precision)
    fabric.seed_everything(0)
    digits = load_digits()
    images = torch.tensor(digits.data / 16, dtype=torch.float32)  # 1797×64
    data = TensorDataset(images, torch.tensor(digits.target))
    train, test = random_split(data, [1500, 297])

    network = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
    model, optimizer = fabric.setup(network, NaturalGradientOptimizer(network.parameters()))
    batches = fabric.setup_dataloaders(DataLoader(train, batch_size=100, shuffle=True))
    criterion = nn.CrossEntropyLoss()

    for epoch in range(5):
        for x, y in batches:
            with optimizer.observe():  # Fabric's wrapper passes it on
                loss = criterion(model(x), y)
            optimizer.zero_grad()
            fabric.backward(loss)
            optimizer.step()
        fabric.print(f"epoch {epoch}: loss {loss.item():.3f}")

    x, y = fabric.to_device(test[:])
    with torch.no_grad():
        accuracy = (model(x).argmax(1) == y).float().mean()
    fabric.print(f"accuracy {accuracy.item():.3f}")


if __name__ == "__main__":
    main()
