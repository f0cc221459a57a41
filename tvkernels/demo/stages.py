"""The two stages of the demo model's training: the VAE, then UNet and text encoder."""

from __future__ import annotations

import datetime
import json
import math
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, UNet2DConditionModel
from diffusers.models.attention_processor import AttnProcessor
from transformers import CLIPTextModel

from tvkernels.demo import networks
from tvkernels.demo.team import Progress, Team, Trainer
from tvkernels.demo.world import HELDOUT_START, Scene, heldout_scene

TWO_OBJECTS = 0.1
EMPTY_PROMPT = 0.1
POSTERIOR = 0.03
BATCH = 32
START_LATENTS = 12_000


def picture(rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray, str]:
    """A random training picture [H, W, 3] uint8, its masks [objects, H, W] and caption."""
    objects = 2 if rng.random() < TWO_OBJECTS else 1
    scene = Scene.random(int(rng.integers(HELDOUT_START)), objects=objects)
    frame, masks = scene.render_frame(int(rng.integers(scene.num_frames)))
    return frame, masks, scene.caption


def to_tensor(pictures: np.ndarray) -> torch.Tensor:
    """uint8 [B, H, W, 3] to float32 [B, 3, H, W] in [-1, 1]."""
    return torch.from_numpy(pictures).permute(0, 3, 1, 2).float().div_(127.5).sub_(1.0)


def crops(rng: np.random.Generator, count: int, size: int) -> torch.Tensor:
    """Pictures cropped to `size` around a point of their objects, [count, 3, size, size]."""
    batch = []
    room, reach = networks.SIZE - size, size // 3
    for _ in range(count):
        frame, masks, _ = picture(rng)
        rows, columns = np.nonzero(masks.max(0) > 0.5)
        point = rng.integers(len(rows))
        top, left = (
            int(np.clip(center - size // 2 + rng.integers(-reach, reach + 1), 0, room))
            for center in (rows[point], columns[point])
        )
        batch.append(frame[top : top + size, left : left + size])
    return to_tensor(np.stack(batch))


def train_vae(team: Team, out: Path, minutes: float, seed: int, log: Path, resume: bool) -> None:
    """Trains the VAE: on crops first, which show more edges per second, then on whole pictures.

    The posterior's deviation is held constant while the latents' size is penalised, which
    keeps them smooth enough to be predicted. Writes the model with untrained other parts.
    """
    torch.manual_seed(seed * 100 + team.rank)
    rng = np.random.default_rng([seed, team.rank])
    progress = Progress("vae", minutes * 60, log)
    if resume:
        vae = AutoencoderKL.from_pretrained(out / "vae", torch_dtype=torch.float32)
        whiten_latents(vae, np.random.default_rng(seed))
    else:
        vae = networks.make_vae()
    vae.train()
    trainer = Trainer(team, [vae], rate=1.5e-3 if resume else 2e-3, decay=0.99)
    rest = networks.make_unet(), networks.make_text_encoder()
    if team.leads:
        networks.save_pipeline(out, vae, *rest)
    images = 0
    while progress.share < 1:
        whole = resume or progress.share > 0.55
        batch, size = (8, networks.SIZE) if whole else (16, networks.SIZE // 2)
        x = crops(rng, batch // team.size, size)
        with torch.autocast("cpu", torch.bfloat16):
            mean = vae.encode(x).latent_dist.mean.float()
            y = vae.decode(mean + POSTERIOR * torch.randn_like(mean)).sample.float()
        loss = reconstruction_loss(y, x) + 1e-3 * mean.square().mean()
        trainer.step(loss, progress)
        images += batch
        if team.leads and trainer.steps % 100 == 0:
            progress.say(f"step {trainer.steps} loss {loss.item():.4f} psnr {psnr(y, x):.2f}")
        if team.leads and progress.due(120):
            progress.say(f"held-out psnr {heldout_psnr(trainer.averages[0], 8):.2f}")
            networks.save_pipeline(out, trainer.averages[0], *rest)
    if team.leads:
        whiten_latents(trainer.averages[0], rng)
        networks.save_pipeline(out, trainer.averages[0], *rest)
        progress.say(f"done, held-out psnr {heldout_psnr(trainer.averages[0], 16):.2f}")
        record(out, "vae", progress, trainer.steps, images)


def refine_decoder(team: Team, out: Path, minutes: float, seed: int, log: Path) -> None:
    """Trains the decoder in `out` further, on whole pictures.

    The encoder is frozen: latents, and a UNet that was trained on them, keep their meaning.
    """
    torch.manual_seed(seed * 100 + 25 + team.rank)
    rng = np.random.default_rng([seed, 25 + team.rank])
    progress = Progress("decoder", minutes * 60, log)
    vae = AutoencoderKL.from_pretrained(out / "vae", torch_dtype=torch.float32).train()
    vae.encoder.requires_grad_(False)
    vae.quant_conv.requires_grad_(False)
    trainer = Trainer(team, [vae], rate=1e-3, decay=0.995)
    rest = networks.make_unet(), networks.make_text_encoder()
    images = 0
    while progress.share < 1:
        x = crops(rng, 8 // team.size, networks.SIZE)
        with torch.autocast("cpu", torch.bfloat16):
            with torch.no_grad():
                z = vae.encode(x).latent_dist.sample()
            y = vae.decode(z).sample.float()
        loss = reconstruction_loss(y, x)
        trainer.step(loss, progress)
        images += 8
        if team.leads and trainer.steps % 100 == 0:
            progress.say(f"step {trainer.steps} loss {loss.item():.4f} psnr {psnr(y, x):.2f}")
        if team.leads and progress.due(120):
            progress.say(f"held-out psnr {heldout_psnr(trainer.averages[0], 8):.2f}")
            networks.save_pipeline(out, trainer.averages[0], *rest, only=("vae",))
    if team.leads:
        networks.save_pipeline(out, trainer.averages[0], *rest, only=("vae",))
        progress.say(f"done, held-out psnr {heldout_psnr(trainer.averages[0], 16):.2f}")
        record(out, "decoder", progress, trainer.steps, images)


def reconstruction_loss(y: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """L1, squared error, L1 of the gradients and L1 of 8 x 8 means.

    The gradients keep edges sharp. The means count the backgrounds' muted hues: errors of hue
    were 70 % of the squared error at 28.7 dB.
    """
    error = y - x
    hue = F.avg_pool2d(error, 8).abs().mean()
    edges = error.diff(dim=2).abs().mean() + error.diff(dim=3).abs().mean()
    return error.abs().mean() + 2 * error.square().mean() + 0.5 * edges + hue


def psnr(y: torch.Tensor, x: torch.Tensor) -> float:
    """Peak signal-to-noise ratio in dB of pictures in [-1, 1]."""
    return -10 * math.log10(((y.detach().clamp(-1, 1) - x) / 2).square().mean().item())


@torch.no_grad()
def heldout_psnr(vae: AutoencoderKL, clips: int) -> float:
    """Reconstruction PSNR in dB of held-out clips, the error averaged over all frames first."""
    total = 0.0
    for i in range(clips):
        x = to_tensor(heldout_scene(i).render().frames)
        y = vae.decode(vae.encode(x).latent_dist.mean).sample.clamp(-1, 1)
        total += ((y - x) / 2).square().mean().item() / clips
    return -10 * math.log10(total)


@torch.no_grad()
def whiten_latents(vae: AutoencoderKL, rng: np.random.Generator) -> None:
    """Folds the latents' mean and covariance into the 1 x 1 convolutions around them.

    The decoder's output is unchanged; the latents have mean 0, deviation 1 and no correlation
    between channels, so the scaling factor, 1 / deviation of the latents, is 1. The posterior
    gets the constant deviation `POSTERIOR`.
    """
    x = torch.cat([crops(rng, 16, networks.SIZE) for _ in range(16)])
    z = torch.cat([vae.encode(part).latent_dist.mean for part in x.split(16)])
    z = z.transpose(0, 1).flatten(1)
    mean = z.mean(1)
    values, vectors = torch.linalg.eigh(torch.cov(z))
    whiten = vectors @ torch.diag(values.rsqrt()) @ vectors.T
    color = vectors @ torch.diag(values.sqrt()) @ vectors.T
    encode, decode = vae.quant_conv, vae.post_quant_conv
    decode.bias += decode.weight[:, :, 0, 0] @ mean
    decode.weight.copy_((decode.weight[:, :, 0, 0] @ color)[:, :, None, None])
    encode.weight[:4] = (whiten @ encode.weight[:4, :, 0, 0])[:, :, None, None]
    encode.bias[:4] = whiten @ (encode.bias[:4] - mean)
    encode.weight[4:] = 0.0
    encode.bias[4:] = 2 * math.log(POSTERIOR)


def train_unet(team: Team, out: Path, minutes: float, seed: int, log: Path, resume: bool) -> None:
    """Trains UNet and text encoder together to predict the noise in the VAE's latents.

    Each worker draws and encodes its own pictures, a start-up share at once and one more per
    step. One caption in ten is dropped for classifier-free guidance.
    """
    torch.manual_seed(seed * 100 + 50 + team.rank)
    rng = np.random.default_rng([seed, 50 + team.rank])
    progress = Progress("unet", minutes * 60, log)
    vae = AutoencoderKL.from_pretrained(out / "vae", torch_dtype=torch.float32).eval()
    if resume:
        unet = UNet2DConditionModel.from_pretrained(out / "unet", torch_dtype=torch.float32)
        text_encoder = CLIPTextModel.from_pretrained(out / "text_encoder", dtype=torch.float32)
    else:
        unet, text_encoder = networks.make_unet(), networks.make_text_encoder()
    unet.train()
    text_encoder.train()
    # Measured on CPU, a step of 16: 0.98 s with scaled_dot_product_attention, whose backward
    # is slow for heads this narrow, 0.63 s with plain bfloat16 products.
    unet.set_attn_processor(AttnProcessor())
    trainer = Trainer(team, [unet, text_encoder], rate=1e-3, decay=0.999)
    pool = Latents(vae, rng)
    pool.extend(START_LATENTS // team.size)
    progress.say(f"worker {team.rank}: {len(pool.captions)} latents encoded")
    kept = networks.make_scheduler().alphas_cumprod
    running, parts = 0.0, ("unet", "text_encoder", "tokenizer")
    while progress.share < 1:
        if trainer.steps % 8 == 0:
            pool.extend(8)
        batch = BATCH // 2 if progress.share < 0.75 else BATCH
        z, tokens = pool.draw(batch // team.size)
        t = timesteps(rng, len(z))
        noise = torch.randn_like(z)
        signal = kept[t].view(-1, 1, 1, 1)
        noisy = signal.sqrt() * z + (1 - signal).sqrt() * noise
        text = text_encoder(tokens)[0]
        with torch.autocast("cpu", torch.bfloat16):
            predicted = unet(noisy, t, text).sample
        loss = (predicted.float() - noise).square().mean()
        trainer.step(loss, progress)
        running += (loss.item() - running) / min(trainer.steps, 100)
        if team.leads and trainer.steps % 100 == 0:
            progress.say(f"step {trainer.steps} loss {running:.4f}")
        if team.leads and progress.due(240):
            networks.save_pipeline(out, vae, *trainer.averages, only=parts)
    if team.leads:
        networks.save_pipeline(out, vae, *trainer.averages, only=parts)
        progress.say(f"done, {trainer.steps} steps, loss {running:.4f}")
        record(out, "unet", progress, trainer.steps, len(pool.captions) * team.size)


class Latents:
    """A growing pool of encoded training pictures with their captions' tokens."""

    def __init__(self, vae: AutoencoderKL, rng: np.random.Generator):
        self.vae, self.rng = vae, rng
        self.tokenizer = networks.make_tokenizer()
        self.latents: list[torch.Tensor] = []
        self.captions: list[str] = []
        self._tokens: dict[str, torch.Tensor] = {}

    @torch.no_grad()
    def extend(self, count: int) -> None:
        """Draws and encodes `count` more pictures."""
        for start in range(0, count, 16):
            drawn = [picture(self.rng) for _ in range(min(16, count - start))]
            x = to_tensor(np.stack([frame for frame, _, _ in drawn]))
            with torch.autocast("cpu", torch.bfloat16):
                mean = self.vae.encode(x).latent_dist.mean
            self.latents.extend(mean.float() * self.vae.config.scaling_factor)
            self.captions.extend(caption for _, _, caption in drawn)

    def draw(self, count: int) -> tuple[torch.Tensor, torch.Tensor]:
        """A batch: latents [count, 4, h, w] and token ids [count, 77], some prompts empty."""
        chosen = self.rng.integers(len(self.captions), size=count)
        prompts = [
            "" if self.rng.random() < EMPTY_PROMPT else self.captions[index] for index in chosen
        ]
        return torch.stack([self.latents[index] for index in chosen]), torch.stack(
            [self.tokens(prompt) for prompt in prompts]
        )

    def tokens(self, prompt: str) -> torch.Tensor:
        """Token ids of a prompt, padded to 77."""
        if prompt not in self._tokens:
            length = self.tokenizer.model_max_length
            encoded = self.tokenizer(prompt, padding="max_length", max_length=length)
            self._tokens[prompt] = torch.tensor(encoded.input_ids)
        return self._tokens[prompt]


def timesteps(rng: np.random.Generator, count: int) -> torch.Tensor:
    """Training timesteps [count]: 30 % uniform, 70 % from 250 to 950, where shapes form."""
    uniform = rng.integers(0, 1000, count)
    middle = rng.integers(250, 950, count)
    return torch.from_numpy(np.where(rng.random(count) < 0.3, uniform, middle))


def record(out: Path, stage: str, progress: Progress, steps: int, images: int) -> None:
    """Appends a finished stage to training.json."""
    path = out / "training.json"
    content = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    run = {
        "stage": stage,
        "seconds": round(progress.seconds),
        "steps": steps,
        "images": images,
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
    }
    content.setdefault("stages", []).append(run)
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
