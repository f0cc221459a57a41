"""The embedded default: a small Stable-Diffusion-shaped model and the world it knows.

`world` draws clips whose masks, motion and edits are known exactly, `metrics` measures an edit
against that truth, `train` makes the model in `MODEL_DIR`. Importing this package imports
neither torch nor diffusers.
"""

from pathlib import Path

MODEL_DIR = Path(__file__).resolve().parent / "model"
"""The shipped model, a directory in diffusers' layout."""

__all__ = ["MODEL_DIR"]
