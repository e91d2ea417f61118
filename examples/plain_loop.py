"""Digits by natural gradient in a loop of PyTorch alone: python examples/plain_loop.py."""

import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset, random_split

from ngplugin import NaturalGradientOptimizer


def main() -> None:
    torch.manual_seed(0)
    digits = load_digits()
    images = torch.tensor(digits.data / 16, dtype=torch.float32)  # 1797×64
    data = TensorDataset(images, torch.tensor(digits.target))
    train, test = random_split(data, [1500, 297])

    model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
    criterion = nn.CrossEntropyLoss()
    optimizer = NaturalGradientOptimizer(model.parameters())

    for epoch in range(5):
        for x, y in DataLoader(train, batch_size=100, shuffle=True):
            with optimizer.observe():  # only the forward pass and the loss
                loss = criterion(model(x), y)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        print(f"epoch {epoch}: loss {loss.item():.3f}, KL {optimizer.report.kl_predicted:.1e}")

    x, y = test[:]
    with torch.no_grad():
        accuracy = (model(x).argmax(1) == y).float().mean()
    print(f"accuracy {accuracy.item():.3f}")


if __name__ == "__main__":
    main()
