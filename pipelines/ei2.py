"""EI2: fine-coarse frame attention and shift-restricted temporal attention (NeurIPS 2023)."""

from tvkernels.pipelines.one_shot import OneShotPipeline, Settings
from tvkernels.recipes import EI2

# Section 5: 8 frames, AdamW at 3e-5, 500 steps, guidance 7.5. The paper is silent on weight decay
# (ours: AdamW's usual 1e-2), on the number of DDIM steps (50) and the inversion's prompt (empty).
SETTINGS = Settings(
    recipe=EI2,
    frames=8,
    tune_steps=500,
    learning_rate=3e-5,
    weight_decay=1e-2,
    steps=50,
    guidance=7.5,
)


class EI2Pipeline(OneShotPipeline):
    """`OneShotPipeline` with EI2's video UNet and numbers."""

    settings = SETTINGS
