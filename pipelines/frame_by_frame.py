"""The baseline: every frame inverted and edited as an image of its own, nothing tuned."""

from tvkernels.pipelines.one_shot import OneShotPipeline, Settings
from tvkernels.recipes import FRAME_BY_FRAME

# Stable Diffusion's own guidance; the steps of the methods it is compared with.
SETTINGS = Settings(
    recipe=FRAME_BY_FRAME,
    frames=8,
    tune_steps=0,
    learning_rate=0.0,
    weight_decay=0.0,
    steps=50,
    guidance=7.5,
)


class FrameByFramePipeline(OneShotPipeline):
    """`OneShotPipeline` with the plain 2-D UNet."""

    settings = SETTINGS
