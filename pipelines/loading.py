"""A method's pipeline from what users have on their disks: models, LoRAs, embeddings."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from tvkernels.pipelines import pipeline_class
from tvkernels.pipelines.checks import ModelError, check_embedding, check_lora, check_model

if TYPE_CHECKING:
    import torch

    from tvkernels.pipelines.one_shot import OneShotPipeline, Settings


def load_pipeline(
    method: str,
    model: str | Path,
    backend: str = "auto",
    *,
    variant: str | None = None,
    dtype: torch.dtype | None = None,
    device: torch.device | str = "auto",
    offload: bool = False,
    loras: Sequence[tuple[str | Path, float]] = (),
    embeddings: Sequence[str | Path] = (),
    settings: Settings | None = None,
    **options,
) -> OneShotPipeline:
    """A method's pipeline on a device, without loading bars.

    Args:
        method: a name of `METHODS`.
        model: a folder in diffusers' layout, a .safetensors file in Stable Diffusion's, or a hub
            name.
        backend: of the attention ops.
        variant: of the folder's files, such as fp16.
        dtype: of all models; None takes float32.
        device: as `tvkernels.devices.pick_device` takes it.
        offload: models that are not at work wait in the host's memory.
        loras: files of LoRA weights, and how much of each counts.
        embeddings: files of textual inversions; `checks.check_embedding` tells the word of each.
        settings: other numbers than the method's own.
        options: of the method's constructor, or of `from_pretrained`.
    Raises:
        ModelError: a file is not there, is a pickle, or does not fit: one line.
        DeviceError: no such device.
    """
    import torch

    from tvkernels.devices import pick_device

    device = pick_device(str(device))
    check_model(model, variant)
    loras = [(check_lora(file), weight) for file, weight in loras]
    words = [check_embedding(file) for file in embeddings]
    options |= {"backend": backend, **dtype_option(dtype or torch.float32)}
    if settings is not None:
        options["settings"] = settings
    kind = quiet_class(method)
    with loading(f"the model {model}"):
        if Path(model).is_file():
            pipe = kind.from_single_file(str(model), **options)
        else:
            # Pickles are not looked for on a hub either.
            options |= {"variant": variant, "use_safetensors": True}
            pipe = kind.from_pretrained(str(model), **options)
    names = [f"lora{number}" for number in range(len(loras))]
    for name, (file, _) in zip(names, loras, strict=True):
        with loading(f"the LoRA {file}"):
            pipe.load_lora_weights(str(file), adapter_name=name)
    if names:
        pipe.set_adapters(names, [weight for _, weight in loras])
    for file, word in zip(embeddings, words, strict=True):
        with loading(f"the embedding {file}"):
            pipe.load_textual_inversion(str(file), token=word)
    if offload:
        pipe.enable_model_cpu_offload(device=device)
        return pipe
    return pipe.to(device)


def quiet_class(method: str) -> type[OneShotPipeline]:
    """A method's class, with the libraries' own bars and advice switched off."""
    import diffusers
    import transformers

    for library in (diffusers, transformers):
        library.utils.logging.set_verbosity_error()
        library.utils.logging.disable_progress_bar()
    return pipeline_class(method)


def dtype_option(dtype: torch.dtype) -> dict[str, torch.dtype]:
    """The dtype under the name that this diffusers has for it: `torch_dtype` up to 0.39."""
    from diffusers.utils import deprecation_utils

    return {"dtype" if hasattr(deprecation_utils, "_resolve_dtype") else "torch_dtype": dtype}


@contextmanager
def loading(what: str) -> Iterator[None]:
    """Says in one line what libraries raise when a file does not fit.

    Raises:
        ModelError: instead of their errors.
    """
    from diffusers.loaders.single_file_utils import SingleFileComponentError
    from safetensors import SafetensorError

    from tvkernels._dispatch import BackendError
    from tvkernels.devices import out_of_memory

    kinds = (OSError, ValueError, TypeError, LookupError, AttributeError, RuntimeError)
    try:
        yield
    except (ModelError, BackendError):
        raise
    except (*kinds, SafetensorError, SingleFileComponentError) as error:
        if out_of_memory(error):
            raise
        reason = " ".join(str(error).split()) or type(error).__name__
        if isinstance(error, LookupError):  # says which key or index, and nothing else
            reason = f"its names are not those of such a file ({type(error).__name__}: {reason})"
        if "meta tensor" in reason:
            reason = "weights are missing in it"
        raise ModelError(f"cannot load {what}: {reason[:300]}") from error
