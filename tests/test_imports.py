"""Imports run downward only, and importing the package is cheap."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import ngplugin

ROOT = Path(ngplugin.__file__).parent

# From the ground up. What shares a floor may not import each other, unless it is one package.
FLOORS = [
    {"errors"},
    {
        "curvature.random_state",
        "curvature.subclasses",
        "curvature.ranks",
        "curvature.dependence",
        "curvature.hidden_backward",
        "curvature.factorization",
        "curvature.process_wide",
        "curvature.weak_tensors",
    },
    {"curvature.activation_checkpointing"},
    {"curvature.recorded_call"},
    {
        "curvature.likelihoods",
        "curvature.taps",
        "curvature.tape",
        "curvature.average",
        "curvature.composites",
        "curvature.pace",
        "curvature.parameter_vector",
        "curvature.products",
        "curvature.spectrum",
    },
    {"curvature.tail"},
    {"curvature.blocks", "curvature.observation", "curvature.conjugate_gradients"},
    {
        "curvature.static_graph",
        "curvature.score_backward",
        "curvature.matrix_free",
        "curvature.uses",
    },
    {"curvature.observe", "curvature.jacobian"},
    {"curvature.block_choice", "curvature.exact_rows"},
    {"curvature.sharing"},
    {"curvature.fisher", "curvature.objective"},
    {"curvature"},
    {
        "damping",
        "declaration",
        "saved_places",
        "saved_state",
        "trust_region",
        "momentum",
        "report",
        "kl_measurement",
        "nat_worth",
        "step_group",
        "usable_parameters",
        "objective_check",
        "layer_balance",
        "move",
        "direction",
        "unmeasured_step",
    },
    {"geodesic_acceleration", "solver"},
    {"options", "proposal"},
    {"step_length"},
    {"step_watch"},
    {"coverage", "natural_step"},
    {"optimizer"},
    {"tracking.kinds", "summary", "diagnosis", "history"},
    {"tracking.metrics", "tracking.alerts"},
    {"tracking.spectra", "tracking.coverage"},
    {"reporting"},
    {"tracking.pictures"},
    {"tracking"},
    {"lightning"},
    {"callbacks_factory", "command_line"},
]
OPTIONAL = {
    "lightning", "pytorch_lightning", "hydra", "omegaconf", "wandb", "rich", "torchmetrics",
    "matplotlib", "jinja2", "yaml", "PIL", "numpy",
}  # fmt: skip


def modules():
    for path in sorted(ROOT.rglob("*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        name = ".".join(part for part in parts if part != "__init__")
        if name and not name.startswith("conf"):
            yield name, path


def imports(path):
    """Absolute names of everything a file imports, wherever in the file."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path.name}: relative import"
            for alias in node.names:
                # `from package import module` names a module only by both parts together.
                whole = f"{node.module}.{alias.name}"
                inside = ROOT.parent / Path(*whole.split("."))
                known = inside.with_suffix(".py").exists() or inside.is_dir()
                yield whole if known else node.module


def floor(name):
    """The floor and the house of a module: the longest entry that its name begins with."""
    houses = [h for level in FLOORS for h in level if name == h or name.startswith(h + ".")]
    house = max(houses, key=len)
    return next(i for i, level in enumerate(FLOORS) if house in level), house


def ours(path):
    return [n.removeprefix("ngplugin.") for n in imports(path) if n.startswith("ngplugin.")]


def test_every_module_has_a_floor():
    for name, _ in modules():
        assert floor(name), name


@pytest.mark.parametrize("name", [name for name, _ in modules()])
def test_imports_run_downward_only(name):
    level, house = floor(name)
    for other in ours(dict(modules())[name]):
        other_level, other_house = floor(other)
        assert other_level < level or other_house == house, f"{name} imports {other}"


def test_only_lightning_and_what_writes_to_loggers_know_anything_but_torch():
    for name, path in modules():
        if name.split(".")[0] in ("lightning", "tracking", "reporting"):
            continue
        foreign = {n.split(".")[0] for n in imports(path)} & OPTIONAL
        assert not foreign, f"{name} imports {foreign}"


def test_curvature_knows_nothing_of_the_upper_floors():
    for name, path in modules():
        if name.startswith("curvature"):
            assert all(other.startswith("curvature") for other in ours(path)), name


def in_a_fresh_interpreter(program):
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    return done.stdout.split()


def test_importing_the_package_loads_nothing_that_a_plain_loop_does_without():
    names = repr(sorted(OPTIONAL))
    assert (
        in_a_fresh_interpreter(
            f"import sys, ngplugin; print(*[name for name in {names} if name in sys.modules])"
        )
        == []
    )


def test_every_public_name_is_there_and_no_other():
    assert all(getattr(ngplugin, name).__name__ == name for name in ngplugin.__all__)
    with pytest.raises(AttributeError, match="no attribute 'NaturalGradients'"):
        _ = ngplugin.NaturalGradients
