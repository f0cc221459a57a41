"""The methods as their papers' users run them: the baseline that the pipelines are timed against.

diffusers and PyTorch alone, written from the papers and from notes on the public code; nothing of
the ops, modules and processors under test. Clips are [b c f h w], permuted to and fro; keys and
values are gathered and concatenated; the text is repeated for every frame and projected in every
step; probabilities are held whole. Where a paper is silent or its code errs, the decision is the
recipe's, so that both compute the same (`tests/benchmarks/test_reference.py`).
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tvkernels.benchmarks.reference.loop import Reference

METHODS = (
    "frame-by-frame", "tune-a-video", "ei2", "tcve", "blended-diffusion", "stable-video",
)  # fmt: skip
# Method -> the module that has its `Reference`.
REFERENCES = {name: f"{__name__}.{name.replace('-', '_')}" for name in METHODS}
ATTENTION = ("math", "sdpa")


def load_reference(pipe, *, attention: str = "math") -> Reference:
    """The plain version of a loaded pipeline.

    Args:
        pipe: of `tvkernels.pipelines`; its models are copied, with the weights that inflation
            added and tuning changed, and are left as they are.
        attention: "math" holds all probabilities, as the original code does without xformers;
            "sdpa" is PyTorch's own.
    Raises:
        ValueError: no plain version of the pipeline's recipe, another attention, or a UNet that is
            not Stable Diffusion 1.x's.
    """
    name = pipe.settings.recipe.name
    if name not in REFERENCES:
        raise ValueError(f"no reference of {name}: there is one of {', '.join(REFERENCES)}")
    if attention not in ATTENTION:
        raise ValueError(f"unknown attention {attention!r}: use one of {', '.join(ATTENTION)}")
    return import_module(REFERENCES[name]).Reference(pipe, attention)
