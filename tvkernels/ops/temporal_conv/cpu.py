"""Lean composed PyTorch: a product of each tap on views of the frames, no sequence is laid out.

The convolution over [1, 8, 320, 32, 32] took 57 ms in float32 on one CPU core so, 69 ms as a 3-D
one and 92 ms on sequences. One product of all taps at once, on a view whose frames overlap,
was 0.9 to 1.6 times as fast at 48 to 192 channels of 16 x 16, 0.6 to 1.1 times at 320 and more.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor


def why_not(*args) -> list[str]:
    """Composed of torch's own ops: runs on every device."""
    return []


def forward(x, weight, bias, norm_weight, norm_bias, residual, groups, eps, stride, frames):
    """Shapes as in `tvkernels.temporal_conv`."""
    b, f, _, h, w = x.shape
    if x.numel() == 0 or weight.numel() == 0:
        return x.new_zeros(b, (frames - 1) // stride + 1, weight.shape[0], h, w)
    y = x
    if norm_weight is not None:
        normal, _ = _normalise(x, groups, eps)
        y = F.silu(_affine(normal, norm_weight, norm_bias)).to(x.dtype)
    index = torch.arange(frames, device=x.device) * f // frames
    # What export decomposes to may not write in place. Few input channels (7 taps of 4) would make
    # many large results.
    if torch._guards.detect_fake_mode() is not None or weight[0].numel() <= len(weight):
        if frames != f:
            y = y[:, index]
        y = y.transpose(1, 2)
        padding = (weight.shape[2] // 2, 0, 0)
        y = F.conv3d(y, weight[..., None, None], bias, (stride, 1, 1), padding).transpose(1, 2)
        return (y if residual is None else y + residual).contiguous()
    out = None
    for k, at, read in _taps(weight.shape[2], stride, frames):
        source = y[:, read] if frames == f else y
        part = _product(source, weight[..., k], bias if out is None else None)
        part = part if frames == f else part[:, index[read]]
        if out is None:
            out = part if residual is None else part.add_(residual)
        else:
            out[:, at] += part
    return out.contiguous()


def backward(
    grads, x, weight, bias, norm_weight, norm_bias, residual, groups, eps, stride, frames
):
    """Exact gradients in closed form, without the forward pass's products."""
    grad = grads[0]
    if grad.numel() == 0 or x.numel() == 0:
        given = (x, weight, bias, norm_weight, norm_bias)
        found = [torch.zeros_like(t) for t in given if t is not None]
        return found if residual is None else [*found, grad]
    wide = torch.promote_types(x.dtype, torch.float32)
    y = x
    if norm_weight is not None:
        normal, rstd = _normalise(x, groups, eps)
        affine = _affine(normal, norm_weight, norm_bias)
        y = F.silu(affine).to(x.dtype)
    dy, dweight = torch.zeros_like(y), torch.zeros_like(weight)
    index = torch.arange(frames, device=x.device) * x.shape[1] // frames
    for k, at, read in _taps(weight.shape[2], stride, frames):
        outer = grad[:, at]
        if frames != x.shape[1]:  # those that one frame stands for, together
            whole = grad.new_zeros(*y.shape[:2], len(weight), *y.shape[3:])
            outer, read = whole.index_add_(1, index[read], outer), slice(None)
        part, dweight[..., k] = _product_gradients(outer, y[:, read], weight[..., k])
        dy[:, read] += part
    found = [dy, dweight]
    if bias is not None:
        found.append(grad.sum((0, 1, 3, 4), dtype=wide).to(bias))
    if norm_weight is not None:
        sigmoid = affine.sigmoid()
        outer = dy.to(wide) * sigmoid * (1 + affine * (1 - sigmoid))
        inner = _grouped(outer * norm_weight.to(wide)[:, None, None], groups)
        along = _grouped(normal, groups)
        inner = inner - _mean(inner) - along * _mean(inner * along)
        found[0] = (inner * rstd).flatten(2, 3).to(x.dtype)
        found.append((outer * normal).sum((0, 1, 3, 4)).to(norm_weight))
        found.append(outer.sum((0, 1, 3, 4)).to(norm_bias))
    return found if residual is None else [*found, grad]


def _grouped(x: Tensor, groups: int) -> Tensor:
    """[B, F, C, h, w] -> [B, F, groups, C / groups, h, w]."""
    return x.unflatten(2, (groups, x.shape[2] // groups))


def _mean(grouped: Tensor) -> Tensor:
    return grouped.mean((1, 3), keepdim=True)


def _normalise(x: Tensor, groups: int, eps: float) -> tuple[Tensor, Tensor]:
    """x without its groups' means and spreads, and 1 / spread; float32 for half inputs."""
    grouped = _grouped(x, groups).to(torch.promote_types(x.dtype, torch.float32))
    centred = grouped - _mean(grouped)
    rstd = (_mean(centred.square()) + eps).rsqrt()
    return (centred * rstd).flatten(2, 3), rstd


def _affine(normal: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    weight, bias = (t.to(normal)[:, None, None] for t in (weight, bias))
    return torch.addcmul(bias, normal, weight)


def _taps(kernel: int, stride: int, frames: int) -> Iterator[tuple[int, slice, slice]]:
    """Tap, the results that it reaches and the frames it reads for them; the middle one first."""
    half, count = kernel // 2, (frames - 1) // stride + 1
    for k in sorted(range(kernel), key=lambda k: k != half):
        first = max(0, -((k - half) // stride))
        last = min(count, (frames - 1 - k + half) // stride + 1)
        if first < last:
            start = first * stride + k - half
            yield k, slice(first, last), slice(start, start + (last - first) * stride, stride)


def _product(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """[B, F, C, h, w] times [O, C]."""
    return F.conv2d(x.flatten(0, 1), weight[..., None, None], bias).unflatten(0, x.shape[:2])


def _product_gradients(outer: Tensor, x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Those of `_product`'s x and weight."""
    if outer.is_cuda:
        return _as_matrices(outer, x, weight)
    dx, dweight, _ = torch.ops.aten.convolution_backward(
        outer.flatten(0, 1), x.flatten(0, 1), weight[..., None, None], None,
        [1, 1], [0, 0], [1, 1], False, [0, 0], 1, [True, True, False],
    )  # fmt: skip
    return dx.unflatten(0, x.shape[:2]), dweight[..., 0, 0]


def _as_matrices(outer: Tensor, x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """The same by matrix products, which are IEEE's in float32 and the same bits every time: a
    convolution on CUDA is TF32 unless told otherwise, and may sum in any order.
    """
    rows, columns = outer.flatten(0, 1).flatten(2), x.flatten(0, 1).flatten(2)
    dweight = torch.einsum("nop,ncp->oc", rows, columns)
    return (weight.t() @ rows).view(x.shape), dweight
