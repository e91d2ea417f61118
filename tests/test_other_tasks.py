"""The tasks that are not classification of images: their data, their losses, that they learn."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import lightning as L
import networkx
import pytest
import torch
from omegaconf import DictConfig
from torch import Tensor, nn
from torch.nn import functional as F

from experiments.tasks.autoencoder import Autoencoder, autoencoder
from experiments.tasks.characters import Characters, Windows
from experiments.tasks.diamonds import Diamonds
from experiments.tasks.gaussian_regression import GaussianRegression
from experiments.tasks.graph_atlas import GraphAtlas, merge
from experiments.tasks.graph_network import GraphNetwork, GraphRegression
from experiments.tasks.implicit_image import (
    FourierFeatures,
    ImplicitImage,
    SavePicture,
    Sine,
    coordinate_network,
)
from experiments.tasks.language_model import LanguageModel, Transformer
from experiments.tasks.photograph import Photograph, places
from experiments.tasks.poisson_equation import PoissonEquation, UnitSquare, laplacian
from experiments.tasks.splits import Examples, SplitData, shares
from experiments.training import make_task
from experiments.workload import in_precision

Compose = Callable[..., DictConfig]


def sgd(params: object) -> torch.optim.Optimizer:
    return torch.optim.SGD(params, lr=0.1)  # type: ignore[arg-type]


class Known(nn.Module):
    """A given function in the place of a network."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


# Smaller networks than the experiments', where these would take their time.
SMALL = {
    "autoencoder": ("data=digits", "model.hidden=[64]"),
    "char_transformer": ("model.width=32", "data.batch_size=8"),
    "graph_network": (),
    "implicit_image": ("data.batch_size=512",),
    "poisson_pinn": (),
    "tabular": (),
}


@pytest.mark.parametrize("name", SMALL)
def test_every_task_learns(name: str, compose_config: Compose) -> None:
    torch.manual_seed(0)
    options = (f"experiment={name}", "optimizer=adamw", *SMALL[name])
    cfg = compose_config(*options)
    data, module = make_task(cfg)
    if cfg.trainer.precision == "64-true":
        module.double()
    optimizer = torch.optim.AdamW(module.parameters(), 3e-3)
    loader = data.train_dataloader()
    losses = []
    while len(losses) < 25:
        for batch in loader:
            loss = module.loss(in_precision(batch, module))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
            if len(losses) == 25:
                break
    assert sum(losses[-5:]) / 5 < losses[0] - 0.1 * abs(losses[0])


# --- autoencoder


def test_the_autoencoder_is_the_classic_one() -> None:
    network = autoencoder((1, 28, 28))
    layers = [layer for layer in network if isinstance(layer, nn.Linear)]
    sizes = [784, 1000, 500, 250, 30, 250, 500, 1000, 784]
    assert [layer.in_features for layer in layers] == sizes[:-1]
    assert [layer.out_features for layer in layers] == sizes[1:]
    assert not any(layer.bias.any() for layer in layers)
    assert layers[1].weight.std().item() == pytest.approx(math.sqrt(2 / 1500), rel=0.01)
    after_code = list(network).index(layers[3]) + 1
    assert isinstance(network[after_code], nn.Linear)  # no tanh on the code


def test_its_loss_is_summed_over_pixels_and_averaged_over_images() -> None:
    images = torch.rand(3, 1, 2, 2)
    logits = torch.randn(3, 4)
    module = Autoencoder(Known(lambda x: logits), sgd)
    p, x = logits.sigmoid(), images.flatten(1)
    expected = -(x * p.log() + (1 - x) * (1 - p).log()).sum() / 3
    measured = module.measure((images, torch.zeros(3)))
    assert module.loss((images, torch.zeros(3))).item() == pytest.approx(expected.item(), rel=1e-5)
    assert measured["squared_error"].item() == pytest.approx(((p - x) ** 2).sum().item() / 3)


# --- characters


def test_parts_of_the_text_follow_each_other() -> None:
    data = Characters(context=50, val_share=0.1, test_share=0.2)
    data.setup()
    parts = [data.splits[name].text for name in ("train", "val", "test")]
    restored = "".join(data.symbols[i] for i in torch.cat(parts).tolist())
    assert restored == data.text
    shares = [len(part) / len(data.text) for part in parts]
    assert shares == pytest.approx([0.7, 0.1, 0.2], abs=1e-4)
    assert data.facts["characters"] == len(data.text)


def test_windows_cover_the_text_and_targets_are_a_character_later() -> None:
    windows = Windows(torch.arange(23), context=5)
    assert len(windows) == 4  # the last would need character 25
    inputs, targets = windows.__getitems__([0, 1, 2, 3])
    assert torch.equal(inputs.flatten(), torch.arange(20))
    assert torch.equal(targets, inputs + 1)


def test_shares_of_a_text_that_leave_nothing_are_refused() -> None:
    with pytest.raises(ValueError, match="shares above 0"):
        Characters(val_share=0.5, test_share=0.5)
    with pytest.raises(ValueError, match="the part to val on is shorter"):
        Characters(context=100_000).setup()


def test_the_transformer_does_not_see_what_is_to_come() -> None:
    torch.manual_seed(0)
    network = Transformer(symbols=11, context=8, width=16).double().eval()
    before = torch.randint(11, (2, 8))
    after = before.clone()
    after[:, 5] = (after[:, 5] + 1) % 11
    a, b = network(before), network(after)
    assert torch.equal(a[:, :5], b[:, :5])
    assert (a[:, 5:] != b[:, 5:]).any(dim=2).all()  # and does see what has been


def test_the_transformer_drops_out_in_training_only() -> None:
    network = Transformer(symbols=11, context=8, width=16, dropout=0.5)
    x = torch.randint(11, (2, 8))
    assert not torch.equal(network(x), network(x))
    network.eval()
    assert torch.equal(network(x), network(x))


def test_bits_of_a_uniform_prediction() -> None:
    module = LanguageModel(Known(lambda x: torch.zeros(*x.shape, 8)), sgd)
    batch = (torch.zeros(2, 3, dtype=torch.long), torch.ones(2, 3, dtype=torch.long))
    assert module.measure(batch)["bits"].item() == pytest.approx(3)


# --- implicit image


def test_the_photograph_is_what_it_was() -> None:
    data = Photograph(height=427, width=640)
    data.setup()
    from sklearn.datasets import load_sample_image

    where, colours = data.splits["train"][:]
    original = torch.tensor(load_sample_image("china.jpg")) / 255
    assert torch.equal(data.picture(colours), original)
    assert torch.allclose(where[0], torch.tensor([-1 + 1 / 427, -1 + 1 / 640]))
    assert torch.allclose(where[640 * 3 + 5], torch.tensor([-1 + 7 / 427, -1 + 11 / 640]))


def test_a_smaller_photograph_has_the_same_mean() -> None:
    data = Photograph(height=61, width=80, batch_size=1000, steps=12)
    data.setup()
    colours = data.splits["train"].tensors[1]
    assert colours.shape == (61 * 80, 3)
    whole = Photograph(height=427, width=640)
    whole.setup()
    mean = whole.splits["train"].tensors[1].mean(0)
    assert torch.allclose(colours.mean(0), mean, atol=1e-4)
    batches = list(data.train_dataloader())
    assert [len(batch[0]) for batch in batches] == [1000] * 12
    first = torch.cat([batch[0] for batch in batches])[: 61 * 80]
    assert len(first.unique(dim=0)) == 61 * 80  # every pixel once before any comes again


def test_places_are_symmetric_middles_of_pixels() -> None:
    assert torch.equal(places(1, 2), torch.tensor([[0.0, -0.5], [0.0, 0.5]]))


def test_decibels() -> None:
    module = ImplicitImage(Known(lambda x: torch.full((len(x), 3), 0.1)), sgd)
    measured = module.measure((torch.zeros(5, 2), torch.zeros(5, 3)))
    assert measured["psnr"].item() == pytest.approx(20, rel=1e-4)


def test_fourier_features_are_waves() -> None:
    features = FourierFeatures(2, 3, 4.0)
    x = torch.rand(5, 2)
    cosines, sines = features(x).split(3, dim=1)
    assert torch.allclose(cosines.square() + sines.square(), torch.ones(5, 3))
    assert torch.allclose(torch.atan2(sines, cosines).sin(), (math.tau * x @ features.waves).sin())
    assert not list(features.parameters())
    assert "waves" in features.state_dict()


def test_a_siren_is_even_in_all_its_layers() -> None:
    torch.manual_seed(0)
    network = coordinate_network(2, 3, features=256, hidden=[256, 256], activation="sine")
    assert not any(isinstance(layer, FourierFeatures) for layer in network)
    x = torch.rand(500, 2) * 2 - 1
    spread = []
    for layer in network:
        x = layer(x)
        if isinstance(layer, Sine):
            spread.append(x.std().item())
    assert spread == pytest.approx([math.sqrt(0.5)] * 3, abs=0.06)  # arcsine distributed


def test_networks_of_coordinates_refuse_what_cannot_be() -> None:
    with pytest.raises(ValueError, match="features=3"):
        coordinate_network(2, 3, features=3)
    with pytest.raises(ValueError, match="activation='sinus'"):
        coordinate_network(2, 3, activation="sinus")


def test_the_picture_shows_what_is_tested(tmp_path: Path) -> None:
    data = Photograph(batch_size=100, height=30, width=45, steps=1)
    data.setup()
    _, colours = data.splits["test"][:]
    module = ImplicitImage(Known(lambda x: colours[: len(x)] + 0.1), sgd)
    trainer = L.Trainer(
        logger=False, enable_checkpointing=False, enable_progress_bar=False,
        callbacks=[SavePicture(str(tmp_path / "new" / "a.png"))],
    )  # fmt: skip
    (tested,) = trainer.test(module, datamodule=data, verbose=False)
    assert tested["test/psnr"] == pytest.approx(20, abs=1e-3)
    from matplotlib.image import imread

    shown = imread(tmp_path / "new" / "a.png")
    assert shown.shape[1] == 15 * 120
    assert shown.std() > 0.1


# --- Poisson


def test_the_laplacian_of_a_polynomial() -> None:
    x = torch.rand(7, 2, dtype=torch.float64)
    value = laplacian(lambda p: (p[:, :1] ** 3) * p[:, 1:] ** 2, x)
    expected = 6 * x[:, :1] * x[:, 1:] ** 2 + 2 * x[:, :1] ** 3
    assert torch.allclose(value, expected, rtol=1e-12)


@pytest.mark.parametrize("waves", [1, 3])
def test_the_exact_solution_solves_the_equation(waves: int) -> None:
    network = Known(lambda p: torch.sin(waves * math.pi * p).prod(1, keepdim=True))
    module = PoissonEquation(network, sgd, waves=waves)
    data = UnitSquare()
    data.setup()
    interior, boundary = (x.double() for x in next(iter(data.train_dataloader())))
    assert module.residual(interior).abs().max() < 1e-10
    assert module.loss((interior, boundary)) < 1e-20
    grid = data.splits["val"].tensors[0].double()
    assert module.measure((grid,))["error"] < 1e-14
    half = PoissonEquation(Known(lambda p: 0.5 * network(p)), sgd, waves=waves)
    assert half.measure((grid,))["error"].item() == pytest.approx(0.5)


def test_the_boundary_counts_as_much_as_it_is_told_to() -> None:
    points = torch.rand(4, 2), torch.rand(4, 2)
    off = Known(lambda p: torch.sin(math.pi * p).prod(1, keepdim=True) + 0.1)
    losses = [
        PoissonEquation(off, sgd, boundary_weight=weight)
        .double()
        .loss(tuple(x.double() for x in points))
        for weight in (1.0, 3.0)
    ]
    edge = off(points[1].double()).square().mean()
    assert (losses[1] - losses[0]).item() == pytest.approx(2 * edge.item())


def test_points_lie_where_they_should() -> None:
    data = UnitSquare(interior=50, boundary=40, steps=7)
    data.setup()
    batches = list(data.train_dataloader())
    assert len(batches) == 7
    interior, boundary = batches[0]
    assert all(torch.equal(batch[0], interior) for batch in batches)  # full batch
    assert interior.shape == (50, 2)
    assert len(boundary.unique(dim=0)) == 40
    on_edge = (boundary == 0) | (boundary == 1)
    assert on_edge.any(dim=1).all()
    again, other = UnitSquare(50, 40), UnitSquare(50, 40, points_seed=1)
    for module in (again, other):
        module.setup()
    assert torch.equal(next(iter(again.train_dataloader()))[0], interior)
    assert not torch.equal(next(iter(other.train_dataloader()))[0], interior)
    assert len(data.splits["test"]) == 101 * 101


# --- graphs


@pytest.fixture(scope="module")
def atlas() -> GraphAtlas:
    data = GraphAtlas()
    data.setup()
    return data


def test_the_atlas_is_split_without_loss(atlas: GraphAtlas) -> None:
    sizes = {name: len(split) for name, split in atlas.splits.items()}
    assert sizes == {"train": 694, "val": 150, "test": 150}
    nodes = sorted(len(g.features) for split in atlas.splits.values() for g in split.graphs)
    assert [nodes.count(n) for n in range(3, 8)] == [2, 6, 21, 112, 853]  # OEIS A001349


def test_targets_are_the_algebraic_connectivity(atlas: GraphAtlas) -> None:
    for graph in atlas.splits["val"].graphs[:20]:
        g = networkx.Graph(graph.edges.T.tolist())
        laplacian = torch.tensor(networkx.laplacian_matrix(g).toarray(), dtype=torch.float64)
        assert graph.target.item() == pytest.approx(torch.linalg.eigvalsh(laplacian)[1].item())
        degrees = [g.degree(i) for i in range(len(g))]
        assert graph.features.argmax(1).tolist() == degrees


def test_a_batch_of_graphs_is_each_by_itself(atlas: GraphAtlas) -> None:
    torch.manual_seed(0)
    network = GraphNetwork(7, 2).double()
    for layer in network.layers:
        nn.init.constant_(layer.eps, 0.3)
    graphs = [g._replace(features=g.features.double()) for g in atlas.splits["train"].graphs[:9]]
    together = network(merge(graphs))
    alone = torch.cat([network(merge([graph])) for graph in graphs])
    assert together.shape == (9, 2)
    assert torch.allclose(together, alone, rtol=1e-12)


def test_names_of_nodes_do_not_matter(atlas: GraphAtlas) -> None:
    network = GraphNetwork(7, 1).double()
    graph = max(atlas.splits["train"].graphs, key=lambda g: len(g.features))
    order = torch.randperm(len(graph.features))
    renamed = graph._replace(
        features=graph.features[order].double(), edges=order.argsort()[graph.edges]
    )
    graph = graph._replace(features=graph.features.double())
    assert torch.allclose(network(merge([graph])), network(merge([renamed])), rtol=1e-12)


def test_a_constant_prediction_explains_nothing(atlas: GraphAtlas) -> None:
    (batch,) = atlas.val_dataloader()
    mean = batch.targets.mean()
    module = GraphRegression(Known(lambda b: mean.expand(len(b.targets), 1)), sgd)
    measured = module.measure(batch)
    assert measured["r2"].item() == pytest.approx(0, abs=1e-6)
    assert measured["rmse"].item() == pytest.approx(batch.targets.std(correction=0).item())
    assert module.size(batch) == 150


# --- diamonds


def test_diamonds_are_split_and_normalised() -> None:
    data = Diamonds(val_size=100, test_size=200)
    data.setup()
    train, val, test = (data.splits[name] for name in ("train", "val", "test"))
    assert (len(val), len(test)) == (100, 200)
    known, price = train[:]
    assert known.shape == (len(price), data.dimensions["inputs"])
    assert known[:, :6].mean(0).abs().max() < 1e-3
    assert (known[:, :6].std(0) - 1).abs().max() < 1e-3
    assert price.mean().abs() < 1e-4
    for grades in known[:, 6:].split([5, 7, 8], dim=1):
        assert (grades.sum(1) == 1).all()  # each has one grade
    rows = torch.cat([torch.cat([s[:][0], s[:][1][:, None]], dim=1) for s in (train, val, test)])
    assert len(rows.unique(dim=0)) == len(rows)  # so no diamond is in two splits
    with pytest.raises(ValueError, match="expected some of them for each split"):
        Diamonds(val_size=60_000).setup()


def test_the_likelihood_of_a_gaussian() -> None:
    output = torch.randn(6, 2)
    targets = torch.randn(6)
    module = GaussianRegression(Known(lambda x: output), sgd)
    normal = torch.distributions.Normal(output[:, 0], (F.softplus(output[:, 1]) + 1e-6).sqrt())
    measured = module.measure((torch.zeros(6, 1), targets))
    assert measured["loss"].item() == pytest.approx(-normal.log_prob(targets).mean().item())
    rmse = (output[:, 0] - targets).square().mean().sqrt()
    assert measured["rmse"].item() == pytest.approx(rmse.item())


# --- all


class Numbers(SplitData):
    dimensions = {}  # noqa: RUF012

    def make_splits(self) -> dict[str, Examples]:
        return {"train": Examples(torch.arange(10), -torch.arange(10))}


def drawn(data: SplitData) -> list[list[int]]:
    data.setup()
    return [batch[0].tolist() for batch in data.train_dataloader()]


def test_the_order_of_batches_is_the_seeds() -> None:
    assert drawn(Numbers(4, seed=0)) == drawn(Numbers(4, seed=0)) != drawn(Numbers(4, seed=1))
    assert [len(batch) for batch in drawn(Numbers(4))] == [4, 4]  # whole ones only
    again = drawn(Numbers(5, steps=4))
    assert sorted(again[0] + again[1]) == sorted(again[2] + again[3]) == list(range(10))
    with pytest.raises(ValueError, match="batch_size=2, steps=0: expected positive"):
        Numbers(2, steps=0)


def test_shares_are_disjoint_and_whole() -> None:
    first, again, other = shares(50, 7, 8, 0), shares(50, 7, 8, 0), shares(50, 7, 8, 1)
    assert [len(first[name]) for name in ("train", "val", "test")] == [35, 7, 8]
    assert torch.equal(torch.cat(list(first.values())).sort().values, torch.arange(50))
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["test"], other["test"])
