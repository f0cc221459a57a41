"""Words of a prompt: which change between two prompts, and where they lie among the tokens."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence
from difflib import SequenceMatcher
from typing import NamedTuple

# Scripts that put no space between words: each letter may begin one. Thai to Khmer, hiragana, Han.
UNSPACED = re.compile(
    "[\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3005-\u3007\u3041-\u309f"
    "\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff]"
)
JOINERS = "\u200c\u200d"  # within a Persian word, an emoji of several
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
    old, new = units(source), units(prompt)
    pairs = []
    same = SequenceMatcher(None, [u.key for u in old], [u.key for u in new], False)
    for kind, a, b, c, d in same.get_opcodes():
        if kind == "replace":
            pairs.append((_phrase(old[a:b], source), _phrase(new[c:d], prompt)))
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
    places = _places(word, prompt)
    if not places:
        raise WordError(f"the word {word!r} is not in the prompt {prompt!r}")
    read, cut = prompt_ids(tokenizer, prompt)
    found: list[int] = []
    for start, end in places:
        tokens = _covering(tokenizer, prompt, start, end)
        if tokens.stop <= len(read) - bool(cut):  # the end token stands where the cut is
            found += range(tokens.start, min(tokens.stop + after, len(read)))
    if not found:
        raise WordError(
            f"the word {word!r} is beyond the {len(read)} tokens that are read of the prompt: "
            "name it earlier"
        )
    return sorted(set(found))


def prompt_ids(tokenizer, prompt: str, length: int | None = None) -> tuple[list[int], list[int]]:
    """A prompt's tokens from the start to the end token as they are read, and those cut off.

    Args:
        tokenizer: CLIP's.
        prompt: any text.
        length: tokens that are read, by default the tokenizer's own number.
    """
    length = length or tokenizer.model_max_length
    whole = tokenizer(prompt, verbose=False).input_ids
    if len(whole) <= length:
        return whole, []
    return whole[: length - 1] + whole[-1:], whole[length - 1 : -1]


def _covering(tokenizer, prompt: str, start: int, end: int) -> range:
    """The tokens of the whole prompt that any of its characters from start to end are in."""
    if (
        not tokenizer.is_fast
    ):  # before transformers 5: these tell no offsets, but words stand alone
        first, last = (len(tokenizer(prompt[:n], verbose=False).input_ids) for n in (start, end))
        return range(first - 1, last - 1)
    offsets = tokenizer(prompt, verbose=False, return_offsets_mapping=True).offset_mapping
    found = [i for i, (a, b) in enumerate(offsets) if a < end and b > start]
    return range(found[0], found[-1] + 1) if found else range(0)


class Unit(NamedTuple):
    """What words are compared by: a word's characters, a letter of `UNSPACED`, or a symbol."""

    start: int
    end: int
    key: str  # composed and in small letters


def units(text: str) -> list[Unit]:
    """A text's words in any script; spaces and punctuation, apostrophes too, part them."""
    spans: list[list[int]] = []
    before = ""  # kind of the character before
    for i, char in enumerate(text):
        category = unicodedata.category(char)
        kind = "word" if category[0] in "LN" or char == "_" else ""
        if kind and UNSPACED.match(char):
            kind = "letter"
        elif category[0] == "M" or char in JOINERS or (category == "Sk" and not char.isascii()):
            kind = before  # a mark or a tone belongs to what it stands on
        elif category == "So":
            kind = "symbol"
        marks = kind == before and (kind == "word" or category[0] == "M" or category == "Sk")
        if kind and (marks or (before and (char in JOINERS or text[i - 1] == "\u200d"))):
            spans[-1][1] = i + 1
        elif kind:
            spans.append([i, i + 1])
        before = kind
    keys = (unicodedata.normalize("NFC", text[a:b]).lower() for a, b in spans)
    return [Unit(a, b, key) for (a, b), key in zip(spans, keys, strict=True)]


def _phrase(words: list[Unit], text: str) -> str:
    while len(words) > 1 and words[0].key in ARTICLES:
        words = words[1:]
    return text[words[0].start : words[-1].end].lower()


def _places(word: str, text: str) -> list[tuple[int, int]]:
    """Where a word or phrase stands in a text, from its first character to behind its last."""
    wanted, there = [unit.key for unit in units(word)], units(text)
    starts = range(len(there) - len(wanted) + 1) if wanted else ()
    return [
        (there[i].start, there[i + len(wanted) - 1].end)
        for i in starts
        if [unit.key for unit in there[i : i + len(wanted)]] == wanted
    ]
