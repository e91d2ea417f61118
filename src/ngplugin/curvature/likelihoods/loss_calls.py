"""The torch loss functions that reveal what a model predicts.

Hinges, margins and cosines have no distribution behind them and are left out. So is `ctc_loss`: its
labels are sums over alignments, whose Fisher information has no short form, and that of its frames,
as if each alignment were observed, is an upper bound only (what is hidden takes information away).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F

from ngplugin.curvature.likelihoods.bernoulli import (
    read_binary_cross_entropy,
    read_binary_cross_entropy_with_logits,
    read_soft_margin_loss,
)
from ngplugin.curvature.likelihoods.categorical import (
    read_cross_entropy,
    read_kl_div,
    read_nll_loss,
)
from ngplugin.curvature.likelihoods.gaussian import read_mse_loss
from ngplugin.curvature.likelihoods.huber import read_huber_loss, read_smooth_l1_loss
from ngplugin.curvature.likelihoods.laplace import read_l1_loss
from ngplugin.curvature.likelihoods.loss_call import LossCall
from ngplugin.curvature.likelihoods.normal import read_gaussian_nll_loss
from ngplugin.curvature.likelihoods.poisson import read_poisson_nll_loss

_READERS: dict[Callable[..., Any], Callable[..., LossCall | None]] = {
    F.cross_entropy: read_cross_entropy,
    F.nll_loss: read_nll_loss,
    F.binary_cross_entropy: read_binary_cross_entropy,
    F.binary_cross_entropy_with_logits: read_binary_cross_entropy_with_logits,
    F.mse_loss: read_mse_loss,
    F.poisson_nll_loss: read_poisson_nll_loss,
    F.gaussian_nll_loss: read_gaussian_nll_loss,
    F.kl_div: read_kl_div,
    F.l1_loss: read_l1_loss,
    F.smooth_l1_loss: read_smooth_l1_loss,
    F.huber_loss: read_huber_loss,
    F.soft_margin_loss: read_soft_margin_loss,
}

#: Names of the loss functions that are recognised.
RECOGNISED = tuple(function.__name__ for function in _READERS)


def read_loss_call(
    function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> LossCall | None:
    """What a call of a torch function says about the model's prediction, None if nothing."""
    reader = _READERS.get(function)
    if reader is None:
        return None
    with torch.no_grad():
        return reader(*args, **kwargs)
