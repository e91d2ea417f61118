"""Every config composes, makes what it names, and says what its values mean."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable
from pathlib import Path

import lightning as L
import pytest
import torch
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf

import ngplugin
from experiments import training
from experiments.race.courses import COURSES
from experiments.tasks.fashion_mnist import FashionMNIST
from experiments.tasks.networks import cnn
from experiments.tasks.splits import SplitData

CONF = Path(__file__).parents[1] / "conf"
FILES = sorted(CONF.rglob("*.yaml"))
Compose = Callable[..., DictConfig]


def options(group: str) -> list[str]:
    return sorted(path.stem for path in (CONF / group).glob("*.yaml"))


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(CONF)))
def test_every_value_has_a_comment(path: Path) -> None:
    for line in path.read_text().splitlines():
        has_value = re.match(r"\s*(- )?[^#\s].*(:\s+\S|^\s*- \S)", line)
        if has_value:
            assert re.search(r"\S # \S", line), f"no comment in {line!r}"


def test_choices_named_in_the_primary_config_are_those_that_exist() -> None:
    for line in (CONF / "train.yaml").read_text().splitlines():
        match = re.match(r"\s*- (\w+): \w+ # ([\w, ]+)", line)
        if match:
            group, named = match.groups()
            assert sorted(named.split(", ")) == options(group), group


@pytest.mark.parametrize("name", options("optimizer"))
def test_optimizers_step(name: str, compose_config: Compose) -> None:
    cfg = compose_config(f"optimizer={name}")
    network = cnn((1, 8, 8), 10, (4, 8))
    before = [p.detach().clone() for p in network.parameters()]
    optimizer = instantiate(cfg.optimizer, _convert_="all")(network.parameters())

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        logits = network(torch.randn(16, 1, 8, 8))
        loss = torch.nn.functional.cross_entropy(logits, torch.arange(16) % 10)
        loss.backward()
        return loss

    optimizer.step(closure)
    moved = [not torch.equal(a, b) for a, b in zip(before, network.parameters(), strict=True)]
    assert all(moved)


@pytest.mark.parametrize("name", ["digits", "mnist5k"])
def test_data(name: str, compose_config: Compose) -> None:
    data = instantiate(compose_config(f"data={name}", "seed=3").data)
    assert isinstance(data, L.LightningDataModule)
    assert data.seed == 3


@pytest.mark.parametrize("name", ["cnn", "mlp"])
def test_models_of_images(name: str, compose_config: Compose) -> None:
    network = instantiate(compose_config(f"model={name}").model, shape=(1, 28, 28), classes=10)
    assert network(torch.zeros(2, 1, 28, 28)).shape == (2, 10)


@pytest.mark.parametrize("name", options("schedule"))
def test_schedules(name: str, compose_config: Compose) -> None:
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=2.0)
    scheduler = instantiate(compose_config(f"schedule={name}").schedule)(optimizer, 10)
    assert scheduler.get_last_lr() == [2.0]


@pytest.mark.parametrize("name", options("logger"))
def test_loggers_have_a_csv_beside_them(name: str, compose_config: Compose) -> None:
    nodes = compose_config(f"logger={name}").get("logger") or {}
    made = {key: type(instantiate(node)).__name__ for key, node in nodes.items()}
    expected = {
        "csv": {"csv": "CSVLogger"},
        "none": {},
        "tensorboard": {"csv": "CSVLogger", "tensorboard": "TensorBoardLogger"},
        "wandb": {"csv": "CSVLogger", "wandb": "WandbLogger"},
    }
    assert made == expected[name]


def test_wandb_is_offline(compose_config: Compose) -> None:
    assert compose_config("logger=wandb").logger.wandb.offline is True


@pytest.mark.parametrize("name", options("trainer"))
@pytest.mark.parametrize("callbacks", ["default", "natgrad", "none", "[default,natgrad]"])
def test_trainers_with_callbacks(name: str, callbacks: str, compose_config: Compose) -> None:
    cfg = compose_config(f"trainer={name}", f"callbacks={callbacks}", "optimizer=adamw")
    made = [instantiate(node) for node in (cfg.get("callbacks") or {}).values()]
    trainer = instantiate(cfg.trainer)(callbacks=made, logger=False)
    assert isinstance(trainer, L.Trainer)
    has = any(isinstance(c, ngplugin.NaturalGradient) for c in made)
    assert has == ("natgrad" in callbacks)


@pytest.mark.parametrize("optimizer", ["adamw", "natgrad"])
@pytest.mark.parametrize("name", options("experiment"))
def test_experiments_make_all_that_they_name(
    name: str, optimizer: str, compose_config: Compose
) -> None:
    cfg = compose_config(f"experiment={name}", f"optimizer={optimizer}", "trainer.accelerator=cpu")
    assert not OmegaConf.missing_keys(cfg)
    if name == "fashion_cnn":  # its files are in no package
        data = FashionMNIST.__new__(FashionMNIST)
        assert cfg.data._target_.endswith(f".{FashionMNIST.__name__}")
    else:
        data = instantiate(cfg.data, _convert_="all")
    assert isinstance(data, SplitData)
    network = training._make_network(cfg.model, data.dimensions)
    make, schedule = (instantiate(node, _convert_="all") for node in (cfg.optimizer, cfg.schedule))
    module = instantiate(cfg.task)(network=network, optimizer=make, scheduler=schedule)
    assert isinstance(module, L.LightningModule)
    scheduler = schedule(make(module.parameters()), 10)
    assert isinstance(scheduler, torch.optim.lr_scheduler.LRScheduler)
    callbacks = [instantiate(node, _convert_="all") for node in cfg.callbacks.values()]
    loggers = [instantiate(node, _convert_="all") for node in cfg.logger.values()]
    trainer = instantiate(cfg.trainer, _convert_="all")(callbacks=callbacks, logger=loggers)
    assert set(callbacks) <= set(trainer.callbacks)
    assert trainer.loggers == loggers


@pytest.mark.parametrize("name", options("experiment"))
def test_an_experiment_says_what_it_came_to(name: str) -> None:
    """In the race where it is raced, with the race's own numbers; else by the files' own steps."""
    text = (CONF / "experiment" / f"{name}.yaml").read_text()
    raced = re.search(r"in (\S+) seconds .*natgrad (\S+), tuned adamw (\S+) \(docs/race.md\)", text)
    if raced is None:
        assert name == "fashion_cnn" or re.search(r"steps, seed 0: natgrad \S+, adamw .* \S+", text)
        return
    seconds, natgrad, adamw = raced.groups()
    assert float(seconds) == COURSES[name].seconds
    page = (CONF.parent / "docs" / "race.md").read_text()
    (row,) = re.findall(rf"^\| {name} \|(.*)\|$", page.split("<!-- /summary -->")[0], re.MULTILINE)
    cells = [cell.strip() for cell in row.split("|")]
    assert (adamw, natgrad) == (cells[0], cells[6])


@pytest.mark.parametrize("name", options("debug"))
def test_debug_changes_the_trainer_and_takes_no_callback_away(
    name: str, compose_config: Compose
) -> None:
    chosen = ("experiment=implicit_image", "optimizer=natgrad")
    plain, cfg = compose_config(*chosen), compose_config(*chosen, f"debug={name}")
    assert cfg.callbacks == plain.callbacks
    assert {"natural_gradient", "best", "picture"} <= set(cfg.callbacks)
    assert cfg.trainer != plain.trainer
    changed = {key for key in plain if cfg.get(key) != plain[key]}
    assert changed <= {"trainer", "logger"}
    instantiate(cfg.trainer, _convert_="all")(logger=False)


def test_the_group_for_other_projects_puts_the_callback_beside_theirs(
    compose_config: Compose,
) -> None:
    cfg = compose_config("+natgrad=default", "optimizer=adamw")
    assert {"natural_gradient", "best", "progress"} <= set(cfg.callbacks)
    assert instantiate(cfg.callbacks.natural_gradient, _convert_="all").lr == 1.0


@pytest.mark.parametrize("group", ["data", "model", "task"])
def test_every_choice_is_a_default_or_used_by_an_experiment(group: str) -> None:
    defaults = [d for d in OmegaConf.load(CONF / "train.yaml").defaults if d != "_self_"]
    for name in options("experiment"):
        defaults += OmegaConf.load(CONF / "experiment" / f"{name}.yaml").defaults
    chosen = {v for d in defaults for k, v in dict(d).items() if k.endswith(group)}
    assert chosen == set(options(group))


def test_natgrad_brings_its_callback_and_no_other_optimizer_does(compose_config: Compose) -> None:
    with_it = compose_config("optimizer=natgrad").callbacks
    assert with_it.natural_gradient._target_ == "ngplugin.NaturalGradient"
    assert "best" in with_it
    assert "natural_gradient" in compose_config("optimizer=natgrad", "callbacks=none").callbacks
    for name in set(options("optimizer")) - {"natgrad"}:
        assert "natural_gradient" not in compose_config(f"optimizer={name}").callbacks


@pytest.mark.parametrize(
    ("key", "target"),
    [
        ("optimizer", ngplugin.NaturalGradientOptimizer),
        ("callbacks.natural_gradient", ngplugin.NaturalGradient),
    ],
)
def test_natgrad_configs_state_every_option_and_its_default(
    key: str, target: type, compose_config: Compose
) -> None:
    overrides = ["optimizer=adamw", "callbacks=natgrad"]
    cfg = compose_config(*(overrides if "callbacks" in key else ["optimizer=natgrad"]))
    node = OmegaConf.to_container(OmegaConf.select(cfg, key), resolve=True)
    assert isinstance(node, dict)
    stated = {name: value for name, value in node.items() if not name.startswith("_")}
    defaults = {
        name: parameter.default
        for name, parameter in inspect.signature(target).parameters.items()
        if name != "params"
    }
    assert stated == defaults


def test_a_damping_schedule_can_be_given_as_an_object(compose_config: Compose) -> None:
    schedule = "{_target_: ngplugin.ExponentialDamping, start: 1.0, end: 0.1, steps: 10}"
    cfg = compose_config("optimizer=natgrad", f"optimizer.damping={schedule}")
    optimizer = instantiate(cfg.optimizer)([torch.nn.Parameter(torch.zeros(1))])
    assert optimizer.options.damping(10) == pytest.approx(0.1)
