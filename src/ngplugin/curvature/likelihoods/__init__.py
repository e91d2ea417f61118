"""What a model predicts: probability distributions, and the loss calls that reveal them."""

from ngplugin.curvature.likelihoods.bernoulli import Bernoulli as Bernoulli
from ngplugin.curvature.likelihoods.categorical import Categorical as Categorical
from ngplugin.curvature.likelihoods.gaussian import Gaussian as Gaussian
from ngplugin.curvature.likelihoods.likelihood import FisherKind as FisherKind
from ngplugin.curvature.likelihoods.likelihood import Likelihood as Likelihood
from ngplugin.curvature.likelihoods.likelihood import Prediction as Prediction
from ngplugin.curvature.likelihoods.log_prob import LogProbCall as LogProbCall
from ngplugin.curvature.likelihoods.log_prob import read_log_prob as read_log_prob
from ngplugin.curvature.likelihoods.log_prob import watching_log_prob as watching_log_prob
from ngplugin.curvature.likelihoods.loss_call import LossCall as LossCall
from ngplugin.curvature.likelihoods.loss_call import ScoredCall as ScoredCall
from ngplugin.curvature.likelihoods.loss_calls import read_loss_call as read_loss_call
from ngplugin.curvature.likelihoods.output_curvature import OutputCurvature as OutputCurvature
from ngplugin.curvature.likelihoods.own_loss import OwnLoss as OwnLoss

__all__ = [
    "Bernoulli",
    "Categorical",
    "FisherKind",
    "Gaussian",
    "Likelihood",
    "LogProbCall",
    "LossCall",
    "OutputCurvature",
    "OwnLoss",
    "Prediction",
    "ScoredCall",
    "read_log_prob",
    "read_loss_call",
    "watching_log_prob",
]
