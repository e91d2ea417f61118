"""What a fit leaves besides numbers: coverage, pictures, summary, options."""

from __future__ import annotations

import csv
import json
import warnings
from typing import Any

import matplotlib.figure
import pytest

from ngplugin import NaturalGradient, OptionError
from ngplugin.reporting.pictures import PICTURES
from ngplugin.reporting.run_page import run_page
from ngplugin.reporting.run_record import read_run
from ngplugin.tracking.coverage import FILE, log_coverage, read_coverage
from ngplugin.tracking.fit_log import FitLog
from ngplugin.tracking.spectra import read_spectra
from tests.tracking.conftest import Fit, history, records
from tests.tracking.test_metrics import report
from tests.tracking.test_spectra import block


def _logged(fit: Fit) -> dict[str, Any]:
    return {name: value for row in history(fit.wandb) for name, value in row.items()}


def test_the_coverage_table_is_in_every_logger(fit: Fit) -> None:
    cells = [list(row) for row in fit.callback.coverage().cells()]
    assert len(cells) == 6
    assert read_coverage(fit.csv / FILE) == [list(fit.callback.coverage().columns), *cells]
    table = _logged(fit)["natgrad/coverage"]
    assert json.loads((fit.wandb.parent / "files" / table["path"]).read_text())["data"] == cells
    (text,) = fit.tensorboard.Tensors("natgrad/coverage/text_summary")
    written = text.tensor_proto.string_val[0].decode()
    assert all(f"| {row[0]} | {row[1]} | {row[2]} |" in written for row in cells)


def test_a_second_optimizers_rows_are_beside_the_first_ones(fit: Fit, tmp_path: Any) -> None:
    class CSVLogger:
        log_dir = str(tmp_path / "not there yet")

    coverage = fit.callback.coverage()
    for optimizer in (0, 1, 0, 1):  # of two fits
        log_coverage([CSVLogger()], coverage, 0, optimizer)
    path = tmp_path / "not there yet" / FILE
    assert len(list(csv.reader(path.open()))) == 1 + 2 * 6
    assert read_coverage(path, 0) == read_coverage(path, 1)


def test_pictures_and_their_data_are_there_at_the_end(fit: Fit) -> None:
    logged = _logged(fit)
    for name in ("kl-agreement", "block-conditions", "spectra"):
        image = logged[f"natgrad/pictures/{name}"]
        assert (fit.wandb.parent / "files" / image["path"]).stat().st_size > 3000
        (event,) = fit.tensorboard.Images(f"natgrad/pictures/{name}")
        assert event.width > 600
    table = logged["natgrad/block_conditions"]
    rows = json.loads((fit.wandb.parent / "files" / table["path"]).read_text())["data"]
    assert {row[1] for row in rows} == {"net.0.weight", "net.1.weight", "net.2.weight"}
    points = logged["natgrad/kl_agreement_table"]
    assert points["nrows"] == sum(r.kl is not None for r in fit.callback._logs[0].history.reports)


def test_spectra_are_there_of_the_first_step_soon_after_and_of_the_last(fit: Fit) -> None:
    steps = [step for step, _ in fit.callback._logs[0].history.spectra.kept]
    assert steps[0] == 0
    assert 0 < steps[1] < 6
    assert steps[-1] == 11
    assert [step for step, _, _ in read_spectra(fit.csv / "natgrad-spectra.jsonl")] == steps


def test_wandb_has_the_summary_the_diagnosis_and_the_options(fit: Fit) -> None:
    (summary,) = [
        json.loads(item.value_json)
        for record in records(fit.wandb, "summary")
        for item in record.update
        if "natgrad/fit" in (item.key, *item.nested_key)
    ]
    assert summary["steps"] == 12
    assert summary["diagnosis"] == [str(finding) for finding in fit.callback.diagnosis()]
    (options,) = [
        json.loads(item.value_json)
        for record in records(fit.wandb, "config")
        for item in record.update
        if item.key == "natgrad"
    ]
    assert options["kl_radius"] == 0.05
    assert options["lr"] == 1.0
    summed_up = {m.name: m.summary for m in records(fit.wandb, "metric")}
    assert summed_up["natgrad/kl"].max


def test_a_run_is_read_back_from_wandb_alone(fit: Fit) -> None:
    ours, alone = read_run(fit.csv), read_run(fit.wandb.parent)
    assert alone.coverage == ours.coverage
    assert len(alone.spectra) == len(ours.spectra) >= 2
    for (step, blocks), (same, others) in zip(alone.spectra, ours.spectra, strict=True):
        assert step == same
        for one, other in zip(blocks, others, strict=True):
            assert one.name == other.name
            assert one.counts[1:] == pytest.approx(other.counts[1:], abs=1e-4)
            assert one.condition == pytest.approx(other.condition, rel=1e-4)
    names = {name for name in alone.metrics if name.count("/") == 1}
    assert names == {name for name in ours.metrics if name.startswith("natgrad/")}


def test_the_page_of_a_run_has_the_coverage(fit: Fit, tmp_path: Any) -> None:
    page = run_page(read_run(fit.csv)).write(tmp_path).read_text()
    assert "What preconditions each parameter" in page
    assert "<td>net.1.weight" in page.replace('<td class="">', "<td>")


@pytest.mark.parametrize("name", [p.name for p in PICTURES if p.name != "loss"])
def test_pictures_can_be_had_from_the_callback(fit: Fit, name: str) -> None:
    figure, axes = fit.callback.plot(name)
    assert isinstance(figure, matplotlib.figure.Figure)
    assert figure.axes == (axes if isinstance(axes, list) else [axes])


def test_where_there_is_nothing_to_draw_it_says_so(fit: Fit) -> None:
    with pytest.raises(OptionError, match="nothing to draw there"):
        NaturalGradient().plot()
    with pytest.raises(OptionError, match="name='kls': expected one of 'loss', 'kl'"):
        fit.callback.plot("kls")


def test_kl_and_step_scale_are_among_the_callback_metrics(fit: Fit) -> None:
    *_, last = (r for r in fit.callback._logs[0].history.reports if r.kl is not None)
    assert float(fit.metrics["natgrad/kl"]) == pytest.approx(last.kl)
    assert float(fit.metrics["natgrad/step_scale"]) == pytest.approx(last.step_scale)


class Full:
    """A logger without room."""

    def log_metrics(self, metrics: Any, step: int) -> None:
        raise OSError(28, "No space left on device")


class CSVLogger(Full):
    """One that is known by its name; nothing can be made in its folder."""

    log_dir = "/proc/no/folder"


class Counting:
    def __init__(self) -> None:
        self.steps: list[int] = []

    def log_metrics(self, metrics: Any, step: int) -> None:
        self.steps.append(step)


def test_a_logger_that_fails_is_told_of_once_and_hinders_nobody(fit: Fit) -> None:
    counting = Counting()
    log = FitLog(0, [Full(), CSVLogger(), counting])
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        for step in range(4):
            log.step(report(step=step, spectra=(block(),)), step)
        log.coverage(fit.callback.coverage())
        log.end(list)
    assert counting.steps == [0, 1, 2, 3]
    assert log.summary.numbers()["steps"] == 4
    said = [str(warning.message) for warning in told]
    assert [text.split(" could")[0] for text in said] == [
        "ngplugin: metrics", "ngplugin: spectra", "ngplugin: the coverage table",
    ]  # fmt: skip
    assert "(OSError: [Errno 28] No space left on device); training goes on" in said[0]
