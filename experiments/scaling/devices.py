"""What a device, and the links between devices, can do: every number that is not a formula."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any


def quantity(unit: str, source: str, default: Any = dataclasses.MISSING) -> Any:
    """A field that says its unit and where its value is from."""
    return dataclasses.field(default=default, metadata={"unit": unit, "source": source})


#: FLOPs of a Cholesky factorization and the inverse from it, over d³: LAPACK's potrf and potri, and
#: torch on CUDA, which solves for the identity (potrs).
INVERSE_BY_LAPACK = 1 / 3 + 2 / 3
INVERSE_ON_CUDA = 1 / 3 + 2

_SHEET = "data sheet"
_ASSUMED = "assumed"


@dataclass(frozen=True)
class Device:
    """One of equal devices in nodes of equal size; FLOP/s count multiplications and additions.

    Each field's unit and source are in its metadata: the page's table of assumptions.
    """

    name: str
    memory: float = quantity("B", _SHEET)
    training: float = quantity("FLOP/s", _SHEET + ": dense, 16 bits, of forward and backward")
    half: float = quantity("FLOP/s", _SHEET + ": dense bfloat16, products with inverses")
    single: float = quantity("FLOP/s", _SHEET + ": float32")
    gram: float = quantity(
        "FLOP/s", _SHEET + ": of XᵀX; float32 is torch's default, TF32 with precision 'high'"
    )
    bandwidth: float = quantity("B/s", _SHEET + ": of the memory")
    link_inside: float = quantity("B/s", _SHEET + ": a rank's, each way, within a node")
    link_between: float = quantity("B/s", _SHEET + ": a rank's, each way, between nodes")
    per_node: int = quantity("ranks", _SHEET, 8)
    latency_inside: float = quantity("s", _ASSUMED + ": of one hop", 5e-6)
    latency_between: float = quantity("s", _ASSUMED + ": of one hop", 15e-6)
    training_efficiency: float = quantity("of peak", _ASSUMED + ": forward and backward", 0.45)
    product_efficiency: float = quantity("of peak", _ASSUMED + ": other products", 0.7)
    bandwidth_efficiency: float = quantity("of peak", _ASSUMED, 0.8)
    link_efficiency: float = quantity("of peak", _ASSUMED, 0.75)
    overlap: float = quantity(
        "of the backward pass", _ASSUMED + ": in which gradients are sent", 0.8
    )
    waits_for_host: bool = quantity(
        "", _ASSUMED + ": whether kernels run while Python goes on", False
    )
    inverse_flops: float = quantity(
        "d³", "torch's source: potrf and potrs of the identity", INVERSE_ON_CUDA
    )
    inverse_efficiency: float = quantity("of float32 peak", _ASSUMED + ": for d → ∞", 0.5)
    inverse_half_size: float = quantity("d", _ASSUMED + ": where it is half of that", 2048.0)
    eigh_efficiency: float = quantity("of float32 peak", _ASSUMED + ": for d → ∞", 0.1)
    eigvalsh_efficiency: float = quantity("of float32 peak", _ASSUMED + ": for d → ∞", 0.03)
    eigen_half_size: float = quantity("d", _ASSUMED + ": where both are half of that", 1024.0)

    # -- compute -------------------------------------------------------------------------------

    def train(self, flops: float) -> float:
        """Seconds of products in a forward or backward pass."""
        return flops / (self.training * self.training_efficiency)

    def products(self, flops: float, half: bool) -> float:
        """Seconds of products with inverses."""
        return flops / ((self.half if half else self.single) * self.product_efficiency)

    def second_moments(self, flops: float) -> float:
        """Seconds of XᵀX."""
        return flops / (self.gram * self.product_efficiency)

    def traffic(self, moved: float) -> float:
        """Seconds of reading and writing so many bytes."""
        return moved / (self.bandwidth * self.bandwidth_efficiency)

    def with_host(self, computing: float, host: float) -> float:
        """Seconds of kernels that take the host some time to launch."""
        return computing + host if self.waits_for_host else max(computing, host)

    def inverse(self, size: int) -> float:
        """Seconds of a Cholesky factorization and the inverse from it."""
        slowed = 1 + self.inverse_half_size / size
        return self.inverse_flops * size**3 * slowed / (self.single * self.inverse_efficiency)

    def leading(self, size: int, rank: int) -> float:
        """Seconds of one sweep of orthogonal iteration with `rank` vectors, and T and K of it.

        X Q twice, QᵀXQ; Q R with Q written out, 4 d r² FLOPs, and an inverse of r x r, 2 r³
        (Golub & Van Loan 2013, §5.2, §3.4), which are as slow as factorizations of that size.
        """
        products = self.products(4 * size**2 * rank + 2 * size * rank**2, half=False)
        slowed = 1 + self.inverse_half_size / rank
        flops = 4 * size * rank**2 + 2 * rank**3
        return products + flops * slowed / (self.single * self.inverse_efficiency)

    def eigenvectors(self, size: int) -> float:
        """Seconds of eigenvalues and eigenvectors, 9 d³ FLOPs (Golub & Van Loan 2013, §8.3)."""
        return 9 * size**3 * self._eigen_slowed(size) / (self.single * self.eigh_efficiency)

    def eigenvalues(self, size: int) -> float:
        """Seconds of eigenvalues alone, 4/3 d³ FLOPs (the same, §8.3.1)."""
        flops = 4 / 3 * size**3
        return flops * self._eigen_slowed(size) / (self.single * self.eigvalsh_efficiency)

    def _eigen_slowed(self, size: int) -> float:
        return 1 + self.eigen_half_size / size


#: NVIDIA's data sheets of the A100 and H100 with SXM sockets, in nodes of 8 with a network adapter
#: of 200 and 400 Gbit/s for each. TF32: 156 and 494 TFLOP/s.
DEVICES = {
    "a100": Device(
        "A100-80GB-like",
        memory=80e9,
        training=312e12,
        half=312e12,
        single=19.5e12,
        gram=19.5e12,
        bandwidth=2.039e12,
        link_inside=300e9,
        link_between=25e9,
    ),
    "h100": Device(
        "H100-80GB-like",
        memory=80e9,
        training=989e12,
        half=989e12,
        single=67e12,
        gram=67e12,
        bandwidth=3.35e12,
        link_inside=450e9,
        link_between=50e9,
        # The same kernels are a smaller part of a faster chip.
        training_efficiency=0.4,
        product_efficiency=0.6,
    ),
}
TF32 = {"a100": 156e12, "h100": 494e12}
