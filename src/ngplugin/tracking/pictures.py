"""What can only be drawn of a whole fit, to the loggers that can show it, when it ends."""

from __future__ import annotations

import io
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from ngplugin.diagnosis import Finding
from ngplugin.history import History
from ngplugin.tracking.kinds import kind
from ngplugin.tracking.metrics import prefix

_DRAWN = ("kl-agreement", "block-conditions", "spectra")


def log_end(
    loggers: Iterable[Any],
    history: History,
    numbers: Mapping[str, float | None],
    findings: Sequence[Finding],
    step: int,
    optimizer: int = 0,
) -> None:
    """Write pictures, summary and diagnosis of a fit.

    wandb gets a scatter plot of measured against predicted KL that can be pointed at, a table of
    the condition numbers of blocks by step, and numbers and diagnosis in the run's summary;
    TensorBoard the diagnosis as a text; both the pictures, if matplotlib is there. Other loggers
    have nothing to show them with.

    Args:
        loggers: a trainer's.
        history: of the fit.
        numbers: it in a few, `Summary.numbers`.
        findings: its diagnosis.
        step: on the loggers' axis.
        optimizer: whose, of several.
    """
    showing = [(logger, kind(logger)) for logger in loggers]
    showing = [(logger, of) for logger, of in showing if of in ("wandb", "tensorboard")]
    if not showing or not history.reports:
        return
    images = _images(history)
    for logger, of in showing:
        if of == "wandb":
            _to_wandb(logger.experiment, history, numbers, findings, images, step, optimizer)
        else:
            _to_tensorboard(logger.experiment, findings, images, step, optimizer)


def _to_wandb(
    run: Any,
    history: History,
    numbers: Mapping[str, float | None],
    findings: Sequence[Finding],
    images: Mapping[str, Any],
    step: int,
    optimizer: int,
) -> None:
    import wandb

    name = prefix(optimizer)
    found: dict[str, Any] = {"trainer/global_step": step}
    pairs = [
        [math.log10(report.kl_predicted), math.log10(report.kl), report.step]
        for report in history.reports
        if report.kl is not None and report.kl > 0 and report.kl_predicted > 0
    ]
    if pairs:
        x, y = "log10 predicted KL", "log10 measured KL"
        table = wandb.Table(columns=[x, y, "step"], data=pairs)
        title = "measured against predicted KL"
        found[f"{name}kl_agreement"] = wandb.plot.scatter(table, x, y, title)
    conditions = [
        [at, block.name, math.log10(block.condition)]
        for at, blocks in history.spectra.kept
        for block in blocks
        if math.isfinite(block.condition)
    ]
    if conditions:
        found[f"{name}block_conditions"] = wandb.Table(
            columns=["step", "block", "log10 condition number"], data=conditions
        )
    for picture, image in images.items():
        found[f"{name}pictures/{picture}"] = wandb.Image(image)
    run.log(found)
    known = {key: value for key, value in numbers.items() if value is not None}
    run.summary.update({f"{name}fit": {**known, "diagnosis": [str(f) for f in findings]}})


def _to_tensorboard(
    writer: Any, findings: Sequence[Finding], images: Mapping[str, Any], step: int, optimizer: int
) -> None:
    name = prefix(optimizer)
    if findings:
        writer.add_text(f"{name}diagnosis", "\n".join(f"- {each}" for each in findings), step)
    for picture, image in images.items():
        import numpy as np  # matplotlib needs it too

        writer.add_image(f"{name}pictures/{picture}", np.asarray(image), step, dataformats="HWC")


def _images(history: History) -> dict[str, Any]:
    """Pictures as Pillow has them; none without matplotlib, which needs Pillow too."""
    try:
        from PIL import Image

        from ngplugin.reporting.pictures import PICTURES
        from ngplugin.reporting.run_record import record_of
    except ImportError:
        return {}
    record, images = record_of(history), {}
    for each in PICTURES:
        figure = each.draw(record) if each.name in _DRAWN else None
        if figure is not None:
            file = io.BytesIO()
            figure.savefig(file, format="png", dpi=120)
            images[each.name] = Image.open(file).convert("RGB")
    return images
