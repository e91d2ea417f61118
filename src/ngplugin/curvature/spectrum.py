"""The eigenvalues of a matrix in a few numbers: extremes, and how many there are of each size."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

PER_DECADE = 4  # bins
LOWEST, HIGHEST = -24, 16  # decades, in nats per term and squared parameter
BINS = PER_DECADE * (HIGHEST - LOWEST)
#: Of the bins, from the lowest to the highest, one more than there are bins.
EDGES = tuple(10 ** (LOWEST + i / PER_DECADE) for i in range(BINS + 1))
MIDDLES = tuple(math.sqrt(low * high) for low, high in itertools.pairwise(EDGES))


@dataclass(frozen=True)
class Spectrum:
    """Of a positive semi-definite matrix, as of its last inversion.

    Attributes:
        counts: how many eigenvalues there are, `[1 + bins]`: those that rounding cannot tell from
            zero, then a bin for each quarter of a decade. Of a Kronecker product bins are exact to
            within one, since what is multiplied has been sorted into bins before.
        extremes: smallest and largest eigenvalue, then the same of the damped matrix, `[4]`.
    """

    counts: Tensor
    extremes: Tensor


@dataclass(frozen=True)
class BlockSpectrum:
    """`Spectrum` of one block, on the host.

    Attributes:
        name: of its first parameter.
        counts: of eigenvalues that are zero, and of those in each bin.
        low: the smallest eigenvalue.
        high: the largest.
        damped_low: the smallest of the damped matrix.
        damped_high: the largest.
    """

    name: str
    counts: tuple[float, ...]
    low: float
    high: float
    damped_low: float
    damped_high: float

    @property
    def condition(self) -> float:
        """Of the damped matrix; inf if it is singular."""
        return math.inf if self.damped_low <= 0 else self.damped_high / self.damped_low

    @property
    def effective_rank(self) -> float:
        """How many directions share the undamped matrix: exp of the entropy of its spectrum.

        Between 1 and the number of eigenvalues; nan for a matrix of zeros. Eigenvalues count as the
        middles of their bins, which it knows to within a tenth or so.

        Source: Roy & Vetterli, The effective rank, EUSIPCO 2007.
        """
        weights = [(n, n * m) for n, m in zip(self.counts[1:], MIDDLES, strict=True) if n > 0]
        total = sum(weight for _, weight in weights)
        if total <= 0:
            return math.nan
        return math.exp(-sum(w / total * math.log(w / (n * total)) for n, w in weights))


def spectrum(values: Tensor, extremes: tuple[Tensor, ...], zeros: int = 0) -> Spectrum:
    """Of eigenvalues that are all there.

    Args:
        values: they.
        extremes: as of `Spectrum`, scalars.
        zeros: eigenvalues that are zero besides.
    """
    found = counted(values.reshape(1, -1))[0]
    found[0] += zeros
    return Spectrum(found, torch.stack(extremes))


def counted(values: Tensor, times: Tensor | None = None) -> Tensor:
    """How many there are in each bin, `[group, 1 + bins]`.

    Args:
        values: `[group, n]`.
        times: how often each counts, `[n]`; None for once.
    """
    rounding = torch.finfo(values.dtype).eps * values.amax(1, keepdim=True)
    bins = ((values.clamp_min(10.0**LOWEST).log10() - LOWEST) * PER_DECADE).long()
    bins = torch.where(values > rounding, 1 + bins.clamp(0, BINS - 1), 0)
    # Whole numbers: a sum of ones in float32 ends at 2^24.
    each = torch.ones((), dtype=torch.long, device=bins.device) if times is None else times.long()
    result = bins.new_zeros(len(values), 1 + BINS)
    return result.scatter_add_(1, bins, each.expand_as(bins)).to(values)


def counted_products(a: Tensor, g: Tensor) -> Tensor:
    """How many products of one eigenvalue each there are in each bin, of all groups together.

    Args:
        a: `counted` of one factor, `[group, 1 + bins]`.
        g: of the other.
    """
    nonzero = a[:, 1:].sum(1) * g[:, 1:].sum(1)
    # Bin i and bin j: from 10^(2 LOWEST + (i + j) / PER_DECADE) on, over two bins; half of each.
    together = F.conv1d(a[None, :, 1:], g[:, 1:].flip(1)[:, None], padding=BINS - 1, groups=len(a))
    both = F.pad(together[0], (0, 1)) / 2 + F.pad(together[0], (1, 0)) / 2
    first = -LOWEST * PER_DECADE  # the place of LOWEST
    kept = both[:, first : first + BINS].clone()
    kept[:, 0] += both[:, :first].sum(1)
    kept[:, -1] += both[:, first + BINS :].sum(1)
    zeros = a.sum(1) * g.sum(1) - nonzero
    return torch.cat([zeros[:, None], kept], 1).sum(0)
