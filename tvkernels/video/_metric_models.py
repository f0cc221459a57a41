"""The networks that metrics ask, each loaded on first use and once: CLIP, DINOv2 and their kin."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import linear, normalize

from tvkernels.video._files import need
from tvkernels.video._metric_files import (
    MetricError,
    need_transformers,
    on_disk,
    one_line,
    read_tensors,
)
from tvkernels.video._metric_packages import Dover, GmFlow, ViClip, load_lpips

if TYPE_CHECKING:
    import numpy as np

# Frames that go through a network at once.
BATCH = 8
LOCAL = {"local_files_only": True}


class ImageFeatures(NamedTuple):
    """One pass of CLIP's image tower.

    Attributes:
        pooled: float32 [F, width], the class token after the last norm.
        embeddings: float32 [F, C], the same projected to where text lies too.
    """

    pooled: Tensor
    embeddings: Tensor


class Clip:
    """CLIP of transformers.

    Args:
        name: folder or hub name.
    Attributes:
        scale: what a cosine is multiplied by, the exponential of `logit_scale`; 100 as published.
    """

    role = "clip"

    def __init__(self, name: str, device: str):
        source = self.processor(name)
        self.net = _pretrained(self.role, name, device, kinds=("clip",))
        self.prepare = _preparation(self.role, source)
        with on_disk(self.role, source):
            self.tokenize = need_transformers(self.role).AutoTokenizer.from_pretrained(
                source, **LOCAL
            )
        self.scale = self.net.logit_scale.exp().item()

    def processor(self, name: str) -> str:
        """Where the preparation of images and text is."""
        return name

    @torch.no_grad()
    def images(self, frames: np.ndarray) -> ImageFeatures:
        """Features of frames, uint8 [F, H, W, 3]."""
        pooled = _pooled(self.net.vision_model, self.prepare, frames, self.net.device)
        return ImageFeatures(pooled, self.net.visual_projection(pooled))

    @torch.no_grad()
    def text(self, prompt: str) -> Tensor:
        """The prompt's embedding, float32 [C]; what is beyond CLIP's 77 tokens is cut off."""
        longest = self.net.config.text_config.max_position_embeddings
        tokens = self.tokenize([prompt], truncation=True, max_length=longest, return_tensors="pt")
        pooled = self.net.text_model(
            input_ids=tokens["input_ids"].to(self.net.device),
            attention_mask=tokens["attention_mask"].to(self.net.device),
        ).pooler_output
        return self.net.text_projection(pooled)[0]


class PickScore(Clip):
    """CLIP ViT-H/14 tuned on what people preferred, without a processor in its own repository."""

    role = "pickscore"

    def processor(self, name: str) -> str:
        own = (Path(name) / "preprocessor_config.json").is_file()
        return name if own else "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"


class Dino:
    """DINOv2 of transformers: frames [F, H, W, 3] -> the class token, normed, float32 [F, C]."""

    def __init__(self, name: str, device: str):
        self.net = _pretrained("dino", name, device, kinds=("dinov2", "dinov2_with_registers"))
        self.prepare = _preparation("dino", name)

    @torch.no_grad()
    def __call__(self, frames: np.ndarray) -> Tensor:
        return _pooled(self.net, self.prepare, frames, self.net.device)


class AestheticHead:
    """LAION's aesthetic predictor: CLIP's embeddings [F, C] -> a grade of 0 to 10 each, [F].

    Linear layers on the embedding of length 1, nothing between them (improved-aesthetic-predictor,
    sac+logos+ava1-l14-linearMSE).

    Args:
        name: the .pth of that repository, or a folder or hub name of a whole predictor, whose CLIP
            is the published one and is not loaded again.
    """

    def __init__(self, name: str, device: str):
        state = read_tensors("aesthetic", _head_file(name), prefix="layers.")
        numbers = sorted({int(key.split(".")[1]) for key in state if key.startswith("layers.")})
        # Only a dropout lies between the linear layers; where two do, one is a ReLU.
        if not numbers or any(b - a > 2 for a, b in pairwise(numbers)):
            raise MetricError(f"aesthetic: {name} holds no predictor of linear layers alone")
        self.layers = [
            [state[f"layers.{n}.{part}"].float().to(device) for part in ("weight", "bias")]
            for n in numbers
        ]

    @torch.no_grad()
    def __call__(self, embeddings: Tensor) -> Tensor:
        width = self.layers[0][0].shape[1]
        if embeddings.shape[1] != width:
            raise MetricError(
                f"aesthetic takes embeddings of {width} channels and clip gives "
                f"{embeddings.shape[1]}: give the CLIP that it was trained on"
            )
        grades = normalize(embeddings, dim=-1)
        for weight, bias in self.layers:
            grades = linear(grades, weight, bias)
        return grades[:, 0]


class Role(NamedTuple):
    """What a metric asks: the published weights, and how they are loaded by (name, device)."""

    default: str | None
    load: Callable[[Any, str], Any]


ROLES = {
    "clip": Role("openai/clip-vit-large-patch14", Clip),
    "dino": Role("facebook/dinov2-base", Dino),
    "aesthetic": Role(
        "shunk031/aesthetics-predictor-v2-sac-logos-ava1-l14-linearMSE", AestheticHead
    ),
    "pickscore": Role("yuvalkirstain/PickScore_v1", PickScore),
    "dover": Role(None, Dover),
    "viclip": Role(None, ViClip),
    "gmflow": Role(None, GmFlow),
    "lpips": Role("alex", load_lpips),
}


class Models:
    """The networks by role, each loaded when it is first asked for; keep one for many clips.

    Args:
        given: role -> folder, file or hub name in place of the published one, or an object that
            answers as the one here does: `Clip`, `Dino`, `AestheticHead`, `Dover`, `ViClip`,
            `GmFlow`; for "lpips" the network itself, such as `lpips.LPIPS(net="vgg")`.
        device: where they run.
    Raises:
        MetricError: an unknown role, no such device; on asking, weights that are not there, or of
            another network.
        ImportError: on asking, a package that is not there.
    """

    def __init__(self, given: Mapping[str, Any] | None = None, device: str = "cpu"):
        self.given, self.device = dict(given or {}), str(device)
        self._loaded: dict[str, Any] = {}
        if unknown := set(self.given) - set(ROLES):
            raise MetricError(f"unknown model {min(unknown)!r}: use one of {', '.join(ROLES)}")
        try:
            torch.empty(0, device=self.device)
        except (RuntimeError, AssertionError) as error:
            raise MetricError(f"no device {device!r} here ({one_line(error)})") from error

    def __getitem__(self, role: str) -> Any:
        if role not in self._loaded:
            try:
                self._loaded[role] = self._load(role)
            except (MetricError, ImportError) as error:
                # The next metric is told the same, without another search.
                self._loaded[role] = error
        if isinstance(self._loaded[role], Exception):
            raise self._loaded[role]
        return self._loaded[role]

    def _load(self, role: str) -> Any:
        given = self.given.get(role)
        if given is None:
            return ROLES[role].load(ROLES[role].default, self.device)
        if isinstance(given, (str, os.PathLike)):
            return ROLES[role].load(str(given), self.device)
        return given


def _pretrained(role: str, name: str, device: str, kinds: tuple[str, ...]):
    """A model of one of these kinds in float32; weights that are missing are an error."""
    transformers = need_transformers(role)
    with on_disk(role, name):
        kind = transformers.AutoConfig.from_pretrained(name, **LOCAL).model_type
    if kind not in kinds:
        raise MetricError(f"{role}: {name} is a model of the kind {kind}, not {kinds[0]}")
    with on_disk(role, name):
        net, report = transformers.AutoModel.from_pretrained(
            name, output_loading_info=True, **LOCAL
        )
    if missing := sorted(report["missing_keys"]):
        raise MetricError(f"{role}: {name} lacks {len(missing)} weights, such as {missing[0]}")
    return net.float().eval().to(device)


def _preparation(role: str, name: str) -> Callable[[np.ndarray], Iterator[Tensor]]:
    """Frames -> batches of float32 [N, 3, h, w], resized, cropped and scaled as published."""
    transformers, image = need_transformers(role), need("PIL.Image")
    # The published numbers are of Pillow's bicubic. Where torchvision is installed, transformers
    # takes its own, another one, unless told; the words for that changed with version 5.
    newer = int(transformers.__version__.partition(".")[0]) >= 5
    pillow = {"backend": "pil"} if newer else {"use_fast": False}
    with on_disk(role, name):
        process = transformers.AutoImageProcessor.from_pretrained(name, **pillow, **LOCAL)

    def batches(frames: np.ndarray) -> Iterator[Tensor]:
        for start in range(0, len(frames), BATCH):
            pictures = [image.fromarray(frame) for frame in frames[start : start + BATCH]]
            yield process(images=pictures, return_tensors="pt")["pixel_values"]

    return batches


def _pooled(net, prepare, frames: np.ndarray, device: torch.device) -> Tensor:
    batches = prepare(frames)
    return torch.cat([net(pixel_values=pixels.to(device)).pooler_output for pixels in batches])


def _head_file(name: str) -> Path:
    """The file in which the predictor's weights are."""
    path = Path(name)
    if path.is_file():
        return path
    files = ("model.safetensors", "pytorch_model.bin")
    if path.is_dir():
        return next((path / file for file in files if (path / file).is_file()), path / files[0])
    with on_disk("aesthetic", name, "the .pth of improved-aesthetic-predictor"):
        from huggingface_hub import hf_hub_download

        return Path(hf_hub_download(name, files[0], **LOCAL))
