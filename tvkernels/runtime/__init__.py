"""The same UNet behind one call, whatever runs it.

`accelerate(unet, backend)` takes an inflated UNet and returns a `Runner`. A backend is one file
here:

| `OPTIONS` | names of its options |
| `LIVE` | whether its steps read the UNet's own weights and take tables of patterns |
| `serves(shape)` | what of a call's shape a prepared step is bound to |
| `DTYPES` | those of a UNet that it takes |
| `why_not(device)` | every reason against it for a UNet on that kind of device |
| `prepare(handle, shape, **options)` | a step: (sample, timestep, text[, tables]) -> noise |
"""

from tvkernels.runtime.runner import BACKENDS, Runner, accelerate, why_not

__all__ = ["BACKENDS", "Runner", "accelerate", "why_not"]
