"""Everyone who races, with the grids that they are tuned over."""

from __future__ import annotations

from experiments.race import contestants as own
from experiments.race import peers
from experiments.race.contestants import Contestant
from experiments.race.courses import COURSES
from experiments.race.search import Axes, Axis


def learning_rates(*middles: float) -> dict[str, Axes]:
    """A learning rate for the middle of each course's grid."""
    return {c: {"lr": Axis(lr)} for c, lr in zip(COURSES, middles, strict=True)}


def rates_and_dampings(*middles: tuple[float, float] | None) -> dict[str, Axes]:
    """A learning rate and a damping for the middle of each course's grid."""
    return {
        c: {"lr": Axis(m[0]), "damping": Axis(m[1], 10.0)}
        for c, m in zip(COURSES, middles, strict=True)
        if m is not None
    }


_SECOND_DERIVATIVES = (
    "the loss has second derivatives of the network in it, so that a layer is run backward "
    "several times; its hooks expect one forward and one backward pass"
)

FIELD = {
    "sgd": Contestant(
        "SGD", own.SGD, learning_rates(0.1, 0.03, 1e-3, 0.03, 0.3, 1e-3), options="momentum 0.9"
    ),
    "adam": Contestant("Adam", own.Adam, learning_rates(3e-3, 3e-3, 1e-3, 2e-3, 3e-3, 1e-2)),
    "adamw": Contestant("AdamW", own.AdamW, learning_rates(3e-3, 3e-3, 1e-3, 2e-3, 3e-3, 1e-2)),
    "adamw-cosine": Contestant(
        "AdamW, cosine", own.AdamWCosine, learning_rates(3e-3, 3e-3, 1e-3, 2e-3, 3e-3, 1e-2)
    ),
    "muon": Contestant(
        "Muon", own.Muon, learning_rates(1e-2, 1e-2, 3e-3, 3e-3, 1e-2, 1e-2),
        options="for matrices; AdamW for the rest",
    ),
    "lbfgs": Contestant(
        "L-BFGS", own.LBFGS,
        {c: {"lr": Axis(1.0), "history_size": Axis(20, 3.0)} for c in COURSES},
        unable={
            "mnist5k_cnn": "a pass over all of the images takes two fifths of the race",
            "char_transformer": "a pass over all of the text takes longer than the race",
        },
        options="whole training set, strong Wolfe line search",
    ),
    "soap": Contestant(
        "SOAP", own.SOAP, learning_rates(3e-3, 3e-3, 1e-3, 3e-3, 3e-3, 1e-2),
        package="pytorch_optimizer", options="basis every 10 steps",
    ),
    "shampoo": Contestant(
        "Shampoo", own.Shampoo, learning_rates(3e-3, 3e-3, 1e-3, 3e-3, 3e-3, 1e-2),
        package="pytorch_optimizer", options="grafted to RMSProp, roots every 10 steps",
    ),
    "asdl": Contestant(
        "ASDL K-FAC", peers.ASDL,
        rates_and_dampings(
            (1e-2, 3e-2), (1e-2, 3e-2), (3e-3, 1e-1), (1e-3, 1e-1), (3e-3, 3e-3), None
        ),
        unable={"poisson_pinn": _SECOND_DERIVATIVES}, package="asdl",
        options="every 10 steps",
    ),
    "singd": Contestant(
        "SINGD", peers.SINGD,
        rates_and_dampings(
            (3e-3, 1e-3), (1e-2, 1e-3), (3e-3, 1e-2), (1e-2, 1e-3), (3e-3, 1e-3), None
        ),
        unable={"poisson_pinn": _SECOND_DERIVATIVES}, package="singd",
        options="dense factors, every 10 steps",
    ),
    "nngeometry": Contestant(
        "NNGeometry K-FAC", peers.NNGeometry,
        rates_and_dampings((1e-2, 1e-1), (3e-2, 1e-1), None, None, (3e-2, 1e-2), None),
        unable={
            "autoencoder": "no Fisher of 784 Bernoulli outputs but by as many backward passes",
            "char_transformer": "its linear layers take matrices, not sequences of them",
            "poisson_pinn": _SECOND_DERIVATIVES,
        },
        package="nngeometry", options="every 10 steps",
    ),
    "natgrad": Contestant("natural gradient", own.NaturalGradient, options="defaults"),
    "natgrad-tuned": Contestant(
        "natural gradient, tuned", own.NaturalGradient,
        {c: {"kl_radius": Axis(0.05, 3.0), "memory": Axis(10, 2.0)} for c in COURSES},
        options="`memory` = 1 / (1 - momentum)",
    ),
}  # fmt: skip
