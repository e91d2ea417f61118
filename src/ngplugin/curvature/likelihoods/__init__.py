"""What a model predicts: probability distributions, and the loss calls that reveal them."""

from ngplugin.curvature.likelihoods.bernoulli import Bernoulli as Bernoulli
from ngplugin.curvature.likelihoods.categorical import Categorical as Categorical
from ngplugin.curvature.likelihoods.gaussian import Gaussian as Gaussian
from ngplugin.curvature.likelihoods.likelihood import Likelihood as Likelihood
from ngplugin.curvature.likelihoods.loss_call import LossCall as LossCall
from ngplugin.curvature.likelihoods.loss_calls import read_loss_call as read_loss_call

__all__ = ["Bernoulli", "Categorical", "Gaussian", "Likelihood", "LossCall", "read_loss_call"]
