"""C++ for CPUs, csrc/cpu/token_map_attention.cpp: the map of one block of queries at a time."""

from __future__ import annotations

from tvkernels import _native


def why_not(q, k, v, tokens, scale) -> list[str]:
    """Every reason against this call; empty if it runs."""
    reasons = _native.refuse("token_map_attention", q, k, v)
    if tokens.device.type != "cpu":
        reasons.append(f"needs tokens on the CPU, got {tokens.device}")
    # Its speed over that of cpu, one core of an EPYC without AVX-512, float32, [1, 8, 1024, 8,
    # 80], 77 words: 0.57 at level generic, 1.70 at avx2; 1.87 at avx512 on an EPYC 9004. On CPUs
    # other than x86 it is not measured.
    return reasons or _native.refuse_generic()


def forward(q, k, v, tokens, scale):
    """Shapes as in `tvkernels.token_map_attention`."""
    length = k.shape[1]
    for token in tokens.tolist():
        if not 0 <= token < length:
            raise IndexError(f"index {token} is out of bounds: the text has {length} tokens")
    ops = _native.load("cpu")
    return ops.token_map_attention(q, k, v, tokens.contiguous(), scale)
