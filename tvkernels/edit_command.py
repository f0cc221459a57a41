"""`tvk edit`: its options, which are the names of `EditSettings`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from tvkernels._console import say
from tvkernels.config import ConfigError, read_config, resolve
from tvkernels.pipelines import METHODS

METHOD_HELP = f"One of {', '.join(METHODS)}. (default: ei2)"


def edit_command(
    clip: Annotated[
        Path | None, typer.Argument(help="The source: a video file or a folder of images.")
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", help="OUT.mp4, OUT.gif, or a folder for PNG files."),
    ] = None,
    prompt: Annotated[
        list[str] | None,
        typer.Option(help="What the edited clip should show; repeat it for several clips."),
    ] = None,
    source_prompt: Annotated[str | None, typer.Option(help="What the clip shows.")] = None,
    method: Annotated[str | None, typer.Option(help=METHOD_HELP)] = None,
    model: Annotated[
        str | None,
        typer.Option(
            help="Stable Diffusion 1.x: a folder in diffusers' layout, a .safetensors file, or a "
            "hub name. (default: the embedded model of the shapes world)"
        ),
    ] = None,
    variant: Annotated[
        str | None, typer.Option(help="Of the model's files, such as fp16.")
    ] = None,
    lora: Annotated[
        list[str] | None,
        typer.Option(help="FILE or FILE:weight, LoRA weights for that model; repeat it."),
    ] = None,
    embedding: Annotated[
        list[Path] | None, typer.Option(help="FILE of a textual inversion; repeat it.")
    ] = None,
    frames: Annotated[
        int | None, typer.Option(help="Frames to take. (default: the whole clip)")
    ] = None,
    start: Annotated[int | None, typer.Option(help="First frame to take, from 0.")] = None,
    stride: Annotated[
        int | None,
        typer.Option(help="Take every n-th frame; Tune-A-Video and TCVE: 2. (default: 1)"),
    ] = None,
    size: Annotated[
        str | None,
        typer.Option(
            help="Pixels of the shorter side, or both as WIDTHxHEIGHT. (default: the model's)"
        ),
    ] = None,
    steps: Annotated[
        int | None, typer.Option(help="DDIM steps of inversion and sampling. (default: method's)")
    ] = None,
    tune_steps: Annotated[
        int | None, typer.Option(help="Steps of the one-shot tuning. (default: the method's)")
    ] = None,
    learning_rate: Annotated[
        float | None, typer.Option(help="Of the tuning. (default: the method's)")
    ] = None,
    guidance: Annotated[
        float | None, typer.Option(help="Guidance scale. (default: the method's)")
    ] = None,
    negative_prompt: Annotated[
        str | None, typer.Option(help="What the edited clip should not show.")
    ] = None,
    clip_skip: Annotated[
        int | None, typer.Option(help="Last layers of the text encoder to leave out.")
    ] = None,
    words: Annotated[
        list[str] | None,
        typer.Option(
            help="old=new, such as 'red circle=blue star': what changes, for blended-diffusion; "
            "repeat it. (default: the words by which the prompts differ)"
        ),
    ] = None,
    mask: Annotated[
        Path | None,
        typer.Option(
            help="Image, video or folder, bright where the clip may change, instead of --words."
        ),
    ] = None,
    seed: Annotated[
        int | None, typer.Option(help="Same seed, same edited frames. (default: 0)")
    ] = None,
    dtype: Annotated[
        str | None,
        typer.Option(
            help="auto, fp32, bf16 or fp16. (default: auto, what the device multiplies fastest; "
            "fp32 for the embedded model)"
        ),
    ] = None,
    device: Annotated[
        str | None,
        typer.Option(help="auto, cpu, cuda, cuda:1, xpu or mps. (default: auto, a GPU if any)"),
    ] = None,
    backend: Annotated[
        str | None,
        typer.Option(help="auto, triton, cuda, native, cpu or reference. (default: auto)"),
    ] = None,
    runtime: Annotated[
        str | None,
        typer.Option(
            help="What inversion and sampling run under: eager, compile, cuda_graph, onnx, "
            "tensorrt or aoti. (default: eager)"
        ),
    ] = None,
    max_memory: Annotated[
        str | None,
        typer.Option(
            help="Such as 8GB: the edit is planned to keep its tensors, weights included, under "
            "it by accounting; the libraries themselves come on top."
        ),
    ] = None,
    cache: Annotated[
        Path | None,
        typer.Option(help="Folder that keeps preprocessing. (default: ~/.cache/tvkernels)"),
    ] = None,
    no_cache: Annotated[bool, typer.Option("--no-cache", help="Keep and reuse nothing.")] = False,
    no_audio: Annotated[
        bool, typer.Option("--no-audio", help="Leave out the clip's sound, which an mp4 keeps.")
    ] = False,
    atlas: Annotated[
        list[Path] | None,
        typer.Option(
            help="A PNG that `tvk atlas` wrote, edited: the clip is rendered from it, without a "
            "model. Repeat it for several layers."
        ),
    ] = None,
    atlas_layer: Annotated[
        str | None, typer.Option(help="Which layer that PNG is. (default: what its name says)")
    ] = None,
    atlas_dir: Annotated[
        Path | None,
        typer.Option(
            help="Folder that `tvk atlas` wrote, for --atlas or stable-video. (default: the PNG's)"
        ),
    ] = None,
    foreground_prompt: Annotated[
        str | None,
        typer.Option(help="Of stable-video: the objects alone. (default: the prompt)"),
    ] = None,
    background_prompt: Annotated[
        str | None,
        typer.Option(help="Of stable-video: the background alone. (default: it stays)"),
    ] = None,
    controlnet_canny: Annotated[
        str | None, typer.Option(help="StableVideo: a ControlNet on edges, for objects.")
    ] = None,
    controlnet_depth: Annotated[
        str | None, typer.Option(help="StableVideo: one on depth, for the background.")
    ] = None,
    depth_model: Annotated[
        str | None, typer.Option(help="What makes the depth: a model of transformers.")
    ] = None,
    config: Annotated[
        Path | None,
        typer.Option(
            help="YAML with these settings or a Tune-A-Video configuration, or the JSON beside an "
            "edited clip. Options given here win."
        ),
    ] = None,
) -> None:
    """Edit a clip: tune the model on it, invert it, sample it with another prompt.

    Further prompts on the same clip skip the tuning: it is kept in the cache. Beside the edited
    clip lies a JSON file with every setting it was made with.
    """
    given = {
        "clip": clip, "output": output, "prompts": prompt or None, "source_prompt": source_prompt,
        "method": method, "model": model, "frames": frames, "start": start, "stride": stride,
        "size": size, "steps": steps, "tune_steps": tune_steps, "learning_rate": learning_rate,
        "guidance": guidance, "negative_prompt": negative_prompt, "seed": seed,
        "words": words or None, "mask": mask, "variant": variant, "lora": lora or None,
        "embedding": embedding or None, "clip_skip": clip_skip, "dtype": dtype, "device": device,
        "audio": False if no_audio else None,
        "backend": backend, "runtime": runtime, "max_memory": max_memory,
        "cache": False if no_cache else cache,
        "foreground_prompt": foreground_prompt, "background_prompt": background_prompt,
        "controlnet_canny": controlnet_canny, "controlnet_depth": controlnet_depth,
        "depth_model": depth_model,
    }  # fmt: skip
    if no_cache and cache is not None:
        raise ConfigError("give either --cache or --no-cache")
    if atlas:
        _edit_by_atlas(given, atlas, atlas_layer, atlas_dir, config)
        return
    if atlas_layer is not None:
        raise ConfigError("--atlas-layer goes with --atlas")
    given["atlas_dir"] = atlas_dir
    settings, notes = read_config(config) if config is not None else ({}, [])
    told = {name: value for name, value in given.items() if value is not None}
    settings.update(told)
    from tvkernels.edit import edit

    edit(resolve(settings), notes, say, told)


def _edit_by_atlas(given: dict, pictures: list[Path], layer, folder, config) -> None:
    from tvkernels.atlas.commands import edit_by_atlas

    options = {"prompts": "prompt"}
    names = [n for n, v in given.items() if v is not None and n not in ("clip", "output", "audio")]
    idle = [f"--{options.get(n, n).replace('_', '-')}" for n in names]
    idle += ["--config"] * bool(config)
    if idle:
        raise ConfigError(f"--atlas renders without a model: leave out {', '.join(idle)}")
    if given["output"] is None:
        raise ConfigError("--output is missing: say where to write, such as -o edited.mp4")
    edit_by_atlas(
        given["clip"], pictures, given["output"], layer, folder, say,
        audio=given["audio"] is not False,
    )  # fmt: skip
