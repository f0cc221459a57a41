"""Runtimes and what else touches a UNet: prepared forms, dtypes, spawned workers."""

import multiprocessing

import pytest
import torch

pytest.importorskip("diffusers")

from tiny_unets import assert_rounding, clip_inputs, one_level_unet, seeded

from tvkernels import BackendError, inflate
from tvkernels.recipes import EI2, FRAME_BY_FRAME
from tvkernels.runtime import accelerate, why_not
from tvkernels.runtime.files import artifact_key
from tvkernels.runtime.program import shape_of


def with_lora(unet):
    peft = pytest.importorskip("peft")
    unet.add_adapter(peft.LoraConfig(r=2, target_modules=["to_q"], init_lora_weights=False))


def replace_a_class(unet):
    block = unet.up_blocks[0].attentions[0].transformer_blocks[0]
    block.__class__ = type("Merging", (type(block),), {})


CHANGES = {
    "loaded": with_lora,
    "weaker": lambda unet: unet.set_adapters(["default"], [0.5]),
    "off": lambda unet: unet.disable_adapters(),
    "free": lambda unet: unet.enable_freeu(s1=0.9, s2=0.2, b1=1.4, b2=1.6),
    "freer": lambda unet: unet.enable_freeu(s1=0.9, s2=0.2, b1=1.4, b2=1.5),
    "merging": replace_a_class,
}


def test_prepared_forms_are_of_the_numbers_that_adapters_bring():
    """They stand in the code: the names and shapes of the weights are the same."""
    unet = one_level_unet()
    with inflate(unet, EI2) as handle:
        shape = shape_of(handle, 3, (8, 8))
        keys = [artifact_key(handle, shape, "x")]
        for change in CHANGES.values():
            change(unet)
            keys.append(artifact_key(handle, shape, "x"))
    assert len(set(keys)) == len(keys)


def test_a_step_that_holds_weights_is_dropped_with_them(monkeypatch):
    """Also where nobody says that they changed."""
    unet, prepared = one_level_unet(), []
    with inflate(unet, EI2) as handle:
        runner = accelerate(unet)
        monkeypatch.setattr(runner, "_module", Prepared(prepared))
        runner(*clip_inputs())
        runner(*clip_inputs())
        assert len(prepared) == 1
        with torch.no_grad():
            next(iter(handle.tuned_parameters().values())).mul_(2)
        runner(*clip_inputs())
        with_lora(unet)
        runner(*clip_inputs())
        unet.disable_adapters()
        runner(*clip_inputs())
    assert len(prepared) == 4


def test_what_was_projected_is_renewed_or_refused():
    unet = one_level_unet()
    sample, t, text = clip_inputs()
    refused = pytest.raises(ValueError, match=r"projected before the UNet changed: call text\(\)")
    with inflate(unet, EI2, generator=seeded()) as handle:
        runner = accelerate(unet)

        def call(time, states):
            return runner(sample, time, states).sample

        (row,), held = runner.times(t[None]), runner.text(text)
        copied = held.clone()
        for parameter in unet.parameters():
            parameter.data.mul_(1.1)  # which moves no version
        runner.weights_changed()
        assert_rounding(call(row, held), call(t, text))
        with refused:
            call(row, copied)
        layer = next(m for n, m in unet.named_modules() if n.endswith("attn2.to_k"))
        hook = layer.register_forward_hook(lambda module, args, out: 2 * out)
        with refused:
            call(t, held)
        hook.remove()
        hook = unet.time_embedding.linear_2.register_forward_hook(lambda m, args, out: 2 * out)
        assert_rounding(call(row, held), call(t, text))
        hook.remove()
        for module in handle._spectral:
            with torch.no_grad():
                module.weight.mul_(1.5)
        before = [module.exact.clone() for module in handle._spectral]
        call(row, held)
        for module, old in zip(handle._spectral, before, strict=True):
            assert_rounding(module.exact, 1.5 * old)  # where compiled code reads it


class Prepared:
    """A runtime whose steps hold weights."""

    OPTIONS, LIVE = (), False

    def __init__(self, prepared):
        self.prepared = prepared

    def serves(self, shape):
        return shape

    def prepare(self, handle, shape):
        self.prepared.append(shape)
        return lambda sample, time, text: sample


@pytest.mark.parametrize("backend", ["onnx", "tensorrt"])
def test_a_dtype_that_a_runtime_lacks_is_told_before(backend):
    reason = "the UNet computes in bfloat16, it takes float32, float16"
    assert reason in why_not(backend, "cpu", torch.bfloat16)
    assert reason not in why_not(backend, "cpu", torch.float16)
    unet = one_level_unet().bfloat16()
    with inflate(unet, FRAME_BY_FRAME), pytest.raises(BackendError, match=reason):
        accelerate(unet, backend)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_unets_dtype_is_the_steps(dtype):
    unet = one_level_unet()
    sample, t, text = clip_inputs()
    with inflate(unet, EI2, generator=seeded()):
        expected = accelerate(unet)(sample, t, text).sample
        runner = accelerate(unet.to(dtype))
        given = runner.times(t[None])[0], runner.text(text.to(dtype))
        found = runner(sample.to(dtype), *given).sample
    assert found.dtype == runner.dtype == dtype
    assert (found.float() - expected).abs().max() < 0.1


def work(unet, inputs, results):
    torch.set_num_threads(1)
    results.put(accelerate(unet)(*inputs).sample.numpy())


@pytest.mark.slow
def test_a_spawned_worker_runs_an_inflated_unet():
    """As on systems without fork, and wherever CUDA is in use."""
    unet = one_level_unet()
    inflate(unet, EI2, generator=seeded())
    expected = accelerate(unet)(*clip_inputs()).sample
    context = multiprocessing.get_context("spawn")
    results = context.SimpleQueue()
    worker = context.Process(target=work, args=(unet, clip_inputs(), results))
    worker.start()
    found = torch.from_numpy(results.get())
    worker.join()
    torch.testing.assert_close(found, expected)
