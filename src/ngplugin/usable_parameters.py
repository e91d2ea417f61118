"""Whether parameters are such that a Fisher matrix of them can be formed."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

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
