"""Blended diffusion against the paper written down plainly; masks, words, memory, errors."""

import copy
import dataclasses
import json
import shutil

import numpy as np
import pytest
import torch

pytest.importorskip("diffusers")
pytest.importorskip("transformers")

from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
from tiny_unets import clip_inputs, one_level_unet, seeded, tiny_unet
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from tvkernels import inflate
from tvkernels.benchmarks.reference import load_reference
from tvkernels.demo import MODEL_DIR
from tvkernels.pipelines.blended_diffusion import SETTINGS, BlendedDiffusionPipeline
from tvkernels.pipelines.cache import Cache
from tvkernels.pipelines.masks import WordMask
from tvkernels.pipelines.words import WordError, changed_words, parse_pair, word_tokens
from tvkernels.processors.maps import LEVELS, TokenMaps
from tvkernels.recipes import BLENDED_DIFFUSION
from tvkernels.runtime import accelerate

SOURCE = "a red circle on a striped background"
TARGET = "a blue star on a striped background"
FRAMES, STEPS, SIZE = 3, 4, (8, 6)


@pytest.fixture(scope="module")
def tokenizer():
    return CLIPTokenizer.from_pretrained(MODEL_DIR / "tokenizer")


@pytest.fixture(scope="module")
def parts(tokenizer):
    """A random SD-1.x model in miniature."""
    torch.manual_seed(0)
    vae = AutoencoderKL(
        block_out_channels=(8, 8, 8, 8), norm_num_groups=4, latent_channels=4, sample_size=64,
        down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4,
    )  # fmt: skip
    config = CLIPTextConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=32, num_hidden_layers=1,
        num_attention_heads=2, max_position_embeddings=tokenizer.model_max_length,
    )  # fmt: skip
    scheduler = DDIMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", steps_offset=1,
    )  # fmt: skip
    return {
        "vae": vae, "text_encoder": CLIPTextModel(config).eval(), "tokenizer": tokenizer,
        "unet": tiny_unet(), "scheduler": scheduler,
    }  # fmt: skip


@pytest.fixture
def build(parts):
    def make(dtype=torch.float64, **changes):
        own = {n: copy.deepcopy(p) if n != "tokenizer" else p for n, p in parts.items()}
        settings = dataclasses.replace(SETTINGS, steps=STEPS, **changes)
        pipe = BlendedDiffusionPipeline(**own, settings=settings).to(dtype)
        pipe.set_progress_bar_config(disable=True)
        return pipe

    return make


@pytest.fixture
def clip():
    shape = (FRAMES, SIZE[0] * 8, SIZE[1] * 8, 3)
    return np.random.default_rng(0).integers(0, 255, shape, dtype=np.uint8)


def edit(pipe, clip, prompt=TARGET, **options):
    """The edited latents; inverts where that is still to be done."""
    if pipe.source is None:
        pipe.invert(clip, SOURCE)
    return pipe(prompt, output_type="latent", **options).frames


@pytest.mark.parametrize(("floor", "threshold", "levels", "after"), [
    ("zero", 0.96, (1, 2), 0), ("mean", 0.3, (1, 2), 0), ("mean", 0.2, (0,), 1),
])  # fmt: skip
@torch.no_grad()
def test_is_the_papers_method(build, clip, floor, threshold, levels, after):
    """Against full probability maps, loops over all steps so far, and DDIM by hand, in float64."""
    pipe = build(floor=floor, threshold=threshold, levels=levels, after=after)
    words = [("red circle", "blue star"), ("striped", "striped")]
    masks = []
    keep = lambda p, i, t, tensors: masks.append(p.mask.clone()) or {}  # noqa: E731
    found = edit(pipe, clip, words=words, guidance_scale=3.0, callback_on_step_end=keep)
    plain = load_reference(pipe)
    plain.invert(pipe._encode_video(clip, 8).double(), SOURCE, STEPS)
    torch.testing.assert_close(pipe.source.latents, torch.stack(plain.path), rtol=1e-5, atol=1e-5)
    expected = plain.sample(plain.path[-1], TARGET, STEPS, 3.0, words=words)
    share = torch.stack(masks).double().mean().item()
    assert 0.05 < share < 0.95, f"a mask of {share:.0%} shows nothing"
    assert torch.equal(torch.stack(masks), torch.stack(plain.masks))
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_the_mean_over_steps_is_of_each_steps_own_scale():
    """Running means from T down are the suffix means of maps that were made going up."""
    maps = torch.rand(5, 2, 3, 4, 4, generator=seeded(3))
    maps *= torch.logspace(0, 3, 5).reshape(5, 1, 1, 1, 1)
    made = WordMask((8, 8), [[0], [1]], [], 0.6)
    for t in reversed(range(5)):
        mask = made(maps[t], torch.zeros(0, 3, 4, 4))
        scaled = torch.nn.functional.interpolate(maps[t:].flatten(0, 1), (8, 8), mode="bilinear")
        scaled = scaled / scaled.flatten(-2).max(-1).values[..., None, None]
        mean = scaled.unflatten(0, (-1, 2)).mean(0)
        torch.testing.assert_close(mask[:, 0], (mean > 0.6).any(0))


def test_outside_the_mask_the_clip_stays_and_inside_the_edit_is_free(build, clip):
    pipe = build(torch.float32)
    mask = np.zeros(clip.shape[:3], bool)
    mask[:, 10:20, 20:30] = True
    latents = edit(pipe, clip, mask=mask)
    marked = torch.zeros(FRAMES, *SIZE, dtype=torch.bool)
    marked[:, 1:3, 2:4] = True  # every latent that a pixel of it touches
    assert torch.equal(pipe.mask, marked)
    source, where = pipe.source.latents[0], marked[:, None].expand_as(latents)
    assert torch.equal(latents[~where], source[~where])
    assert not torch.equal(latents[where], source[where])
    same = edit(pipe, clip, mask=torch.as_tensor(mask[0]).to(torch.uint8))
    assert torch.equal(same, latents), "one mask for all frames"
    assert torch.equal(edit(pipe, clip, mask=np.zeros(clip.shape[:3])), source)
    free = edit(pipe, clip, mask=np.ones(clip.shape[:3]))
    assert torch.equal(free, edit_with(pipe, clip, mask="none"))


def edit_with(pipe, clip, **changes):
    before, pipe.settings = pipe.settings, dataclasses.replace(pipe.settings, **changes)
    try:
        return edit(pipe, clip)
    finally:
        pipe.settings = before


def test_the_random_background_is_the_clip_under_seeded_noise(build, clip):
    pipe = build(torch.float32, background="random")
    nothing = np.zeros(clip.shape[:3])
    a, b, c = (edit(pipe, clip, mask=nothing, generator=seeded(s)) for s in (0, 0, 1))
    assert torch.equal(a, b) and not torch.equal(a, c)
    last = pipe.scheduler.final_alpha_cumprod
    noise = (a - last.sqrt() * pipe.source.latents[0]) / (1 - last).sqrt()
    assert 0.8 < noise.std() < 1.2 and not torch.equal(a, pipe.source.latents[0])


def test_the_pattern_is_previous_and_own():
    assert BLENDED_DIFFUSION.pattern.segments(3) == type(BLENDED_DIFFUSION.pattern).frames(
        offsets=(-1, 0)
    ).segments(3)
    assert BLENDED_DIFFUSION.temporal is None
    assert BLENDED_DIFFUSION.tuned == () and not BLENDED_DIFFUSION.clip_group_norm


@torch.no_grad()
def test_maps_are_the_conditional_halfs_and_the_noise_is_the_same():
    unet = tiny_unet()
    sample, t, text = clip_inputs(2, 3)
    tokens = torch.tensor([4, 1])
    with inflate(unet, BLENDED_DIFFUSION):
        runner = accelerate(unet)
        plain = runner(sample, t, text).sample
        noise, maps = runner(sample, t, text, tokens=tokens, return_dict=False)
        torch.testing.assert_close(noise, plain, rtol=1e-4, atol=1e-5)
        assert maps.shape == (2, 3, 4, 4)
        _, alone = runner(sample[3:], t, text[1:], tokens=tokens, return_dict=False)
        torch.testing.assert_close(maps, alone, rtol=1e-4, atol=1e-6)
        projected = runner(sample, t, runner.text(text), tokens=tokens, return_dict=False)[1]
        torch.testing.assert_close(projected, maps, rtol=1e-4, atol=1e-6)
        every = runner(sample, t, text, tokens=torch.arange(5), return_dict=False)[1]
        torch.testing.assert_close(every.sum(0), torch.ones(3, 4, 4))
        with pytest.raises(ValueError, match="return_dict=False"):
            runner(sample, t, text, tokens=tokens)


@torch.no_grad()
def test_a_call_that_asks_for_no_maps_makes_none(monkeypatch):
    from tvkernels.processors import attention

    def never(*args, **kwargs):
        raise AssertionError("an unmapped call went through token_map_attention")

    unet = tiny_unet()
    sample, t, text = clip_inputs(1, 3)
    with inflate(unet, BLENDED_DIFFUSION):
        asked = TokenMaps(torch.tensor([1]))
        told = {"num_frames": 3, "maps": asked}
        unet(sample, t, text, cross_attention_kwargs=told)
        # At two levels of this UNet one block down and one up, of one and of two layers.
        assert len(asked.found) == 6
        monkeypatch.setattr(attention, "token_map_attention", never)
        unet(sample, t, text, cross_attention_kwargs={"num_frames": 3})
        assert len(asked.found) == 6, "nothing of a call is kept for the next"
        with pytest.raises(AssertionError, match="unmapped"):
            unet(sample, t, text, cross_attention_kwargs=told)


@torch.no_grad()
def test_a_unet_without_layers_of_that_size_says_so():
    unet = one_level_unet()
    sample, t, text = clip_inputs(1, 3)
    with inflate(unet, BLENDED_DIFFUSION):
        with pytest.raises(ValueError, match=r"no cross-attention at 1/2, 1/4"):
            accelerate(unet)(sample, t, text, tokens=torch.tensor([1]), return_dict=False)
        _, maps = accelerate(unet)(
            sample, t, text, tokens=torch.tensor([1]), levels=(0,), return_dict=False
        )
        assert maps.shape == (1, 3, 8, 8)


@pytest.mark.slow
@torch.no_grad()
def test_one_compiled_graph_gives_the_maps_too():
    unet = one_level_unet()
    sample, t, text = clip_inputs(1, 3)
    with inflate(unet, BLENDED_DIFFUSION):
        asked = {"tokens": torch.tensor([1, 3]), "levels": (0,), "return_dict": False}
        expected = accelerate(unet)(sample, t, text, **asked)
        found = accelerate(unet, "compile", compiler="eager")(sample, t, text, **asked)
        torch.testing.assert_close(found, expected)
        apart = accelerate(unet, "compile", compiler="eager", regional=True)
        with pytest.raises(ValueError, match="leave out regional"):
            apart(sample, t, text, **asked)


def test_a_runtime_that_gives_no_maps_is_refused(build, clip):
    unet = tiny_unet()
    sample, t, text = clip_inputs(1, 3)
    with inflate(unet, BLENDED_DIFFUSION):
        runner = accelerate(unet)
        runner.backend = "onnx"
        with pytest.raises(ValueError, match="onnx gives no maps of words: use eager or compile"):
            runner(sample, t, text, tokens=torch.tensor([1]), return_dict=False)
    pipe = build(torch.float32)
    pipe.runner.backend = "onnx"
    pipe.invert(clip, SOURCE)
    assert pipe.source.maps is None
    with pytest.raises(ValueError, match="onnx gives no maps of words: give a mask"):
        pipe(TARGET)
    assert edit(pipe, clip, mask=np.ones(clip.shape[:3])).isfinite().all()


def test_guidance_in_two_calls_is_the_same(build, clip):
    pipe = build(floor="mean")
    whole = edit(pipe, clip)
    mask = pipe.mask
    split = edit(pipe, clip, split_guidance=True)
    assert torch.equal(mask, pipe.mask)
    torch.testing.assert_close(split, whole, rtol=1e-6, atol=1e-6)


def test_words_are_found_among_the_tokens(tokenizer):
    prompt = "a Red circle on a gray wolfish background, and a red circle"
    assert word_tokens(tokenizer, prompt, "red circle") == [2, 3, 18, 19]
    assert word_tokens(tokenizer, prompt, "Circle") == [3, 19]
    assert word_tokens(tokenizer, prompt, "wolfish") == list(range(7, 14)), "letter by letter"
    assert word_tokens(tokenizer, prompt, "gray wolfish") == list(range(6, 14))
    assert word_tokens(tokenizer, prompt, "red circle", 1) == [2, 3, 4, 18, 19, 20], "the end too"
    assert word_tokens(tokenizer, prompt, "red circle", 3) == [2, 3, 4, 5, 6, 18, 19, 20]
    for absent in ("fish", "wolf", "circle red", "wolfish cat"):
        with pytest.raises(WordError, match=f"'{absent}' is not in the prompt 'a Red"):
            word_tokens(tokenizer, prompt, absent)
    with pytest.raises(WordError, match="beyond the 77 tokens that are read"):
        word_tokens(tokenizer, "a " * 80 + "star", "star")


def test_words_that_change_are_told_or_asked_for():
    assert changed_words(SOURCE, TARGET) == [("red circle", "blue star")]
    pairs = changed_words("A squirrel is eating a carrot.", "A rabbit is eating an eggplant.")
    assert pairs == [("squirrel", "rabbit"), ("carrot", "eggplant")]
    for source, prompt in (
        (SOURCE, SOURCE), ("a man", "a man on skis"), ("a big man", "a man"),
        ("a red circle and a red star", "a red circle and a blue star"),
        ("a red circle on a gray floor", "a cat"),
    ):  # fmt: skip
        with pytest.raises(WordError, match="cannot tell which words change"):
            changed_words(source, prompt)
    assert parse_pair(" red circle = blue star") == ("red circle", "blue star")
    for wrong in ("red", "red=", "=blue"):
        with pytest.raises(WordError, match="old=new"):
            parse_pair(wrong)


def test_bad_input_is_one_line(build, clip):
    pipe = build(torch.float32)
    with pytest.raises(ValueError, match="nothing to blend with"):
        pipe(TARGET)
    with pytest.raises(ValueError, match="say what the clip shows"):
        pipe.invert(clip)
    pipe.fit(clip, SOURCE)
    pipe.invert(clip)
    for options, says in (
        ({"words": [("square", "star")]}, "'square' is not in the prompt 'a red circle"),
        ({"words": [("circle", "ring")]}, "'ring' is not in the prompt 'a blue star"),
        ({"words": []}, "words are pairs"),
        ({"words": ["circle=ring"]}, "'ring' is not in the prompt 'a blue star"),
        ({"words": [("circle", "star")], "mask": np.ones(clip.shape[:3])}, "either words or a"),
        ({"mask": np.ones((FRAMES, 8, 8))}, r"a mask of \[3, 8, 8\] for a clip of \[3, 64, 48\]"),
        ({"num_inference_steps": STEPS + 1}, "inverted in 4 steps: sample in as many"),
        ({"latents": pipe.inverted[1:]}, "for a clip inverted as"),
    ):
        with pytest.raises(ValueError, match=says):
            pipe(TARGET, **options)
    with pytest.raises(ValueError, match="unknown floor 'low': use one of zero, mean"):
        build(floor="low")
    with pytest.raises(ValueError, match="tunes nothing"):
        pipe.fit(clip, SOURCE, num_steps=2)
    pipe.fit(clip, SOURCE)
    with pytest.raises(ValueError, match="nothing to blend with"):
        pipe(TARGET)


def test_the_cache_keeps_path_and_maps(build, clip, tmp_path):
    cache = Cache(tmp_path)
    results = []
    for _ in range(2):
        pipe = build(torch.float32)
        pipe.fit(clip, SOURCE, cache=cache)
        pipe.invert(clip, cache=cache)
        results.append(edit(pipe, clip))
    assert cache.hits == 1 and torch.equal(*results)
    pipe.invert(clip, "a red circle", cache=cache)
    assert cache.hits == 1, "another source prompt is another inversion"
    assert pipe.source.maps.shape == (STEPS, 5, FRAMES, 4, 3)
    video = build(torch.float32)
    fresh = video(TARGET, video=clip, source_prompt=SOURCE, output_type="latent").frames
    assert torch.equal(fresh, results[0])


def test_memory_against_every_map_stored():
    """The figures of the pipeline's docstring, from Stable Diffusion's own layers."""
    with torch.device("meta"):
        unet = UNet2DConditionModel(cross_attention_dim=768, attention_head_dim=8)
    depth = len(unet.config.block_out_channels) - 1
    level = {f"down_blocks.{i}": i for i in range(depth)}
    level |= {f"up_blocks.{i}": depth - i for i in range(1, depth + 1)}
    frames, steps, tokens, side, item = 8, 50, 10 + 2, 64, 4
    layers = [
        (level[".".join(name.split(".")[:2])], module.heads)
        for name, module in unet.named_modules()
        if name.endswith("attn2") and not name.startswith("mid_block")
    ]
    stored = sum(
        heads * (side // 2**at) ** 2 * 77 * frames * steps * item
        for at, heads in layers if at in LEVELS
    )  # fmt: skip
    maps = steps * tokens * frames * (side // 2 ** min(LEVELS)) ** 2 * item
    path = (steps + 1) * frames * 4 * side**2 * item
    assert round(stored / 1e9, 1) == 6.3
    assert round(maps / 1e6) == 20
    assert round(path / 1e6) == 27


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    pytest.importorskip("av")
    from tvkernels.demo.world import edit_pair
    from tvkernels.video import write_video

    folder = tmp_path_factory.mktemp("blended")
    shutil.copytree(MODEL_DIR, folder / "model")
    source, target = edit_pair(2, num_frames=3)
    write_video(folder / "clip.mp4", source.render(64, 64).frames, 8)
    masks = (source.render(64, 64).masks > 0).astype(np.uint8)[..., None].repeat(3, -1) * 255
    write_video(folder / "masks", masks, 8)
    write_video(folder / "small", masks[:, ::2, ::2], 8)
    return folder, source.caption, target.caption


@pytest.fixture
def tvk(place, capsys, tmp_path, monkeypatch):
    from tvkernels.cli import main

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    folder, source, target = place
    fixed = {
        "--method": "blended-diffusion", "--model": folder / "model", "--frames": 3,
        "--size": 64, "--steps": 2, "--source-prompt": source, "--prompt": target,
        "-o": tmp_path / "out.mp4",
    }  # fmt: skip

    def run(clip=folder / "clip.mp4", **changes):
        chosen = {**fixed, **{f"--{n.replace('_', '-')}": v for n, v in changes.items()}}
        given = [str(x) for pair in chosen.items() if pair[1] is not None for x in pair]
        status = main(["edit", str(clip), *given])
        return status, *capsys.readouterr()

    return run


def test_the_command_tells_the_words_and_keeps_them(tvk, tmp_path):
    status, said, errors = tvk()
    assert status == 0, errors
    assert "words that change: blue star -> cyan triangle" in said
    kept = json.loads((tmp_path / "out.json").read_text(encoding="utf-8"))["settings"]
    assert kept["words"] == ["blue star=cyan triangle"] and kept["mask"] is None
    first = (tmp_path / "out.mp4").read_bytes()
    status, said, errors = tvk(words="blue star=cyan triangle")
    assert status == 0, errors
    assert "inversion taken from the cache" in said
    assert (tmp_path / "out.mp4").read_bytes() == first


def test_the_command_takes_a_mask(tvk, place, tmp_path):
    status, _, errors = tvk(mask=place[0] / "masks")
    assert status == 0, errors
    kept = json.loads((tmp_path / "out.json").read_text(encoding="utf-8"))["settings"]
    assert kept["mask"] == str(place[0] / "masks") and kept["words"] is None


@pytest.mark.parametrize(("changes", "says"), [
    ({"words": "blue circle=cyan triangle"}, "'blue circle' is not in the prompt 'a blue star on"),
    ({"words": "blue star"}, "words are old=new"),
    ({"prompt": "a square"}, "cannot tell which words change"),
    ({"mask": "small"}, "is 32 x 32 pixels, the clip's frames are 64 x 64"),
    ({"mask": "none.png"}, "does not exist"),
    ({"words": "star=triangle", "mask": "masks"}, "either --words or --mask"),
    ({"method": "frame-by-frame", "words": "star=triangle"}, "frame-by-frame takes no --words"),
    ({"method": "ei2", "mask": "masks"}, "ei2 takes no --mask"),
    ({"runtime": "onnx"}, "the runtime onnx gives no maps of words"),
    ({"max_memory": "8GB"}, "--max-memory does not account"),
    ({"tune_steps": 3}, "tunes nothing"),
])  # fmt: skip
def test_the_command_refuses_in_one_line(tvk, place, changes, says):
    if "mask" in changes:
        changes = {**changes, "mask": place[0] / changes["mask"]}
    status, _, errors = tvk(**changes)
    assert status == 2
    assert says in errors and errors.count("\n") == 1 and "Traceback" not in errors


def test_the_benchmarks_ablations_are_the_papers():
    pytest.importorskip("rich")
    from tvkernels.benchmarks.edits import quality

    names = ["no-mask", "true-mask", "random-background", "own-frame"]
    found = quality.entrants(["blended-diffusion"], True)
    assert [e.name for e in found] == ["blended-diffusion", *(f"blended-{n}" for n in names)]
    assert [e.masked for e in found] == ["words", None, "true", "words", "words"]
    assert not any("blended" in e.name for e in quality.entrants(["ei2"], True))


def test_the_masks_iou_is_of_all_that_an_edit_must_cover():
    from tvkernels.demo.measure import mask_iou

    true = np.zeros((2, 16, 16), bool)
    true[:, 7:9, 0] = True  # one pixel of each of two cells
    mask = torch.zeros(2, 2, 2, dtype=torch.bool)
    mask[:, 0, 0] = True
    assert mask_iou(mask, true) == 0.5
    mask[0] = True
    assert mask_iou(mask, true) == 3 / 6


@pytest.mark.slow
def test_every_ablation_runs_and_is_measured(tmp_path, place, monkeypatch):
    from tvkernels.benchmarks.edits import quality

    monkeypatch.setattr(quality, "MODEL_DIR", place[0] / "model")
    rows = quality.run(
        [2], ["blended-diffusion"], ablation=True, output=tmp_path / "q.jsonl",
        numbers={"steps": 2},
    )  # fmt: skip
    assert [row["measures"]["iou"] is None for row in rows] == [False, True, True, False, False]
    assert rows[0]["settings"]["levels"] == (0,) and rows[1]["settings"]["mask"] == "none"
    psnr = {row["method"]: row["measures"]["psnr"] for row in rows}
    assert psnr["blended-true-mask"] > psnr["blended-no-mask"]
    again = quality.run(
        [2], ["blended-diffusion"], output=tmp_path / "q.jsonl", numbers={"steps": 2}, resume=True
    )
    assert again[0]["measures"] == rows[0]["measures"]
