"""Tune-A-Video: sparse-causal frame attention and temporal attention (ICCV 2023)."""

from tvkernels.pipelines.one_shot import OneShotPipeline, Settings
from tvkernels.recipes import TUNE_A_VIDEO

# The published configurations and training script: 24 frames, AdamW at 3e-5 with weight decay
# 1e-2, 500 steps, DDIM 50 both ways, guidance 12.5, inversion with the empty prompt.
SETTINGS = Settings(
    recipe=TUNE_A_VIDEO,
    frames=24,
    tune_steps=500,
    learning_rate=3e-5,
    weight_decay=1e-2,
    steps=50,
    guidance=12.5,
)


class TuneAVideoPipeline(OneShotPipeline):
    """`OneShotPipeline` with Tune-A-Video's video UNet and numbers."""

    settings = SETTINGS
