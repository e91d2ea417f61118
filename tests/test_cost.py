"""What a step costs: formulas against real tensors, fits against exact laws, the page."""

from __future__ import annotations

import re
import time

import pytest
import torch
from torch import nn

from experiments.cost import __main__ as script
from experiments.cost import growth, linear_algebra, memory
from experiments.cost.growth import Case, Run
from experiments.cost.page import Study
from experiments.cost.pieces import PIECES, Stopwatch
from experiments.cost.power_law import PowerLaw
from experiments.cost.timing import medians
from experiments.cost.workloads import WORKLOADS
from ngplugin import NaturalGradientOptimizer
from ngplugin.curvature.fisher import Fisher

F = torch.nn.functional


# -- fits and timing -------------------------------------------------------------------------------


@pytest.mark.parametrize("exponent", [-1.0, 0.0, 2.0, 2.7])
def test_an_exact_power_law_is_found(exponent):
    sizes = [256, 512, 1024, 4096]
    law = PowerLaw.fit(sizes, [3e-6 * d**exponent for d in sizes])
    assert law.exponent == pytest.approx(exponent, abs=1e-9)
    assert law.coefficient == pytest.approx(3e-6)
    assert law(2048) == pytest.approx(3e-6 * 2048**exponent)


@pytest.mark.parametrize(
    ("sizes", "values"), [([8], [1.0]), ([8, 8], [1.0, 2.0]), ([8, 9], [1, 0])]
)
def test_what_no_power_law_goes_through_is_refused(sizes, values):
    with pytest.raises(ValueError, match="expected two or more"):
        PowerLaw.fit(sizes, values)


def test_alternatives_take_turns_and_the_median_is_of_one_call(monkeypatch):
    """With a clock that only the alternatives move."""
    now, called = 0.0, []

    def run(name, seconds):
        nonlocal now
        called.append(name)
        now += seconds

    monkeypatch.setattr(time, "process_time", lambda: now)
    found = medians({"a": lambda: run("a", 1.0), "b": lambda: run("b", 6e-4)}, 0, least=3)
    assert found == {"a": pytest.approx(1.0), "b": pytest.approx(6e-4)}
    assert called == ["a", "a", "b", "b", *3 * "abbbb"]  # what is fast, several times a sample


def test_pieces_within_pieces_are_counted_once(monkeypatch):
    now = 0.0

    def run(self, inner=None):
        nonlocal now
        now += 1.0
        if inner:
            inner(self)

    monkeypatch.setattr(time, "process_time", lambda: now)
    monkeypatch.setattr(Fisher, "refresh", run)
    monkeypatch.setattr(Fisher, "fold", run)
    with Stopwatch().running() as stopwatch:
        Fisher.refresh(Fisher(), lambda fisher: fisher.fold())
        Fisher.fold(Fisher())
    found = stopwatch.taken()
    assert found == {**dict.fromkeys(PIECES, 0.0), "refresh": 1.0, "statistics": 2.0}
    assert not any(stopwatch.taken().values())
    assert Fisher.refresh is run


# -- linear algebra --------------------------------------------------------------------------------


def test_every_way_to_an_inverse_leads_there():
    torch.manual_seed(0)
    problem = linear_algebra.Problem.of(24, torch.float64)
    exact, V = torch.linalg.inv(problem.matrix), problem.gradient
    torch.testing.assert_close(linear_algebra.inverse_by_cholesky(problem.matrix), exact)
    torch.testing.assert_close(linear_algebra.solve(problem.matrix, V), exact @ V)
    turned = linear_algebra.newton_schulz(problem.matrix, problem.inverse, 12)
    torch.testing.assert_close(turned, exact)
    residuals = problem.residuals()
    assert residuals["Cholesky"] < 1e-12
    assert residuals["Newton-Schulz, one turn"] < residuals["the old inverse"]


def test_orthogonal_iteration_goes_to_the_eigenvectors():
    torch.manual_seed(0)
    problem = linear_algebra.Problem.of(24, torch.float64)
    M, d = problem.matrix, 24
    for sweep in (linear_algebra.by_qr, linear_algebra.by_cholesky_qr):
        U = problem.basis
        for _ in range(2000):
            U = sweep(M, U)
        torch.testing.assert_close(U.mT @ U, torch.eye(d, dtype=M.dtype), atol=1e-8, rtol=0)
        turned = U.mT @ M @ U
        exact = torch.linalg.eigvalsh(M).flip(0)
        torch.testing.assert_close(turned.diagonal(), exact, atol=1e-6, rtol=0)
    residuals = problem.residuals()
    assert residuals["orthogonal iteration, QR"] < residuals["the old basis"]


def test_what_is_timed_computes_what_its_name_says():
    torch.manual_seed(0)
    problem = linear_algebra.Problem.of(16, torch.float32)
    runs = linear_algebra._runs(problem)
    G, V = problem.inverse, problem.gradient
    torch.testing.assert_close(runs["product"](), problem.matrix @ V)
    torch.testing.assert_close(runs["G⁻¹ V A⁻¹"](), G @ V @ G)
    low = runs["G⁻¹ V A⁻¹ of bfloat16, converted there and back"]()
    assert low.dtype == torch.float32
    assert (low - G @ V @ G).norm() < 0.05 * low.norm()
    wider = linear_algebra._inputs(problem)
    for more in linear_algebra.MORE:
        assert wider[f"product, d + {more}"]().shape == (16, 16 + more)
        preconditioned = wider[f"G⁻¹ V A⁻¹, d + {more}"]()
        assert preconditioned.shape == (16, 16 + more)
        inverse = wider[f"cholesky_ex, cholesky_inverse, d + {more}"]()
        torch.testing.assert_close(
            inverse[:16, :16], linear_algebra.inverse_by_cholesky(problem.matrix)
        )
    for run in runs.values():
        run()


# -- growth ----------------------------------------------------------------------------------------


def recorded(natural=10.0, sgd=2.0, steps=20, refresh=40.0):
    pieces = {name: [0.0] * steps for name in PIECES}
    pieces["refresh"][0] = refresh
    pieces["preconditioning"] = [3.0] * steps
    seconds = [natural + found for found in pieces["refresh"]]
    return Run(
        Case("width", 8, 3, 4), 100, 5, 20, 100, seconds, [sgd] * steps, pieces, spectrum=50.0
    )


@pytest.mark.parametrize("steps", [20, 40])
def test_what_is_rare_is_shared_out(steps):
    run = recorded(steps=steps, refresh=2.0 * steps)
    assert run.piece("refresh") == pytest.approx(2.0)
    assert run.piece("condition numbers") == pytest.approx(0.5)
    assert run.rest == pytest.approx(10 - 3 - 2)
    assert run.step == pytest.approx(10 + 2 + 0.5)
    assert run.ratio == pytest.approx(12.5 / 2)
    assert run.median_ratio == pytest.approx(5.0)


def test_the_refresh_of_a_part_of_a_period_counts_as_that_part():
    run = recorded(steps=5)
    assert run.piece("refresh") == pytest.approx(40 / 20)
    assert run.step == pytest.approx(10 + 2 + 0.5)


@pytest.mark.parametrize("case", [Case("width", 16, 3, 8), Case("transformer", 8, 1, 2)])
def test_a_run_meets_every_piece_and_leaves_the_package_as_it_was(case):
    before = {method: getattr(*method) for methods in PIECES.values() for method in methods}
    run = growth.run(case)
    assert len(run.natural) == len(run.sgd) == case.counted
    for name in ("statistics", "refresh", "preconditioning", "KL"):
        assert sum(run.pieces[name]) > 0, name
    assert run.spectrum > 0
    assert run.parameters == sum(p.numel() for p in case.network().parameters())
    assert before == {method: getattr(*method) for method in before}
    again = Run.of(vars(run) | {"case": vars(run.case)})
    assert again == run


def test_statistics_count_by_how_often_they_are_due_and_not_by_how_often_they_fell():
    run = recorded(steps=20)
    run.pieces["statistics"][3::7] = [6.0] * 3
    assert run.piece("statistics") == pytest.approx(6 / 5)
    assert run.floor == pytest.approx((2 + 3) / 2)


def test_periods_are_those_of_the_defaults():
    options = NaturalGradientOptimizer([nn.Parameter(torch.ones(1))]).options
    for case in growth.CASES:
        assert case.counted % options.refresh_every == 0
        assert case.first >= options.refresh_every
        assert case.first + case.counted <= options.spectrum_every


# -- memory ----------------------------------------------------------------------------------------


# The autoencoder and the image have layers of the first one's kinds.
@pytest.mark.parametrize("workload", [*WORKLOADS[:2], *WORKLOADS[3::2]], ids=lambda w: w.name)
def test_formulas_predict_the_bytes_that_are_kept(workload, monkeypatch):
    monkeypatch.setattr(memory, "STEPS", 3)
    found = memory._needed(workload, lambda p: NaturalGradientOptimizer(p))
    module, _ = workload.made()
    shapes = workload.shapes(module)
    assert shapes.parameters == sum(p.numel() for p in module.parameters())
    assert found.kept == pytest.approx(memory.kept(shapes, workload.rows), rel=1e-3)


def test_the_stored_bytes_are_those_of_the_formulas():
    for m in Study(script.stored()).memories:
        assert m.predicted == pytest.approx(m.natural.kept, rel=1e-3), m.workload
        assert m.sgd.kept == m.natural.gradients == m.parameters


def test_bytes_and_their_makers_are_counted():
    counter = memory._Makers()
    with counter:
        kept = torch.ones(100)
        parts = [torch.ones(1000) for _ in range(2)]
        view = parts[0][:10]
    assert counter.alive == counter.made[""] == 400 + 2 * 4000
    assert counter.at_peak == {"": 400 + 2 * 4000}
    del parts
    assert counter.alive == counter.made[""] == 400 + 4000  # the view holds one of them
    del view, kept
    assert counter.alive == counter.made[""] == 0


# -- the page --------------------------------------------------------------------------------------


def test_the_page_has_the_tables_of_the_script():
    page = script.PAGE.read_text()
    tables = Study(script.stored()).tables()
    for name, table in tables.items():
        assert f"<!-- {name} -->\n{table.markdown()}\n<!-- /{name} -->" in page, name
    places = re.findall(r"<!-- (?!/)(.*?) -->", page)
    assert sorted(places) == sorted(tables)


def test_the_script_writes_the_page_and_the_figure(tmp_path, capsys):
    page, figure = tmp_path / "page.md", tmp_path / "figure.png"
    places = re.compile(r"(<!-- (?!/)[^>]*-->)\n.*?\n(<!-- /)", re.DOTALL)
    emptied = places.sub(r"\1\n\2", script.PAGE.read_text())
    page.write_text(emptied)
    assert script.main(["--page", str(page), "--figure", str(figure)]) == 0
    assert page.read_text() == script.PAGE.read_text() != emptied
    assert figure.stat().st_size > 10_000
    assert str(page) in capsys.readouterr().out


def test_a_quick_run_prints_and_writes_nothing(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(memory, "STEPS", 2)
    page = tmp_path / "page.md"
    page.write_text("as it was")
    options = ["--quick", "--measure", "memory", "--page", str(page), "--results", str(tmp_path)]
    assert script.main(options) == 0
    assert page.read_text() == "as it was"
    assert [*tmp_path.iterdir()] == [page]
    assert "digits_mlp" in capsys.readouterr().out
