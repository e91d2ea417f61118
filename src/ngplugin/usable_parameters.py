"""Whether parameters, and what was observed of them, are such that a step can be made."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from ngplugin.curvature.observation import Observation
from ngplugin.curvature.ranks import several_ranks
from ngplugin.errors import OptionError, StepOrderError


def check_usable(parameters: Sequence[Tensor]) -> None:
    """Refuse parameters on the meta device, and pieces of parameters.

    Args:
        parameters: that are to be trained.

    Raises:
        StepOrderError: one of them has a shape and no values.
        OptionError: one of them is sharded.
    """
    for i, p in enumerate(parameters):
        if p.is_meta:
            raise StepOrderError(
                f"parameter {i} of the optimizer, of shape {tuple(p.shape)}, is on the meta "
                "device, where tensors have no values; expected parameters with values. Usual "
                "cause: the optimizer was built under torch.device('meta'), before to_empty() or "
                "configure_model() replaced the model's parameters by others. Build it after that, "
                "with Lightning in configure_optimizers()."
            )
        if hasattr(p, "to_local"):
            raise OptionError(
                f"parameter {i} of the optimizer, of shape {tuple(p.shape)}, is sharded (a "
                "DTensor): of pieces of a layer no Fisher block can be formed. Usual cause: "
                "fully_shard() or tensor parallelism. Use DistributedDataParallel, which leaves "
                "layers whole and spreads the work over the devices, or give this optimizer only "
                "the layers that are whole."
            )


def check_not_joined(observations: Sequence[Observation]) -> None:
    """Refuse a step of processes that may leave one by one.

    One that is done answers what the model sends, and none of a step's own messages, which would be
    taken for others.

    Args:
        observations: of the step.

    Raises:
        OptionError: the model was run under `Join`.
    """
    if several_ranks() and any(observation.joined for observation in observations):
        raise OptionError(
            "a natural-gradient step under torch.distributed.algorithms.Join: a process whose "
            "batches have ended would answer the model's messages, but none of the step's. "
            "Expected as many batches in every process. Have all end with the first, by "
            "Join(..., throw_on_early_termination=True), or fill up the shorter data loaders, as "
            "torch.utils.data.DistributedSampler does."
        )
