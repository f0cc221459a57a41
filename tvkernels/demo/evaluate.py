"""The demo model's figures on held-out scenes."""

from __future__ import annotations

import datetime
import json
import multiprocessing
import platform
import time
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch

from tvkernels.demo import metrics, networks, stages
from tvkernels.demo.world import heldout_scene

COMMAND = "python -m tvkernels.demo.train --out tvkernels/demo/model"
TARGETS = {"vae_psnr_db": 30.0, "color": 0.95, "shape": 0.90}


def generate(
    directory: Path, prompts: list[str], steps: int, guidance: float, workers: int = 2
) -> np.ndarray:
    """Pictures of prompts, uint8 [N, H, W, 3].

    Batches of 20, each with its own seed, are spread over single-threaded processes; their
    number does not change the pictures.
    """
    starts = range(0, len(prompts), 20)
    parts = [prompts[start : start + 20] for start in starts]
    context = multiprocessing.get_context("spawn")
    draw = partial(_draw, directory, steps, guidance)
    with ProcessPoolExecutor(min(workers, len(parts)), context) as pool:
        return np.concatenate(list(pool.map(draw, starts, parts)))


def _draw(
    directory: Path, steps: int, guidance: float, seed: int, prompts: list[str]
) -> np.ndarray:
    torch.set_num_threads(1)
    pictures = networks.load_pipeline(directory)(
        prompts,
        num_inference_steps=steps,
        guidance_scale=guidance,
        generator=torch.Generator().manual_seed(seed),
        output_type="np",
    ).images
    return (pictures * 255 + 0.5).astype(np.uint8)


def evaluate(
    directory: Path,
    clips: int = 64,
    images: int = 200,
    steps: int = 25,
    guidance: float = 7.5,
    workers: int = 2,
) -> dict[str, float]:
    """VAE reconstruction in dB, and shares of generated pictures the classifier agrees with.

    Returns:
        {"vae_psnr_db", "color", "shape", "both", ...} with the settings they hold for.
    """
    scenes = [heldout_scene(i) for i in range(images)]
    started = time.time()
    captions = [scene.caption for scene in scenes]
    pictures = generate(directory, captions, steps, guidance, workers)
    seconds = time.time() - started
    readings = [metrics.read(picture) for picture in pictures]
    wanted = [scene.objects[0] for scene in scenes]
    pairs = list(zip(readings, wanted, strict=True))
    color = np.array([r is not None and r.color == w.color for r, w in pairs])
    shape = np.array([r is not None and r.shape == w.shape for r, w in pairs])
    vae = networks.load_pipeline(directory).vae
    return {
        "vae_psnr_db": round(stages.heldout_psnr(vae, clips), 2),
        "color": float(color.mean()),
        "shape": float(shape.mean()),
        "both": float((color & shape).mean()),
        "heldout_clips": clips,
        "generated_images": images,
        "ddim_steps": steps,
        "guidance": guidance,
        "generation_seconds": round(seconds, 1),
    }


def write_record(directory: Path, figures: dict) -> None:
    """Completes training.json and writes the model card and licence note beside it."""
    path = directory / "training.json"
    content = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    content |= {
        "command": COMMAND,
        "settings": {
            "unet_batch": f"{stages.BATCH // 2}, then {stages.BATCH}",
            "two_object_share": stages.TWO_OBJECTS,
            "empty_prompt_share": stages.EMPTY_PROMPT,
            "posterior_deviation": stages.POSTERIOR,
            "optimizer": "AdamW, betas 0.9 and 0.99, gradient norm clipped to 1",
            "workers": 2,
        },
        "figures": figures,
        "targets": TARGETS,
        "missed": [name for name, target in TARGETS.items() if figures[name] < target],
        "versions": {
            "python": platform.python_version(),
            **{name: version(name) for name in ("torch", "diffusers", "transformers", "numpy")},
        },
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
    }
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    (directory / "README.md").write_text(_card(content), encoding="utf-8")
    (directory / "LICENSE").write_text(_LICENSE, encoding="utf-8")


def _card(content: dict) -> str:
    figures, targets = content["figures"], content["targets"]
    names = {
        "vae_psnr_db": "VAE reconstruction, dB PSNR",
        "color": "generated pictures, colour right",
        "shape": "generated pictures, shape right",
    }
    rows = [
        f"| {label} | {figures[name]:g} | {targets[name]:g} |" for name, label in names.items()
    ]
    missed = ", ".join(names[name] for name in content["missed"])
    verdict = f"Short of target: {missed}." if missed else "All targets are met."
    return _CARD.format(
        rows="\n".join(rows),
        verdict=verdict,
        command=content["command"],
        seconds=sum(run["seconds"] for run in content.get("stages", [])),
        images=figures["generated_images"],
        steps=figures["ddim_steps"],
        guidance=figures["guidance"],
        clips=figures["heldout_clips"],
    )


_CARD = """# The demo model

Stable Diffusion 1.x in miniature, in diffusers' layout: it draws the shapes world of
`tvkernels.demo.world`, one or two coloured shapes over a textured background, and nothing else.
128 x 128 pixels, 16 x 16 latents, captions such as "a red circle on a gray striped background".

```python
from diffusers import StableDiffusionPipeline
from tvkernels.demo import MODEL_DIR

pipeline = StableDiffusionPipeline.from_pretrained(MODEL_DIR)
picture = pipeline("a red circle on a gray striped background", guidance_scale=7.5).images[0]
```

Figures on scenes kept out of training ({clips} clips; {images} pictures, {steps} DDIM steps,
guidance {guidance:g}, named by the world's own classifier):

| figure | reached | target |
|---|---|---|
{rows}

{verdict}

`{command}` runs every stage from nothing. The stages that
made these weights, some of them resumed, are listed in `training.json` with their seconds,
steps and pictures, {seconds} seconds of wall clock in all. `--stage unet --resume` continues.
"""

_LICENSE = """These weights are licensed under the Apache License, Version 2.0
(https://www.apache.org/licenses/LICENSE-2.0).

They were trained from scratch on synthetic pictures drawn by tvkernels.demo.world only. No
photograph, video, third-party data set or pretrained weight was used.
"""
