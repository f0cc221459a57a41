"""Prompts as the UNet reads them: text states, or what a caller has made of them before."""

from __future__ import annotations

import logging

import torch
from torch import Tensor

from tvkernels.pipelines.words import prompt_ids

logger = logging.getLogger("tvkernels")


@torch.no_grad()
def encode_text(
    tokenizer, text_encoder, prompts: list[str], clip_skip: int | None = None,
    length: int | None = None,
) -> Tensor:  # fmt: skip
    """Text states [B, L, C] of B prompts; longer ones are cut, and it is said what is cut.

    Args:
        tokenizer, text_encoder: CLIP's.
        prompts: one for each text.
        clip_skip: layers left out at the end of the text encoder, as diffusers counts them.
        length: L, by default the tokenizer's own.
    Raises:
        ValueError: a prompt that is no string, or more layers to skip than there are.
    """
    if not all(isinstance(prompt, str) for prompt in prompts):
        raise ValueError(f"a prompt is one string, not {prompts!r}: edit clips one by one")
    most = text_encoder.config.num_hidden_layers
    if clip_skip is not None and not 0 <= clip_skip <= most:
        raise ValueError(f"clip_skip {clip_skip}: skip 0 to {most} layers of this text encoder")
    length = length or tokenizer.model_max_length
    tell_cut(tokenizer, prompts, length)
    tokens = tokenizer(
        prompts, padding="max_length", max_length=length, truncation=True, return_tensors="pt"
    )
    ids = tokens.input_ids.to(text_encoder.device)
    if clip_skip is None:
        return text_encoder(ids)[0]
    states = text_encoder(ids, output_hidden_states=True).hidden_states[-1 - clip_skip]
    # transformers 5.6 took the wrapper around CLIP's text model away.
    return getattr(text_encoder, "text_model", text_encoder).final_layer_norm(states)


def tell_cut(tokenizer, prompts: list[str], length: int | None = None) -> None:
    """Warns of every prompt that is cut, and of what is cut; arguments as for `encode_text`."""
    for prompt in prompts:
        read, cut = prompt_ids(tokenizer, prompt, length)
        if cut:
            logger.warning(
                "the prompt is longer than the %d tokens that are read, so this is cut: %r",
                len(read), tokenizer.decode(cut),
            )  # fmt: skip


def check_texts(
    prompt: str | None,
    negative_prompt: str | None,
    prompt_embeds: Tensor | None,
    negative_prompt_embeds: Tensor | None,
    width: int,
) -> None:
    """Whether each half is given once, as diffusers' pipelines ask.

    Args:
        prompt, negative_prompt: strings or None.
        prompt_embeds, negative_prompt_embeds: [1, L, width] or None.
        width: of the UNet's text.
    Raises:
        ValueError: none or both, or states of another shape.
    """
    if (prompt is None) == (prompt_embeds is None):
        raise ValueError("give either prompt or prompt_embeds: one of the two tells what to show")
    if negative_prompt is not None and negative_prompt_embeds is not None:
        raise ValueError("give either negative_prompt or negative_prompt_embeds, not both")
    given = {"prompt_embeds": prompt_embeds, "negative_prompt_embeds": negative_prompt_embeds}
    shapes = {name: tuple(states.shape) for name, states in given.items() if states is not None}
    for name, shape in shapes.items():
        if len(shape) != 3 or shape[0] != 1 or shape[2] != width:
            raise ValueError(f"{name} of {shape}: one clip takes [1, tokens, {width}]")
    if len(set(shapes.values())) > 1:
        raise ValueError(f"prompt_embeds and negative_prompt_embeds differ in shape: {shapes}")
