"""A report of Nsight Systems over a short sampling loop, our ranges in it.

`nsys stats` and its window show them by domain and category. Not taken on a device yet.
"""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from tvkernels import _ranges
from tvkernels.benchmarks.cases import inputs, line_up

NAME = "gpu-sampling.nsys-rep"
SECONDS = 60  # of the program that is recorded; it is ended then
WRITING = 30  # seconds more, for the report
STEPS = 4
OPTIONS = ("--trace=cuda,nvtx", "--sample=none", "--cpuctxsw=none", "--force-overwrite=true")


def why_not(device: torch.device) -> str | None:
    """What a report lacks here."""
    if device.type != "cuda":
        return "it is for CUDA devices"
    return None if shutil.which("nsys") else "nsys is not on PATH"


def record(command: Sequence[str], folder: Path) -> str:
    """Runs a command under `nsys profile`; one line that says where the report is, or why none."""
    target = folder / NAME
    target.unlink(missing_ok=True)
    how = ["nsys", "profile", *OPTIONS, f"--duration={SECONDS}", f"--output={target}"]
    try:
        ran = subprocess.run(
            [*how, *command],
            capture_output=True,
            text=True,
            timeout=SECONDS + WRITING,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"Nsight Systems: no report: {error}"
    if not target.exists():
        said = (ran.stderr or ran.stdout).strip().splitlines() or [f"status {ran.returncode}"]
        return f"Nsight Systems: no report: {said[-1]}"
    return f"Nsight Systems: the report is {target}"


def sample(device: torch.device, ops: Sequence[str]) -> None:
    """What is recorded: EI2's sampling of the embedded model, without diffusers every op in turn.

    Once before ranges are on, for what is compiled at the first call.
    """
    try:
        loop = _pipeline(device)
    except ImportError as error:
        print(f"every op in turn: {error}")
        loop = _ops(device, ops)
    loop(1)
    with _ranges.on():
        loop(STEPS)
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _pipeline(device: torch.device) -> Callable[[int], None]:
    from tvkernels.demo import MODEL_DIR
    from tvkernels.pipelines.checks import latent_side
    from tvkernels.pipelines.loading import load_pipeline

    pipe = load_pipeline("ei2", str(MODEL_DIR))
    pipe.set_progress_bar_config(disable=True)
    side = latent_side(pipe.unet.config)
    latents = torch.randn(pipe.settings.frames, 4, side, side, device=device)
    return lambda steps: pipe("a blue star", latents=latents, num_inference_steps=steps)


def _ops(device: torch.device, ops: Sequence[str]) -> Callable[[int], None]:
    dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
    first = {spec.name: (spec, case) for spec, case in reversed(line_up(ops, None, device))}
    calls = [(spec.call, *inputs(spec, case, dtype, device)) for spec, case in first.values()]

    @torch.no_grad()
    def loop(steps: int) -> None:
        with _ranges.span("method", "ops"):
            for _ in _ranges.each_step(range(steps)):
                for call, positional, keyword in calls:
                    call(*positional, **keyword)

    return loop
