"""Published video checkpoints under their own names, read into an inflated UNet."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from tvkernels.inflate import InflatedHandle


def load_published(unet: nn.Module, state_dict: Mapping[str, Tensor]) -> None:
    """Fills an inflated UNet from a published checkpoint's state dict, strictly.

    Understands Tune-A-Video's names (diffusers 0.11's `UNet3DConditionModel`: the 2-D UNet's names
    with `attn_temp` and `norm_temp` in each transformer block).

    Args:
        unet: a UNet that `tvkernels.inflate` turned into the checkpoint's recipe.
        state_dict: name -> tensor, the 2-D part and the added modules.
    Raises:
        ValueError: the UNet is not inflated, or a name is missing, unknown, or of another shape;
            nothing is loaded then.
    """
    handle = getattr(unet, "_tvkernels_handle", None)
    if not isinstance(handle, InflatedHandle):
        raise ValueError("inflate the UNet to the checkpoint's recipe first")
    renamed = {n.replace(".norm_temp.", ".attn_temp.norm."): t for n, t in state_dict.items()}
    own = unet.state_dict()
    problems = [f"{name} is missing" for name in own.keys() - renamed.keys()]
    problems += [f"{name} is unknown" for name in renamed.keys() - own.keys()]
    problems += [
        f"{name} is {tuple(renamed[name].shape)}, the UNet's {tuple(own[name].shape)}"
        for name in own.keys() & renamed.keys()
        if renamed[name].shape != own[name].shape
    ]
    if problems:
        problems.sort()
        raise ValueError(
            f"the checkpoint does not fit a UNet of the recipe {handle.recipe.name}: "
            f"{'; '.join(problems[:3])} ({len(problems)} in all)"
        )
    # A checkpoint tuned from other base weights changes more than `remove` knows of.
    base = {name: tensor for name, tensor in own.items() if ".attn_temp." not in name}
    handle.keep({n: t for n, t in base.items() if not torch.equal(t, renamed[n].to(t))})
    unet.load_state_dict(renamed)
