"""Every frame an image of its own, in diffusers' own UNet."""

from __future__ import annotations

import torch
from diffusers import UNet2DConditionModel
from diffusers.models.attention_processor import AttnProcessor, AttnProcessor2_0

from tvkernels.benchmarks.reference import loop

PROCESSORS = {"math": AttnProcessor, "sdpa": AttnProcessor2_0}


class Reference(loop.Reference):
    """The stock UNet; frames are its batch, and the text is repeated for each."""

    def build(self, config, attention):
        """diffusers' UNet and processors."""
        unet = UNet2DConditionModel.from_config(config)
        unet.set_attn_processor(PROCESSORS[attention]())
        return unet

    def predict(self, latents, t, text):
        """The stock UNet on B times the frames."""
        batch = torch.cat([latents] * len(text))
        repeated = text.repeat_interleave(len(latents), 0)
        return self.unet(batch, t, repeated).sample.unflatten(0, (len(text), -1))
