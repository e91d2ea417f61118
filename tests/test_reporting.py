"""What a run has left, read back, drawn, and put on a page."""

from __future__ import annotations

import html.parser
import json
import math
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.loggers import CSVLogger, WandbLogger
from torch import nn

from ngplugin import NaturalGradient
from ngplugin.command_line import main
from ngplugin.reporting import wandb_file
from ngplugin.reporting.comparison import comparison_page
from ngplugin.reporting.leaderboard import (
    higher_is_better,
    leaderboard,
    read_sweep,
    write_leaderboard,
)
from ngplugin.reporting.pictures import PICTURES
from ngplugin.reporting.run_page import run_page
from ngplugin.reporting.run_record import RunNotFoundError, read_run
from tests.browser import needs_chromium, opened


class Classifier(L.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3))

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        (x,) = batch
        loss = nn.functional.cross_entropy(self.net(x), (x[:, 0] > 0).long())
        self.log("train/loss", loss)
        self.log("train/seconds", float(self.global_step))
        return loss

    def train_dataloader(self) -> Any:
        generator = torch.Generator().manual_seed(0)
        data = torch.utils.data.TensorDataset(torch.randn(160, 6, generator=generator))
        return torch.utils.data.DataLoader(data, batch_size=8)

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, NaturalGradient]:
    """The folder of a run that a CSVLogger and an offline wandb have written to."""
    folder = tmp_path_factory.mktemp("runs") / "a run"
    callback = NaturalGradient(show_coverage=False, show_summary=False, spectrum_every=10)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("WANDB_SILENT", "true")
        loggers = [
            CSVLogger(folder, "csv", version=""),
            WandbLogger(
                save_dir=folder, offline=True, mode="offline", project="test", config={"rate": 0.1}
            ),
        ]
        L.Trainer(
            max_epochs=3, logger=loggers, accelerator="cpu", enable_checkpointing=False,
            enable_progress_bar=False, enable_model_summary=False, log_every_n_steps=5,
            callbacks=[callback],
        ).fit(Classifier())  # fmt: skip
        loggers[1].experiment.finish()
    return folder, callback


def test_what_is_read_back_is_what_was_logged(trained: tuple[Path, NaturalGradient]) -> None:
    folder, callback = trained
    run = read_run(folder)
    assert run.natural
    assert run.metrics["natgrad/kl_radius"].steps == [*range(60)]
    assert run.metrics["train/loss"].steps == [*range(4, 60, 5)]
    assert run.seconds(run.metrics["train/loss"]) == run.metrics["train/loss"].steps
    logged, known = run.numbers(), callback.summary()
    assert logged.keys() == known.keys()
    for name, value in known.items():
        # What was measured may be shared out among steps in another way: seconds are not logged.
        if name not in ("overhead", "step_seconds"):
            assert logged[name] == pytest.approx(value, rel=1e-4), name
    assert len(run.spectra) >= 4
    assert [block.name for block in run.spectra[0][1]] == ["net.0.weight", "net.2.weight"]


def test_an_offline_wandb_file_says_the_same(trained: tuple[Path, NaturalGradient]) -> None:
    folder, _ = trained
    (path,) = folder.rglob("*.wandb")
    alone = read_run(path.parent)
    table = read_run(folder)
    for name in ("natgrad/kl", "natgrad/kl_radius", "train/loss"):
        assert alone.metrics[name].steps == table.metrics[name].steps
        assert alone.metrics[name].values == pytest.approx(table.metrics[name].values)
    assert alone.config["rate"] == 0.1


def test_records_span_blocks_and_cut_files_are_read_as_far_as_they_go() -> None:
    content, expected = bytearray(b":W&B\0\0\0"), []
    for size in (10, 40_000, 3, 70_000, 32_000):
        data = bytes([size % 251]) * size
        expected.append(data)
        left = data
        first = True
        while first or left:
            room = 32 * 1024 - len(content) % (32 * 1024)
            if room < 7:
                content += b"\0" * room
                continue
            piece, left = left[: room - 7], left[room - 7 :]
            kind = {(True, True): 1, (True, False): 2, (False, False): 3, (False, True): 4}
            head = bytes(4) + len(piece).to_bytes(2, "little")
            content += head + bytes([kind[first, not left]]) + piece
            first = False
    assert [*wandb_file.records(bytes(content))] == expected
    assert [*wandb_file.records(bytes(content[:-1]))] == expected[:-1]


def test_every_picture_is_drawn_of_a_run_and_none_of_nothing(
    trained: tuple[Path, NaturalGradient], tmp_path: Path
) -> None:
    run = read_run(trained[0])
    page = run_page(run)
    assert [picture.name for picture in page.pictures] == [picture.name for picture in PICTURES]
    path = page.write(tmp_path)
    assert path == tmp_path / "report.html"
    for picture in PICTURES:
        assert (tmp_path / "pictures" / f"{picture.name}.png").stat().st_size > 3000
    run.metrics.clear()
    run.spectra.clear()
    assert not run_page(run).pictures


class _Tags(html.parser.HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []
        self.links: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.append(tag)
        self.links += [v for n, v in attrs if n in ("src", "href", "xlink:href") and v is not None]


def test_the_page_needs_nothing_else_and_is_the_same_each_time(
    trained: tuple[Path, NaturalGradient], tmp_path: Path
) -> None:
    texts = [run_page(read_run(trained[0])).write(tmp_path / n).read_text() for n in "ab"]
    assert texts[0] == texts[1]
    tags = _Tags()
    tags.feed(texts[0])
    assert tags.seen.count("svg") == len(PICTURES)
    assert "script" not in tags.seen
    assert all(link.startswith(("#", "data:")) for link in tags.links)


def test_what_is_in_names_is_no_markup(
    trained: tuple[Path, NaturalGradient], tmp_path: Path
) -> None:
    run = read_run(trained[0])
    run.metrics, run.spectra = {}, []  # without pictures
    run.config = {"title": "<script>alert(1)</script>"}
    text = run_page(run, "<b>bold</b>").write(tmp_path).read_text()
    assert "<script>" not in text
    assert "&lt;b&gt;bold" in text


@needs_chromium
def test_a_browser_shows_the_pages_without_complaint(
    trained: tuple[Path, NaturalGradient], tmp_path: Path
) -> None:
    path = run_page(read_run(trained[0])).write(tmp_path)
    assert opened(path.as_uri(), tmp_path).count("<svg") == len(PICTURES)
    sweep(tmp_path / "sweep", {"adamw": [0.3, 0.5], "natgrad": [0.1, 0.2]})
    page = comparison_page(tmp_path / "sweep")
    shown = opened(page.write(tmp_path / "sweep").as_uri(), tmp_path)
    assert shown.count("<svg") == len(page.pictures) >= 4


# -- several runs --------------------------------------------------------------------------------


def sweep(folder: Path, settings: dict[str, list[float]], step: int = 1) -> None:
    """Runs of settings, one for each loss at the end."""
    for i, (setting, ends) in enumerate(settings.items()):
        for seed, end in enumerate(ends):
            run = folder / f"{i}-{seed}"
            (run / ".hydra").mkdir(parents=True)
            overrides = [f"optimizer={setting}", f"seed={seed}", "model=mlp"]
            (run / ".hydra" / "overrides.yaml").write_text(json.dumps(overrides))
            rows = ["step,train/loss,val/accuracy,train/seconds"]
            rows += [
                f"{s},{end + (10 - s) / 10},{1 - end},{s * (i + 1)}" for s in range(0, 11, step)
            ]
            (run / "metrics.csv").write_text("\n".join(rows) + "\n")
            (run / "results.json").write_text(json.dumps({"test/loss": end, "steps": 10}))


def test_runs_are_grouped_by_what_is_not_the_same_in_all(tmp_path: Path) -> None:
    sweep(tmp_path, {"adamw": [0.3, 0.5], "natgrad": [0.1, 0.2]})
    (tmp_path / "unfinished").mkdir()
    groups = read_sweep(tmp_path)
    assert [group.label for group in groups] == ["optimizer=adamw", "optimizer=natgrad"]
    assert [len(group.runs) for group in groups] == [2, 2]
    ranked = leaderboard(groups, "test/loss")
    assert [g.label for g, _, _ in ranked] == ["optimizer=natgrad", "optimizer=adamw"]
    assert ranked[0][1:] == pytest.approx((0.15, math.sqrt(0.005)))
    assert leaderboard(groups, "val/accuracy")[0][0].label == "optimizer=natgrad"


def test_the_comparison_has_curves_a_table_and_winners(tmp_path: Path) -> None:
    sweep(tmp_path, {"adamw": [0.3, 0.5], "natgrad": [0.1, 0.2]})
    page = comparison_page(tmp_path)
    (board,) = page.tables
    assert board.head == [
        "setting",
        "runs",
        "test/loss",
        "steps",
        "train/loss",
        "train/seconds",
        "val/accuracy",
    ]
    assert [row[0] for row in board.rows] == ["optimizer=natgrad", "optimizer=adamw"]
    assert board.rows[0][2] == "0.15 ± 0.071"
    assert getattr(board.rows[0][2], "best", False)
    assert not getattr(board.rows[1][2], "best", False)
    assert getattr(board.rows[0][6], "best", False)  # of accuracy the most
    names = [picture.name for picture in page.pictures]
    assert names[:2] == ["train-loss-steps", "train-loss-seconds"]
    text = page.write(tmp_path).read_text()
    assert "optimizer=natgrad" in text
    write_leaderboard(tmp_path / "board.json", read_sweep(tmp_path), ["test/loss"])
    stored = json.loads((tmp_path / "board.json").read_text())
    assert stored[1]["metrics"]["test/loss"]["values"] == [0.1, 0.2]


def test_a_search_has_short_labels_and_the_curves_of_its_best(tmp_path: Path) -> None:
    ends = [0.01 + 0.1 * ((i * 5) % 12) / 12 for i in range(12)]
    for i, end in enumerate(ends):
        run = tmp_path / f"{i}-natgrad"
        (run / ".hydra").mkdir(parents=True)
        radius = 0.0123456789012345 * (i + 1)
        overrides = [f"optimizer.kl_radius={radius}", f"optimizer.lr={i}", f"callbacks.lr={i}"]
        (run / ".hydra" / "overrides.yaml").write_text(json.dumps(overrides))
        (run / "metrics.csv").write_text(f"step,val/loss\n0,1.0\n10,{end}\n")
        (run / "results.json").write_text(json.dumps({"val/loss": end}))
    page = comparison_page(tmp_path, "val/loss")
    groups = read_sweep(tmp_path)
    # In the order of their numbers, 2 before 10; a word that two keys end with does not do.
    assert groups[10].label == "kl_radius=0.136, optimizer.lr=10, callbacks.lr=10"
    assert groups[10].setting.startswith("optimizer.kl_radius=0.13580246791357")
    assert page.tables[0].head[2] == "val/loss"
    assert [float(row[2]) for row in page.tables[0].rows] == [
        float(f"{e:.4g}") for e in sorted(ends)
    ]
    (picture,) = page.pictures
    assert picture.caption.endswith("The first 8 of 12 settings.")
    legend = [text.get_text() for text in picture.figure.axes[0].get_legend().get_texts()]
    assert legend == [row[0] for row in page.tables[0].rows[:8]]
    assert comparison_page(tmp_path, "val/loss", higher=True).tables[0].rows[-1][0] == legend[0]


def test_runs_that_were_stopped_come_last(tmp_path: Path) -> None:
    sweep(tmp_path, {"adamw": [0.3], "natgrad": [0.1], "sgd": [0.4]})
    stopped = {"test/loss": 0.1, "steps": 5, "stopped/step": 5}
    (tmp_path / "1-0" / "results.json").write_text(json.dumps(stopped))
    (board,) = comparison_page(tmp_path, "test/loss").tables
    labels = ["optimizer=adamw", "optimizer=sgd", "optimizer=natgrad (stopped early)"]
    assert [row[0] for row in board.rows] == labels
    assert getattr(board.rows[0][2], "best", False)


def test_labels_that_would_be_the_same_are_written_out(tmp_path: Path) -> None:
    sweep(tmp_path, {"adamw optimizer.lr=0.10000001": [0.3], "adamw optimizer.lr=0.1": [0.1]})
    for i, lr in enumerate(("0.10000001", "0.10000002")):
        path = tmp_path / f"{i}-0" / ".hydra" / "overrides.yaml"
        path.write_text(json.dumps([f"optimizer.lr={lr}", "seed=0"]))
    labels = [group.label for group in read_sweep(tmp_path)]
    assert labels == ["optimizer.lr=0.10000001", "optimizer.lr=0.10000002"]


def test_runs_that_did_not_end_are_left_out_and_numbers_that_are_not_finite_counted(
    tmp_path: Path,
) -> None:
    sweep(tmp_path, {"adamw": [0.3, 0.5], "natgrad": [0.1, 0.2], "sgd": [0.4]})
    (tmp_path / "1-1" / "results.json").unlink()
    diverged = {"test/loss": None, "steps": 10}
    (tmp_path / "0-1" / "results.json").write_text(json.dumps(diverged))
    (tmp_path / "2-0" / "results.json").write_text(json.dumps(diverged))
    (board,) = comparison_page(tmp_path, "test/loss").tables
    assert [row[:3] for row in board.rows] == [
        ["optimizer=natgrad", "1", "0.1"],
        ["optimizer=adamw", "2", "0.3 (1 of 2)"],
        ["optimizer=sgd", "1", "–"],
    ]


@pytest.mark.parametrize(
    ("metric", "higher"),
    [("val/accuracy", True), ("psnr", True), ("val/loss", False), ("test/rmse", False)],
)
def test_what_is_better_follows_from_the_name(metric: str, higher: bool) -> None:
    assert higher_is_better(metric) == higher


def test_without_seconds_there_are_no_curves_against_them(tmp_path: Path) -> None:
    sweep(tmp_path, {"adamw": [0.3], "natgrad": [0.1]})
    for path in tmp_path.rglob("metrics.csv"):
        path.write_text(path.read_text().replace("train/seconds", "other"))
    names = [picture.name for picture in comparison_page(tmp_path).pictures]
    assert "train-loss-steps" in names
    assert "train-loss-seconds" not in names


# -- the command ---------------------------------------------------------------------------------


def test_the_command_writes_the_page_of_a_run_and_of_a_sweep(
    trained: tuple[Path, NaturalGradient], tmp_path: Path, capsys: Any
) -> None:
    assert main(["report", str(trained[0]), "--output", str(tmp_path / "one")]) == 0
    assert capsys.readouterr().out.strip() == str(tmp_path / "one" / "report.html")
    sweep(tmp_path / "sweep", {"adamw": [0.3], "natgrad": [0.1]})
    assert main(["report", str(tmp_path / "sweep")]) == 0
    assert "2 settings, 2 runs" in (tmp_path / "sweep" / "report.html").read_text()


@pytest.mark.parametrize("there", [True, False])
def test_where_there_is_nothing_it_says_so(there: bool, tmp_path: Path, capsys: Any) -> None:
    folder = tmp_path / "nothing"
    if there:
        folder.mkdir()
    assert main(["report", str(folder)]) == 1
    said = capsys.readouterr().err
    assert str(folder) in said
    assert "expected the folder of a" in said
    with pytest.raises(RunNotFoundError):
        read_run(folder)
