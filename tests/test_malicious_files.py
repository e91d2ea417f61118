"""Nothing here runs what a file says: pickles, expressions and tags are data, or refused."""

from __future__ import annotations

import ast
import inspect
import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn
from torch.utils.data import DataLoader

from ngplugin import NaturalGradient, NaturalGradientOptimizer
from ngplugin.command_line import _assigned
from ngplugin.reporting.run_record import read_run
from tests.environment import REPOSITORY
from tests.small_fits import POINTS, Points, quiet

supports = pytest.mark.supports
refuses = pytest.mark.refuses

# -- checkpoints -----------------------------------------------------------------------------------


class Bomb:
    """Whoever unpickles it makes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return (Path.touch, (self.path,))


def with_bomb(checkpoint: dict[str, Any], place: str, path: Path) -> dict[str, Any]:
    bomb = Bomb(path)
    match place:
        case "natural gradient":
            checkpoint["optimizer_states"][0]["natgrad"]["momentum"][0] = bomb
        case "callbacks":
            checkpoint["callbacks"]["NaturalGradient{'optimizers': None}"] = {"natgrad": [bomb]}
        case "key":
            checkpoint["optimizer_states"][0]["natgrad"][bomb] = 1
        case "anywhere":
            checkpoint["more"] = bomb
    return checkpoint


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("good")
    natural = NaturalGradient(show_coverage=False, show_summary=False)
    saving = ModelCheckpoint(folder, save_last=True)
    quiet(natural, saving, max_epochs=1, enable_checkpointing=True).fit(
        Points(), DataLoader(POINTS, 16)
    )
    return folder / "last.ckpt"


@refuses("Checkpoints", "a pickle that would run code, anywhere in a file")
@pytest.mark.parametrize("place", ["natural gradient", "callbacks", "key", "anywhere"])
def test_a_pickle_that_runs_code_is_refused(place: str, good: Path, tmp_path: Path) -> None:
    struck = tmp_path / "struck"
    path = tmp_path / "bomb.ckpt"
    torch.save(with_bomb(torch.load(good, weights_only=True), place, struck), path)
    with pytest.raises(pickle.UnpicklingError, match="weights_only"):
        torch.load(path, weights_only=True)
    # Older Lightnings read all that is in a file.
    for options in [{}, {"weights_only": True}] if takes_weights_only() else []:
        trainer = quiet(NaturalGradient(show_coverage=False), max_epochs=2)
        with pytest.raises(pickle.UnpicklingError, match="weights_only"):
            trainer.fit(Points(), DataLoader(POINTS, 16), ckpt_path=path, **options)
    assert not struck.exists()
    torch.load(path, weights_only=False)
    assert struck.exists()  # it would have


def takes_weights_only() -> bool:
    return "weights_only" in inspect.signature(quiet().fit).parameters


@supports("Checkpoints", "plain tensors, numbers and words, whatever the options")
@pytest.mark.parametrize(
    "options",
    [
        {}, {"structure": "exact"}, {"structure": "eigen"}, {"structure": "diagonal"},
        {"structure": "identity"}, {"structure": "matrix-free"}, {"step_size": "line-search"},
        {"structure": "kronecker", "step_size": "quadratic"}, {"noise_variance": "running"},
        {"overhead": 0.01, "rank": 2, "structure": "kronecker"}, {"max_factor": 4},
        {"kl_radius": None}, {"damping": "auto", "structure": "exact"},
    ],
    ids=str,
)  # fmt: skip
def test_a_state_is_plain(options: dict[str, Any], tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(5, 6), nn.Linear(6, 8), nn.LayerNorm(8), nn.Linear(8, 2))
    optimizer = NaturalGradientOptimizer(model.parameters(), **options)
    for _ in range(3):
        with optimizer.observe():
            loss = nn.functional.cross_entropy(model(torch.arange(20) % 5), torch.arange(20) % 2)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    state = optimizer.state_dict()
    kinds = {type(leaf) for leaf in leaves(state)}
    assert kinds <= {torch.Tensor, int, float, bool, str, type(None)}
    assert not any(leaf.requires_grad for leaf in leaves(state) if isinstance(leaf, torch.Tensor))
    torch.save(state, tmp_path / "state.pt")
    torch.load(tmp_path / "state.pt", weights_only=True)


def leaves(tree: Any) -> Iterator[Any]:
    if type(tree) in (dict, list, tuple, torch.Size):
        for key in tree if type(tree) is dict else ():
            assert type(key) in (str, int)
        for value in tree.values() if type(tree) is dict else tree:
            yield from leaves(value)
    else:
        yield tree


# -- configs and runs ------------------------------------------------------------------------------


def test_a_config_with_a_tag_that_runs_code_is_no_config(tmp_path: Path) -> None:
    (tmp_path / "csv").mkdir()
    (tmp_path / "csv/metrics.csv").write_text("step,natgrad/kl\n0,0.01\n")
    struck = tmp_path / "struck"
    tag = "!!python/object/apply"
    text = f"optimizer: {tag}:pathlib.Path.touch [{tag}:pathlib.Path ['{struck}']]\n"
    (tmp_path / "config.yaml").write_text(text)
    with pytest.raises(yaml.YAMLError):
        read_run(tmp_path)
    assert not struck.exists()


@pytest.mark.parametrize(
    "text", ["__import__('os').system('false')", "(lambda: 1)()", "1 if True else 2"]
)
def test_values_on_the_command_line_are_words_and_not_run(text: str) -> None:
    assert _assigned([f"x={text}"]) == {"x": text}


# -- sources ---------------------------------------------------------------------------------------

SOURCES = [
    *(REPOSITORY / "src").rglob("*.py"), *(REPOSITORY / "experiments").rglob("*.py"),
    *(REPOSITORY / "hydra_plugins").rglob("*.py"), *(REPOSITORY / "examples").rglob("*.py"),
    REPOSITORY / "train.py",
]  # fmt: skip
#: Modules whose loading runs what a file says.
RUNNERS = {"pickle", "cPickle", "dill", "cloudpickle", "shelve", "marshal", "joblib", "jsonpickle"}
RUNNING = {"eval", "exec", "compile", "__import__"}
#: Of a module: what loads safely only with an argument, and with which.
GUARDED = {"torch.load": ("weights_only", True), "np.load": ("allow_pickle", False),
           "numpy.load": ("allow_pickle", False)}  # fmt: skip
FORBIDDEN = {"yaml.load", "yaml.unsafe_load", "yaml.full_load", "pandas.read_pickle",
             "pd.read_pickle", "torch.jit.load", "torch.package.PackageImporter"}  # fmt: skip


def complaints(source: str) -> list[str]:
    """What of a program may run what a file says."""
    found: list[str] = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found += [a.name for a in node.names if a.name.split(".")[0] in RUNNERS]
        elif isinstance(node, ast.ImportFrom) and node.module:
            found += [node.module] if node.module.split(".")[0] in RUNNERS else []
            names = {f"{node.module}.{a.name}" for a in node.names}
            found += sorted(names & (FORBIDDEN | GUARDED.keys()))
        elif isinstance(node, ast.Call):
            name = ast.unparse(node.func)
            given = {k.arg: getattr(k.value, "value", None) for k in node.keywords}
            if name in RUNNING or name in FORBIDDEN:
                found.append(name)
            elif name in GUARDED:
                argument, value = GUARDED[name]
                found += [] if given.get(argument) is value else [name]
            elif name.endswith("load_from_checkpoint") and given.get("weights_only") is not True:
                found.append(name)
    return found


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(REPOSITORY)))
def test_no_source_file_runs_what_a_file_says(path: Path) -> None:
    found = complaints(path.read_text(encoding="utf-8"))
    # They run this repository's own sources, with a change in each.
    ours = {"compile", "exec"} if path.parent.name == "mutants" else set()
    assert [name for name in found if name not in ours] == []


@pytest.mark.parametrize(
    "source",
    [
        "eval(text)", "exec(text)", "import pickle", "from dill import loads", "yaml.load(file)",
        "torch.load(path)", "torch.load(path, weights_only=False)", "from torch import load",
        "np.load(path)", "np.load(path, allow_pickle=True)", "pd.read_pickle(path)",
        "Module.load_from_checkpoint(path)",
    ],
)  # fmt: skip
def test_what_would_run_it_is_found(source: str) -> None:
    assert complaints(source)
