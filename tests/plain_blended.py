"""Blended latent diffusion under attention control as the paper writes it, every map stored.

An independent witness: diffusers' own UNet with the plainest processors, loops in place of running
means, DDIM by eq. 2 and 4, masks by eq. 5, blending by eq. 3.
"""

import torch
import torch.nn.functional as F


class PlainProcessor:
    """Softmax attention; self-attention reads [f-1; f], cross-attention keeps its whole map."""

    def __init__(self, store: list | None = None, frames: int = 1):
        self.store, self.frames = store, frames

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, **kwargs):
        context = hidden_states if encoder_hidden_states is None else encoder_hidden_states
        q, k, v = attn.to_q(hidden_states), attn.to_k(context), attn.to_v(context)
        if encoder_hidden_states is None:
            order = []
            for start in range(0, len(k), self.frames):
                order += [start + max(f - 1, 0) for f in range(self.frames)]
            k, v = torch.cat([k[order], k], 1), torch.cat([v[order], v], 1)
        q, k, v = (x.unflatten(-1, (attn.heads, -1)).transpose(1, 2) for x in (q, k, v))
        probabilities = (q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5).softmax(-1)
        if encoder_hidden_states is not None:
            self.store.append(probabilities)
        return attn.to_out[0]((probabilities @ v).transpose(1, 2).flatten(2))


class PlainBlended:
    """The method on a plain UNet.

    Args:
        unet: as diffusers builds it, not inflated.
        alphas: of all training steps.
        steps: DDIM steps; `offset` is the first timestep.
    """

    def __init__(self, unet, alphas, steps, frames, size, levels, threshold, floor, offset=1):
        self.unet, self.alphas, self.frames, self.size = unet, alphas, frames, size
        self.levels, self.threshold, self.floor = levels, threshold, floor
        stride = len(alphas) // steps
        self.times = [offset + i * stride for i in range(steps)]
        self.maps: list = []
        for module in unet.modules():
            if hasattr(module, "set_processor"):
                module.set_processor(PlainProcessor(self.maps, frames))

    def alpha(self, i):
        """Of the latents after i steps of inversion; before the first they are the clip's."""
        return self.alphas[self.times[i - 1] if i else 0]

    def noise(self, latents, i, text):
        self.maps.clear()
        return self.unet(latents, self.times[i], text.repeat_interleave(self.frames, 0)).sample

    def move(self, z, noise, a, b):
        return b.sqrt() * (z - (1 - a).sqrt() * noise) / a.sqrt() + (1 - b).sqrt() * noise

    def look(self, tokens):
        """The word's map in the last call: the conditional frames, [F, h, w]."""
        grids = [(-(-self.size[0] // 2**level), -(-self.size[1] // 2**level))
                 for level in self.levels]  # fmt: skip
        layers = []
        for stored in self.maps:
            for grid in grids:
                if stored.shape[2] == grid[0] * grid[1]:
                    mean = stored[-self.frames :, :, :, tokens].mean((1, 3))
                    layers.append(self.resize(mean.unflatten(1, grid), grids[0]))
        seen = self.resize(sum(layers) / len(layers), self.size)
        for f in range(self.frames):
            low = seen[f].mean() if self.floor == "mean" else 0
            seen[f] = (seen[f] - low) / (seen[f] - low).max()
        return seen

    def resize(self, maps, size):
        return F.interpolate(maps[:, None], size=size, mode="bilinear")[:, 0]

    def invert(self, latents, text, words):
        path, seen = [latents], []
        for i in range(len(self.times)):
            noise = self.noise(path[-1], i, text)
            seen.append([self.look(word) for word in words])
            path.append(self.move(path[-1], noise, self.alpha(i), self.alpha(i + 1)))
        return path, seen

    def edit(self, path, seen, text, words, guidance):
        """Text is (unconditional, conditional); gives the latents and the mask of each step."""
        z, steps, new, masks = path[-1], len(self.times), [], []
        for i in reversed(range(steps)):
            low, high = self.noise(torch.cat([z, z]), i, text).chunk(2)
            new.append([self.look(word) for word in words])
            mask = torch.zeros(self.frames, *self.size, dtype=torch.bool)
            for w in range(len(words)):
                for steps_so_far in ([s[w] for s in seen[i:]], [s[w] for s in new]):
                    mask |= sum(steps_so_far) / len(steps_so_far) > self.threshold
            noise = low + guidance * (high - low)
            z = self.move(z, noise, self.alpha(i + 1), self.alpha(i))
            z = torch.where(mask[:, None], z, path[i])
            masks.append(mask)
        return z, masks
