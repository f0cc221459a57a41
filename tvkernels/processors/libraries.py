"""Attention of other libraries, by name: dense, each query reading every key it is given."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from functools import partial

import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

Attend = Callable[[Tensor, Tensor, Tensor, float], Tensor]


def attention(name: str) -> Attend:
    """A library's function of q [B, N, H, D], k, v [B, M, H, D] and the scale -> [B, N, H, D].

    Functions of modules, so that a model that holds them can be pickled.

    Raises:
        ValueError: unknown name.
        ImportError: the library is not installed.
    """
    if name not in LIBRARIES:
        raise ValueError(f"unknown attention {name!r}: use one of {', '.join(LIBRARIES)}")
    module, attend = LIBRARIES[name]
    try:
        importlib.import_module(module)
    except ImportError as error:
        raise ImportError(f"attention {name!r} is not to be had here: {error}") from error
    return attend


def _sdpa(q, k, v, scale):
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, scale=scale).transpose(1, 2)


def _forced(kernel: str, q, k, v, scale):
    with sdpa_kernel(getattr(SDPBackend, kernel)):
        return _sdpa(q, k, v, scale)


def _xformers(q, k, v, scale):
    attend = importlib.import_module("xformers.ops").memory_efficient_attention
    return attend(q, k, v, scale=scale)


def _flash_attn(module: str, q, k, v, scale):
    out = importlib.import_module(module).flash_attn_func(q, k, v, softmax_scale=scale)
    return out[0] if isinstance(out, tuple) else out


def _sage(q, k, v, scale):
    attend = importlib.import_module("sageattention").sageattn
    return attend(q, k, v, tensor_layout="NHD", sm_scale=scale)


# Name -> the module that it needs and its function. "sdpa" lets PyTorch choose; the four after it
# are its kernels, forced.
LIBRARIES: dict[str, tuple[str, Attend]] = {
    "sdpa": ("torch", _sdpa),
    "sdpa-flash": ("torch", partial(_forced, "FLASH_ATTENTION")),
    "sdpa-cudnn": ("torch", partial(_forced, "CUDNN_ATTENTION")),
    "sdpa-efficient": ("torch", partial(_forced, "EFFICIENT_ATTENTION")),
    "sdpa-math": ("torch", partial(_forced, "MATH")),
    "xformers": ("xformers.ops", _xformers),
    "flash-attn": ("flash_attn", partial(_flash_attn, "flash_attn")),
    "flash-attn-3": ("flash_attn_interface", partial(_flash_attn, "flash_attn_interface")),
    "flash-attn-4": ("flash_attn.cute", partial(_flash_attn, "flash_attn.cute")),
    "sage": ("sageattention", _sage),
}
