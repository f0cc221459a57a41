"""Prompts: what is read of them and said of the rest, given as states, and words in any script."""

import inspect
import unicodedata

import pytest
import torch
from diffusers import StableDiffusionPipeline
from tiny_unets import seeded
from transformers import CLIPTokenizer

from tvkernels.pipelines import METHODS, pipeline_class
from tvkernels.pipelines.checks import CONFIGS
from tvkernels.pipelines.words import WordError, changed_words, prompt_ids, units, word_tokens

LATENTS = torch.randn(2, 4, 4, 4, generator=seeded())


@pytest.fixture(scope="module")
def tokenizer():
    """Stable Diffusion's own."""
    return CLIPTokenizer.from_pretrained(CONFIGS[1] / "tokenizer")


@pytest.fixture(scope="module")
def plain(folder):
    return StableDiffusionPipeline.from_pretrained(folder)


def sample(pipe, prompt=None, **options):
    options = {"latents": LATENTS, "num_inference_steps": 1, "output_type": "latent", **options}
    return pipe(prompt, **options).frames


def test_a_long_prompt_is_cut_as_diffusers_cuts_it_and_it_is_said(load, plain, caplog):
    pipe = load("frame-by-frame")
    whole = "red " * 80 + "star"
    expected, _ = plain.encode_prompt(whole, "cpu", 1, False)
    caplog.clear()
    assert torch.equal(pipe._encode_prompts([whole]), expected)
    (line,) = [r.getMessage() for r in caplog.records if r.name == "tvkernels"]
    read, cut = prompt_ids(pipe.tokenizer, whole)
    assert len(read) == 77 and "77 tokens" in line and pipe.tokenizer.decode(cut) in line
    assert cut and line.rstrip("'").endswith("star")
    caplog.clear()
    pipe._encode_prompts(["red " * 20])
    assert not [r for r in caplog.records if r.name == "tvkernels"]


@pytest.mark.parametrize("clip_skip", [None, 0, 1])
def test_states_are_those_of_diffusers(load, plain, clip_skip, monkeypatch):
    kind = type(plain.text_encoder)
    if not hasattr(plain.text_encoder, "text_model"):  # that diffusers 0.42 still looks for
        monkeypatch.setattr(kind, "text_model", property(lambda self: self), raising=False)
    pipe = load("frame-by-frame")
    own, negative = plain.encode_prompt("a star", "cpu", 1, True, "a ring", clip_skip=clip_skip)
    both = pipe._texts("a star", "a ring", None, None, clip_skip, True)
    torch.testing.assert_close(both, torch.cat([negative, own]), rtol=1e-5, atol=1e-6)
    expected = sample(pipe, "a star", negative_prompt="a ring", clip_skip=clip_skip)
    for given in (
        {"prompt_embeds": own, "negative_prompt_embeds": negative},
        {"prompt_embeds": own, "negative_prompt": "a ring"},
        {"prompt": "a star", "negative_prompt_embeds": negative, "clip_skip": clip_skip},
    ):
        torch.testing.assert_close(sample(pipe, **given), expected, rtol=1e-4, atol=1e-4)


def test_states_of_another_number_of_tokens(load):
    pipe = load("frame-by-frame")
    width = pipe.unet.config.cross_attention_dim
    short, long = torch.randn(1, 9, width), torch.randn(1, 154, width)
    assert sample(pipe, prompt_embeds=short).isfinite().all()
    assert sample(pipe, prompt_embeds=long, negative_prompt_embeds=-long).isfinite().all()
    assert sample(pipe, prompt_embeds=long, guidance_scale=1.0).isfinite().all()
    with pytest.raises(ValueError, match="give negative_prompt_embeds of as many"):
        sample(pipe, prompt_embeds=long)


STATES = torch.zeros(1, 77, 16)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({}, "either prompt or prompt_embeds"),
        ({"prompt": "a", "prompt_embeds": STATES}, "either prompt or prompt_embeds"),
        ({"prompt": "a", "negative_prompt": "b", "negative_prompt_embeds": STATES}, "not both"),
        ({"prompt_embeds": STATES, "negative_prompt_embeds": STATES[:, :5]}, "differ in shape"),
        ({"prompt_embeds": STATES.repeat(2, 1, 1)}, "one clip takes"),
        ({"prompt_embeds": STATES[..., :4]}, "one clip takes"),
        ({"prompt": "a", "negative_prompt_embeds": STATES[:, :5]}, "5 tokens, not 77"),
        ({"prompt": "a", "clip_skip": 2}, "skip 0 to 1 layers"),
        ({"prompt": ["a", "b"]}, "a prompt is one string"),
    ],
)
def test_what_does_not_fit_is_told(load, given, message):
    with pytest.raises(ValueError, match=message):
        sample(load("frame-by-frame"), **given)


@pytest.mark.parametrize("method", METHODS)
def test_every_method_takes_them_or_raises(method):
    """None is dropped: each is in the signature, or goes on by name."""
    names = {"prompt_embeds", "negative_prompt_embeds", "clip_skip", "cross_attention_kwargs"}
    parameters = inspect.signature(pipeline_class(method).__call__).parameters
    assert names <= set(parameters) or "options" in parameters


def test_inversion_takes_states_too(load, clip):
    pipe = load("frame-by-frame")
    states = pipe._encode_prompts([""])
    expected = pipe.invert(clip, num_inference_steps=1)
    assert torch.equal(pipe.invert(clip, num_inference_steps=1, prompt_embeds=states), expected)
    other = pipe.invert(clip, num_inference_steps=1, prompt_embeds=states + 1)
    assert not torch.equal(other, expected)


def test_states_name_no_words_to_blend_by(load, clip):
    pipe = load("blended-diffusion")
    states = pipe._encode_prompts(["a star"])
    pipe.invert(clip, "a ring", num_inference_steps=1)
    told = {"num_inference_steps": 1, "output_type": "latent"}
    with pytest.raises(ValueError, match="name no words.*give a mask"):
        pipe(prompt_embeds=states, **told)
    pipe(prompt_embeds=states, mask=torch.ones(32, 48), **told)
    pipe.invert(clip, prompt_embeds=states, num_inference_steps=1)
    with pytest.raises(ValueError, match="name no words.*give a mask"):
        pipe("a ring", **told)


DECOMPOSED = unicodedata.normalize("NFD", "un éléphant bleu")


@pytest.mark.parametrize(
    ("prompt", "word", "places"),
    [
        ("a red circle, moving", "circle", [3]),
        ("a (circle)", "circle", [3]),
        ("the circle's edge", "circle", [2]),
        ("the circle's edge", "circle's", [2, 3]),
        ("the circle’s edge", "Circle", [2]),
        ("sky-blue ball", "blue", [3]),
        ("ball…red", "red", [3]),
        ("A RED CIRCLE", "red circle", [2, 3]),
        ("un éléphant bleu", "éléphant", [2, 3, 4, 5]),
        (DECOMPOSED, "éléphant", [2, 3, 4, 5]),
        ("un éléphant bleu", unicodedata.normalize("NFD", "éléphant"), [2, 3, 4, 5]),
        ("赤い円が動く", "円", [5, 6]),
        ("赤い円が動く", "赤い円", [1, 2, 3, 4, 5, 6]),
        ("サークルが", "サークル", [1, 2, 3, 4, 5]),
        ("دائرة حمراء", "حمراء", [6, 7, 8, 9, 10]),
        ("हिन्दी चित्र", "चित्र", [7, 8, 9, 10, 11, 12]),
        ("a 🐶 dog", "🐶", [2]),
        ("a 👩‍🚀 here", "👩‍🚀", [2, 3]),
        ("red ball, red box", "red", [1, 4]),
    ],
)
def test_tokens_of_words_in_any_script(tokenizer, prompt, word, places):
    assert word_tokens(tokenizer, prompt, word) == places
    ids = prompt_ids(tokenizer, prompt)[0]
    read = unicodedata.normalize("NFC", tokenizer.decode([ids[i] for i in places])).lower()
    if "�" not in read and prompt != "red ball, red box":  # a token may be a part of a letter
        assert read.replace(" ", "") == unicodedata.normalize("NFC", word).lower().replace(" ", "")


@pytest.mark.parametrize(
    ("prompt", "word"),
    [("a bluebird", "blue"), ("cafés", "café"), (DECOMPOSED, "elephant"), ("a star", "!!"),
     ("हिन्दी", "हिन"), ("دائرة", "دائر"), ("スターダスト", "スター")],
)  # fmt: skip
def test_parts_of_words_are_no_words(tokenizer, prompt, word):
    with pytest.raises(WordError, match="is not in the prompt"):
        word_tokens(tokenizer, prompt, word)


def test_words_beyond_the_cut_are_refused(tokenizer):
    assert word_tokens(tokenizer, "very " * 74 + "star", "star") == [75]
    for count in (75, 90):
        with pytest.raises(WordError, match="beyond the 77 tokens"):
            word_tokens(tokenizer, "very " * count + "star", "star")
    assert word_tokens(tokenizer, "star " + "very " * 90 + "star", "star") == [1]
    assert word_tokens(tokenizer, "very " * 74 + "star", "star", after=3) == [75, 76]


@pytest.mark.parametrize(
    ("source", "prompt", "pairs"),
    [
        ("a red circle's edge", "a blue star's edge", [("red circle", "blue star")]),
        ("A Red Circle.", "a BLUE star!", [("red circle", "blue star")]),
        ("un cercle «rouge»", "un cercle «bleu»", [("rouge", "bleu")]),
        ("赤い円が動く", "青い星が動く", [("赤", "青"), ("円", "星")]),
        ("サークルが動く", "スターが動く", [("サークル", "スター")]),
        ("دائرة حمراء", "دائرة زرقاء", [("حمراء", "زرقاء")]),
        ("a 🐶 runs", "a 🐱 runs", [("🐶", "🐱")]),
    ],
)
def test_changed_words_in_any_script(source, prompt, pairs):
    assert changed_words(source, prompt) == pairs


def test_units_keep_what_belongs_together():
    def parts(text):
        return [text[unit.start : unit.end] for unit in units(text)]

    assert parts("👍🏽 up, 👩‍🚀!") == ["👍🏽", "up", "👩‍🚀"]
    assert parts("می‌خواهم <cat-toy> x_1") == ["می‌خواهم", "cat", "toy", "x_1"]
    assert parts("") == parts("...") == []


def test_tokenizers_without_offsets_find_words_too(tokenizer):
    """transformers 4 has CLIP's tokenizer in Python alone."""

    class Slow:
        is_fast, model_max_length = False, 77

        def __call__(self, text, **options):
            assert "return_offsets_mapping" not in options
            return tokenizer(text, **options)

    for prompt, word in (("a red circle's edge", "circle"), ("un éléphant bleu", "éléphant")):
        assert word_tokens(Slow(), prompt, word) == word_tokens(tokenizer, prompt, word)
