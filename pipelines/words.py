"""Words of a prompt: which change between two prompts, and where they lie among the tokens."""

from __future__ import annotations

import re
from collections.abc import Sequence
from difflib import SequenceMatcher

ARTICLES = ("a", "an", "the")
LONGEST = 3  # words in a row that are taken for one thing's name without being told
WordPairs = Sequence[tuple[str, str] | str]


class WordError(ValueError):
    """Words that are not in a prompt, or cannot be told; one line that says what to do."""


def parse_pair(text: str) -> tuple[str, str]:
    """ "red circle=blue star" as its two sides.

    Raises:
        WordError: not two sides.
    """
    old, sign, new = (part.strip() for part in text.partition("="))
    if not (old and sign and new):
        raise WordError(f"words are old=new, such as 'red circle=blue star', not {text!r}")
    return old, new


def changed_words(source: str, prompt: str) -> list[tuple[str, str]]:
    """The (old, new) words by which two prompts differ, articles before them left out.

    Raises:
        WordError: nothing differs, words were only added or taken away, more than `LONGEST` in a
            row differ, or an old or new word stands elsewhere in its prompt too, so that naming it
            would not tell which is meant.
    """
    old, new = source.split(), prompt.split()
    pairs = []
    for kind, a, b, c, d in SequenceMatcher(None, _bare(old), _bare(new), False).get_opcodes():
        if kind == "replace":
            pairs.append((_phrase(old[a:b]), _phrase(new[c:d])))
        elif kind != "equal":
            pairs.append(("", ""))
    clear = all(
        0 < len(whole.split()) <= LONGEST and len(_places(whole, text)) == 1
        for pair in pairs
        for whole, text in zip(pair, (source, prompt), strict=True)
    )
    if not pairs or not clear:
        raise WordError(
            f"cannot tell which words change from {source!r} to {prompt!r}: name them, "
            "such as 'red circle=blue star', or give a mask"
        )
    return pairs


def check_words(words: WordPairs, source: str, prompt: str) -> list[tuple[str, str]]:
    """The pairs, each of (old, new) or "old=new"; by spelling alone, no tokenizer is needed.

    Raises:
        WordError: none, not pairs, an old word that is not in the source prompt or a new one that
            is not in the other.
    """
    pairs = [parse_pair(pair) if isinstance(pair, str) else tuple(pair) for pair in words]
    if not pairs or any(len(pair) != 2 for pair in pairs):
        raise WordError(f"words are pairs of (old, new), one or more, not {words!r}")
    for pair in pairs:
        for word, text in zip(pair, (source, prompt), strict=True):
            if not _places(word, text):
                raise WordError(f"the word {word!r} is not in the prompt {text!r}")
    return pairs


def word_tokens(tokenizer, prompt: str, word: str, after: int = 0) -> list[int]:
    """Positions of a word or phrase among a prompt's tokens, the start token being 0.

    Every occurrence counts, and every token of a word that the tokenizer splits.

    Args:
        tokenizer: CLIP's.
        prompt: as it is encoded, cut at the tokenizer's length.
        word: one word or several in a row, in any case.
        after: tokens behind it that count as its own, as far as there are any.
    Raises:
        WordError: it is not in the prompt, or beyond the cut.
    """
    tokens = prompt_tokens(tokenizer, prompt)
    wanted = tokenizer.convert_ids_to_tokens(tokenizer(word, add_special_tokens=False).input_ids)
    count = len(wanted)
    found: list[int] = []
    for start in range(1, len(tokens) - count + 1):
        # A word's last token is marked as such, its first is known by the one before it.
        begins = start == 1 or tokens[start - 1].endswith("</w>")
        if count and begins and tokens[start : start + count] == wanted:
            found += range(start, min(start + count + after, len(tokens)))
    if not found:
        cut = " within the length that is read" if _places(word, prompt) else ""
        raise WordError(f"the word {word!r} is not in the prompt {prompt!r}{cut}")
    return sorted(set(found))


def prompt_tokens(tokenizer, prompt: str) -> list[str]:
    """A prompt's tokens from the start to the end token, cut as `encode_text` cuts."""
    ids = tokenizer(prompt, truncation=True, max_length=tokenizer.model_max_length).input_ids
    return tokenizer.convert_ids_to_tokens(ids)


def _bare(words: list[str]) -> list[str]:
    return [word.strip(".,;:!?\"'()").lower() for word in words]


def _phrase(words: list[str]) -> str:
    bare = _bare(words)
    while len(bare) > 1 and bare[0] in ARTICLES:
        bare.pop(0)
    return " ".join(bare)


def _places(word: str, text: str) -> list[int]:
    parts = r"\W+".join(map(re.escape, word.split()))
    return [m.start() for m in re.finditer(rf"(?<!\w){parts}(?!\w)", text, re.IGNORECASE)]
