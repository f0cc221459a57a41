"""Trains the demo model on pictures of the shapes world, and measures it.

    python -m tvkernels.demo.train --out tvkernels/demo/model

First the VAE, then its decoder alone, then UNet and text encoder together; at the end the
figures on held-out scenes, which `--evaluate` measures without training.
Budgets are minutes of wall clock and the learning rates follow them, so a slower machine trains
fewer steps. The output directory holds a loadable model from the first checkpoint on.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from tvkernels.demo import MODEL_DIR, evaluate, stages
from tvkernels.demo.team import launch


def main(arguments: list[str] | None = None) -> None:
    """Command line; see the module's text."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=MODEL_DIR)
    parser.add_argument("--stage", choices=("all", "vae", "decoder", "unet"), default="all")
    parser.add_argument("--evaluate", action="store_true", help="measure --out, train nothing")
    parser.add_argument("--vae-minutes", type=float, default=25.0)
    parser.add_argument("--decoder-minutes", type=float, default=9.0)
    parser.add_argument("--unet-minutes", type=float, default=130.0)
    parser.add_argument("--workers", type=int, default=2, help="processes of one thread each")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--resume", action="store_true", help="start from the weights in --out")
    parser.add_argument("--log", type=Path, default=Path("train.log"))
    parser.add_argument("--ddim-steps", type=int, default=25)
    parser.add_argument("--guidance", type=float, default=7.5)
    options = parser.parse_args(arguments)
    if not options.evaluate:
        train(options)
    figures = evaluate.evaluate(
        options.out,
        steps=options.ddim_steps,
        guidance=options.guidance,
        workers=options.workers,
    )
    evaluate.write_record(options.out, figures)
    print(json.dumps(figures, indent=2))


def train(options: argparse.Namespace) -> None:
    """Runs the asked stages, in order."""

    def run(stage: str, function, minutes: float, *more) -> None:
        if options.stage in ("all", stage):
            common = (options.out, minutes, options.seed, options.log)
            launch(function, options.workers, *common, *more)

    run("vae", stages.train_vae, options.vae_minutes, options.resume)
    run("decoder", stages.refine_decoder, options.decoder_minutes)
    run("unet", stages.train_unet, options.unet_minutes, options.resume)


if __name__ == "__main__":
    main()
