"""Published video checkpoints under their own names, read into an inflated UNet."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from tvkernels._inflate import InflatedHandle

# Ends a module's name where TCVE's code has a part of the temporal U-Net or a unit.
TCVE_PART = "_TempUnet."
# Of those, names within that differ: the code's and ours.
TCVE_NAMES = ((".upsample_TempUnet.1.", ".conv."), (".conv_3d.", ".conv."))
DEAD = "down_stb_TempUnet."
ADDED = "temporal_unet."


def load_published(unet: nn.Module, state_dict: Mapping[str, Tensor]) -> None:
    """Fills an inflated UNet from a published checkpoint's state dict, strictly.

    Understands Tune-A-Video's names (diffusers 0.11's `UNet3DConditionModel`: the 2-D UNet's names
    with `attn_temp` and `norm_temp` in each transformer block), and TCVE's, whose temporal layers
    stand beside the spatial ones with `_TempUnet` behind their names; of these the units of the
    down blocks, which its code never calls, are not read.

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
    renamed = {_own_name(n): t for n, t in state_dict.items() if not n.startswith(DEAD)}
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
    base = {n: t for n, t in own.items() if ".attn_temp." not in n and not n.startswith(ADDED)}
    handle.keep({n: t for n, t in base.items() if not torch.equal(t, renamed[n].to(t))})
    unet.load_state_dict(renamed)


def _own_name(published: str) -> str:
    """A published name as ours."""
    name = published.replace(".norm_temp.", ".attn_temp.norm.")
    if TCVE_PART not in name:
        return name
    for theirs, own in TCVE_NAMES:
        name = name.replace(theirs, own)
    return ADDED + name.replace(TCVE_PART, ".")
