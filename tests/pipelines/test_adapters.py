"""LoRA and textual inversion through diffusers' loaders: the edit is that of a model with them."""

import pytest
import torch
from diffusers import StableDiffusionPipeline
from safetensors.torch import save_file
from single_files import kohya, lora
from tiny_unets import seeded

from tvkernels.pipelines import pipeline_class
from tvkernels.pipelines.cache import Cache
from tvkernels.pipelines.checks import ModelError

pytest.importorskip("peft")


@pytest.fixture(scope="module")
def plain(folder):
    """diffusers' own pipeline; nothing here changes it."""
    return StableDiffusionPipeline.from_pretrained(folder)


@pytest.fixture(scope="module")
def weights(plain):
    return lora(plain.unet, plain.text_encoder)


@pytest.fixture(scope="module")
def of_time(plain):
    """LCM's LoRA also changes the layers that read the timestep."""
    generator, found = seeded(3), {}
    for name, layer in plain.unet.named_modules():
        if name.endswith(("time_emb_proj", "linear_1", "conv1")):
            wide, into, *kernel = layer.weight.shape
            for kind, shape in (("A", (2, into, *kernel)), ("B", (wide, 2, *(1 for _ in kernel)))):
                tensor = torch.randn(shape, generator=generator) * 0.1
                found[f"unet.{name}.lora_{kind}.weight"] = tensor
    return found


def build(folder, method="ei2", change=lambda pipe: None):
    """A pipeline of the models that `change` has been done to in diffusers' own pipeline."""
    pipe = StableDiffusionPipeline.from_pretrained(folder)
    change(pipe)
    names = ("vae", "text_encoder", "tokenizer", "unet", "scheduler")
    pipe = pipeline_class(method)(**{name: pipe.components[name] for name in names})
    pipe.set_progress_bar_config(disable=True)
    return pipe


def edit(pipe, clip, prompt="a blue star", **options):
    """Latents after a step of inversion and one of sampling."""
    pipe.invert(clip, num_inference_steps=1, **options)
    return pipe(prompt, num_inference_steps=1, output_type="latent", **options).frames


@pytest.mark.parametrize(
    ("method", "which"), [("ei2", "weights"), ("tcve", "weights"), ("frame-by-frame", "of_time")]
)
def test_loaded_after_inflation_is_as_loaded_before(folder, clip, request, method, which):
    given = request.getfixturevalue(which)
    expected = edit(build(folder, method, lambda pipe: pipe.load_lora_weights(given)), clip)
    pipe = build(folder, method)
    without = edit(pipe, clip)
    pipe.load_lora_weights(given)
    found = edit(pipe, clip)
    assert torch.equal(found, expected) and not torch.allclose(found, without, atol=1e-3)
    pipe.unload_lora_weights()
    assert torch.equal(edit(pipe, clip), without)


def test_weights_and_scales_are_those_of_diffusers(folder, clip, weights, tmp_path):
    """Kohya's files too; the scale of one call counts in it alone, for both models."""
    save_file(kohya(weights), tmp_path / "kohya.safetensors")

    def change(pipe):
        pipe.load_lora_weights(tmp_path, weight_name="kohya.safetensors", adapter_name="a")
        pipe.load_lora_weights({name: -x for name, x in weights.items()}, adapter_name="b")
        pipe.set_adapters(["a", "b"], [0.5, 0.25])

    expected = edit(build(folder, change=change), clip)
    pipe = build(folder)
    pipe.load_lora_weights(tmp_path / "kohya.safetensors", adapter_name="a")
    whole = edit(pipe, clip)
    half = edit(pipe, clip, cross_attention_kwargs={"scale": 0.5})
    assert torch.equal(edit(pipe, clip, cross_attention_kwargs={"scale": 1.0}), whole)
    pipe.set_adapters("a", 0.5)
    assert torch.equal(edit(pipe, clip), half) and not torch.equal(half, whole)
    pipe.load_lora_weights({name: -x for name, x in weights.items()}, adapter_name="b")
    pipe.set_adapters(["a", "b"], [0.5, 0.25])
    assert torch.equal(edit(pipe, clip), expected)


def test_fused_into_what_was_tuned(folder, clip, weights):
    """Fusing changes weights that tuning has changed before: both changes stay."""
    pipe = build(folder)
    pipe.load_lora_weights(weights)
    pipe.fit(clip, "a red circle", num_steps=1, learning_rate=0.01, generator=seeded())
    beside = edit(pipe, clip)
    tuned = pipe.handle.tuned_state()
    pipe.fuse_lora()
    pipe.unload_lora_weights()
    torch.testing.assert_close(edit(pipe, clip), beside, rtol=1e-4, atol=1e-4)
    name = next(name for name in tuned if name.endswith("attn2.to_q.weight"))
    assert not torch.equal(pipe.handle.tuned_state()[name], tuned[name])
    pipe.handle.remove()  # then it is the plain model with the LoRA in it, not the one before
    other = StableDiffusionPipeline.from_pretrained(folder)
    other.load_lora_weights(weights)
    other.fuse_lora()
    other.unload_lora_weights()
    expected = other.unet.state_dict()
    for name, tensor in pipe.unet.state_dict().items():
        torch.testing.assert_close(tensor, expected[name], msg=name)


def test_embeddings_are_words_of_a_prompt(folder, clip, plain, tmp_path):
    width = plain.text_encoder.config.hidden_size
    files = [tmp_path / "thing.safetensors", tmp_path / "cat.safetensors"]
    save_file({"emb_params": torch.randn(2, width, generator=seeded())}, files[0])
    save_file({"<cat>": torch.randn(width, generator=seeded(1))}, files[1])

    def change(pipe):
        for file, token in zip(files, ("thing", "<cat>"), strict=True):
            pipe.load_textual_inversion(str(file), token=token)

    prompt = "a thing, and <cat>"
    expected = edit(build(folder, change=change), clip, prompt)
    pipe = build(folder, "blended-diffusion")
    without = pipe._encode_prompts([prompt])
    pipe = build(folder)
    for file in files:
        pipe.load_textual_inversion(str(file))
    assert torch.equal(edit(pipe, clip, prompt), expected)
    assert not torch.allclose(pipe._encode_prompts([prompt]), without, atol=1e-3)
    pipe = build(folder, "blended-diffusion", change)
    # A word of two vectors is two tokens: [start] a thing thing_1 , and <cat>.
    assert pipe.check_words("a red star", prompt, [("red", "thing"), ("star", "<cat>")]) == (
        [[2], [3]], [[2, 3], [6]],
    )  # fmt: skip


def test_caches_know_what_has_been_loaded(folder, clip, weights, plain, tmp_path):
    pipe, cache = build(folder, "frame-by-frame"), Cache(tmp_path)
    run = lambda: pipe.invert(clip, num_inference_steps=1, cache=cache)  # noqa: E731
    changes = {
        "LoRA": lambda: pipe.load_lora_weights(weights, adapter_name="a"),
        "weight": lambda: pipe.set_adapters("a", 0.5),
        "fused": lambda: (pipe.fuse_lora(), pipe.unload_lora_weights()),
        "embedding": lambda: pipe.text_encoder.get_input_embeddings().weight.data.add_(1.0),
    }
    run()
    for name, change in changes.items():
        change()
        run()
        assert cache.hits == 0, name
    run()
    assert cache.hits == 1


def test_what_cannot_be_honoured_is_refused(folder, weights, tmp_path):
    pipe = build(folder)
    strange = {"unet.other.to_q.lora_A.weight": torch.ones(2, 4),
               "unet.other.to_q.lora_B.weight": torch.ones(4, 2)}  # fmt: skip
    with pytest.raises((ModelError, ValueError)):
        pipe.load_lora_weights(strange)
    torch.save(weights, tmp_path / "lora.safetensors")  # a pickle under another name
    for load in (pipe.load_lora_weights, pipe.load_textual_inversion):
        with pytest.raises(ModelError, match="is a pickle.* convert it by python -c"):
            load(tmp_path / "lora.safetensors")
    latents = torch.zeros(2, 4, 4, 4)
    for kwargs, message in (({"scale": 0.5}, "needs a LoRA"), ({"gligen": 1}, "a scale alone")):
        with pytest.raises(ValueError, match=message):
            pipe("x", latents=latents, num_inference_steps=1, cross_attention_kwargs=kwargs)
    pipe.load_lora_weights({k: v for k, v in weights.items() if k.startswith("text_encoder")})
    with pytest.raises(ValueError, match="holds LoRA adapters"):
        pipe.save_pretrained(tmp_path / "saved")
