"""The demo model's tokenizer: CLIPTokenizer's format with a vocabulary of the world's words.

Each word of a caption is one token; anything else falls back to single bytes, so that every
prompt can be tokenised.
"""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path

from tvkernels.demo import world

MAX_LENGTH = 77
START, END = "<|startoftext|>", "<|endoftext|>"


def words() -> list[str]:
    """All words that captions are made of."""
    grammar = ["a", "and", "on", "background"]
    return [
        *grammar,
        *world.OBJECT_COLORS,
        *world.SHAPES,
        *world.BACKGROUND_COLORS,
        *world.TEXTURES,
    ]


def byte_symbols() -> list[str]:
    """The printable character that stands for each byte, as in GPT-2 and CLIP; 256 of them."""
    plain = {*range(33, 127), *range(161, 173), *range(174, 256)}
    symbols, spare = [], 256
    for byte in range(256):
        if byte in plain:
            symbols.append(chr(byte))
        else:
            symbols.append(chr(spare))
            spare += 1
    return symbols


def build() -> tuple[dict[str, int], list[tuple[str, str]]]:
    """Vocabulary and merges, in order of rank.

    A merge that is added later has a higher rank, so the words already complete keep merging
    the way they did: a single pass makes every word one token.
    """
    merges: list[tuple[str, str]] = []
    for word in words():
        parts = _apply([*word[:-1], word[-1] + "</w>"], merges)
        while len(parts) > 1:
            merges.append((parts[0], parts[1]))
            parts = _apply(parts, merges)
    symbols = sorted(byte_symbols())
    tokens = [*symbols, *(symbol + "</w>" for symbol in symbols)]
    tokens += [left + right for left, right in merges]
    tokens += [START, END]
    return {token: index for index, token in enumerate(tokens)}, merges


def save(directory: Path) -> None:
    """Writes vocab.json, merges.txt and the two configuration files of a CLIPTokenizer."""
    directory.mkdir(parents=True, exist_ok=True)
    vocabulary, merges = build()
    special = {"bos_token": START, "eos_token": END, "unk_token": END, "pad_token": END}
    config = {
        "tokenizer_class": "CLIPTokenizer",
        "model_max_length": MAX_LENGTH,
        "add_prefix_space": False,
        "do_lower_case": True,
        **special,
    }
    lines = ["#version: 0.2", *(f"{left} {right}" for left, right in merges)]
    (directory / "merges.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    for name, content in (
        ("vocab.json", vocabulary),
        ("tokenizer_config.json", config),
        ("special_tokens_map.json", special),
    ):
        text = json.dumps(content, ensure_ascii=False, indent=1) + "\n"
        (directory / name).write_text(text, encoding="utf-8")


def _apply(parts: list[str], merges: list[tuple[str, str]]) -> list[str]:
    """Byte-pair encoding: merges the pair of lowest rank until none is left."""
    ranks = {pair: rank for rank, pair in enumerate(merges)}
    while True:
        pairs = [pair for pair in pairwise(parts) if pair in ranks]
        if not pairs:
            return parts
        best = min(pairs, key=ranks.__getitem__)
        merged, index = [], 0
        while index < len(parts):
            if tuple(parts[index : index + 2]) == best:
                merged.append(parts[index] + parts[index + 1])
                index += 2
            else:
                merged.append(parts[index])
                index += 1
        parts = merged
