"""The tables of `docs/cost.md`, and what follows from them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from rich.text import Text

from experiments.cost import linear_algebra as algebra
from experiments.cost.growth import Run
from experiments.cost.memory import Memory
from experiments.cost.pieces import PIECES
from experiments.cost.power_law import PowerLaw
from experiments.scaling.table import Table

GOAL = 4  # times the parameters, beside the factors

_KINDS = {
    "width": "3 hidden layers, by width",
    "depth": "width 256, by hidden layers",
    "transformer": "transformer of 2 layers, by width",
}


@dataclass(frozen=True)
class Findings:
    """Sentences that are made of numbers."""

    sentences: tuple[str, ...]

    def markdown(self) -> str:
        """A list."""
        return "\n".join(f"* {sentence}" for sentence in self.sentences)

    def for_terminal(self) -> Text:
        """For rich's console."""
        return Text(f"{self.markdown()}\n")


@dataclass(frozen=True)
class Study:
    """What was measured, by part."""

    records: dict[str, dict[str, Any]]

    @cached_property
    def runs(self) -> list[Run]:
        """Of `growth`."""
        return [Run.of(record) for record in self.records["growth"]["found"]]

    @cached_property
    def memories(self) -> list[Memory]:
        """Of `memory`."""
        return [Memory.of(record) for record in self.records["memory"]["found"]]

    def tables(self) -> dict[str, Table | Findings]:
        """All whose part was measured, by the names of their places in the page."""
        found: dict[str, Table | Findings] = {}
        for part, tables in (
            ("linear_algebra", self._algebra),
            ("growth", self._growth),
            ("memory", self._memory),
        ):
            if part in self.records:
                found[f"machine {part}"] = self._machine(part)
                found |= tables()
        return found

    def _machine(self, part: str) -> Findings:
        machine = self.records[part]["machine"]
        text = f"Python {machine['python']}, torch {machine['torch']}, {machine['instructions']}"
        return Findings((f"Measured on one thread with {text}.",))

    # -- linear algebra ----------------------------------------------------------------------------

    def _algebra(self) -> dict[str, Table | Findings]:
        tables: dict[str, Table | Findings] = {"algebra findings": self.algebra_findings()}
        for dtype in algebra.DTYPES:
            tables[f"algebra {dtype}"] = self.in_products(dtype)
            tables[f"inputs {dtype}"] = self.inputs(dtype)
            tables[f"stacks {dtype}"] = self.stacks(dtype)
        for dtype in algebra.DTYPES:
            tables[f"milliseconds {dtype}"] = self.milliseconds(dtype)
        return {**tables, "residuals": self.residuals()}

    def _times(self, dtype: str) -> dict[str, dict[str, float]]:
        found: dict[str, dict[str, float]] = self.records["linear_algebra"]["found"]["times"][dtype]
        return found

    def units(self, dtype: str, name: str) -> dict[int, float]:
        """Products that something takes, by size."""
        return {
            int(d): times[name] / times[algebra.PRODUCT]
            for d, times in self._times(dtype).items()
            if name in times
        }

    def in_products(self, dtype: str) -> Table:
        """Everything in units of one product of the same dtype and size."""
        return self._by_size(
            dtype, "products", lambda t, name: f"{t[name] / t[algebra.PRODUCT]:.2f}"
        )

    def milliseconds(self, dtype: str) -> Table:
        """The same as it was measured."""
        return self._by_size(dtype, "ms", lambda times, name: _ms(times[name]))

    def _by_size(
        self, dtype: str, unit: str, cell: Callable[[dict[str, float], str], str]
    ) -> Table:
        times = self._times(dtype)
        table = Table(f"{dtype}, {unit}", ("", *times))
        for name in _names(times.values()):
            cells = (cell(by, name) if name in by else "" for by in times.values())
            table.add(name, *cells)
        return table

    def inputs(self, dtype: str) -> Table:
        """Of more inputs, over what it is of none more."""
        found = self.records["linear_algebra"]["found"]["inputs"][dtype]
        table = Table(f"{dtype}, more inputs over none", ("", *found))
        for name in _names(found.values()):
            usual = f"{name.rpartition('+')[0]}+ 0"
            if name != usual:
                table.add(name, *(f"{by[name] / by[usual]:.2f}" for by in found.values()))
        return table

    def more_inputs(self, name: str, sizes: Sequence[int]) -> str:
        """The same in words, of float32."""
        found = self.records["linear_algebra"]["found"]["inputs"]["float32"]
        usual = f"{name.rpartition('+')[0]}+ 0"
        return _span([found[str(d)][name] / found[str(d)][usual] for d in sizes])

    def stacks(self, dtype: str) -> Table:
        """What one call for a stack saves."""
        stacks = self.records["linear_algebra"]["found"]["stacks"][dtype]
        calls, count = ", one call", f", {algebra.COUNT} calls"
        table = Table(f"{dtype}, {algebra.COUNT} calls over one", ("", *stacks))
        for name in _names(stacks.values()):
            if name.endswith(calls):
                name = name.removesuffix(calls)
                cells = (f"{by[name + count] / by[name + calls]:.2f}" for by in stacks.values())
                table.add(name, *cells)
        return table

    def residuals(self) -> Table:
        """How exact the inverses and bases are, in float32."""
        found = self.records["linear_algebra"]["found"]["residuals"]["float32"]
        table = Table("residuals, float32", ("", *found))
        for name in _names(found.values()):
            table.add(name, *(f"{by[name]:.2g}" for by in found.values()))
        return table

    def algebra_findings(self) -> Findings:
        """What the tables of float32 say about a refresh and a step."""
        units = {
            name: self.units("float32", name) for name in _names(self._times("float32").values())
        }
        large = [d for d in units[algebra.PRODUCT] if d >= 256] or [*units[algebra.PRODUCT]]
        every = [*units[algebra.PRODUCT]]

        def span(name: str, over: str = algebra.PRODUCT, sizes: Sequence[int] = large) -> str:
            ratios = [units[name][d] / units[over][d] for d in sizes]
            return _span(ratios)

        inverse, solved = "cholesky_ex, cholesky_inverse", "G⁻¹ V A⁻¹"
        newton = "Newton-Schulz, two turns"
        residuals = self.records["linear_algebra"]["found"]["residuals"]["float32"]
        faster = [d for d in every if units[newton][d] < units[inverse][d]]
        worse = [d for d, r in residuals.items() if r[newton] > r["the old inverse"]]
        first, stacks = large[0], self.records["linear_algebra"]["found"]["stacks"]["float32"]
        gains = {
            int(d): max(
                by[f"{name}, {algebra.COUNT} calls"] / by[f"{name}, one call"]
                for name in ("cholesky_ex", "cholesky_inverse")
            )
            for d, by in stacks.items()
        }
        return Findings(
            (
                f"From {first} on, Cholesky and the inverse from it take {span(inverse)} products; "
                f"`inv_ex` takes {span('inv_ex', inverse)} times that, `eigh` "
                f"{span('eigh', inverse)} times, `eigvalsh` {span('eigvalsh', inverse)} times, one "
                f"sweep of orthogonal iteration "
                f"{span('orthogonal iteration, Cholesky-QR', inverse)} times.",
                f"Two turns of Newton-Schulz from the old inverse are faster at "
                f"{_list(faster)}, with a residual of "
                f"{_span([residuals[str(d)][newton] for d in faster])}; the residual grows "
                f"instead of shrinking at {_list(worse)}.",
                f"Multiplying a gradient with both inverses takes {span(solved)} products, "
                f"{self.more_inputs(f'{solved}, d + 1', large)} times as long with the one input "
                f"more that a bias is, {self.more_inputs(f'{solved}, d + 16', large)} times with "
                "sixteen more. In twenty steps it is done twenty times and a refresh of both "
                f"factors once: from {first} on that refresh is "
                f"{_percent(2 * units[inverse][d] / (20 * units[solved][d]) for d in large)} of "
                "those products.",
                "Solving triangular systems for all columns each time, without an inverse, takes "
                f"{span('cholesky_ex, triangular solves of d columns')} products with the "
                "factorization.",
                f"The second moment of 128 rows takes {span('XᵀX of 128 rows')} products from "
                f"{first} on; averaged in the same call (`addmm`) it is "
                f"{span('XᵀX of 128 rows, addmm', 'XᵀX of 128 rows, then averaged')} of what it "
                "is in another, by oneDNN "
                f"{span('XᵀX of 128 rows, by oneDNN', 'XᵀX of 128 rows')} of what it is by "
                "default.",
                f"One call for {algebra.COUNT} matrices saves at most a factor of "
                + ", ".join(f"{gain:.1f} at {d}" for d, gain in gains.items())
                + " in Cholesky and its inverse.",
            )
        )

    # -- growth ------------------------------------------------------------------------------------

    def _growth(self) -> dict[str, Table | Findings]:
        return {
            "growth findings": self.growth_findings(),
            "growth": self.growth(),
            "exponents": self.exponents(),
            "shares": self.shares(),
        }

    def growth(self) -> Table:
        """Each network's step, and SGD's."""
        table = Table(
            "A step",
            ("network", "width", "hidden layers", "batch", "parameters", "steps counted",
             "statistics, inverses every", "SGD, ms", "natural gradient, ms", "ratio",
             "ratio of medians", "floor"),
        )  # fmt: skip
        for run in self.runs:
            case = run.case
            table.add(
                "transformer" if case.kind == "transformer" else "perceptron",
                f"{case.width:,}", str(case.depth), str(case.batch), _count(run.parameters),
                str(len(run.natural)), f"{run.statistics_every}, {run.refresh_every}",
                _ms(run.sgd_step), _ms(run.step),
                f"{run.ratio:.2f}", f"{run.median_ratio:.2f}", f"{run.floor:.2f}",
            )  # fmt: skip
        return table

    def series(self) -> dict[tuple[str, int], list[tuple[int, Run]]]:
        """Runs of one kind and batch with the size that grows, from small to large."""
        found: dict[tuple[str, int], list[tuple[int, Run]]] = {}
        for run in self.runs:
            case = run.case
            size = case.depth if case.kind == "depth" else case.width
            found.setdefault((case.kind, case.batch), []).append((size, run))
        return {key: sorted(runs, key=lambda pair: pair[0]) for key, runs in found.items()}

    def exponents(self) -> Table:
        """K of c nᵏ: over all sizes, and from the last but one to the last."""
        table = Table(
            "Exponents",
            ("network", "batch", "sizes", "SGD", "natural gradient", "ratio",
             "ratio, the last two sizes"),
            left=frozenset({0, 2}),
        )  # fmt: skip
        for (kind, batch), runs in self.series().items():
            sizes = [size for size, _ in runs]
            values = (
                [run.sgd_step for _, run in runs],
                [run.step for _, run in runs],
                [run.ratio for _, run in runs],
            )
            exponents = [PowerLaw.fit(sizes, each).exponent for each in values]
            exponents.append(PowerLaw.fit(sizes[-2:], values[2][-2:]).exponent)
            span = f"{sizes[0]:,} to {sizes[-1]:,}"
            table.add(_KINDS[kind], str(batch), span, *(f"{k:.2f}" for k in exponents))
        return table

    def shares(self) -> Table:
        """What a natural-gradient step consists of, in percent."""
        table = Table(
            "Percent of a step",
            ("network", "size", "batch", "SGD's step", *PIECES, "rest"),
        )  # fmt: skip
        for (kind, batch), runs in self.series().items():
            for size, run in runs:
                parts = (run.sgd_step, *map(run.piece, PIECES), run.rest)
                cells = (f"{100 * part / run.step:.0f}" for part in parts)
                table.add(_KINDS[kind], f"{size:,}", str(batch), *cells)
        return table

    def growth_findings(self) -> Findings:
        """From the smallest to the largest of each series."""
        sentences = []
        for (kind, batch), runs in self.series().items():
            (small, first), (large, last) = runs[0], runs[-1]
            parts = {name: last.piece(name) for name in PIECES} | {"the rest": last.rest}
            largest = max(parts, key=lambda name: parts[name])
            sentences.append(
                f"{_KINDS[kind]}, batch {batch}: {first.ratio:.1f} times SGD's step at {small:,}, "
                f"{last.ratio:.1f} times at {large:,}; the largest piece of it beside SGD's is "
                f"{largest}, {100 * parts[largest] / last.step:.0f} %."
            )
        return Findings(tuple(sentences))

    # -- memory ------------------------------------------------------------------------------------

    def _memory(self) -> dict[str, Table | Findings]:
        return {
            "memory findings": self.memory_findings(),
            "memory": self.memory(),
            "makers": self.makers(),
        }

    def memory_findings(self) -> Findings:
        """Held against four times the parameters and the factors."""
        once = [m.workload for m in self.memories if m.peak(m.factors) <= GOAL]
        kept = [m.workload for m in self.memories if m.peak(m.curvature) <= GOAL]
        off = max(abs(m.predicted / m.natural.kept - 1) for m in self.memories)
        return Findings(
            (
                f"The formulas are at most {100 * off:.2g} % off what was counted.",
                "Between steps there are "
                f"{_span([m.persistent(m.curvature) for m in self.memories])} times the parameters "
                "and the curvature, which is "
                f"{_span([m.curvature / m.factors for m in self.memories])} times the factors.",
                f"At the peak of `step()` there are at most {GOAL} times the parameters beside "
                f"the curvature for {_list(kept)}, and beside the factors, counted once, for "
                f"{_list(once)}.",
            )
        )

    def memory(self) -> Table:
        """Of each workload."""
        table = Table(
            "Memory",
            ("workload", "parameters, MB", "factors, MB", "kept, MB", "by the formulas",
             "curvature over factors", "persistent", "peak", "peak, factors counted once",
             "left by the passes, MB", "peak of the passes, MB", "SGD's, MB"),
        )  # fmt: skip
        for m in self.memories:
            table.add(
                m.workload,
                _mb(m.parameters), _mb(m.factors), _mb(m.natural.kept), _mb(m.predicted),
                f"{m.curvature / m.factors:.2f}", f"{m.persistent(m.curvature):.2f}",
                f"{m.peak(m.curvature):.1f}", f"{m.peak(m.factors):.1f}", _mb(m.natural.left),
                _mb(m.natural.pass_peak), _mb(m.sgd.pass_peak),
            )  # fmt: skip
        return table

    def makers(self) -> Table:
        """Where the peak of `step()` comes from."""
        table = Table(
            "The peak of step()",
            ("workload", "adds, MB", "over the parameters", "most of it made by"),
            left=frozenset({0, 3}),
        )
        for m in self.memories:
            added = m.natural.step_peak
            makers = ", ".join(
                f"`{name}` {100 * size / added:.0f} %" for name, size in m.natural.made_by.items()
            )
            table.add(m.workload, _mb(added), f"{added / m.parameters:.1f}", makers)
        return table


# -- words -----------------------------------------------------------------------------------------


def _names(by_size: Iterable[dict[str, float]]) -> list[str]:
    return list(dict.fromkeys(name for by in by_size for name in by))


def _span(values: Sequence[float]) -> str:
    if not values:
        return "nothing"
    low, high = f"{min(values):.2g}", f"{max(values):.2g}"
    return low if low == high else f"{low} to {high}"


def _percent(shares: Iterable[float]) -> str:
    found = [*shares]
    return f"{100 * min(found):.0f} to {100 * max(found):.0f} %"


def _list(sizes: Sequence[Any]) -> str:
    return ", ".join(map(str, sizes)) or "none"


def _ms(seconds: float) -> str:
    ms = 1e3 * seconds
    return f"{ms:,.0f}" if ms >= 99.5 else f"{ms:.3g}"


def _mb(size: float) -> str:
    return f"{size / 1e6:.2f}"


def _count(number: float) -> str:
    return f"{number / 1e6:.2f} M"
