"""Contract of STAM: schema, fake, checks and the public function. Imports torch only."""

from __future__ import annotations

from torch import Tensor

from tvkernels._dispatch import Op
from tvkernels.ops.spectral_linear.api import check_bias, check_sigma


def _fake(z, w_q, w_k, w_v, w_out, bias, sigma_v, sigma_out, heads):
    return z.new_empty(z.shape)


OP = Op(
    "shift_restricted_temporal_attention",
    "Tensor z, Tensor w_q, Tensor w_k, Tensor w_v, Tensor w_out, Tensor? bias, "
    "Tensor? sigma_v, Tensor? sigma_out, int heads",
    "Tensor",
    _fake,
    backends=("cuda", "triton", "native", "cpu", "reference"),
    differentiable=(0, 1, 2, 3, 4, 5, 6, 7),
)


def shift_restricted_temporal_attention(
    z: Tensor,
    w_q: Tensor,
    w_k: Tensor,
    w_v: Tensor,
    w_out: Tensor,
    bias: Tensor | None = None,
    *,
    heads: int,
    sigma_v: Tensor | None = None,
    sigma_out: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """EI2's STAM: z + Linear(Attention(IC(z), IC(z))) over frames (EI2, eq. 8 and 9).

    Args:
        z: [B, F, N, C], any strides.
        w_q, w_k, w_v, w_out: [C, C] of z's dtype, out x in as torch keeps them; w_v and w_out are
            divided by their sigma.
        bias: [C] of z's dtype, added after w_out; None for none.
        heads: number of heads, a divisor of C; scores are divided by sqrt(C / heads).
        sigma_v, sigma_out: one floating number each, 0-d or [1], on z's device; the exact largest
            singular value if None. Gradients reach them; a sigma of 0 gives z + bias.
        backend: "auto" or a name; a named backend never falls back.
    Returns:
        [B, F, N, C], contiguous.
    Raises:
        ValueError: shapes, dtypes or heads do not fit; the text says how.
        BackendError: no backend, or not the named one, can run this call.
    """
    if z.dim() != 4 or not z.is_floating_point():
        raise ValueError(f"z is a floating [B, F, N, C], got {tuple(z.shape)} {z.dtype}")
    c = z.shape[-1]
    for name, weight in (("w_q", w_q), ("w_k", w_k), ("w_v", w_v), ("w_out", w_out)):
        if weight.shape != (c, c) or weight.dtype != z.dtype:
            raise ValueError(
                f"{name} is [{c}, {c}] of {z.dtype}, got {tuple(weight.shape)} {weight.dtype}"
            )
    check_bias(bias, w_out)
    if heads < 1 or c % heads:
        raise ValueError(f"{heads} heads do not divide {c} channels")
    check_sigma(sigma_v, "sigma_v")
    check_sigma(sigma_out, "sigma_out")
    return OP(z, w_q, w_k, w_v, w_out, bias, sigma_v, sigma_out, heads, backend=backend)
