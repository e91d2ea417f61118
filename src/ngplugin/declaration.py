"""Says by hand what a model predicts."""

from __future__ import annotations

from torch import Tensor
from torch.distributions import Distribution

from ngplugin.curvature.observe import active
from ngplugin.errors import LikelihoodError


def declare(
    loss: Tensor,
    distribution: Distribution,
    observed: Tensor,
    weight: Tensor | float | None = None,
) -> None:
    """Say inside a training step which distribution a loss stands for.

        loss = my_loss(mean, target)
        ngplugin.declare(loss, torch.distributions.Normal(mean, 0.1), target)

    The Fisher information of that loss is then the distribution's, whatever the loss was computed
    of: neither losses that are recognised in it nor its own curvature count. Outside of an observed
    step nothing happens.

    Args:
        loss: a scalar that the objective is, or contains.
        distribution: made of what the model computed; each element of its `log_prob(observed)` is
            a term.
        observed: what it is a prediction of.
        weight: how often the loss counts the -log p of each term, broadcast to the terms; one over
            their number by default, as in a mean.

    Raises:
        LikelihoodError: the loss or the distribution does not depend on a trained parameter, or the
            distribution has no `sample`.
    """
    watching = active()
    if watching and not watching[-1].declare(loss, distribution, observed, weight):
        raise LikelihoodError(
            f"declare() was given a loss of shape {tuple(loss.shape)} and a distribution of type "
            f"{type(distribution).__name__}; no trained parameter enters one of them, or the "
            "distribution cannot be sampled. Usual cause: it was detached, or computed under "
            "torch.no_grad(). Make both of the model's outputs."
        )
