"""TCVE: a temporal U-Net beside the spatial one, and units that join them (arXiv 2308.09091)."""

from dataclasses import replace

from diffusers import AutoencoderKL, UNet2DConditionModel
from diffusers.schedulers import KarrasDiffusionSchedulers
from transformers import CLIPTextModel, CLIPTokenizer

from tvkernels.pipelines.one_shot import OneShotPipeline, Settings
from tvkernels.recipes import TCVE, TCVE_PAPER

# Section V-A: SD-1.4, Adam at 3e-5 (AdamW without decay is Adam), 100 steps, DDIM 50 both ways,
# guidance 12.5; the code's configurations: 16 frames of 480 x 480, inverted with an empty prompt.
SETTINGS = Settings(
    recipe=TCVE,
    frames=16,
    tune_steps=100,
    learning_rate=3e-5,
    weight_decay=0.0,
    steps=50,
    guidance=12.5,
)


class TCVEPipeline(OneShotPipeline):
    """`OneShotPipeline` with TCVE's two U-Nets and numbers.

    Args:
        paper: the form that the paper writes, a plain 2-D UNet that stays frozen beside the tuned
            temporal U-Net and units; by default the published code's, Tune-A-Video's UNet tuned
            along with them.
        settings, backend, attention: and the models, as for `OneShotPipeline`.
    """

    settings = SETTINGS

    def __init__(
        self, vae: AutoencoderKL, text_encoder: CLIPTextModel, tokenizer: CLIPTokenizer,
        unet: UNet2DConditionModel, scheduler: KarrasDiffusionSchedulers,
        settings: Settings | None = None, backend: str = "auto", attention: str | None = None,
        paper: bool = False,
    ):  # fmt: skip
        settings = settings or type(self).settings
        if paper:
            settings = replace(settings, recipe=TCVE_PAPER)
        super().__init__(
            vae=vae, text_encoder=text_encoder, tokenizer=tokenizer, unet=unet,
            scheduler=scheduler, settings=settings, backend=backend, attention=attention,
        )  # fmt: skip
