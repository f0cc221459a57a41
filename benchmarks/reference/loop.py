"""Tuning, inversion and sampling as the published scripts run them, whatever the UNet."""

from __future__ import annotations

from copy import deepcopy

import torch
import torch.nn.functional as F
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor, nn


class Reference:
    """A method's plain version: `tune`, `invert` and `sample`, each on latents [F, 4, h, w].

    A method has its UNet, that UNet's names for the weights and how it is called; blended
    diffusion and StableVideo have more.

    Args:
        pipe: the loaded pipeline whose models are copied.
        attention: "math" or "sdpa".
    """

    # Endings of the modules that are tuned, as the published scripts choose them.
    tuned: tuple[str, ...] = ()
    # Beginnings of names that the pipeline has no weights for.
    dead: tuple[str, ...] = ()

    def __init__(self, pipe, attention: str):
        self.name, self.settings = pipe.settings.recipe.name, pipe.settings
        self.tokenizer, self.text_encoder = pipe.tokenizer, deepcopy(pipe.text_encoder)
        self.scheduler = deepcopy(pipe.scheduler)
        # Float32 in diffusers; a float64 model is an oracle only with a float64 schedule.
        wide = torch.promote_types(pipe.unet.dtype, torch.float32)
        for name in ("alphas_cumprod", "final_alpha_cumprod"):
            setattr(self.scheduler, name, getattr(self.scheduler, name).to(wide))
        self.device = pipe.unet.device
        self.unet = self.build(pipe.unet.config, attention).to(self.device, pipe.unet.dtype)
        self.load(pipe.unet.state_dict())

    def build(self, config, attention: str) -> nn.Module:
        """The plain UNet of that configuration, with any weights."""
        raise NotImplementedError

    def rename(self, name: str) -> str:
        """The plain UNet's name for a weight of the pipeline's UNet."""
        return name

    def predict(self, latents: Tensor, t: Tensor, text: Tensor) -> Tensor:
        """The noise [B, F, 4, h, w] in latents [F, 4, h, w] under B texts [B, L, C]."""
        raise NotImplementedError

    def load(self, state: dict[str, Tensor]) -> None:
        """Takes the pipeline's weights, by its names."""
        state = {self.rename(name): tensor for name, tensor in state.items()}
        self.unet.train()
        missing, unknown = self.unet.load_state_dict(state, strict=False)
        missing = [name for name in missing if not name.startswith(self.dead)]
        if missing or unknown:
            raise ValueError(f"weights missing: {missing[:3]}, unknown: {unknown[:3]}")
        self.unet.eval()

    @torch.no_grad()
    def encode(self, prompt: str) -> Tensor:
        """Text states [1, L, C]."""
        tokens = self.tokenizer(
            prompt, padding="max_length", max_length=self.tokenizer.model_max_length,
            truncation=True, return_tensors="pt",
        )  # fmt: skip
        return self.text_encoder(tokens.input_ids.to(self.device))[0]

    def tune(
        self, latents: Tensor, prompt: str, steps: int, learning_rate: float, generator=None
    ) -> None:
        """Tunes on one clip and its prompt; the text is encoded in every step.

        Args:
            latents: of the clip, the VAE's mode; the published scripts encode it in every step
                too, and draw from its posterior.
            prompt: what it shows.
            steps, learning_rate: of AdamW, whose weight decay is the pipeline's.
            generator: draws timesteps and noise, in the order in which the pipeline draws them.
        Raises:
            ValueError: the method tunes nothing.
        """
        if not self.tuned:
            raise ValueError(f"{self.name} tunes nothing")
        self.unet.requires_grad_(False)
        for name, module in self.unet.named_modules():
            if name.endswith(self.tuned):
                module.requires_grad_(True)
        optimizer = torch.optim.AdamW(
            self.unet.parameters(), lr=learning_rate, weight_decay=self.settings.weight_decay
        )
        self.unet.train()
        for _ in range(steps):
            t = self.timestep(generator)
            noise = randn_tensor(latents.shape, generator, self.device, latents.dtype)
            noisy = self.scheduler.add_noise(latents, noise, t)
            found = self.predict(noisy, t, self.encode(prompt))[0]
            loss = F.mse_loss(found.float(), noise.float())
            loss.backward()
            nn.utils.clip_grad_norm_(self.unet.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
        self.unet.eval()

    def timestep(self, generator) -> Tensor:
        """A random one, [1]."""
        last = self.scheduler.config.num_train_timesteps
        device = self.device if generator is None else generator.device
        return torch.randint(last, (1,), generator=generator, device=device).to(self.device)

    @torch.no_grad()
    def invert(self, latents: Tensor, prompt: str, steps: int) -> Tensor:
        """DDIM inversion without guidance: from the clip to noise."""
        text = self.encode(prompt)
        self.scheduler.set_timesteps(steps, device=self.device)
        for t in reversed(self.scheduler.timesteps):
            latents = self.next_step(self.predict(latents, t, text)[0], t, latents)
        return latents

    def next_step(self, noise: Tensor, t: Tensor, latents: Tensor) -> Tensor:
        """`scheduler.step`, the other way."""
        scheduler = self.scheduler
        before = t - scheduler.config.num_train_timesteps // scheduler.num_inference_steps
        alphas, end = scheduler.alphas_cumprod, scheduler.final_alpha_cumprod
        alpha, target = alphas[before] if before >= 0 else end, alphas[t]
        clean = (latents - (1 - alpha) ** 0.5 * noise) / alpha**0.5
        return target**0.5 * clean + (1 - target) ** 0.5 * noise

    @torch.no_grad()
    def sample(self, latents: Tensor, prompt: str, steps: int, guidance: float) -> Tensor:
        """DDIM from noise under guidance, which 1 or less leaves out."""
        text = self.encode(prompt)
        if guidance > 1:
            text = torch.cat([self.encode(""), text])
        self.scheduler.set_timesteps(steps, device=self.device)
        for t in self.scheduler.timesteps:
            noise = self.predict(latents, t, text)
            if guidance > 1:
                low, high = noise
                noise = low + guidance * (high - low)
            else:
                noise = noise[0]
            latents = self.step(noise, t, latents)
        return latents

    def step(self, noise: Tensor, t: Tensor, latents: Tensor) -> Tensor:
        """The scheduler's own."""
        return self.scheduler.step(noise, t, latents).prev_sample
