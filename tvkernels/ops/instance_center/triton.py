"""One kernel for the forward and, centering being its own adjoint, the backward."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from tvkernels._triton import support
from tvkernels._triton.configs import choose
from tvkernels._triton.launch import arch, launch


def why_not(z) -> list[str]:
    """Reasons against this call."""
    return support.why_not(z)


def forward(z):
    """Shapes as in `tvkernels.instance_center`."""
    out = torch.empty(z.shape, dtype=z.dtype, device=z.device)
    b, f, n, c = z.shape
    config = choose("instance_center", "_center", arch=arch(z), dtype=str(z.dtype)[6:])
    launch(
        _center,
        (triton.cdiv(n * c, config["BLOCK"]) * b,),
        {
            "z": z, "out": out, "frames": f, "channels": c, "size": n * c,
            "z_b": z.stride(0), "z_f": z.stride(1), "z_n": z.stride(2), "z_c": z.stride(3),
        },
        config,
    )  # fmt: skip
    return out


def backward(grads, z):
    """Centering is a symmetric projection: its gradient is the centered gradient."""
    return [forward(grads[0])]


@triton.jit
def _center(z, out, frames, channels, size, z_b, z_f, z_n, z_c, BLOCK: tl.constexpr):
    """A block of positions and channels: two passes over its frames, the second from cache."""
    blocks = tl.cdiv(size, BLOCK)
    batch = (tl.program_id(0) // blocks).to(tl.int64)
    cell = (tl.program_id(0) % blocks) * BLOCK + tl.arange(0, BLOCK)
    inside = cell < size
    start = z + batch * z_b + (cell // channels).to(tl.int64) * z_n + (cell % channels) * z_c
    total = tl.zeros([BLOCK], tl.float32)
    source = start
    for _ in range(frames):
        total += tl.load(source, mask=inside, other=0.0).to(tl.float32)
        source += z_f
    mean = total / frames
    source = start
    target = out + batch * frames * size + cell
    for _ in range(frames):
        x = tl.load(source, mask=inside, other=0.0).to(tl.float32)
        tl.store(target, (x - mean).to(out.dtype.element_ty), mask=inside)
        source += z_f
        target += size
