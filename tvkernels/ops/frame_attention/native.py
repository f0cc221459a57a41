"""C++ for CPUs, csrc/cpu/frame_attention.cpp: segments read in place, one online softmax."""

from __future__ import annotations

import torch

from tvkernels import _native


def why_not(q, k, v, row_ptr, segments, levels, h, w, scale, return_lse) -> list[str]:
    """Every reason against this call; empty if it runs."""
    reasons = _native.refuse("frame_attention", q, k, v, backward="frame_attention_backward")
    if any(x.dtype != torch.int32 or not x.is_cpu for x in (row_ptr, segments)):
        reasons.append("needs the pattern's table in int32 on the CPU")
    # Its speed over that of cpu, one core of an EPYC without AVX-512, float32, own frame at 16 x
    # 16 x 1280 and fine-coarse at 8 x 8: 0.34 and 0.44 at level generic, 1.04 and 1.45 at avx2; at
    # avx512 on an EPYC 9004, before its broadcasts were cheaper, 1.15 and 1.45. On CPUs other than
    # x86 it is not measured.
    return reasons or _native.refuse_generic()


def forward(q, k, v, row_ptr, segments, levels, h, w, scale, return_lse):
    """Shapes as in `tvkernels.frame_attention`."""
    ops, row_ptr, segments = _native.load("cpu"), row_ptr.contiguous(), segments.contiguous()
    return ops.frame_attention(q, k, v, row_ptr, segments, levels, h, w, scale, return_lse)


def backward(grads, q, k, v, row_ptr, segments, levels, h, w, scale, return_lse):
    """Whole rows of weights and slopes for some queries at a time: five products."""
    grad, grad_lse = grads
    grad = q.new_zeros(()).expand(q.shape) if grad is None else grad
    # A compiler also sends the empty gradient of a log-sum-exp that was not asked for.
    grad_lse = None if grad_lse is None or not grad_lse.numel() else grad_lse
    ops, row_ptr, segments = _native.load("cpu"), row_ptr.contiguous(), segments.contiguous()
    return list(
        ops.frame_attention_backward(
            grad, grad_lse, q, k, v, row_ptr, segments, levels, h, w, scale
        )
    )
