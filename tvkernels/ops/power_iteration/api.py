"""Contract of power_iteration: schema, fake, checks, public function. Imports torch only."""

from __future__ import annotations

import torch
from torch import Tensor

from tvkernels._dispatch import Op


def _fake(weight, u, steps):
    wide = torch.promote_types(weight.dtype, torch.float32)
    rows, columns = weight.shape
    return weight.new_empty((rows,), dtype=wide), weight.new_empty((columns,), dtype=wide)


OP = Op(
    "power_iteration",
    "Tensor weight, Tensor u, int steps",
    "(Tensor, Tensor)",
    _fake,
    backends=("triton", "cpu", "reference"),
)


def power_iteration(
    weight: Tensor, u: Tensor, steps: int = 1, *, backend: str = "auto"
) -> tuple[Tensor, Tensor]:
    """Better singular vectors of the largest singular value (Miyato et al., algorithm 1; EI2).

    Args:
        weight: [C_out, C_in], any strides. Held constant, as u is: no gradient passes.
        u: [C_out], the left vector of the previous call; any random vector at first.
        steps: iterations; one for each training step is enough.
        backend: "auto" or a name; a named backend never falls back.
    Returns:
        (u, v), unit vectors [C_out] and [C_in] in float32 at least. A zero product keeps the
        vector there was, so that an all-zero weight does not end the estimate for good.
    Raises:
        ValueError: shapes or dtypes do not fit, or no step is asked for.
        BackendError: no backend, or not the named one, can run this call.
    """
    if weight.dim() != 2 or u.shape != weight.shape[:1] or steps < 1:
        raise ValueError(
            "weight is [C_out, C_in], u [C_out] and steps 1 or more, got "
            f"{tuple(weight.shape)}, {tuple(u.shape)}, {steps}"
        )
    if not weight.is_floating_point() or not u.is_floating_point():
        raise ValueError(f"weight and u need floating dtypes, got {weight.dtype}, {u.dtype}")
    return OP(weight.detach(), u.detach(), steps, backend=backend)
