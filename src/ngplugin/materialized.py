"""Whether parameters have values yet."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from ngplugin.errors import StepOrderError


def check_materialized(parameters: Sequence[Tensor]) -> None:
    """Refuse parameters on the meta device.

    Args:
        parameters: that are to be trained.

    Raises:
        StepOrderError: one of them has a shape and no values.
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
