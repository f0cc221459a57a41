"""What an edit holds at once, by accounting, and the plan that keeps it under a budget.

The modules themselves run, on fake tensors: no weights, no device, seconds for Stable Diffusion
1.5. A ledger follows every storage from its making to its end, inside our ops too, which run as
composed PyTorch (`cpu.py`; the kernels hold less). Not seen, and so not in any number here: what
torch's own kernels and libraries hold during one call (workspaces of convolutions and matrix
products), what an allocator keeps in reserve or loses to fragments, the libraries themselves, and
the loading of the weights.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import cached_property, partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, unset_fake_temporarily
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from tvkernels._dispatch import OPS, Op
from tvkernels._inflate import inflate, is_tuned
from tvkernels.ops.guided_ddim_step.api import guided_ddim_step
from tvkernels.recipes import Recipe

CHUNKS = (8, 4, 2, 1)  # frames that the VAE sees at once
STEPS = 50  # DDIM steps, whose rows of time embedding are held
TOKENS = 77
OF_A_CHUNK = ("encoding", "decoding")  # traced of some frames, whatever the length of the clip
STAGES = {"the VAE": "vae", "tuning": "unet", "sampling": "unet"}  # and whose weights each needs
# Timesteps, counters of the optimizer, tables: of them 452 bytes were missing in the demo's edit.
SMALL = 2**16
QUEUED = 16  # frames between decoder and writer at most


class BudgetError(ValueError):
    """No plan fits the budget; one line that names the least that would do."""


class Ledger(TorchDispatchMode):
    """Bytes of the storages that live, `now` and at the `peak`.

    Our ops are followed inside.

    Args:
        given: tensors that were there before and do not count.
    """

    def __init__(self, given: Sequence[Tensor] = ()):
        super().__init__()
        self.now = self.peak = 0
        self._live: dict[int, tuple] = {}
        for tensor in given:
            self._enter(tensor.untyped_storage(), 0)

    def _enter(self, storage, size: int) -> None:
        key = storage._cdata
        if key not in self._live:
            self._live[key] = (weakref.ref(storage, lambda ref: self._leave(key)), size)
            self.now += size

    def _leave(self, key: int) -> None:
        self.now -= self._live.pop(key)[1]

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if function.namespace == "tvkernels":
            results = self._follow(function, args)
        else:
            given = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
            real = bool(given) and not any(isinstance(x, FakeTensor) for x in given)
            # Real among fake ones: a pattern's table, whose values are read.
            with unset_fake_temporarily() if real else nullcontext():
                results = function(*args, **kwargs)
        for x in tree_leaves(results):
            if isinstance(x, Tensor):
                storage = x.untyped_storage()
                self._enter(storage, storage.nbytes())
        self.peak = max(self.peak, self.now)
        return results

    def _follow(self, function, args):
        """An op of ours as composed PyTorch, seen operator by operator."""
        name = function._schema.name.partition("::")[2]
        op = OPS[name.removesuffix("_backward")]
        composed = op.backend("cpu")
        if name == "frame_attention_backward":
            self.peak = max(self.peak, self.now + frame_attention_backward_bytes(*args[1:-1]))
            return [torch.empty_like(args[1:][i]) for i in op.differentiable]
        with _Autograd(), self:
            if name == op.name:
                return composed.forward(*args[:-1])
            return _backward(op, composed, *args[:-1])


def _backward(op: Op, composed, grads, *args):
    if hasattr(composed, "backward"):
        return composed.backward(grads, *args)
    return op._recompute(composed.forward, grads, args)


class _Autograd:
    """Autograd inside of a dispatch mode, where it is switched off: gradients by recomputing."""

    KEYS = ("AutogradFunctionality", "ADInplaceOrView")

    def __enter__(self):
        self._guard = torch._C._PreserveDispatchKeyGuard()
        self._guard.__enter__()
        for name in self.KEYS:
            key = getattr(torch._C.DispatchKey, name)
            torch._C._dispatch_tls_set_dispatch_key_excluded(key, False)

    def __exit__(self, *error):
        self._guard.__exit__(*error)


def frame_attention_backward_bytes(
    q, k, v, row_ptr, segments, levels, h, w, scale, return_lse
) -> int:
    """What `ops/frame_attention/cpu.py` holds in a backward pass, its results included.

    Its loop over frames and query tokens is written down here, not followed: at 64 x 64 tokens it
    is some 40 000 operators.
    """
    cpu = OPS["frame_attention"].backend("cpu")
    with unset_fake_temporarily():
        rows, _ = cpu.read_table(row_ptr, segments)
    batch, frames, tokens, heads, dim = k.shape
    item = max(4, k.element_size())
    token = batch * heads * dim * item
    size = {0: tokens, **{r: -(-h // r) * -(-w // r) for r in levels if r}}
    pooled = sum(2 * frames * size[r] for r in levels if r) * token
    keys = max(sum(size[s.level] for s in row) for row in rows)
    gathered = 2 * keys * token
    queries = min(tokens, max(1, cpu.SCORES // (batch * heads * keys)))
    scores = batch * heads * queries * keys * item
    frame, whole = tokens * token, frames * tokens * token
    sums = 3 * whole + 2 * pooled
    one = 3 * gathered + 3 * frame + 4 * scores
    unpooling = pooled + 2 * whole if pooled else 0
    return sums + max(one, unpooling)


class Account:
    """The bytes of one model's edit, stage by stage, without its weights.

    Args:
        unet, vae, text_encoder: the configurations, as in the model's folder.
        recipe: the video UNet.
        frames: of the clip.
        size: (height, width) of its frames in pixels.
        dtype: of the weights.
    """

    def __init__(
        self, unet: Mapping, vae: Mapping, text_encoder: Mapping, recipe: Recipe, *,
        frames: int, size: tuple[int, int], dtype: torch.dtype = torch.float32,
    ):  # fmt: skip
        from diffusers import AutoencoderKL, UNet2DConditionModel
        from transformers import CLIPTextConfig, CLIPTextModel

        self.recipe, self.frames, self.size, self.dtype = recipe, frames, size, dtype
        with torch.device("meta"):
            self.unet = UNet2DConditionModel.from_config(dict(unet)).eval()
            tuned = [n for n, _ in self.unet.named_parameters() if is_tuned(n, recipe)]
            self.handle = inflate(self.unet, recipe, backend="cpu")
            self.vae = AutoencoderKL.from_config(dict(vae)).eval()
            text = CLIPTextModel(CLIPTextConfig.from_dict(dict(text_encoder)))
        self._fake = FakeTensorMode()
        for module in (self.unet, self.vae, text):
            with self._fake:
                _appear(module, dtype)
        # What tuning changes is kept a second time, for `handle.remove()`.
        kept = [self.unet.get_parameter(name) for name in tuned]
        self.weights = {
            "unet": by_dtype([*_tensors(self.unet), *kept]),
            "vae": by_dtype(_tensors(self.vae)),
            "text_encoder": by_dtype(_tensors(text)),
        }
        self.tuned = [p.nbytes for p in self.handle.tuned_parameters().values()]
        factor = 2 ** (len(self.vae.config.block_out_channels) - 1)
        self.latents = (self.unet.config.in_channels, size[0] // factor, size[1] // factor)
        self._seen: dict[tuple, int] = {}

    def weight_bytes(self, *names: str) -> int:
        """Of those models, all if none is named."""
        return sum(sum(self.weights[name].values()) for name in names or self.weights)

    def sampling(self, clips: int, calls: int = 1) -> int:
        """One step of sampling (2 clips: guidance) or of inversion (1 clip).

        Args:
            clips: in the batch of all calls together.
            calls: over which the clips are split.
        """
        return self._once(("sampling", clips, calls), lambda: self._sample(clips, calls))

    def tuning(self, checkpointing: bool) -> int:
        """One step of tuning, AdamW's two moments held, and float32 copies of bfloat16 weights."""

        def step():
            self.unet.train()
            if checkpointing:
                self.unet.enable_gradient_checkpointing()
            try:
                self._tune()
            finally:
                self.unet.disable_gradient_checkpointing()
                self.unet.eval()
                self.unet.zero_grad(set_to_none=True)

        traced = self._once(("tuning", checkpointing), step)
        narrow = self.dtype == torch.bfloat16
        wide = [(1 + narrow) * size for size in self.tuned]  # of the moments, in float32
        update = sum(wide) + 2 * max(wide, default=0)
        return (2 + narrow) * sum(wide) + max(traced, update)

    def coding(self, chunk: int, tile: int | None = None) -> int:
        """The VAE, encoding or decoding: whichever holds more.

        Args:
            chunk: frames at once.
            tile: pixels, None for whole frames.
        """
        return max(self.encoding(chunk, tile), self.decoding(chunk, tile))

    def encoding(self, chunk: int, tile: int | None = None) -> int:
        """Frames to latents; the clip in float32 is held twice while it is converted."""
        clip = self.frames * self._pixels * 4

        def encode():
            parts = [self.vae.encode(self._new(chunk, 3, *self.size)).latent_dist.mode()]
            return torch.cat(parts) * self.vae.config.scaling_factor

        traced = self._once(("encoding", chunk, tile), self._in_tiles(encode, tile))
        return clip + max(clip, traced)

    def decoding(self, chunk: int, tile: int | None = None) -> int:
        """Latents to bytes, with the frames that wait to be written."""

        def decode():
            frames = self.vae.decode(self._new(chunk, *self.latents)).sample.float()
            frames = (frames / 2 + 0.5).clamp(0, 1)
            return frames.mul(255).round().byte().permute(0, 2, 3, 1).contiguous()

        traced = self._once(("decoding", chunk, tile), self._in_tiles(decode, tile))
        return traced + min(self.frames, QUEUED + chunk) * self._pixels

    @property
    def _pixels(self) -> int:
        return 3 * self.size[0] * self.size[1]

    @cached_property
    def _tables(self):
        return self.handle.tables(self.frames, "cpu")

    def _new(self, *shape: int) -> Tensor:
        return torch.empty(shape, dtype=self.dtype)

    def _once(self, key: tuple, run: Callable) -> int:
        if key not in self._seen:
            if key[0] not in OF_A_CHUNK:
                # Real ones, whose values are read. EI2's of 20,000 frames take minutes.
                _ = self._tables
            given = [*_tensors(self.unet), *_tensors(self.vae)]
            with self._fake, Ledger(given) as ledger, torch.set_grad_enabled(key[0] == "tuning"):
                run()
            self._seen[key] = ledger.peak + SMALL
        return self._seen[key]

    def _in_tiles(self, run: Callable, tile: int | None) -> Callable:
        def tiled():
            if tile is not None:
                tile_vae(self.vae, tile)
            try:
                return run()
            finally:
                self.vae.disable_tiling()

        return tiled

    def _call(self, sample: Tensor, time: Tensor, text: Tensor, **inputs) -> Tensor:
        told = {"num_frames": self.frames, "one_clip": True, "tables": self._tables}
        return self.unet(
            sample, time, text, cross_attention_kwargs=told, return_dict=False, **inputs
        )[0]

    def _text(self, clips: int) -> Tensor:
        states = self._new(clips, TOKENS, self.unet.config.cross_attention_dim)
        return states if self.handle.text_width is None else self.handle.project_text(states)

    def _sample(self, clips: int, calls: int) -> Tensor:
        self.handle.settle()
        kept, latents = (self._new(self.frames, *self.latents) for _ in range(2))
        text, row, time = self._text(clips), {}, torch.zeros(())
        if self.handle.time_width is not None:
            table = self.handle.project_time(torch.zeros(STEPS))
            row = {"timestep_cond": table[:1]}
        batch = torch.cat([latents] * clips) if calls == 1 else latents
        noise = [self._call(batch, time, part, **row) for part in text.chunk(calls)]
        noise = torch.cat(noise) if calls > 1 else noise[0]
        latents = guided_ddim_step(latents, noise, torch.zeros(3))
        return kept + latents

    def _tune(self) -> None:
        latents, noise, noisy = (self._new(self.frames, *self.latents) for _ in range(3))
        with torch.no_grad():
            text = self._text(1)
        told = self._call(noisy, torch.zeros(1, dtype=torch.int64), text)
        F.mse_loss(told.float(), noise.float()).backward()
        del latents


def by_dtype(tensors: Sequence[Tensor]) -> dict[str, int]:
    """Bytes of tensors by dtype, "float32" and the like."""
    found: dict[str, int] = {}
    for tensor in tensors:
        name = str(tensor.dtype).removeprefix("torch.")
        found[name] = found.get(name, 0) + tensor.nbytes
    return found


def tile_vae(vae: nn.Module, pixels: int) -> None:
    """Has a VAE work in overlapping tiles of `pixels` x `pixels`, blended at the seams.

    Not the same result: norms and the attention in the middle see one tile each.
    """
    vae.enable_tiling()
    vae.tile_sample_min_size = pixels
    vae.tile_latent_min_size = pixels // 2 ** (len(vae.config.block_out_channels) - 1)


def _tensors(module: nn.Module) -> list[Tensor]:
    return [*module.parameters(), *module.buffers()]


def _appear(module: nn.Module, dtype: torch.dtype) -> None:
    """Gives a module on the meta device fake weights on the CPU, where SDPA keeps no scores."""
    for part in module.modules():
        for name, old in part._parameters.items():
            if old is not None:
                new = torch.empty(old.shape, dtype=dtype)
                part._parameters[name] = nn.Parameter(new, old.requires_grad)
        for name, old in part._buffers.items():
            if old is not None:
                part._buffers[name] = torch.empty(old.shape, dtype=old.dtype)


@dataclass(frozen=True)
class Plan:
    """How an edit stays under a budget.

    Args:
        budget: bytes.
        chunk: frames that the VAE sees at once.
        split_guidance: the halves of the guidance in two calls.
        gradient_checkpointing: while tuning.
        offload: on a device, the models that are not at work wait in the host's memory.
        tile: pixels of the VAE's tiles, None for whole frames; tiles change the result.
        weights: bytes of all weights.
        peaks: stage -> bytes at its peak, the weights that it holds included.
    """

    budget: int
    chunk: int
    split_guidance: bool
    gradient_checkpointing: bool
    offload: bool
    tile: int | None
    weights: int
    peaks: dict[str, int]

    @property
    def peak(self) -> int:
        """Bytes of the largest stage."""
        return max(self.peaks.values())

    def __str__(self) -> str:
        stage = max(self.peaks, key=self.peaks.get)
        chosen = [f"VAE {self.chunk} frame{'s' * (self.chunk > 1)} at a time"]
        if self.tile is not None:
            chosen.append(f"in tiles of {self.tile} pixels, which changes the picture a little")
        chosen += ["guidance in two calls"] * self.split_guidance
        chosen += ["gradient checkpointing"] * self.gradient_checkpointing
        chosen += ["models offloaded"] * self.offload
        return (
            f"accounted peak {show(self.peak)} of {show(self.budget)} in {stage}, "
            f"weights {show(self.weights)}: {', '.join(chosen)}"
        )


def show(size: int) -> str:
    """Bytes for people, rounded up: "7.62GB"."""
    unit, name = (10**9, "GB") if size >= 10**9 else (10**6, "MB")
    return f"{math.ceil(size / unit * 100) / 100:g}{name}"


def plan(
    budget: int, account: Account, *,
    tune: bool, guided: bool = True, checkpointing: bool = False, device: str = "cpu",
) -> Plan:  # fmt: skip
    """The plan that costs the least time and fits.

    Each stage for itself takes the first of its ways that fits: for the VAE fewer frames at once,
    for sampling the guidance in two calls, for tuning gradient checkpointing. Then come models
    that wait in the host's memory, and last tiles, which alone change the result.

    Args:
        budget: bytes for tensors: the weights and what a stage holds beside them.
        account: of the model and clip.
        tune: whether it is tuned.
        guided: whether sampling has an unconditional half.
        checkpointing: asked for in any case.
        device: "cpu", where nothing can be offloaded, or "cuda".
    Raises:
        BudgetError: nothing fits; the text names the least that would.
    """
    ways = _ways(account, tune, guided, checkpointing)
    tried = []
    for tiles in (False, True):
        for offload in (False, True) if device != "cpu" else (False,):
            if tiles:
                # Of the VAE alone: of use where nothing else holds more.
                if max(tried[offload], key=tried[offload].get) != "the VAE":
                    continue
                ways["the VAE"] = _tiled(account) or ways["the VAE"]
            chosen, peaks = {}, {}
            for stage, model in STAGES.items():
                held = account.weight_bytes(*([model] if offload else []))
                for settings, size in ways.get(stage, ()):
                    chosen[stage], peaks[stage] = settings, held + size()
                    if peaks[stage] <= budget:
                        break
            if max(peaks.values()) <= budget:
                chunk, tile = chosen["the VAE"]
                return Plan(
                    budget, chunk, chosen["sampling"], chosen.get("tuning", False), offload, tile,
                    account.weight_bytes(), peaks,
                )  # fmt: skip
            tried.append(peaks)
    least = min(max(peaks.values()) for peaks in tried)
    raise BudgetError(
        f"{show(budget)} cannot hold this edit: {show(least)} would do, of which the weights are "
        f"{show(account.weight_bytes())}; or take fewer frames or a smaller size"
    )


def _ways(account: Account, tune: bool, guided: bool, checkpointing: bool) -> dict[str, list]:
    """Stage -> its ways, quickest first: settings, and what gives their bytes."""
    chunks = sorted({min(n, account.frames) for n in CHUNKS}, reverse=True)
    ways = {
        "the VAE": [((n, None), partial(account.coding, n)) for n in chunks],
        "sampling": [(False, partial(account.sampling, 1 + guided))],
    }
    if guided:
        ways["sampling"].append((True, partial(account.sampling, 2, 2)))
    if tune:
        ways["tuning"] = [(on, partial(account.tuning, on)) for on in (False, True)][
            checkpointing:
        ]
    return ways


def _tiled(account: Account) -> list:
    """The VAE's ways in tiles, which overlap by a quarter: of whole latents, therefore."""
    latent = max(account.size) // max(account.latents[1:])
    tiles = (max(account.size) // 2, max(account.size) // 4)
    return [
        ((1, tile), partial(account.coding, 1, tile)) for tile in tiles if tile // latent % 4 == 0
    ]
