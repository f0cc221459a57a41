"""Attention driven by the table of segments: keys and values read in place, one online softmax."""

from __future__ import annotations

import math

import torch

from tvkernels._triton import support
from tvkernels._triton.configs import cdiv, choose, next_power_of_2
from tvkernels._triton.launch import arch, launch
from tvkernels._triton.maths import split
from tvkernels.ops.frame_attention.backward import _differentiate_keys, _differentiate_queries
from tvkernels.ops.frame_attention.kernels import _attend, _pool

NAME = "frame_attention"
MAX_HEAD_DIM = 256
NARROWER = {"sm_86": 192, "sm_89": 192}  # whose shared memory is 99 KiB: at 256 tiles take 104
# Offsets inside a tile of 128 rows are 32-bit numbers; those of tiles, frames and batches 64-bit.
MAX_ROW_STRIDE = 2**24


def why_not(q, k, v, row_ptr, segments, levels, h, w, scale, return_lse) -> list[str]:
    """Reasons against this call."""
    reasons = support.why_not(q, k, v, row_ptr, segments, matrices=True)
    if q.shape[-1] > MAX_HEAD_DIM:
        reasons.append(f"head dim {q.shape[-1]} is above {MAX_HEAD_DIM}")
    elif not reasons and q.shape[-1] > NARROWER.get(arch(q), MAX_HEAD_DIM):
        reasons.append(f"head dim {q.shape[-1]} is above {NARROWER[arch(q)]} on {arch(q)}")
    for name, x in (("q", q), ("k", k), ("v", v)):
        if abs(x.stride(2)) >= MAX_ROW_STRIDE:
            reasons.append(f"tokens of {name} are {x.stride(2)} elements apart, 2^24 or more")
    if any(levels) and h * w != q.shape[2]:
        reasons.append("the pattern pools tokens of a grid that was not given")
    return reasons


def forward(q, k, v, row_ptr, segments, levels, h, w, scale, return_lse):
    """Shapes as in `tvkernels.frame_attention`; allocates the results and the pooled k and v."""
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    lse = q.new_empty(q.shape[:-1] if return_lse else (0,), dtype=torch.float32)
    if out.numel():
        sources = pool(k, v, levels, h, w)
        common = call(q, k, v, row_ptr, segments, levels, h, w, scale)
        attend(common, sources, out, lse, unit=math.log(2) if return_lse else 0.0)
    return out, lse


def backward(grads, q, k, v, row_ptr, segments, levels, h, w, scale, return_lse):
    """Exact gradients of q, k and v, also through the log-sum-exp; scores are recomputed."""
    dq, dk, dv = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v))
    if not q.numel():
        return [dq, dk.zero_(), dv.zero_()]
    # A compiler also sends the empty gradient of a log-sum-exp that was not asked for.
    grad, grad_lse = (None if g is None or not g.numel() else g for g in grads)
    grad = q.new_zeros(()).expand(q.shape) if grad is None else grad
    grad_lse = None if grad_lse is None else grad_lse.contiguous()
    sources = pool(k, v, levels, h, w)
    common = call(q, k, v, row_ptr, segments, levels, h, w, scale)
    norm, delta = (q.new_empty(q.shape[:-1], dtype=torch.float32) for _ in range(2))
    out = share = None
    if q.dtype == torch.float32:  # the kernel over queries finds what the result would give
        share = torch.empty_like(norm)
    else:
        out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
        attend(common, sources, out, norm, unit=1.0)

    arguments, constants = common
    arguments = {
        **arguments, **strides(g=grad), "grad": grad, "norm": norm, "share": share,
        "delta": delta, "factor": q.shape[-1] ** -0.5 if scale is None else scale,
    }  # fmt: skip
    constants = {**constants, "ALIGN": alignment(q, k, v, grad)}
    config = choose(NAME, "_differentiate_queries", **facts(q))
    launch(
        _differentiate_queries,
        (cdiv(q.shape[2], config["BM"]) * programs(q),),
        {**arguments, **pairs(sources), "out": out, "grad_lse": grad_lse, "dq": dq},
        config,
        EVEN=even(arguments, config["BN"]),
        **rows(constants["COARSE"], K_ROW=k, V_ROW=v),
        **constants,
    )
    arguments |= inverse(row_ptr, segments, levels, k.shape[1])
    arguments |= {f"d{name}": norm for name in pairs(sources)}  # stands for no gradient
    del constants["COARSE"]
    for i, (level, source) in enumerate(zip(levels, sources, strict=True), 1):
        if level:
            summed = torch.empty_like(source, dtype=torch.float32)
            arguments |= {"level_1": 0, "level_2": 0}
            differentiate_keys(arguments, constants, level, i, *source.unbind(), *summed.unbind())
            arguments |= {f"d{name}_{i}": x for name, x in zip("kv", summed.unbind(), strict=True)}
    arguments |= {f"level_{i}": level for i, level in enumerate(levels, 1)}
    differentiate_keys(arguments, constants, 0, 0, k, v, dk, dv)
    return [dq, dk, dv]


def differentiate_keys(arguments, constants, level, slot, k, v, dk, dv) -> None:
    """Gradients of the keys and values of all frames at one level, level 0 last."""
    config = choose(NAME, "_differentiate_keys", **facts(arguments["q"]))
    apart = config.pop("APART")
    tensors = {"k": k, "v": v, "dk": dk, "dv": dv}
    numbers = {"size": k.shape[2], "level": level, "group": slot * k.shape[1]}
    if level:
        numbers["factor"] = 1.0  # level 0 applies it to what it takes from here, too
    whole = arguments["tokens"] % config["BM"] == 0
    # Of what is read here: pooled heads may lie closer than those they were pooled from.
    constants = {**constants, "ALIGN": alignment(arguments["q"], k, v, arguments["grad"])}
    # Apart, the scores are computed twice, but half the sums fit in registers.
    for keys, values in ((True, False), (False, True)) if apart else ((True, True),):
        launch(
            _differentiate_keys,
            (cdiv(k.shape[2], config["BN"]) * programs(k),),
            {**arguments, **strides(k=k, v=v), **tensors, **numbers},
            config,
            EVEN=whole and not ragged(level, arguments["h"], arguments["w"]),
            **rows(0, Q_ROW=arguments["q"], G_ROW=arguments["grad"]),
            KEYS=keys,
            VALUES=values,
            **constants,
        )


def inverse(row_ptr, segments, levels, frames):
    """Which segments name each frame at each level, and the query frame of every segment.

    The segments of level slot i (0 is full resolution) and frame f are
    order[starts[i * frames + f] : starts[i * frames + f + 1]]. No value is read on the host.
    """
    frame, level = segments.unbind(1)[:2]
    slot = sum((i * (level == r) for i, r in enumerate(levels, 1) if r), torch.zeros_like(level))
    group, order = torch.sort(slot * frames + frame, stable=True)
    numbers = torch.arange(max(len(segments), 3 * frames + 1), device=frame.device).int()
    bounds = numbers.narrow(0, 0, 3 * frames + 1)
    ends = row_ptr.narrow(0, 1, len(row_ptr) - 1)
    return {
        "starts": torch.searchsorted(group, bounds, out_int32=True),
        "order": order,
        "queries": torch.searchsorted(
            ends, numbers.narrow(0, 0, len(segments)), right=True, out_int32=True
        ),
        "segments": segments,
    }


def pool(k, v, levels, h, w):
    """Dense averages of k and v at each coarse level, [2, B, F, cells, H, D]; None if unused."""
    b, f, _, heads, d = k.shape
    pooled = []
    for level in levels:
        if not level:
            pooled.append(None)
            continue
        target = k.new_empty(2, b, f, cells(level, h, w), heads, d)
        config = choose(NAME, "_pool", **facts(k))
        launch(
            _pool,
            (cdiv(target.shape[3], config["CELLS"]) * programs(k) * 2,),
            {
                "k": k, "v": v, "pooled": target, "batches": b, "frames": f, "heads": heads,
                "h": h, "w": w, **strides(k=k, v=v),
            },
            config,
            LEVEL=level, D=d, WIDTH=next_power_of_2(d), ALIGN=alignment(k, v),
        )  # fmt: skip
        pooled.append(target)
    return pooled


def call(q, k, v, row_ptr, segments, levels, h, w, scale):
    """Arguments and constants that the attention kernels of one call share."""
    used = [level for level in levels if level]
    tokens_1, tokens_2, *_ = *(cells(level, h, w) for level in used), 0, 0
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    d1, d2 = split(q.shape[-1])
    arguments = {
        "q": q, "k": k, "v": v, "row_ptr": row_ptr, "segments": segments,
        "scale": scale / math.log(2), "frames_q": q.shape[1], "frames": k.shape[1],
        "heads": q.shape[3], "tokens": q.shape[2], "tokens_1": tokens_1, "tokens_2": tokens_2,
        "level_1": levels[0], "level_2": levels[1], "h": h, "w": w, **strides(q=q, k=k, v=v),
    }  # fmt: skip
    constants = {
        "D": q.shape[-1], "D1": d1, "D2": d2, "COARSE": len(used), "ALIGN": alignment(q, k, v),
    }  # fmt: skip
    return arguments, constants


def attend(common, sources, out, lse, *, unit) -> None:
    """The forward kernel over q, k, v and the pooled `sources`.

    `unit` is what a doubling adds to the log-sum-exp, log(2) or 1; where 0, it is not written.
    """
    arguments, constants = common
    config = choose(NAME, "_attend", **facts(out), even=even(arguments, 64))
    padded = config.pop("PAD_QK")
    d1, d2 = constants["D1"], constants["D2"]
    launch(
        _attend,
        (cdiv(out.shape[2], config["BM"]) * programs(out),),
        {
            **arguments, **pairs(sources), "out": out, "lse": lse, "unit": unit,
            "scale": abs(arguments["scale"]),
        },
        config,
        QK1=next_power_of_2(d1 + d2) if padded else d1,
        QK2=0 if padded else d2,
        NEGATIVE=arguments["scale"] < 0,
        EVEN=even(arguments, config["BN"]),
        **rows(constants["COARSE"], K_ROW=arguments["k"], V_ROW=arguments["v"]),
        **constants,
    )  # fmt: skip


def even(arguments, width) -> bool:
    """Whether all tiles of `width` keys are full, and the cells of each level of one size."""
    full = all(arguments[name] % width == 0 for name in ("tokens", "tokens_1", "tokens_2"))
    h, w = arguments["h"], arguments["w"]
    return full and not any(ragged(arguments[name], h, w) for name in ("level_1", "level_2"))


def ragged(level, h, w) -> bool:
    """Whether the cells at the edges of a coarse level hold fewer tokens."""
    return level > 0 and bool(h % level or w % level)


def rows(coarse, **tensors):
    """Row strides that the compiler may take as constants, 0 where it may not.

    Then the addresses of a tile differ by constants, which the load instructions hold: on sm_90
    in 16 bits `_attend` takes 154 registers for head dim 80 (186 without) and 184 for 160 (236).
    Strides of projections, fused or not, are a few for each model; others, which may depend on
    the clip's length, would compile anew for each. Pooled rows are dense: they must share it.
    """
    found = {}
    for name, x in tensors.items():
        dense = x.shape[3] * x.shape[4]
        few = dense > 0 and x.stride(2) % dense == 0 and 1 <= x.stride(2) // dense <= 3
        found[name] = x.stride(2) if few and (x.stride(2) == dense or not coarse) else 0
    return found


def programs(x) -> int:
    """Programs for each tile of tokens: one for each head, frame and batch."""
    return x.shape[0] * x.shape[1] * x.shape[3]


def cells(level, h, w) -> int:
    """Tokens of a frame at a coarse level."""
    return cdiv(h, level) * cdiv(w, level)


def pairs(sources):
    """Pooled keys and values by the kernels' names for them."""
    found = {}
    for i, x in enumerate(sources, 1):
        found[f"k_{i}"], found[f"v_{i}"] = (None, None) if x is None else x.unbind()
    return found


def facts(x):
    """What `configs.choose` may decide on."""
    return {"arch": arch(x), "dtype": str(x.dtype)[6:], "head_dim": x.shape[-1]}


def strides(**tensors):
    """The strides of [B, F, N, H, D] tensors by the kernels' names for them."""
    return {
        f"{name}_{axis}": stride
        for name, x in tensors.items()
        for axis, stride in zip("bfnhd", x.stride(), strict=True)
    }


def alignment(*tensors) -> int:
    """Elements, of 16 bytes at most, that divide every stride but the last of these tensors.

    Triton finds multiples of 16 elements by itself; a head dim of 40 is none, yet its rows hold
    whole units of 16 bytes, which is what a wide or asynchronous load needs.
    """
    if any(x.stride(-1) != 1 for x in tensors):
        return 1
    steps = [s for x in tensors for n, s in zip(x.shape[:-1], x.stride(), strict=False) if n > 1]
    return math.gcd(16 // tensors[0].element_size(), *steps)
