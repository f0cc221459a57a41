"""Small random networks in the layout of those that the metrics ask, and a clone of V2VBench."""

import json
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import torch
import transformers
from safetensors.torch import save_file
from torch import nn

from tvkernels.demo import MODEL_DIR

SIDE, SHARED = 28, 12
MEAN, STD = [0.48145466, 0.4578275, 0.40821073], [0.26862954, 0.26130258, 0.27577711]


def preparation(folder, kind: str, shortest: int) -> None:
    """The file that says how images are prepared, as published but for the sizes."""
    content = {
        "image_processor_type": kind, "do_resize": True, "size": {"shortest_edge": shortest},
        "resample": 3, "do_center_crop": True, "crop_size": {"height": SIDE, "width": SIDE},
        "do_rescale": True, "rescale_factor": 1 / 255, "do_normalize": True,
        "image_mean": MEAN, "image_std": STD, "do_convert_rgb": True,
    }  # fmt: skip
    (folder / "preprocessor_config.json").write_text(json.dumps(content), encoding="utf-8")


def save_models(root: Path) -> None:
    """CLIP, PickScore and DINOv2 of two layers, and the aesthetic head as both of its files."""
    torch.manual_seed(0)
    tokenizer = transformers.CLIPTokenizer.from_pretrained(MODEL_DIR / "tokenizer")
    small = {
        "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": SIDE,
        "patch_size": 14,
    }  # fmt: skip
    text = small | {
        "intermediate_size": 32, "vocab_size": len(tokenizer),
        "bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id,
    }  # fmt: skip
    clip = transformers.CLIPConfig(
        text_config=text, vision_config=small | {"intermediate_size": 32}, projection_dim=SHARED
    )
    dino = transformers.Dinov2Config(**small, mlp_ratio=2)
    for name, net in {
        "clip": transformers.CLIPModel(clip), "pickscore": transformers.CLIPModel(clip),
        "dino": transformers.Dinov2Model(dino),
    }.items():  # fmt: skip
        for weight in net.parameters():
            if weight.ndim > 1:
                nn.init.normal_(weight, std=0.3)
        net.save_pretrained(root / name)
        if name == "dino":
            preparation(root / name, "BitImageProcessor", shortest=32)
        else:
            tokenizer.save_pretrained(root / name)
            preparation(root / name, "CLIPImageProcessor", shortest=SIDE)
    layers = nn.Sequential(nn.Linear(SHARED, 6), nn.Dropout(), nn.Linear(6, 4), nn.Linear(4, 1))
    head = {f"layers.{key}": value for key, value in layers.state_dict().items()}
    torch.save(head, root / "head.pth")
    (root / "predictor").mkdir()
    save_file(head | {"vision.weight": torch.ones(2)}, root / "predictor" / "model.safetensors")


def clone_v2vbench(monkeypatch, root: Path) -> Path:
    """V2VBench's modules and weights, in networks of one weight that answer in a known way.

    Returns:
        The folder of the weights.
    """

    class Weight(nn.Module):
        def __init__(self, *args, **kwargs):
            super().__init__()
            self.weight = nn.Parameter(torch.zeros(1))

    class Grade(Weight):
        def forward(self, x):
            return x * self.weight

    class Flow(Weight):
        def forward(self, a, b, attn_splits_list, corr_radius_list, prop_radius_list):
            assert attn_splits_list == [2]
            assert a.shape[2] % 16 == a.shape[3] % 16 == 0
            return {"flow_preds": [None, torch.stack([a[:, 0], b[:, 1]], 1) * self.weight]}

    class Joint(Weight):
        def __init__(self, tokenizer, pretrain):
            super().__init__()
            assert pretrain is None

        def encode_vision(self, video, test):
            assert test
            return video.mean((2, 3, 4)) * self.weight

        def encode_text(self, prompt):
            return torch.full((1, 8), float(len(prompt)))

    def views(frames, kinds, samplers):
        drawn = torch.rand(1).item() + np.random.rand()
        clip = torch.from_numpy(np.stack(frames)).float().permute(3, 0, 1, 2)
        assert samplers == {"technical": (32, 3, 2), "aesthetic": (1, 32, 2)}
        return {"technical": clip[:, :3] + drawn, "aesthetic": clip[:, :5]}, None

    content = {
        "dover.models": {
            "VQABackbone": Grade, "VQAHead": Grade,
            "convnext_3d_tiny": lambda pretrained: 1 / 0 if pretrained else Grade(),
        },
        "dover.dataset": {
            "UnifiedFrameSampler": lambda *numbers: numbers,
            "spatial_temporal_view_decomposition": views,
        },
        "gmflow.models": {"GMFlow": Flow},
        "viclip": {
            "ViCLIP": Joint,
            "SimpleTokenizer": lambda path: Path(path).read_text(encoding="utf-8"),
            "clip_image_transform": lambda side: lambda image: torch.tensor(np.array(image)) / 1.0,
        },
    }  # fmt: skip
    monkeypatch.setitem(sys.modules, "third_party", ModuleType("third_party"))
    for name, members in content.items():
        module = ModuleType(f"third_party.{name}")
        module.__file__ = str(root / "third_party" / name / "__init__.py")
        vars(module).update(members)
        monkeypatch.setitem(sys.modules, module.__name__.rpartition(".")[0], ModuleType("parent"))
        monkeypatch.setitem(sys.modules, module.__name__, module)

    one = {"weight": torch.full((1,), 2.0)}
    parts = ("technical_backbone", "technical_head", "aesthetic_backbone", "aesthetic_head")
    weights = {
        "DOVER/DOVER.pth": {f"{part}.weight": torch.full((1,), 0.5) for part in parts},
        "gmflow/gmflow_sintel-0c07dcb3.pth": {"model": one},
        "ViCLIP/ViClip-InternVid-10M-FLT.pth": {"model": one},
    }
    for file, state in weights.items():
        path = root / "checkpoints" / file
        path.parent.mkdir(parents=True)
        torch.save(state, path)
    (root / "checkpoints/ViCLIP/bpe_simple_vocab_16e6.txt.gz").write_text("", encoding="utf-8")
    return root / "checkpoints"
