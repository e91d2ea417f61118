"""K-FAC by other people's packages, each in the way its own documentation has it.

All three precondition linear layers and convolutions, whose steps have momentum 0.9, and look at
the curvature every ten steps; AdamW takes what is left: norms, embeddings.
"""

from __future__ import annotations

import contextlib
import warnings
from abc import abstractmethod
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from experiments.race.contestants import Training
from experiments.tasks.language_model import LanguageModel

EVERY = 10  # steps between looks at the curvature, and between inversions
REST_LR = 1e-3  # of AdamW


class KFAC(Training):
    """What the three have in common."""

    def prepare(self, lr: float, damping: float) -> None:
        """Make the optimizers."""
        network = self.module.network
        self.maps = [m for m in network.modules() if isinstance(m, (nn.Linear, nn.Conv2d))]
        taken = [p for m in self.maps for p in m.parameters()]
        ids = {*map(id, taken)}
        rest = [p for p in network.parameters() if id(p) not in ids]
        self.rest = torch.optim.AdamW(rest, REST_LR) if rest else None
        self.optimizer = self.make(network, taken, lr, damping)

    @abstractmethod
    def make(
        self, network: nn.Module, taken: list[nn.Parameter], lr: float, damping: float
    ) -> torch.optim.Optimizer:
        """The optimizer of the parameters that are taken, and what else is needed."""

    def step(self, batch: Any, done: float) -> Tensor:
        """Gradients, natural ones where there are, and a step."""
        self.optimizer.zero_grad()
        if self.rest is not None:
            self.rest.zero_grad()
        loss = self.differentiate(batch)
        self.optimizer.step()
        if self.rest is not None:
            self.rest.step()
        return loss

    @abstractmethod
    def differentiate(self, batch: Any) -> Tensor:
        """The loss, its gradients in the parameters."""

    def criterion(self, outputs: Tensor, targets: Tensor, reduction: str = "mean") -> Tensor:
        """The task's loss of the network's outputs, averaged or summed over rows."""
        if self.course.prediction == "categorical":
            outputs, targets = outputs.flatten(0, -2), targets.flatten()
            return F.cross_entropy(outputs, targets, reduction=reduction)
        if self.course.prediction == "bernoulli":
            total = F.binary_cross_entropy_with_logits(outputs, targets.flatten(1), reduction="sum")
        else:
            total = F.mse_loss(outputs, targets, reduction="sum") / outputs.shape[-1]
        return total if reduction == "sum" else total / len(outputs)

    def pair(self, batch: Any) -> tuple[Tensor, Tensor]:
        """Inputs and targets; an autoencoder's are the same."""
        return batch[0], batch[0] if self.course.prediction == "bernoulli" else batch[1]


class ASDL(KFAC):
    """Labels drawn from the model; the data's own for Bernoulli outputs, which it cannot draw."""

    def make(
        self, network: nn.Module, taken: list[nn.Parameter], lr: float, damping: float
    ) -> torch.optim.Optimizer:
        """Its gradient maker, and SGD."""
        from asdl import FISHER_EMP, FISHER_MC, LOSS_CROSS_ENTROPY, LOSS_MSE
        from asdl.precondition import KfacGradientMaker, PreconditioningConfig

        left_out = [m for m in network.modules() if m not in self.maps and not [*m.children()]]
        config = PreconditioningConfig(
            data_size=1, damping=damping, ema_decay=0.05, ignore_modules=left_out,
            preconditioner_upd_interval=EVERY, curvature_upd_interval=EVERY,
        )  # fmt: skip
        fisher = FISHER_EMP if self.course.prediction == "bernoulli" else FISHER_MC
        loss = LOSS_MSE if self.course.prediction == "gaussian" else LOSS_CROSS_ENTROPY
        self.maker = KfacGradientMaker(network, config, fisher_type=fisher, loss_type=loss)
        return torch.optim.SGD(taken, lr, momentum=0.9)

    def differentiate(self, batch: Any) -> Tensor:
        """By its gradient maker."""
        inputs, targets = self.pair(batch)
        tokens = targets.numel() if self.course.prediction == "categorical" else len(targets)
        self.maker.config.data_size = tokens

        def criterion(outputs: Tensor, targets: Tensor, reduction: str = "mean") -> Tensor:
            return self.criterion(outputs, targets, reduction)

        outputs = self.maker.setup_model_call(self.module.network, inputs)
        self.maker.setup_loss_call(criterion, outputs, targets)
        # It names ranges for a profiler of CUDA's, which a torch for the CPU does not have.
        no_ranges = mock.patch.object(torch.cuda.nvtx, "range", contextlib.nullcontext)
        with no_ranges, warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of its old-fashioned hooks, which do work here
            _, loss = self.maker.forward_and_backward()
        return loss.detach()  # type: ignore[no-any-return]


class SINGD(KFAC):
    """The data's own labels, no inverses; dense factors."""

    def make(
        self, network: nn.Module, taken: list[nn.Parameter], lr: float, damping: float
    ) -> torch.optim.Optimizer:
        """Its optimizer; the learning rate of the factors is kept small while they are young."""
        from singd.optim.optimizer import SINGD

        return SINGD(  # type: ignore[no-any-return]
            network, taken, lr, damping=damping, T=EVERY, normalize_lr_cov=True, lr_cov=0.1,
            loss_average="batch+sequence" if isinstance(self.module, LanguageModel) else "batch",
        )  # fmt: skip

    def differentiate(self, batch: Any) -> Tensor:
        """Forward and backward, which its hooks follow."""
        loss = self.module.loss(batch)
        loss.backward()
        return loss.detach()


class NNGeometry(KFAC):
    """Its Fisher in Kronecker factors, of labels drawn from the model; averaged here."""

    def make(
        self, network: nn.Module, taken: list[nn.Parameter], lr: float, damping: float
    ) -> torch.optim.Optimizer:
        """Its layers, and SGD."""
        from nngeometry.layercollection import LayerCollection

        self.layers = LayerCollection()
        for m in self.maps:
            self.layers.add_layer_from_model(network, m)
        self.damping = damping
        self.steps = 0
        self.average: Any = None
        self.inverse: Any = None
        return torch.optim.SGD(taken, lr, momentum=0.9)

    def differentiate(self, batch: Any) -> Tensor:
        """Forward and backward; then the gradients times the inverse."""
        from nngeometry.object.vector import PVector

        if self.steps % EVERY == 0:
            self.look(batch)
        self.steps += 1
        loss = self.module.loss(batch)
        loss.backward()
        named = dict(self.module.network.named_modules())
        parameters = {name: [*named[name].parameters()] for name in self.layers.layers}
        gradients = {n: tuple(p.grad for p in ps) for n, ps in parameters.items()}
        natural = self.inverse.mv(PVector(self.layers, dict_repr=gradients)).to_dict()
        for name, ps in parameters.items():
            for p, d in zip(ps, natural[name], strict=True):
                p.grad = d
        return loss.detach()

    def look(self, batch: Any) -> None:
        """Take the curvature of a batch into the average, and invert."""
        from nngeometry import FIM, FIM_MonteCarlo
        from nngeometry.object.pspace import PMatKFAC

        categorical = self.course.prediction == "categorical"
        fim = FIM_MonteCarlo if categorical else FIM
        found = fim(
            self.module.network, (batch[0].clone(),), PMatKFAC,
            variant="classif_logits" if categorical else "regression",
            layer_collection=self.layers,
        )  # fmt: skip
        if self.average is None:
            self.average = found
        else:
            for name, old in self.average.data.items():
                for mine, new in zip(old, found.data[name], strict=True):
                    mine.lerp_(new, 0.05)
        self.inverse = self.average.inverse(regul=self.damping)
