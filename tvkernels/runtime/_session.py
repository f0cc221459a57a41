"""An ONNX file in ONNX Runtime, called with torch tensors that it reads and writes in place."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from tvkernels.runtime import files
from tvkernels.runtime.files import ArtifactError
from tvkernels.runtime.program import INPUTS, OUTPUT

# Where a model given as bytes finds the weights that lie beside its file.
BESIDE = "session.model_external_initializers_file_folder_path"


class Session:
    """ONNX Runtime called with torch tensors, which it reads and writes in place.

    Args:
        path: the file.
        about: its metadata.
        weights, threads, whole: as for `load`.
    """

    def __init__(self, path: Path, about: dict, weights, threads: int | None, whole: bool):
        import onnxruntime

        self.about = about
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads or torch.get_num_threads()
        self._held = []  # a session reads what it was given for as long as it lives
        source = str(path)
        if weights:
            source, given = _with_weights(path, about, weights, whole)
            # Injected before constants are folded, unlike `add_initializer`'s, which came too late
            # for every weight behind a Transpose.
            for value in given.values():
                self._held.append(onnxruntime.OrtValue.ortvalue_from_numpy(value.numpy()))
            options.add_external_initializers([*given], self._held)
            options.add_session_config_entry(BESIDE, str(path.parent))
        self.device = "cpu"
        providers = ["CPUExecutionProvider"]
        if (
            torch.cuda.is_available()
            and "CUDAExecutionProvider" in onnxruntime.get_available_providers()
        ):
            self.device = "cuda"
            stream = {"user_compute_stream": str(torch.cuda.current_stream().cuda_stream)}
            providers.insert(0, ("CUDAExecutionProvider", stream))
        try:
            self.session = onnxruntime.InferenceSession(source, options, providers)
        except Exception as error:  # its exceptions share no base class of their own
            first = str(error).strip().splitlines()[0]
            raise ArtifactError(f"ONNX Runtime does not load {path}: {first}") from error

    def __call__(self, sample: Tensor, timestep: Tensor, text: Tensor) -> Tensor:
        """As `VideoStep.forward`.

        Raises:
            ValueError: shapes or dtypes are not the export's.
        """
        import numpy as np

        files.check_call(self.about, sample, timestep, text)
        binding = self.session.io_binding()
        result = torch.empty_like(
            sample, device=self.device, memory_format=torch.contiguous_format
        )
        half = np.float16 if self.about["dtype"] == "float16" else np.float32
        time = half if self.about["shape"]["time"] is not None else np.int64
        kept = []
        for name, tensor, kind in zip(
            INPUTS, (sample, timestep, text), (half, time, half), strict=True
        ):
            dtype = getattr(torch, np.dtype(kind).name)
            kept.append(tensor.to(self.device, dtype).contiguous())
            binding.bind_input(name, self.device, 0, kind, list(tensor.shape), kept[-1].data_ptr())
        binding.bind_output(OUTPUT, self.device, 0, half, list(result.shape), result.data_ptr())
        self.session.run_with_iobinding(binding)
        return result.to(sample.device)


def _with_weights(path: Path, about: dict, weights: Mapping[str, Tensor], whole: bool):
    """The file's bytes with some initializers external, and those initializers' values.

    The sigma of a spectrally normalised weight follows the weight.

    Args:
        whole: the weights are a UNet's, of which a program may need a part.
    Raises:
        ArtifactError: a name or shape that the file does not have.
    """
    import onnx

    from tvkernels.ops.spectral_linear.api import spectral_sigma

    model = onnx.load(path, load_external_data=False)
    own = {entry.name: entry for entry in model.graph.initializer}
    dtype = getattr(torch, about["dtype"])
    given = {}
    for name, value in weights.items():
        name, value = about["prefix"] + name, value.detach().cpu()
        if name not in own and (whole or name.rpartition(".")[2] in ("u", "v")):
            continue  # not of the program: as the power iteration, which an exported sigma ends
        if name not in own or list(own[name].dims) != list(value.shape):
            raise ArtifactError(
                f"weights do not fit {path}: it has no {name} of shape {list(value.shape)}"
            )
        sigma = name.removesuffix("weight") + "exact"
        if name.endswith(".weight") and sigma in own:
            given[sigma] = spectral_sigma(value)
        given[name] = value.to(dtype).contiguous()
    for name, value in given.items():
        entry = own[name]
        entry.ClearField("raw_data")
        entry.data_location = onnx.TensorProto.EXTERNAL
        del entry.external_data[:]
        size = value.numel() * value.element_size()
        for key, text in (("location", "given"), ("offset", "0"), ("length", str(size))):
            entry.external_data.add(key=key, value=text)
    return model.SerializeToString(), given
