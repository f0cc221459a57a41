"""What `tvk atlas` and `tvk edit --atlas` do."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from fractions import Fraction
from pathlib import Path

import numpy as np
import torch

from tvkernels.atlas.files import MODEL, AtlasError, digest, load_atlas, read_picture, save_atlas
from tvkernels.atlas.train import AtlasSettings, psnr, train_atlas
from tvkernels.video import (
    OUTPUTS,
    Video,
    VideoError,
    check_output,
    read_mask,
    read_video,
    write_video,
)


@dataclass(frozen=True)
class Cut:
    """The frames taken of a clip, as `read_video` understands them."""

    start: int = 0
    stride: int = 1
    frames: int | None = None
    size: int | tuple[int, int] | None = None

    def read(self, clip: Path) -> Video:
        """The frames; sides are even, so that every output can hold them."""
        return read_video(clip, multiple=2, **asdict(self))


def make_atlas(
    clip: Path,
    output: Path,
    cut: Cut,
    masks: Sequence[Path],
    settings: AtlasSettings,
    seed: int,
    say: Callable[[str], None],
) -> float:
    """Fits an atlas to a clip and writes its model, its pictures and the clip it shows.

    Args:
        clip: a video or a folder of images.
        output: a folder.
        cut: the frames taken.
        masks: of the foreground layers, the front one first; none finds what moves.
        settings: of the training.
        seed: of everything drawn.
        say: shows one line.
    Returns:
        The reconstruction's PSNR in dB.
    Raises:
        VideoError: clip, mask, flow or output are not usable.
    """
    check_output(output / MODEL, (".safetensors",))
    if output.is_dir() and any(output.iterdir()):  # perhaps pictures that were edited by hand
        raise VideoError(f"cannot write {output}: it is there already and not an empty folder")
    video = cut.read(clip)
    count, height, width = video.frames.shape[:3]
    settings = settings.of(count, height, width)
    given = [
        read_mask(mask, count, (height, width), video.fit, cut.start, cut.stride) for mask in masks
    ] or None
    say(f"{clip}: {count} frames of {width} x {height}, {settings.steps} steps, seed {seed}")
    began = time.perf_counter()

    def on_step(step: int, loss: float) -> None:
        if (step + 1) % max(1, settings.steps // 4) == 0:
            say(f"step {step + 1}: loss {loss:.6f}, {time.perf_counter() - began:.1f} s")

    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = train_atlas(
        video.frames, given, settings, generator=torch.Generator().manual_seed(seed),
        device=device, on_step=on_step,
    )  # fmt: skip
    seconds, quality = time.perf_counter() - began, psnr(model, video.frames)
    shown = {n: list(x.size) for n, x in zip(model.names, model.layers, strict=True)}
    info = {
        "clip": clip.name, "frames": digest(video.frames), "fps": str(video.fps),
        "cut": asdict(cut) | {"frames": count, "size": [height, width]},
        "settings": asdict(settings), "seed": seed, "layers": shown,
        "sound": video.audio is not None, "psnr": round(quality, 3), "seconds": round(seconds, 1),
    }  # fmt: skip
    save_atlas(model, output, info)
    write_video(output / "reconstruction.mp4", _bytes(model.render()), video.fps, video.audio)
    sizes = ", ".join(f"{n}.png {w} x {h}" for n, (h, w) in shown.items())
    say(f"wrote {sizes}, {MODEL} and reconstruction.mp4 to {output}")
    say(f"reconstruction {quality:.2f} dB PSNR, trained in {seconds:.1f} s")
    return quality


def edit_by_atlas(
    clip: Path | None,
    pictures: Sequence[Path],
    output: Path,
    layer: str | None,
    folder: Path | None,
    say: Callable[[str], None],
    audio: bool = True,
) -> Path:
    """Renders a clip from edited pictures of its atlas.

    Args:
        clip: that the atlas was made from, to be sure of it and for its sound; None takes
            the atlas as it is.
        pictures: edited PNGs, each of another layer.
        output: the edited clip.
        layer: which layer a single picture is; None lets it say so itself.
        folder: of the atlas; None looks beside the first picture.
        say: shows one line.
        audio: keep the sound of the frames.
    Raises:
        VideoError: no atlas, a picture that does not fit it, another clip, or no way to write.
    """
    check_output(output, OUTPUTS)
    model, info = load_atlas(folder or pictures[0].parent)
    sound = None
    if clip is not None:
        cut = Cut(**info["cut"])
        video = cut.read(clip)
        if digest(video.frames) != info["frames"]:
            raise AtlasError(f"the atlas was made from {info['clip']}, not from {clip}")
        sound = video.audio if audio else None
    elif audio and info.get("sound"):
        say("the sound is left out: give the clip to keep it")
    if layer is not None and len(pictures) > 1:
        raise AtlasError("--atlas-layer goes with a single --atlas: the PNGs' names tell several")
    edited: dict[int, torch.Tensor] = {}
    for picture in pictures:
        index, colors = read_picture(picture, model, layer)
        if index in edited:
            raise AtlasError(f"two pictures of the layer {model.names[index]}: give one")
        edited[index] = colors
    write_video(output, _bytes(model.render(edited)), Fraction(info["fps"]), sound)
    say(f"wrote {output} from the edited {', '.join(model.names[i] for i in edited)}")
    return output


def _bytes(pixels: torch.Tensor) -> np.ndarray:
    return pixels.mul(255).round().byte().permute(0, 2, 3, 1).cpu().numpy()
