"""How often the optimizer does what, and what may be changed about it on paper."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

#: What `NaturalGradientOptimizer(structure=...)` takes, but for the one that several ranks refuse.
FisherStructure = Literal["kronecker", "eigen", "diagonal", "identity", "matrix-free"]

#: AdamW is the yardstick.
Structure = Literal["adamw"] | FisherStructure

#: The most steps between those for which F d is formed, to predict the KL of all with.
CURVED_EVERY = 6


@dataclass(frozen=True)
class Protocol:
    """The optimizer's options that cost something; defaults are its own.

    Attributes:
        statistics_every: the fewest steps between statistics of F.
        refresh_every: the fewest steps between inversions.
        measure_every: steps between measurements of the KL; 0 for none.
        spectrum_every: steps between condition numbers; 0 for none.
        max_factor: a factor of a larger size keeps its diagonal only.
        overhead: share of the model's own multiplications that curvature may add. A factor the
            products with which take more than a quarter of it of the layer's own is kept by its
            leading eigenvectors; statistics and inversions that do are rarer.
        rank: by how many eigenvectors, at most.
        paced: whether they are.
        cg_iterations: products with F in a matrix-free step, one for the start not counted.
        weight_decay: whether there is any; its part of the predicted KL is one more product with F.
        accumulate: micro-batches of a step.
        parameter_bytes: of a parameter, its gradient and its momentum: 4, or 2 with bf16-true.
        bucket_view: gradients are views of the buckets in which they are sent
            (`DDPStrategy(gradient_as_bucket_view=True)`).
        sharded_products: each rank preconditions the blocks that it inverts, and sends d and F d to
            the others; not implemented.
        sharded_curvature: averages and matrices at the owner of a block only, and inverses
            everywhere; not implemented.
        sharded_parameters: parameters, gradients and optimizer state divided among the ranks; not
            implemented, and not timed.
    """

    statistics_every: int = 5
    refresh_every: int = 20
    measure_every: int = 6
    spectrum_every: int = 100
    max_factor: int = 8192
    overhead: float = 0.6
    rank: int = 64
    paced: bool = True
    cg_iterations: int = 10
    weight_decay: bool = True
    accumulate: int = 1
    parameter_bytes: int = 4
    bucket_view: bool = False
    sharded_products: bool = False
    sharded_curvature: bool = False
    sharded_parameters: bool = False
