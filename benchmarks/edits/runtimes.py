"""The sampling loop under every runtime that runs here, and what starting one costs.

`python -m tvkernels.benchmarks.edits.runtimes [--method M ...] [--runtime R ...]`: the embedded
model, 8 frames of 128 x 128, guidance. The loops take turns; the baseline is the same UNet with
every op its plain reference. Rows go to results/runtimes.jsonl.
"""

from __future__ import annotations

import argparse
import sys
import time

import torch

from tvkernels import BackendError
from tvkernels._dispatch import auto_takes
from tvkernels.benchmarks import RESULTS, machine, stored, timing
from tvkernels.demo import MODEL_DIR
from tvkernels.pipelines import METHODS
from tvkernels.pipelines.loading import load_pipeline
from tvkernels.runtime import BACKENDS

ROWS = RESULTS / "runtimes.jsonl"
FRAMES, STEPS, GUIDANCE = 8, 4, 5.0
PROMPT = "a blue star on a green checkered background"
REFERENCE = "eager, reference ops"


def main(argv: list[str] | None = None) -> int:
    """Times the loops, prints a line for each runtime and keeps its row."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--method", nargs="*", choices=METHODS, default=["ei2"])
    parser.add_argument("--runtime", nargs="*", choices=BACKENDS, default=BACKENDS)
    asked = parser.parse_args(argv)
    for method in asked.method:
        for row in measure(method, asked.runtime):
            stored.append(ROWS, row)
    return 0


@torch.no_grad()
def measure(method: str, runtimes) -> list[dict]:
    """Rows of a method: seconds of a step, of the first call, and the ratio to the reference."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    latents = torch.randn(FRAMES, 4, 16, 16, generator=torch.Generator().manual_seed(0))
    loops, first, worst, expected = {}, {}, {}, None
    for name in (REFERENCE, *runtimes):
        pipe = load_pipeline(method, str(MODEL_DIR))
        try:
            pipe.accelerate("eager" if name == REFERENCE else name)
        except BackendError as error:
            print(f"{method}, {name}: {'; '.join(str(error).splitlines()[1:])}", flush=True)
            continue
        loops[name] = _loop(pipe, latents, name)
        began = time.perf_counter()
        found = loops[name]()
        first[name] = time.perf_counter() - began
        expected = found if expected is None else expected
        worst[name] = (found - expected).abs().max().item()
    candidates = [timing.Candidate(n, [call], capturable=False) for n, call in loops.items()]
    times = timing.interleave(candidates, device, seconds=20.0)
    medians = {c.name: t.median_s / STEPS for c, t in zip(candidates, times, strict=True)}
    rows = []
    for name, seconds in medians.items():
        ratio = medians[REFERENCE] / seconds
        print(
            f"{method}, {name}: {seconds * 1e3:.0f} ms a step, {ratio:.2f} times the reference, "
            f"first loop {first[name]:.1f} s, differs by {worst[name]:.1e}", flush=True,
        )  # fmt: skip
        facts = {"method": method, "runtime": name, "frames": FRAMES, "size": [128, 128]}
        facts |= {"guidance": GUIDANCE, "step_s": seconds, "first_s": first[name]}
        facts |= {"reference_ratio": ratio, "difference": worst[name]}
        rows.append(facts | machine.facts(device) | {"date": machine.today()})
    return rows


def _loop(pipe, latents, name: str):
    pipe.set_progress_bar_config(disable=True)

    def loop():
        return pipe(
            PROMPT, latents=latents, num_inference_steps=STEPS, guidance_scale=GUIDANCE,
            output_type="latent",
        ).frames  # fmt: skip

    if name != REFERENCE:
        return loop

    def reference():
        with auto_takes("reference"):
            return loop()

    return reference


if __name__ == "__main__":
    sys.exit(main())
