"""A TensorRT engine called with torch's CUDA tensors, on torch's stream, without copies.

Unproven: no machine with a GPU and TensorRT has run this; it follows the API's documentation
(IRuntime.deserialize_cuda_engine, IExecutionContext.execute_async_v3, OnnxParserRefitter).
"""

from __future__ import annotations

from pathlib import Path
from types import ModuleType

import torch
from torch import Tensor

from tvkernels.runtime import files
from tvkernels.runtime.files import ArtifactError
from tvkernels.runtime.program import INPUTS, OUTPUT


class Engine:
    """A step.

    Args:
        trt: the library that built it.
        path: the engine's file.
        about: its metadata, verified.
        device: a CUDA device.
    """

    def __init__(self, trt: ModuleType, path: Path, about: dict, device: torch.device):
        self.about, self.device = about, device
        self._logger = trt.Logger(trt.Logger.ERROR)
        self._runtime = trt.Runtime(self._logger)
        with torch.cuda.device(device):
            self.engine = self._runtime.deserialize_cuda_engine(path.read_bytes())
            if self.engine is None:
                raise ArtifactError(f"TensorRT does not load {path}: build it again")
            if about["weights"] == "stripped":
                self._restore(trt, path.with_name(about["onnx"]))
            self.context = self.engine.create_execution_context()
        self.types = {
            name: getattr(torch, str(trt.nptype(self.engine.get_tensor_dtype(name)).__name__))
            for name in (*INPUTS, OUTPUT)
        }

    def _restore(self, trt: ModuleType, source: Path) -> None:
        """Puts back the weights that were left out of the engine."""
        refitter = trt.Refitter(self.engine, self._logger)
        parser = trt.OnnxParserRefitter(refitter, self._logger)
        if not (parser.refit_from_file(str(source)) and refitter.refit_cuda_engine()):
            raise ArtifactError(f"the weights of {source} do not fit the engine: build it again")

    def __call__(self, sample: Tensor, timestep: Tensor, text: Tensor) -> Tensor:
        """As `VideoStep.forward`.

        Raises:
            ValueError: shapes or dtypes are not the export's, or beyond the engine's profile.
        """
        files.check_call(self.about, sample, timestep, text)
        check_profile(self.about, {INPUTS[0]: sample, INPUTS[2]: text})
        result = torch.empty(sample.shape, dtype=self.types[OUTPUT], device=self.device)
        given = dict(zip(INPUTS, (sample, timestep, text), strict=True))
        # Kept until the launch: only what is of another dtype or device, or not dense, is copied.
        given = {n: x.to(self.device, self.types[n]).contiguous() for n, x in given.items()}
        for name, tensor in given.items():
            self.context.set_input_shape(name, tuple(tensor.shape))
            self.context.set_tensor_address(name, tensor.data_ptr())
        self.context.set_tensor_address(OUTPUT, result.data_ptr())
        stream = torch.cuda.current_stream(self.device)
        if not self.context.execute_async_v3(stream.cuda_stream):
            raise RuntimeError("TensorRT did not run the engine")
        return result.to(sample.dtype)


def check_profile(about: dict, given: dict[str, Tensor]) -> None:
    """Raises ValueError where a shape lies outside what the engine was built for."""
    for name, tensor in given.items():
        least, _, most = about["profile"][name]
        if not all(a <= n <= b for a, n, b in zip(least, tensor.shape, most, strict=True)):
            raise ValueError(
                f"this engine takes {name} from {least} to {most}, got {list(tensor.shape)}: "
                "build one for this shape"
            )
