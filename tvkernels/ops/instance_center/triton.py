"""One kernel for the forward and, centering being its own adjoint, the backward.

Up to 32 frames stay in registers: one read, one write. Beyond, the second of two passes reads from
cache what it can.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from tvkernels._triton import support
from tvkernels._triton.configs import cdiv, choose, next_power_of_2
from tvkernels._triton.launch import arch, launch

ONE_PASS = 32  # frames that one program holds at once


def why_not(z) -> list[str]:
    """Reasons against this call."""
    return support.why_not(z)


def forward(z):
    """Shapes as in `tvkernels.instance_center`."""
    out = torch.empty(z.shape, dtype=z.dtype, device=z.device)
    b, f, n, c = z.shape
    if not z.numel():
        return out
    config = choose("instance_center", "_center", arch=arch(z), dtype=str(z.dtype)[6:], frames=f)
    launch(
        _center,
        (cdiv(n * c, config["BLOCK"]) * b,),
        {
            "z": z, "out": out, "frames": f, "channels": c, "size": n * c,
            "z_b": z.stride(0), "z_f": z.stride(1), "z_n": z.stride(2), "z_c": z.stride(3),
        },
        config,
        FRAMES=next_power_of_2(f) if f <= ONE_PASS else 0,
    )  # fmt: skip
    return out


def backward(grads, z):
    """Centering is a symmetric projection: its gradient is the centered gradient."""
    return [forward(grads[0])]


@triton.jit(do_not_specialize=["frames"])
def _center(
    z, out, frames, channels, size, z_b, z_f, z_n, z_c, FRAMES: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """A block of positions and channels, FRAMES of them at once or, where that is 0, in a loop."""
    blocks = tl.cdiv(size, BLOCK)
    batch = (tl.program_id(0) // blocks).to(tl.int64)
    cell = (tl.program_id(0) % blocks) * BLOCK + tl.arange(0, BLOCK)
    inside = cell < size
    source = z + batch * z_b + (cell // channels).to(tl.int64) * z_n
    source += (cell % channels).to(tl.int64) * z_c
    target = out + batch * frames * size + cell
    if FRAMES:
        frame = tl.arange(0, FRAMES).to(tl.int64)[:, None]
        inside = (frame < frames) & inside[None, :]
        x = tl.load(source[None, :] + frame * z_f, mask=inside, other=0.0).to(tl.float32)
        x -= (tl.sum(x, 0) / frames)[None, :]
        tl.store(target[None, :] + frame * size, x.to(out.dtype.element_ty), mask=inside)
    else:
        total = tl.zeros([BLOCK], tl.float32)
        start = source
        for _ in range(frames):
            total += tl.load(source, mask=inside, other=0.0).to(tl.float32)
            source += z_f
        mean = total / frames
        source = start
        for _ in range(frames):
            x = tl.load(source, mask=inside, other=0.0).to(tl.float32)
            tl.store(target, (x - mean).to(out.dtype.element_ty), mask=inside)
            source += z_f
            target += size
