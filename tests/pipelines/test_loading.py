"""Models as they lie on disks: one file, variants, pickles, names of no model, other VAEs."""

import json
import re
import shutil
import time

import diffusers
import pytest
import torch
from diffusers import (
    AsymmetricAutoencoderKL,
    AutoencoderKL,
    AutoencoderKLTemporalDecoder,
    AutoencoderTiny,
    AutoPipelineForText2Image,
    ConsistencyDecoderVAE,
    DiffusionPipeline,
    PNDMScheduler,
    StableDiffusionPipeline,
)
from safetensors.torch import load_file, save_file
from single_files import lora, save_checkpoint
from tiny_unets import seeded, tiny_unet

from tvkernels.demo import MODEL_DIR
from tvkernels.pipelines import METHODS, pipeline_class
from tvkernels.pipelines.checks import (
    CONFIGS,
    ModelError,
    check_embedding,
    check_lora,
    check_model,
    check_unet,
    latent_side,
    model_size,
    vae_factor,
)
from tvkernels.pipelines.loading import load_pipeline

PARTS = ("unet", "vae", "text_encoder")


@pytest.fixture(scope="module")
def single(tmp_path_factory):
    return save_checkpoint(MODEL_DIR, tmp_path_factory.mktemp("one") / "shapes.safetensors")


def assert_same_models(a, b):
    for part in PARTS:
        ours, theirs = (getattr(pipe, part).state_dict() for pipe in (a, b))
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[name], theirs[name]) for name in ours), part


def test_a_model_in_one_file_is_the_model_in_a_folder(single, monkeypatch):
    monkeypatch.setattr("huggingface_hub.file_download.hf_hub_download", None)
    monkeypatch.setattr("huggingface_hub.snapshot_download", None)
    check_model(single)
    assert model_size(single) == model_size(MODEL_DIR) == (128, 8)
    found = load_pipeline("frame-by-frame", single, device="cpu")
    expected = load_pipeline("frame-by-frame", MODEL_DIR, device="cpu")
    assert_same_models(found, expected)
    assert found.scheduler.config == expected.scheduler.config
    prompt = "a red circle"
    assert found.tokenizer(prompt).input_ids == expected.tokenizer(prompt).input_ids


def test_a_file_of_another_size_takes_a_folder_of_configurations(folder, tmp_path):
    file = save_checkpoint(folder, tmp_path / "tiny.safetensors")
    with pytest.raises(ModelError, match=r"16 channels under a text of 16 is no.*config=FOLDER"):
        check_model(file)
    pipe = pipeline_class("frame-by-frame").from_single_file(file, config=str(folder))
    pipe.handle.remove()
    assert_same_models(pipe, StableDiffusionPipeline.from_pretrained(folder))


def test_what_ships_for_stable_diffusion_is_its_own():
    """The vocabulary gives CLIP's tokens; the configurations build models of SD-1.5's sizes."""
    folder = CONFIGS[1]
    tokenizer = diffusers.DiffusionPipeline.load_config(folder)["tokenizer"]
    assert tokenizer == ["transformers", "CLIPTokenizer"]
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

    tokenizer = CLIPTokenizer.from_pretrained(folder / "tokenizer")
    assert tokenizer("a photo of a cat").input_ids == [49406, 320, 1125, 539, 320, 2368, 49407]
    assert len(tokenizer) == 49408 and tokenizer.model_max_length == 77
    with torch.device("meta"):
        kinds = {"unet": diffusers.UNet2DConditionModel, "vae": AutoencoderKL}
        sizes = {
            part: sum(p.numel() for p in kind.from_config(
                kind.load_config(folder, subfolder=part)).parameters())
            for part, kind in kinds.items()
        }  # fmt: skip
        text = CLIPTextModel(CLIPTextConfig.from_pretrained(folder, subfolder="text_encoder"))
    # Published: 859.5 M, 83.7 M, 123.1 M parameters.
    assert sizes == {"unet": 859_520_964, "vae": 83_653_863}
    assert sum(p.numel() for p in text.parameters()) == 123_060_480


BROKEN = {
    "SDXL": (lambda t: t | {"conditioner.embedders.1.x": torch.ones(1)}, "SDXL"),
    "inpainting": (
        lambda t: t | {"model.diffusion_model.input_blocks.0.0.weight": torch.ones(48, 9, 3, 3)},
        "takes 9 channels",
    ),
    "another family": (
        lambda t: {k: v for k, v in t.items() if "input_blocks.0.0" not in k}, "another family",
    ),
    "no VAE": (
        lambda t: {k: v for k, v in t.items() if not k.startswith("first_stage")}, "has no VAE",
    ),
    "UNet alone": (lambda t: {"down_blocks.0.x": torch.ones(1)}, "no whole Stable Diffusion"),
    "LoRA": (lambda t: {"lora_unet_x.lora_up.weight": torch.ones(1)}, "is a LoRA"),
}  # fmt: skip


@pytest.mark.parametrize("kind", BROKEN)
def test_files_of_other_kinds_are_refused(single, tmp_path, kind):
    change, message = BROKEN[kind]
    save_file(change(load_file(single)), tmp_path / "model.safetensors")
    for check in (check_model, model_size):
        with pytest.raises(ModelError, match=message) as error:
            check(tmp_path / "model.safetensors")
        assert "\n" not in str(error.value)


def test_a_file_cut_off_is_refused(single, tmp_path):
    cut = tmp_path / "cut.safetensors"
    for length in (0, 5, 1000, single.stat().st_size - 1):
        cut.write_bytes(single.read_bytes()[:length])
        with pytest.raises(ModelError, match="no whole .safetensors file"):
            check_model(cut)


@pytest.mark.parametrize("suffix", [".ckpt", ".pt", ".bin", ".pth", ".safetensors"])
def test_pickles_are_refused_and_the_advice_converts_them(tmp_path, suffix):
    """Also under the name of another format, and in the old format of torch.save."""
    weights = {"a.lora_A.weight": torch.ones(2, 3), "step": 7}
    inversion = {"string_to_param": {"*": torch.ones(2, 16)}, "name": "thing"}
    cases = {
        "model": ({"state_dict": weights}, check_model, weights.keys() - {"step"}),
        "lora": (weights, check_lora, weights.keys() - {"step"}),
        "word": (inversion, check_embedding, {"emb_params"}),
    }
    for stem, (content, check, names) in cases.items():
        path = tmp_path / f"{stem}{suffix}"
        torch.save(content, path, _use_new_zipfile_serialization=suffix != ".pt")
        with pytest.raises(ModelError, match="is a pickle") as error:
            check(path)
        command = str(error.value).partition("convert it by ")[2]
        assert "\n" not in str(error.value)
        code = re.fullmatch('python -c "(.*)"', command)[1]
        exec(code, {})
        again = "-converted" if suffix == ".safetensors" else ""
        made = tmp_path / f"{stem}{again}.safetensors"
        assert load_file(made).keys() == names
        made.unlink()


def test_a_folder_of_pickles_is_refused(folder, tmp_path):
    copy = shutil.copytree(folder, tmp_path / "model")
    weights = copy / "unet" / "diffusion_pytorch_model.safetensors"
    weights.rename(weights.with_suffix(".bin"))
    with pytest.raises(ModelError, match="holds pickles.*save_pretrained"):
        check_model(copy)
    weights.with_suffix(".bin").unlink()
    with pytest.raises(ModelError, match=r"has no diffusion_pytorch_model\.safetensors"):
        check_model(copy)


def test_variants(folder, tmp_path):
    pipe = StableDiffusionPipeline.from_pretrained(folder).to(torch.float16)
    pipe.save_pretrained(tmp_path / "half", variant="fp16")
    check_model(tmp_path / "half", "fp16")
    found = load_pipeline("ei2", tmp_path / "half", variant="fp16", device="cpu")
    assert {getattr(found, part).dtype for part in PARTS} == {torch.float32}
    half = load_pipeline(
        "ei2", tmp_path / "half", variant="fp16", dtype=torch.bfloat16, device="cpu"
    )
    assert {getattr(half, part).dtype for part in PARTS} == {torch.bfloat16}
    shutil.rmtree(tmp_path / "half" / "vae")
    shutil.copytree(folder / "vae", tmp_path / "half" / "vae")
    check_model(tmp_path / "half", "fp16")  # a plain VAE beside halves
    for model, variant, message in (
        (tmp_path / "half", None, "ask for variant fp16"),
        (tmp_path / "half", "ema", "ask for fp16"),
        (folder, "fp16", "leave it out"),
    ):
        with pytest.raises(ModelError, match=message):
            load_pipeline("ei2", model, variant=variant, device="cpu")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("stable-difusion", "no hub's name"),
        ("./models/sd15", "no hub's name"),
        ("a/b/c", "no hub's name"),
        ("~/sd15", "no hub's name"),
        ("sd 15/model", "no hub's name"),
        ("models/sd15.safetensors", "is not there"),
        ("sd15.ckpt", "is not there"),
        ("models/sd15", "no sd15 in the folder models"),
        ("nobody/no-such-model", "HF_HUB_OFFLINE"),
        ("nobody/no-such-model", "does not answer"),
    ],
)
def test_names_of_no_model_are_told_without_a_hub(name, message, tmp_path, monkeypatch):
    (tmp_path / "models").mkdir()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", "HF_HUB" in message)
    monkeypatch.setattr("tvkernels.pipelines.checks.getproxies", dict)
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    began = time.perf_counter()
    with pytest.raises(ModelError, match=message) as error:
        check_model(name)
    assert "\n" not in str(error.value) and time.perf_counter() - began < 1


@pytest.mark.parametrize("method", METHODS)
def test_a_saved_folder_is_opened_by_diffusers_and_by_us(folder, tmp_path, method):
    kind = pipeline_class(method)
    pipe = kind.from_pretrained(folder)
    for parameter in pipe.handle.tuned_parameters().values():
        parameter.data += 0.01
    tuned = pipe.handle.tuned_state()
    pipe.save_pretrained(tmp_path / "saved", max_shard_size="1MB")
    pipe.handle.remove()
    index = json.loads((tmp_path / "saved" / "model_index.json").read_text(encoding="utf-8"))
    assert index["_class_name"] == "StableDiffusionPipeline"
    assert index["safety_checker"] == index["feature_extractor"] == [None, None]
    for opened in (StableDiffusionPipeline, DiffusionPipeline, AutoPipelineForText2Image):
        assert_same_models(opened.from_pretrained(tmp_path / "saved"), pipe)
    again = kind.from_pretrained(tmp_path / "saved")
    kept = {name: value for name, value in pipe.scheduler.config.items() if name[0] != "_"}
    assert kept.items() <= again.scheduler.config.items()
    found = again.handle.tuned_state()
    assert found.keys() == tuned.keys()
    assert all(torch.equal(found[name], tuned[name]) for name in tuned)


def test_the_scheduler_that_was_given_is_saved(load, tmp_path):
    """DDIM follows its schedule here, and diffusers samples with it as before."""
    pipe = load()
    given = PNDMScheduler.from_config(pipe.scheduler.config, skip_prk_steps=True)
    pipe.scheduler = given
    pipe.save_pretrained(tmp_path)
    opened = StableDiffusionPipeline.from_pretrained(tmp_path).scheduler
    assert type(opened) is PNDMScheduler and opened.config.skip_prk_steps
    again = type(pipe).from_pretrained(tmp_path).scheduler
    assert torch.equal(again.alphas_cumprod, pipe.scheduler.alphas_cumprod)
    assert type(again) is type(pipe.scheduler)


def test_saving_takes_the_arguments_of_diffusers(load, tmp_path):
    load().to(torch.float16).save_pretrained(tmp_path, variant="fp16")
    assert (tmp_path / "unet" / "diffusion_pytorch_model.fp16.safetensors").is_file()
    load().save_pretrained(tmp_path / "pickled", safe_serialization=False)
    assert (tmp_path / "pickled" / "unet" / "diffusion_pytorch_model.bin").is_file()


BLOCKS = {"block_out_channels": (8, 8, 8), "norm_num_groups": 4, "latent_channels": 4}
TYPES = {
    "down_block_types": ("DownEncoderBlock2D",) * 3,
    "up_block_types": ("UpDecoderBlock2D",) * 3,
}
VAES = {
    "shifted": lambda: AutoencoderKL(**BLOCKS, **TYPES, scaling_factor=0.3, shift_factor=0.1),
    "tiny": lambda: AutoencoderTiny(
        encoder_block_out_channels=(8, 8, 8), decoder_block_out_channels=(8, 8, 8),
        num_encoder_blocks=(1, 1, 1), num_decoder_blocks=(1, 1, 1), scaling_factor=0.5,
    ),
    "asymmetric": lambda: AsymmetricAutoencoderKL(
        **TYPES, down_block_out_channels=(8, 8, 8), up_block_out_channels=(16, 16, 16),
        latent_channels=4, norm_num_groups=4,
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", VAES)
def test_other_vaes_are_served(load, folder, kind):
    torch.manual_seed(0)
    vae = VAES[kind]().eval()
    pipe = load("frame-by-frame", vae=vae)
    assert pipe.multiple == vae_factor(vae.config) == 4
    video = torch.rand(2, 3, 16, 24, generator=seeded())
    latents = pipe._encode_video(video, 8)
    pixels = video * 2 - 1
    with torch.no_grad():
        encoded = vae.encode(pixels)
        own = encoded.latents if kind == "tiny" else encoded.latent_dist.mode()
        scale, shift = vae.config.scaling_factor, vae.config.get("shift_factor") or 0.0
        torch.testing.assert_close(latents, (own - shift) * scale)
        shown = (vae.decode(own).sample / 2 + 0.5).clamp(0, 1)
    torch.testing.assert_close(pipe._decode(latents, "pt", 8)[0], shown)


@pytest.mark.parametrize(
    ("vae", "message"),
    [
        (lambda: AutoencoderKL(**BLOCKS | {"latent_channels": 16}, **TYPES), "3 channels into 16"),
        (lambda: AutoencoderKLTemporalDecoder(block_out_channels=(32,)), "decodes clips"),
        (lambda: ConsistencyDecoderVAE(
            encoder_block_out_channels=(32,), encoder_down_block_types=("DownEncoderBlock2D",),
            encoder_layers_per_block=1, decoder_block_out_channels=(32,),
            decoder_down_block_types=("ResnetDownsampleBlock2D",),
            decoder_up_block_types=("ResnetUpsampleBlock2D",), decoder_layers_per_block=1,
        ), "draws noise"),
    ],
)  # fmt: skip
def test_vaes_that_cannot_be_are_refused(load, vae, message):
    with pytest.raises(ModelError, match=message):
        load("frame-by-frame", vae=vae())


def test_a_size_is_one_number_or_two(folder, tmp_path):
    assert [latent_side({"sample_size": size}) for size in (8, [8, 12], (12, 8), None)] == [
        8,
        8,
        8,
        64,
    ]
    copy = shutil.copytree(folder, tmp_path / "model")
    config = copy / "unet" / "config.json"
    content = json.loads(config.read_text(encoding="utf-8")) | {"sample_size": [4, 6]}
    config.write_text(json.dumps(content), encoding="utf-8")
    assert model_size(copy) == (32, 8)


def test_a_vae_of_other_channels_is_told_from_its_configuration(folder, tmp_path):
    copy = shutil.copytree(folder, tmp_path / "model")
    config = copy / "vae" / "config.json"
    content = json.loads(config.read_text(encoding="utf-8")) | {"latent_channels": 16}
    config.write_text(json.dumps(content), encoding="utf-8")
    for check in (check_model, model_size):
        with pytest.raises(ModelError, match="3 channels into 16"):
            check(copy)


@pytest.mark.parametrize(
    "changes",
    [
        {"time_cond_proj_dim": 8}, {"class_embed_type": "timestep"}, {"num_class_embeds": 3},
        {"encoder_hid_dim": 16, "encoder_hid_dim_type": "text_proj"}, {"in_channels": 8},
        {"out_channels": 8},
    ],
)  # fmt: skip
def test_unets_with_other_inputs_are_refused(load, changes):
    unet = tiny_unet(**changes)
    for check in (lambda: check_unet(unet.config), lambda: load("frame-by-frame", unet=unet)):
        with pytest.raises(ModelError, match="give a") as error:
            check()
        assert "\n" not in str(error.value)


def test_everything_at_once(single, clip, tmp_path):
    """One file, LoRAs with weights and an embedding: as diffusers' own loaders give it."""
    pytest.importorskip("peft")
    plain = StableDiffusionPipeline.from_pretrained(MODEL_DIR)
    weights = lora(plain.unet, plain.text_encoder)
    save_file(weights, tmp_path / "a.safetensors")
    word = torch.randn(128, generator=seeded())
    save_file({"emb_params": word[None]}, tmp_path / "thing.safetensors")
    pipe = load_pipeline(
        "frame-by-frame", single, device="cpu", loras=[(tmp_path / "a.safetensors", 0.5)],
        embeddings=[tmp_path / "thing.safetensors"],
    )  # fmt: skip
    plain.load_lora_weights(weights, adapter_name="a")
    plain.set_adapters("a", 0.5)
    plain.load_textual_inversion({"thing": word})
    expected, _ = plain.encode_prompt("a thing", "cpu", 1, False)
    assert torch.equal(pipe._encode_prompts(["a thing"]), expected)
    latents = torch.randn(1, 4, 16, 16, generator=seeded())
    with torch.no_grad():
        noise = plain.unet(latents, torch.tensor(501), expected).sample
    found = pipe._predict(latents, torch.tensor(501), expected)[0]
    torch.testing.assert_close(found, noise, rtol=1e-4, atol=1e-5)


def test_every_failure_is_one_line(single, folder, tmp_path):
    save_file({"<x>": torch.ones(7)}, tmp_path / "narrow.safetensors")
    save_file({"unet.x.lora_A.weight": torch.ones(2, 2)}, tmp_path / "other.safetensors")
    missing = load_file(single)
    missing.pop("model.diffusion_model.out.2.bias")
    save_file(missing, tmp_path / "missing.safetensors")
    for options, message in (
        ({"model": tmp_path / "missing.safetensors"}, "weights are missing"),
        ({"embeddings": [tmp_path / "narrow.safetensors"]}, "cannot load the embedding"),
        ({"loras": [(tmp_path / "other.safetensors", 1.0)]}, "other.safetensors"),
        ({"loras": [(tmp_path / "absent.safetensors", 1.0)]}, "is not there"),
    ):
        with pytest.raises(ModelError, match=message) as error:
            load_pipeline("frame-by-frame", **{"model": folder, "device": "cpu", **options})
        assert "\n" not in str(error.value)
