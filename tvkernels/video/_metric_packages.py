"""DOVER, ViCLIP, GMFlow and LPIPS, which come with packages of their own.

The first three are on no index. Their code is V2VBench's copy of it, a clone of which stands on
PYTHONPATH; their weights lie in its folder `checkpoints`, where its `doc/install.sh` puts them.
Frames are uint8 [F, H, W, 3] throughout.
"""

from __future__ import annotations

import importlib
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from tvkernels.video._files import need
from tvkernels.video._metric_files import MetricError, fill, one_line

if TYPE_CHECKING:
    import numpy as np

V2VBENCH = "https://github.com/wenhao728/awesome-diffusion-v2v"
# LPIPS's networks, and the files in which torchvision keeps their weights.
LPIPS_NETS = {
    "alex": "alexnet-owt-7be5be79.pth",
    "vgg": "vgg16-397923af.pth",
    "squeeze": "squeezenet1_1-b8a52dc0.pth",
}

DOVER_VIEWS = {
    "technical": {
        "fragments_h": 7, "fragments_w": 7, "fsize_h": 32, "fsize_w": 32, "aligned": 32,
    },
    "aesthetic": {"size_h": 224, "size_w": 224},
}  # fmt: skip
DOVER_CLIPS = {"technical": 3, "aesthetic": 1}
# ImageNet's statistics, in levels.
DOVER_MEAN, DOVER_STD = (123.675, 116.28, 103.53), (58.395, 57.12, 57.375)
GMFLOW_MATCHING = {
    "attn_splits_list": [2], "corr_radius_list": [-1], "prop_radius_list": [-1],
}  # fmt: skip
VICLIP_MERGES = "bpe_simple_vocab_16e6.txt.gz"


class Dover:
    """DOVER: frames -> (technical, aesthetic), each the mean of a head's map.

    The views are V2VBench's: technical, 7 x 7 fragments of 32 pixels in 3 x 32 frames, two apart;
    aesthetic, 32 frames at 224 x 224. A shorter clip is repeated.

    Args:
        path: DOVER.pth; None takes V2VBench's.
    """

    def __init__(self, path: str | None, device: str):
        parts = v2vbench("dover", "dover.models")
        self.data = v2vbench("dover", "dover.dataset")
        # Its own class downloads ImageNet's weights first, which the checkpoint then replaces.
        net = nn.ModuleDict({
            "technical_backbone": parts.VQABackbone(),
            "aesthetic_backbone": parts.convnext_3d_tiny(pretrained=False),
            "technical_head": parts.VQAHead(in_channels=768, hidden_channels=64),
            "aesthetic_head": parts.VQAHead(in_channels=768, hidden_channels=64),
        })  # fmt: skip
        self.net = fill(net, "dover", path or checkpoint(parts, "DOVER/DOVER.pth")).to(device)
        sample = self.data.UnifiedFrameSampler
        self.samplers = {"technical": sample(32, 3, 2), "aesthetic": sample(1, 32, 2)}
        self.device = device

    @torch.no_grad()
    def __call__(self, frames: np.ndarray) -> tuple[float, float]:
        views, scores = self._views(frames), []
        mean, std = (torch.tensor(x).view(3, 1, 1, 1) for x in (DOVER_MEAN, DOVER_STD))
        for name, clips in DOVER_CLIPS.items():
            view = ((views[name] - mean) / std).unflatten(1, (clips, -1)).transpose(0, 1)
            features = self.net[f"{name}_backbone"](view.to(self.device))
            scores.append(self.net[f"{name}_head"](features).mean().item())
        return scores[0], scores[1]

    def _views(self, frames: np.ndarray) -> dict[str, Tensor]:
        """The fragments' places, and the start of a long clip's frames, are drawn from seed 0."""
        np = need("numpy")
        before = np.random.get_state()
        try:
            with torch.random.fork_rng(devices=[]):
                torch.default_generator.manual_seed(0)
                np.random.seed(0)
                return self.data.spatial_temporal_view_decomposition(
                    list(frames), DOVER_VIEWS, self.samplers
                )[0]
        finally:
            np.random.set_state(before)


class ViClip:
    """ViCLIP: (8 frames, prompt) -> the embedding of each, float32 [768].

    Args:
        path: ViClip-InternVid-10M-FLT.pth, with CLIP's merges beside it; None takes V2VBench's.
    """

    def __init__(self, path: str | None, device: str):
        with _packaging_in_setuptools():
            parts = v2vbench("viclip", "viclip")
        path = Path(path or checkpoint(parts, "ViCLIP/ViClip-InternVid-10M-FLT.pth"))
        merges = path.with_name(VICLIP_MERGES)
        if not merges.is_file():
            raise MetricError(f"viclip has no {VICLIP_MERGES} (of openai/CLIP) in {path.parent}")
        net = parts.ViCLIP(parts.SimpleTokenizer(str(merges)), pretrain=None)
        self.net = fill(net, "viclip", path, key="model").to(device)
        self.transform = parts.clip_image_transform(224)
        self.device = device

    @torch.no_grad()
    def __call__(self, frames: np.ndarray, prompt: str) -> tuple[Tensor, Tensor]:
        image = need("PIL.Image")
        pixels = torch.stack([self.transform(image.fromarray(frame)) for frame in frames])
        video = self.net.encode_vision(pixels[None].to(self.device), test=True)
        return video[0].float(), self.net.encode_text(prompt)[0].float()


class GmFlow:
    """GMFlow of one scale: frames -> flow to the next one, float32 [F - 1, H, W, 2], in pixels.

    Sides are padded to multiples of 16, which its windows need, and the flow is cut back.

    Args:
        path: gmflow_sintel-0c07dcb3.pth; None takes V2VBench's.
    """

    def __init__(self, path: str | None, device: str):
        parts = v2vbench("gmflow", "gmflow.models")
        net = parts.GMFlow(
            num_scales=1, upsample_factor=8, feature_channels=128, attention_type="swin",
            num_transformer_layers=6, ffn_dim_expansion=4, num_head=1,
        )  # fmt: skip
        path = path or checkpoint(parts, "gmflow/gmflow_sintel-0c07dcb3.pth")
        self.net = fill(net, "gmflow", path, key="model").to(device)
        self.device = device

    @torch.no_grad()
    def __call__(self, frames: np.ndarray) -> Tensor:
        h, w = frames.shape[1:3]
        top, left = -h % 16 // 2, -w % 16 // 2
        edges = (left, -w % 16 - left, top, -h % 16 - top)
        pixels = torch.from_numpy(frames).permute(0, 3, 1, 2).float()
        pixels = pad(pixels, edges, mode="replicate").to(self.device)
        flow = torch.cat([
            self.net(pixels[f : f + 1], pixels[f + 1 : f + 2], **GMFLOW_MATCHING)["flow_preds"][-1]
            for f in range(len(pixels) - 1)
        ])  # fmt: skip
        return flow[:, :, top : top + h, left : left + w].permute(0, 2, 3, 1)


def load_lpips(net: str, device: str) -> nn.Module:
    """LPIPS 0.1: two batches of images [N, 3, H, W] in -1 to 1 -> distances [N, 1, 1, 1].

    Args:
        net: "alex", "vgg" or "squeeze".
    Raises:
        MetricError: an unknown network, or torchvision's weights of it are not on this machine.
        ImportError: there is no package lpips.
    """
    if net not in LPIPS_NETS:
        raise MetricError(f"lpips has no network {net!r}: use one of {', '.join(LPIPS_NETS)}")
    try:
        lpips = importlib.import_module("lpips")
    except (ImportError, RuntimeError) as error:
        raise ImportError(
            f"lpips needs the package of that name, and torchvision: {one_line(error)}: "
            "pip install lpips"
        ) from error
    weights = Path(torch.hub.get_dir()) / "checkpoints" / LPIPS_NETS[net]
    if not weights.is_file():
        raise MetricError(
            f"lpips has no {weights}: download https://download.pytorch.org/models/{weights.name}"
        )
    with warnings.catch_warnings():
        # It calls torchvision by arguments that torchvision has renamed.
        warnings.simplefilter("ignore")
        return lpips.LPIPS(net=net, verbose=False).to(device)


def v2vbench(role: str, module: str) -> ModuleType:
    """A module of V2VBench's `third_party`.

    Raises:
        ImportError: it, or something that it imports, is not to be found.
    """
    try:
        return importlib.import_module(f"third_party.{module}")
    except (ImportError, RuntimeError) as error:  # RuntimeError: torchvision of another torch
        raise ImportError(
            f"{role} needs V2VBench's code: git clone {V2VBENCH}, name the clone in PYTHONPATH, "
            f"and pip install torchvision timm einops ftfy ({one_line(error)})"
        ) from error


def checkpoint(module: ModuleType, name: str) -> Path:
    """Where V2VBench keeps a file of weights, next to `third_party`."""
    folders = Path(module.__file__).parents
    return next(p for p in folders if p.name == "third_party").parent / "checkpoints" / name


@contextmanager
def _packaging_in_setuptools() -> Iterator[None]:
    """Inside, `packaging` is found where ViCLIP's code looks for it, which setuptools 70 ended."""
    before = sys.modules.get("pkg_resources")
    importlib.import_module("packaging.version")
    stand_in = ModuleType("pkg_resources")
    stand_in.packaging = sys.modules["packaging"]
    sys.modules["pkg_resources"] = stand_in
    try:
        yield
    finally:
        if before is None:
            del sys.modules["pkg_resources"]
        else:
            sys.modules["pkg_resources"] = before
