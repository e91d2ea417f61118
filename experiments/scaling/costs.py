"""Memory, communication and time of a data-parallel step, all parts named."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from experiments.scaling.assignment import longest_first, makespan
from experiments.scaling.blocks import Block, Product, blocks
from experiments.scaling.calibration import Calibration
from experiments.scaling.collectives import all_reduce, broadcasts
from experiments.scaling.devices import Device
from experiments.scaling.models import Model
from experiments.scaling.protocol import CURVED_EVERY, Protocol, Structure
from ngplugin.curvature.pace import Pace, Work

#: Forward passes that a product with all of F is worth, J v and then Jᵀ u: each has two products of
#: matrices where a forward pass has one.
PRODUCT_PASSES = 4

_FEW = 64  # bytes of a few numbers: Σw, inner products, the KL


@dataclass(frozen=True)
class Cost:
    """Of one rank, averaged over the steps that something is done at.

    Attributes:
        structure: of F, or AdamW.
        ranks: that share the work.
        memory: bytes, by what they are for; the last is what comes and goes.
        sent: bytes a step that the rank gives to collective operations.
        seconds: of a step.
    """

    structure: Structure
    ranks: int
    memory: dict[str, float]
    sent: dict[str, float]
    seconds: dict[str, float]

    @property
    def bytes(self) -> float:
        """At the peak."""
        return sum(self.memory.values())

    @property
    def bytes_sent(self) -> float:
        """A step."""
        return sum(self.sent.values())

    @property
    def time(self) -> float:
        """Seconds a step."""
        return sum(self.seconds.values())

    def overhead(self, yardstick: Cost) -> float:
        """How much longer a step is than another, as a share of that."""
        return self.time / yardstick.time - 1


def cost(
    model: Model,
    structure: Structure,
    ranks: int,
    device: Device,
    calibration: Calibration,
    protocol: Protocol | None = None,
) -> Cost:
    """A step of one rank, each with the model's batch."""
    step = _Step(model, structure, ranks, device, calibration, protocol or Protocol())
    return Cost(structure, ranks, step.memory(), step.sent(), step.seconds())


def score_passes(structure: Structure) -> int:
    """Forward passes that scores going back are worth: to outputs of maps, or to weights too."""
    return 2 if structure == "diagonal" else 1


def curved_share(measure_every: int, refresh_every: int) -> float:
    """Of how many steps F d is formed: measured ones, every sixth, and after a refresh."""
    share = 1 / min(measure_every or CURVED_EVERY, CURVED_EVERY)
    return share + (1 - share) / refresh_every


def pace(blocks: Sequence[Block], protocol: Protocol) -> Pace:
    """How often curvature is due; see `ngplugin.curvature.pace`."""
    work = sum((b.work for b in blocks for _ in range(b.count)), Work())
    asked = Pace(protocol.statistics_every, protocol.refresh_every)
    return asked.within(work, protocol.overhead / 4) if protocol.paced else asked


class _Step:
    def __init__(
        self,
        model: Model,
        structure: Structure,
        ranks: int,
        device: Device,
        calibration: Calibration,
        protocol: Protocol,
    ) -> None:
        self.model, self.ranks, self.device, self.protocol = model, ranks, device, protocol
        self.structure: Structure = structure
        self.traffic = calibration.traffic[structure]
        self.host = calibration.host[structure]
        self.blocks = blocks(model, structure, protocol)
        self.pace = pace(self.blocks, protocol)
        self.count = sum(b.count for b in self.blocks)
        self.averages = sum(b.count * b.averages for b in self.blocks)
        self.whole = sum(b.count * b.whole for b in self.blocks)
        self.low_rank = sum(b.count * b.low_rank for b in self.blocks)
        self.rows = sum(b.count * b.rows for b in self.blocks)
        self.logits = model.examples * model.logits

    # -- memory --------------------------------------------------------------------------------

    def memory(self) -> dict[str, float]:
        P, size = self.model.parameters, self.protocol.parameter_bytes
        copies = 4 if self.structure == "adamw" else 3  # parameter, gradient, momentum or moments
        shards = self.ranks if self.protocol.sharded_parameters else 1
        parameters = float(copies * size * P) / shards
        if self.ranks > 1 and shards == 1 and not self.protocol.bucket_view:
            parameters += size * P  # the buckets in which gradients are sent
        # A parameter that enters no known map may lead anywhere, so an unmeasured step may have to
        # be taken back.
        if self.structure != "adamw" and (self.model.norms or self.model.loose):
            parameters += float(size * P) / shards
        return {
            "parameters, gradients, optimizer state": parameters,
            "curvature": self._curvature(),
            "activations and what comes and goes": max(
                self._held_in_pass(), self._held_in_step(P / shards), self._flattened()
            ),
        }

    def _curvature(self) -> float:
        kept = float(sum(b.count * b.bytes for b in self.blocks))
        if not self.protocol.sharded_curvature:
            return kept
        inverses = sum(b.count * b.inverse for b in self.blocks)
        return inverses + (kept - inverses) / self.ranks

    def _held_in_pass(self) -> float:
        """Activations and logits, 16-bit copies of the weights, what a statistic adds."""
        model, t = self.model, self.traffic
        logits = 10 * self.logits  # in 16 and 32 bits, and their gradient
        copies = 2 * model.parameters if self.protocol.parameter_bytes == 4 else 0
        if self.protocol.sharded_parameters:
            copies = 0  # gathered layer by layer
        held = model.examples * model.activations + logits + copies
        statistics = t.statistics_held_row * self.rows + t.statistics_held_logit * self.logits
        return held + statistics + t.statistics_held_average * self.averages

    def _held_in_step(self, parameters: float) -> float:
        t = self.traffic
        rows = t.step_held_row * self.rows + t.step_held_logit * self.logits
        # Counted with parameters of four bytes, in whose type most of it is.
        each = t.step_held_parameter * self.protocol.parameter_bytes / 4
        return each * parameters + rows

    def _flattened(self) -> float:
        """All averages in one piece, to be reduced."""
        return 4.0 * self.averages if self.ranks > 1 else 0.0

    # -- communication -------------------------------------------------------------------------

    def sent(self) -> dict[str, float]:
        if self.ranks == 1:
            return {}
        P, every = self.model.parameters, self.pace.refresh_every
        result = {"gradients": float(self.protocol.parameter_bytes * P)}
        if self.structure == "adamw":
            return result
        result["averages"] = 4 * self.averages / every
        result["inverses"] = sum(b.count * b.sent for b in self.blocks) / every
        if self.protocol.sharded_products:
            result["directions"] = 8.0 * P
        if self.structure == "matrix-free":
            result["products"] = 4.0 * P * self._cg_products()
        return result

    # -- time ----------------------------------------------------------------------------------

    def seconds(self) -> dict[str, float]:
        p, k = self.protocol, self.protocol.accumulate
        forward = self.device.train(self.model.forward)
        gradients = all_reduce(p.parameter_bytes * self.model.parameters, self.ranks, self.device)
        result = {
            "forward and backward": 3 * k * forward,
            "gradients": max(0.0, gradients - self.device.overlap * 2 * forward),
            "update": self._update(),
        }
        if self.structure == "adamw":
            return result
        measure_every = 1 if self.structure == "matrix-free" else p.measure_every
        return result | {
            "statistics": self._statistics() / self.pace.statistics_every,
            "KL": self._measurement() / measure_every if measure_every else 0.0,
            "refresh": self._refresh() / self.pace.refresh_every,
            "exchange": self._exchange() / self.pace.refresh_every,
            "condition numbers": self._spectrum() / p.spectrum_every if p.spectrum_every else 0.0,
        }

    def _update(self) -> float:
        """Products with inverses and with F, and passes over the parameters."""
        t, P = self.traffic, self.model.parameters
        moved = t.update_parameter * P + t.update_factor * self.whole
        moved += t.update_low_rank * self.low_rank
        curved = t.curved_parameter * P + t.curved_factor * self.whole
        share = self._curved_share()
        seconds = self.device.traffic(moved + share * curved)
        products = [self._block_products(b) for b in self.blocks for _ in range(b.count)]
        if self.protocol.sharded_products:
            seconds += makespan(products, longest_first(products, self.ranks))
            seconds += broadcasts(8 * self.model.parameters, self.ranks, self.ranks, self.device)
        else:
            seconds += sum(products)
        host = self.host.update + share * self.host.curved
        seconds = self.device.with_host(seconds, host * self.count)
        if self.structure == "matrix-free":
            seconds += self._cg_passes()
        return seconds if self.structure == "adamw" else seconds + self._numbers()

    def _block_products(self, b: Block) -> float:
        if self.structure == "identity":  # F is only there to predict the KL with
            return self._products(b.product)
        direction, curved = self._products(b.direction), self._products(b.curved)
        if self.structure == "matrix-free":
            return (self.protocol.cg_iterations + 3) * (direction + curved)
        if self.protocol.weight_decay:  # its part of F Δ
            curved += self._products(b.product)
        return direction + self._curved_share() * curved

    def _curved_share(self) -> float:
        return curved_share(self.protocol.measure_every, self.pace.refresh_every)

    def _products(self, products: Sequence[Product]) -> float:
        return sum(self.device.products(x.flops, x.half) for x in products)

    def _cg_products(self) -> int:
        """Products with all of F: of the iterations, the start, and the weight decay."""
        return self.protocol.cg_iterations + 1 + self.protocol.weight_decay

    def _cg_passes(self) -> float:
        """A forward pass and its backward pass with a graph, then the products."""
        forward = self.device.train(self.model.forward)
        sent = all_reduce(4 * self.model.parameters, self.ranks, self.device)
        products = self._cg_products()
        return (3 + PRODUCT_PASSES * products) * forward + products * sent

    def _statistics(self) -> float:
        """A backward pass of scores to the outputs of maps, XᵀX of all rows, folding."""
        t, k = self.traffic, self.protocol.accumulate
        seconds = self.device.train(score_passes(self.structure) * self.model.forward)
        seconds += self.device.second_moments(sum(b.count * b.gram for b in self.blocks))
        moved = t.statistics_row * self.rows + t.statistics_average * self.averages
        seconds += self.device.traffic(moved + t.statistics_logit * self.logits)
        seconds = self.device.with_host(seconds, self.host.statistics * self.count)
        return k * seconds + 2 * self._numbers()

    def _measurement(self) -> float:
        """A forward pass more."""
        t, k = self.traffic, self.protocol.accumulate
        moved = t.measured_parameter * self.model.parameters + t.measured_logit * self.logits
        seconds = self.device.train(self.model.forward) + self.device.traffic(moved)
        seconds = self.device.with_host(seconds, self.host.measured * self.count)
        return k * seconds + self._numbers()

    def _refresh(self) -> float:
        """Of the rank with the most to invert; and copies of all averages, on every rank."""
        each = [self._inversion(b) for b in self.blocks for _ in range(b.count)]
        longest = makespan(each, longest_first(each, self.ranks))
        t = self.traffic
        moved = t.refresh_average * self.averages + t.refresh_factor * self.whole
        return longest + self.device.traffic(moved)

    def _inversion(self, b: Block) -> float:
        invert = self.device.eigenvectors if b.kind == "eigen" else self.device.inverse
        seconds = sum(
            s.groups * (self.device.leading(s.size, s.rank) if s.rank else invert(s.size))
            for s in b.dense
        )
        seconds += self.device.products(b.carried, half=False)
        return self.device.with_host(seconds, self.host.refresh)

    def _exchange(self) -> float:
        """One all-reduce of the averages before, a broadcast of what each rank inverted after."""
        if self.ranks == 1:
            return 0.0
        sent = sum(b.count * b.sent for b in self.blocks)
        owners = min(self.count, self.ranks)
        averaged = all_reduce(4 * self.averages, self.ranks, self.device)
        return averaged + broadcasts(sent, owners, self.ranks, self.device)

    def _spectrum(self) -> float:
        """Eigenvalues of every factor, divided as inversions are; an eigen block has them."""
        each = [
            sum(side.groups * self.device.eigenvalues(side.rank or side.size) for side in b.dense)
            for b in self.blocks
            if b.kind != "eigen"
            for _ in range(b.count)
        ]
        return makespan(each, longest_first(each, self.ranks))

    def _numbers(self) -> float:
        """One all-reduce of a few numbers."""
        return all_reduce(_FEW, self.ranks, self.device)
