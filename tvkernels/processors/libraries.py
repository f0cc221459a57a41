"""Attention of other libraries, by name: dense, each query reading every key it is given."""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

Attend = Callable[[Tensor, Tensor, Tensor, float], Tensor]


def attention(name: str) -> Attend:
    """A library's function of q [B, N, H, D], k, v [B, M, H, D] and the scale -> [B, N, H, D].

    Raises:
        ValueError: unknown name.
        ImportError: the library is not installed.
    """
    if name not in LIBRARIES:
        raise ValueError(f"unknown attention {name!r}: use one of {', '.join(LIBRARIES)}")
    try:
        return LIBRARIES[name]()
    except ImportError as error:
        raise ImportError(f"attention {name!r} is not to be had here: {error}") from error


def _sdpa(backend: SDPBackend | None = None) -> Attend:
    def attend(q, k, v, scale):
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        if backend is None:
            return F.scaled_dot_product_attention(q, k, v, scale=scale).transpose(1, 2)
        with sdpa_kernel(backend):
            return F.scaled_dot_product_attention(q, k, v, scale=scale).transpose(1, 2)

    return attend


def _xformers() -> Attend:
    ops = importlib.import_module("xformers.ops")
    return lambda q, k, v, scale: ops.memory_efficient_attention(q, k, v, scale=scale)


def _flash_attn() -> Attend:
    attend = importlib.import_module("flash_attn").flash_attn_func
    return lambda q, k, v, scale: attend(q, k, v, softmax_scale=scale)


def _flash_attn_newer(module: str) -> Attend:
    attend = importlib.import_module(module).flash_attn_func

    def run(q, k, v, scale):
        out = attend(q, k, v, softmax_scale=scale)
        return out[0] if isinstance(out, tuple) else out

    return run


def _sage() -> Attend:
    attend = importlib.import_module("sageattention").sageattn
    return lambda q, k, v, scale: attend(q, k, v, tensor_layout="NHD", sm_scale=scale)


# "sdpa" lets PyTorch choose; the four after it are its kernels, forced.
LIBRARIES: dict[str, Callable[[], Attend]] = {
    "sdpa": _sdpa,
    "sdpa-flash": functools.partial(_sdpa, SDPBackend.FLASH_ATTENTION),
    "sdpa-cudnn": functools.partial(_sdpa, SDPBackend.CUDNN_ATTENTION),
    "sdpa-efficient": functools.partial(_sdpa, SDPBackend.EFFICIENT_ATTENTION),
    "sdpa-math": functools.partial(_sdpa, SDPBackend.MATH),
    "xformers": _xformers,
    "flash-attn": _flash_attn,
    "flash-attn-3": functools.partial(_flash_attn_newer, "flash_attn_interface"),
    "flash-attn-4": functools.partial(_flash_attn_newer, "flash_attn.cute"),
    "sage": _sage,
}
