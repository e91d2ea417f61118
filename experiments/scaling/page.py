"""The tables of `docs/scaling.md`."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from experiments.scaling.blocks import blocks
from experiments.scaling.calibration import Calibration
from experiments.scaling.costs import Cost, cost, curved_share, pace
from experiments.scaling.devices import DEVICES, TF32, Device
from experiments.scaling.measure import SMALL, this_machine
from experiments.scaling.models import MODELS, Model
from experiments.scaling.protocol import Protocol, Structure
from experiments.scaling.table import Table

RANKS = (1, 8, 64, 1024)
STRUCTURES: tuple[Structure, ...] = (
    "adamw", "identity", "diagonal", "kronecker", "eigen", "matrix-free",
)  # fmt: skip
_NAMES = {"adamw": "AdamW"}


@dataclass(frozen=True)
class Lever:
    """A change to what is, on paper.

    Attributes:
        name: as the table has it.
        protocol: fields of `Protocol`.
        tf32: whether products of float32 statistics are in TF32.
        update: bytes that the update moves for each parameter, None for what was counted.
    """

    name: str
    protocol: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    tf32: bool = False
    update: float | None = None


_RARELY = {"statistics_every": 20, "refresh_every": 100, "spectrum_every": 1000}
LEVERS = (
    Lever("as it is"),
    Lever('`torch.set_float32_matmul_precision("high")`', tf32=True),
    Lever("`spectrum_every=1000`", {"spectrum_every": 1000}),
    Lever(
        "`statistics_every=20, refresh_every=100`", {"statistics_every": 20, "refresh_every": 100}
    ),
    Lever("these three", _RARELY, tf32=True),
    Lever("these three, 8 micro-batches a step", {**_RARELY, "accumulate": 8}, tf32=True),
    Lever(
        "these three, products divided among ranks (not implemented)",
        {**_RARELY, "sharded_products": True},
        tf32=True,
    ),
    Lever(
        "the same, and 100 bytes moved a parameter (not implemented)",
        {**_RARELY, "sharded_products": True},
        tf32=True,
        update=100.0,
    ),
)


@dataclass(frozen=True)
class Study:
    """What is costed, with what.

    Attributes:
        record: what was counted and measured.
        device: of the results; the table of assumptions has all.
        protocol: of the optimizer.
        models: by name.
    """

    record: dict[str, Any]
    device: Device
    protocol: Protocol
    models: dict[str, Model]

    @staticmethod
    def usual(record: dict[str, Any]) -> Study:
        """What the page shows."""
        return Study(record, DEVICES["a100"], Protocol(), dict(MODELS))

    @property
    def calibration(self) -> Calibration:
        """From the record."""
        return Calibration.of(self.record)

    def cost(self, model: Model, structure: Structure, ranks: int) -> Cost:
        """Of one step."""
        return cost(model, structure, ranks, self.device, self.calibration, self.protocol)

    def with_lever(self, lever: Lever) -> Study:
        """The same after a change."""
        changed = replace(self, protocol=replace(self.protocol, **lever.protocol))
        tf32 = {device.name: TF32[name] for name, device in DEVICES.items()}
        if lever.tf32 and self.device.name in tf32:
            changed = replace(changed, device=replace(self.device, gram=tf32[self.device.name]))
        if lever.update is not None:
            traffic = {
                name: {**numbers, "update_parameter": lever.update, "curved_parameter": 0.0}
                for name, numbers in self.record["traffic"].items()
            }
            changed = replace(changed, record={**self.record, "traffic": traffic})
        return changed

    # -- tables --------------------------------------------------------------------------------

    def tables(self) -> dict[str, Table]:
        """All, by the names of their places in the page."""
        return {
            "summary": self.summary(),
            "assumptions": self.assumptions(),
            "counted": self.counted(),
            "checked": self.checked(),
            "shapes": self.shapes(),
            **{f"results {name}": self.results(model) for name, model in self.models.items()},
            "parts": self.parts(),
            "levers": self.levers(),
            "memory": self.memory(),
        }

    def summary(self) -> Table:
        """The Kronecker block on 64 devices, on both kinds of them."""
        table = Table(
            "Kronecker blocks on 64 ranks",
            ("model", "GB: AdamW", "GB: natural gradient", "in 80 GB",
             *(f"overhead: {d.name}" for d in DEVICES.values()),
             *(f"with the settings below: {d.name}" for d in DEVICES.values())),
        )  # fmt: skip
        for model in self.models.values():
            adamw, natural = (self.cost(model, s, 64) for s in ("adamw", "kronecker"))
            shares = []
            for lever in (LEVERS[0], LEVERS[4]):
                for device in DEVICES.values():
                    study = replace(self, device=device).with_lever(lever)
                    shares.append(_share(study.overhead(model, "kronecker", 64)))
            fits = _fits(natural, 80e9)
            if adamw.bytes > 80e9:
                fits += ", nor does AdamW"
            table.add(model.name, _gb(adamw.bytes), _gb(natural.bytes), fits, *shares)
        return table

    def overhead(self, model: Model, structure: Structure, ranks: int) -> float:
        """Over AdamW with as many ranks."""
        return self.cost(model, structure, ranks).overhead(self.cost(model, "adamw", ranks))

    def assumptions(self) -> Table:
        """Every number about devices, with its unit and where it is from."""
        devices = [*DEVICES.values(), this_machine(self.record)]
        table = Table(
            "Assumptions",
            ("", *(d.name for d in devices), "unit", "from"),
            left=frozenset({0, 4, 5}),
        )
        for field in dataclasses.fields(Device):
            if field.name != "name":
                values = (_quantity(getattr(d, field.name)) for d in devices)
                unit, source = field.metadata["unit"], field.metadata["source"]
                table.add(f"`{field.name}`", *values, unit, source)
        return table

    def counted(self) -> Table:
        """What was counted in the code, and the host's time."""
        calibration = self.calibration
        table = Table("Counted and measured", ("", *(_name(s) for s in STRUCTURES)))
        rows = {
            "bytes moved: update, a parameter": "update_parameter",
            "update, a number in a factor": "update_factor",
            "update, a parameter, for each side by eigenvectors": "update_low_rank",
            "F d, a parameter": "curved_parameter",
            "F d, a number in a factor": "curved_factor",
            "statistic, a number in the rows": "statistics_row",
            "statistic, a number in the averages": "statistics_average",
            "statistic, a logit": "statistics_logit",
            "refresh, a number in the averages": "refresh_average",
            "refresh, a number in a factor": "refresh_factor",
            "KL, a parameter": "measured_parameter",
            "KL, a logit": "measured_logit",
            "bytes held: statistic, a number in the rows": "statistics_held_row",
            "statistic, a number in the averages ": "statistics_held_average",
            "statistic, a logit ": "statistics_held_logit",
            "`step()`, a parameter": "step_held_parameter",
            "`step()`, a number in the rows": "step_held_row",
            "`step()`, a logit": "step_held_logit",
        }
        for name, attribute in rows.items():
            values = (getattr(calibration.traffic[s], attribute) for s in STRUCTURES)
            table.add(name.strip(), *(f"{value:.0f}" for value in values))
        for attribute in ("update", "curved", "statistics", "refresh", "measured"):
            name = {"measured": "KL", "curved": "F d"}.get(attribute, attribute)
            values = (1e6 * getattr(calibration.host[s], attribute) for s in STRUCTURES)
            table.add(f"host, μs a block: {name}", *(f"{value:.0f}" for value in values))
        return table

    def checked(self) -> Table:
        """Predicted against measured, on this machine."""
        table = Table(
            "Predicted and measured",
            ("model", "part", "predicted, ms", "measured, ms", "measured over predicted"),
            left=frozenset({0, 1}),
        )
        for name, predicted, measured in self.compared():
            model, part = name
            table.add(model, part, _ms(predicted), _ms(measured), f"{measured / predicted:.2f}")
        return table

    def compared(self) -> list[tuple[tuple[str, str], float, float]]:
        """Seconds predicted and measured, by model and part.

        Forward and backward are taken as measured; everything else is predicted.
        """
        machine = this_machine(self.record)
        found: list[tuple[tuple[str, str], float, float]] = []
        each = Protocol(1, 1, measure_every=1, spectrum_every=1, paced=False)
        for name, model in SMALL.items():
            steps = self.record["steps"][name]
            passes = 3 * model.forward / machine.training
            device = replace(machine, training_efficiency=passes / steps["forward and backward"])
            found.append(((name, "forward and backward"), passes, steps["forward and backward"]))
            adamw = cost(model, "adamw", 1, device, self.calibration)
            found.append(
                ((name, "AdamW's update"), adamw.seconds["update"], steps["AdamW's update"])
            )
            natural = cost(model, "kronecker", 1, device, self.calibration, each)
            whole_update = steps["update"] + steps["F d"]
            found.append(((name, "update, with F d"), natural.seconds["update"], whole_update))
            for part in ("statistics", "KL", "refresh", "condition numbers"):
                found.append(((name, part), natural.seconds[part], steps[part]))
            usual = cost(model, "kronecker", 1, device, self.calibration)
            every = Protocol()
            due = pace(blocks(model, "kronecker", every), every)
            whole = steps["forward and backward"] + steps["update"]
            whole += curved_share(every.measure_every, due.refresh_every) * steps["F d"]
            whole += steps["statistics"] / due.statistics_every
            whole += steps["KL"] / every.measure_every + steps["refresh"] / due.refresh_every
            whole += steps["condition numbers"] / every.spectrum_every
            found.append(((name, "a whole step, on average"), usual.time, whole))
            refresh = self.record["refresh"][name]
            two = cost(model, "kronecker", 2, device, self.calibration, each)
            sent = refresh["all-reduce of the averages"] + refresh["broadcast of what was inverted"]
            found.append(
                (
                    (name, "two ranks: refresh"),
                    two.seconds["refresh"],
                    refresh["inversions, the slower rank"],
                )
            )
            found.append(((name, "two ranks: exchange"), two.seconds["exchange"], sent))
        return found

    def shapes(self) -> Table:
        """The models and what there is to invert of them."""
        table = Table(
            "Models",
            ("model", "parameters", "a rank's batch", "blocks", "dense factors", "the largest d",
             "by eigenvectors", "sides kept diagonal", "10⁹ numbers in factors"),
            left=frozenset({0, 2}),
        )  # fmt: skip
        for model in self.models.values():
            found = blocks(model, "kronecker", self.protocol)
            dense = [side for b in found for side in b.dense]
            factors = sum(b.count * len(b.dense) for b in found)
            diagonal = {
                side
                for m in model.maps
                for side in (m.inputs + m.bias, m.outputs)
                if side > self.protocol.max_factor or (m.kind != "linear" and side == m.inputs)
            }
            numbers = sum(b.count * b.factors for b in found)
            table.add(
                model.name,
                _count(model.parameters),
                f"{model.examples} x {model.example}",
                str(sum(b.count for b in found)),
                str(factors),
                f"{max((side.size for side in dense), default=0):,}",
                _sizes({side.size for side in dense if side.rank}),
                _sizes(diagonal),
                f"{numbers / 1e9:.2f}",
            )
        return table

    def results(self, model: Model) -> Table:
        """All structures of one model."""
        many = [f"{ranks:,}" for ranks in RANKS]
        table = Table(
            f"{model.name} on {self.device.name}",
            ("F", "GB on 1 rank", "on more", *(f"ms a step on {r}" for r in many),
             "MB sent a step", *(f"overhead on {r}" for r in many), "verdict"),
            left=frozenset({0, 12}),
        )  # fmt: skip
        for structure in STRUCTURES:
            costs = [self.cost(model, structure, ranks) for ranks in RANKS]
            shares = [self.overhead(model, structure, ranks) for ranks in RANKS]
            adamw = structure == "adamw"
            table.add(
                _name(structure),
                *(_gb(c.bytes) for c in costs[:2]),
                *(f"{1e3 * c.time:,.0f}" for c in costs),
                f"{costs[-1].bytes_sent / 1e6:,.0f}",
                *("" if adamw else _share(share) for share in shares),
                _fits(costs[1], self.device.memory) + ("" if adamw else f"; {_verdict(shares)}"),
            )
        return table

    def parts(self) -> Table:
        """Where the time goes, on 8 ranks, Kronecker blocks."""
        costs = [self.cost(model, "kronecker", 8) for model in self.models.values()]
        table = Table(
            f"Milliseconds a step, Kronecker blocks, 8 ranks, {self.device.name}",
            ("", *(model.name for model in self.models.values())),
        )
        for part in costs[0].seconds:
            table.add(part, *(_ms(c.seconds[part]) for c in costs))
        table.add("together", *(_ms(c.time) for c in costs))
        table.add("AdamW", *(_ms(self.cost(m, "adamw", 8).time) for m in self.models.values()))
        return table

    def levers(self) -> Table:
        """What changes the overhead, on 8 ranks."""
        table = Table(
            f"Overhead, Kronecker blocks, 8 ranks, {self.device.name}",
            ("", *(model.name for model in self.models.values())),
        )
        for lever in LEVERS:
            study = self.with_lever(lever)
            shares = (study.overhead(m, "kronecker", 8) for m in self.models.values())
            table.add(lever.name, *map(_share, shares))
        return table

    def memory(self) -> Table:
        """What would make seven billion parameters fit, on 64 ranks."""
        model = MODELS["llama-7b"]
        table = Table(
            f"GB of a rank, {model.name}, 64 ranks",
            ("", "parameters, gradients, state", "curvature", "activations, or `step()`",
             "together", "in 80 GB"),
        )  # fmt: skip
        half = {"parameter_bytes": 2, "bucket_view": True}
        diagonals, owners = {"max_factor": 2048}, {"sharded_curvature": True}
        shards = {"sharded_parameters": True}
        cases: list[tuple[str, Structure, dict[str, Any], float | None]] = [
            ("AdamW", "adamw", {}, None),
            ("AdamW, bf16-true, bucket views", "adamw", half, None),
            ("Kronecker", "kronecker", {}, None),
            ("Kronecker, bf16-true, bucket views", "kronecker", half, None),
            ("the same, `max_factor=2048`", "kronecker", half | diagonals, None),
            ("the same, 8 bytes held a parameter in `step()`*", "kronecker", half | diagonals, 8.0),
            ("AdamW, parameters sharded*", "adamw", shards, None),
            ("Kronecker, parameters sharded*", "kronecker", shards, None),
            ("the same, curvature at its owner*", "kronecker", shards | owners, None),
        ]
        for name, structure, changes, held in cases:
            study = replace(self, protocol=replace(self.protocol, **changes))
            if held is not None:
                traffic = {
                    key: {**numbers, "step_held_parameter": held}
                    for key, numbers in self.record["traffic"].items()
                }
                study = replace(study, record={**self.record, "traffic": traffic})
            found = study.cost(model, structure, 64)
            table.add(name, *map(_gb, found.memory.values()), _gb(found.bytes), _fits(found, 80e9))
        return table


# -- words ---------------------------------------------------------------------------------------


def rewritten(page: str, tables: Mapping[str, Table]) -> str:
    """The page with all tables in their places.

    Raises:
        ValueError: a table has no place.
    """
    for name, table in tables.items():
        start, end = f"<!-- {name} -->", f"<!-- /{name} -->"
        if page.count(start) != 1 or page.count(end) != 1:
            raise ValueError(
                f"{start} ... {end}: expected once in the page, to put a table between"
            )
        pattern = re.compile(f"{re.escape(start)}.*{re.escape(end)}", re.DOTALL)
        text = f"{start}\n{table.markdown()}\n{end}"
        page = pattern.sub(lambda _, text=text: text, page)
    return page


def _name(structure: Structure) -> str:
    return _NAMES.get(structure, structure)


def _fits(found: Cost, memory: float) -> str:
    return "fits" if found.bytes <= memory else "does not fit"


def _verdict(shares: list[float]) -> str:
    """The class of the overhead; that of one rank by itself where it differs."""
    one, several = _class(shares[0]), _class(max(shares[1:]))
    return several if one == several else f"{several}, on 1 rank {one}"


def _class(share: float) -> str:
    return next((f"< {limit} %" for limit in (10, 50) if share < limit / 100), "> 50 %")


def _share(share: float) -> str:
    return f"{100 * share:.0f} %"


def _gb(size: float) -> str:
    return f"{size / 1e9:.1f}"


def _ms(seconds: float) -> str:
    ms = 1e3 * seconds
    return f"{ms:,.0f}" if ms >= 99.5 else f"{ms:.3g}"


def _sizes(found: set[int]) -> str:
    return ", ".join(f"{size:,}" for size in sorted(found)) or "none"


def _count(number: float) -> str:
    return f"{number / 1e9:.2f} G" if number >= 1e9 else f"{number / 1e6:.1f} M"


def _quantity(value: Any) -> str:
    """With a prefix of the SI."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if value != value:
        return ""
    for factor, prefix in ((1e12, " T"), (1e9, " G"), (1.0, ""), (1e-3, " m"), (1e-6, " μ")):
        if abs(value) >= factor:
            return f"{value / factor:.4g}{prefix}"
    return f"{value:.3g}"
