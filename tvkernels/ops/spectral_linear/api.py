"""Contract of spectral_linear, and sigma by given vectors or exact. Imports torch only."""

from __future__ import annotations

import torch
from torch import Tensor

from tvkernels._dispatch import Op, _no_autocast


def _fake(x, weight, bias, sigma):
    return x.new_empty((*x.shape[:-1], weight.shape[0]))


OP = Op(
    "spectral_linear",
    "Tensor x, Tensor weight, Tensor? bias, Tensor? sigma",
    "Tensor",
    _fake,
    differentiable=(0, 1, 2, 3),
)


def spectral_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    sigma: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """x W^T / sigma + b, with sigma the largest singular value of W (EI2, eq. 8).

    Args:
        x: [..., C_in], any strides.
        weight: [C_out, C_in] of x's dtype.
        bias: [C_out] of x's dtype.
        sigma: one floating number, 0-d or [1], on x's device; the exact value if None. Gradients
            reach it, so that `spectral_sigma` carries them on to the weight.
        backend: "auto" or a name; a named backend never falls back.
    Returns:
        [..., C_out], contiguous. An all-zero W, whose sigma is 0, gives b and finite gradients.
    Raises:
        ValueError: shapes or dtypes do not fit; the text says how.
        BackendError: no backend, or not the named one, can run this call.
    """
    if weight.dim() != 2 or not x.dim() or x.shape[-1] != weight.shape[1]:
        raise ValueError(
            "x is [..., C_in] and weight [C_out, C_in], got "
            f"{tuple(x.shape)} and {tuple(weight.shape)}"
        )
    if not x.is_floating_point() or x.dtype != weight.dtype:
        raise ValueError(f"x and weight need one floating dtype, got {x.dtype}, {weight.dtype}")
    check_bias(bias, weight)
    check_sigma(sigma, "sigma")
    return OP(x, weight, bias, sigma, backend=backend)


def check_bias(bias: Tensor | None, weight: Tensor) -> None:
    """Raises ValueError unless `bias` is None or [C_out] of the weight's dtype."""
    if bias is not None and (bias.shape != weight.shape[:1] or bias.dtype != weight.dtype):
        raise ValueError(
            f"bias is [{weight.shape[0]}] of {weight.dtype}, got {tuple(bias.shape)} {bias.dtype}"
        )


def check_sigma(sigma: Tensor | None, name: str) -> None:
    """Raises ValueError unless `sigma` is None or one floating number."""
    if sigma is None:
        return
    if sigma.numel() != 1 or sigma.dim() > 1 or not sigma.is_floating_point():
        raise ValueError(
            f"{name} is one floating number, 0-d or [1], got {tuple(sigma.shape)} {sigma.dtype}"
        )


def spectral_sigma(weight: Tensor, u: Tensor | None = None, v: Tensor | None = None) -> Tensor:
    """The largest singular value: u^T W v by given vectors, or exact (EI2, eq. 8).

    Args:
        weight: [C_out, C_in]; the result is differentiable in it.
        u, v: [C_out] and [C_in] from `power_iteration`, held constant; both None for the exact
            value by singular value decomposition (its gradient is finite for an all-zero weight).
    Returns:
        0-d, float32 at least.
    Raises:
        ValueError: shapes do not fit, or only one of u and v is given.
    """
    if weight.dim() != 2 or (u is None) != (v is None):
        raise ValueError("weight is [C_out, C_in], and u and v come together or not at all")
    wide = weight.to(torch.promote_types(weight.dtype, torch.float32))
    if u is None:
        return torch.linalg.svdvals(wide)[0]
    if u.shape != weight.shape[:1] or v.shape != weight.shape[1:]:
        raise ValueError(
            f"u and v are [{weight.shape[0]}] and [{weight.shape[1]}], got "
            f"{tuple(u.shape)} and {tuple(v.shape)}"
        )
    with _no_autocast([weight]):
        return u.detach().to(wide) @ (wide @ v.detach().to(wide))
