"""What something else has done to a model, before or after us: hooks, adapters, other classes."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from tvkernels._ranges import is_range

# What diffusers' FreeU sets on up blocks.
FREEU = ("s1", "s2", "b1", "b2")
# diffusers' hooks that swap weights around the call of the module that they sit on.
CASTING = "layerwise_casting"
OFFLOADING = ("group_offloading", "lazy_prefetch_group_offloading")


def is_a(module: nn.Module, *names: str) -> bool:
    """Whether its class or one that it descends from has one of these names.

    Token merging and its kin replace a module's class by a subclass of the old one.
    """
    return any(kind.__name__ in names for kind in type(module).__mro__)


def untouched(module: nn.Module, forward: object = None) -> bool:
    """Whether nothing hooks or wraps its call.

    Args:
        module: asked by itself, without its parts.
        forward: what of ours stands as its `forward`, if anything.
    """
    hooks = (*module._forward_hooks.values(), *module._forward_pre_hooks.values())
    return vars(module).get("forward") is forward and all(map(is_range, hooks))


def is_plain(module: nn.Module, kind: type[nn.Module]) -> bool:
    """Whether its weights alone say what a call gives: no adapter, no other class, no hook."""
    return type(module) is kind and untouched(module)


@dataclass(frozen=True)
class Guests:
    """What was found on a model.

    Args:
        cast: weights are stored in another dtype than they compute in.
        moved: weights come to the device when their module is called, and leave it again.
        weights: changes where weights or what adapters do with them do; of this process alone.
        adapters: what peft's adapters do, `adapter_state` of each, and FreeU's numbers.
    """

    cast: bool
    moved: bool
    weights: tuple
    adapters: tuple


def guests(model: nn.Module) -> Guests:
    """One walk over a model: 0.44 ms for 709 modules with 782 parameters (one x86-64 thread)."""
    cast = moved = False
    versions, identities, adapters = 0, 0, []
    for module in every(model):
        own = module.__dict__
        if "_diffusers_hook" in own:
            hooks = own["_diffusers_hook"].hooks
            cast |= CASTING in hooks
            moved |= any(name in hooks for name in OFFLOADING)
        # On the whole model accelerate's hook brings all of it before the call.
        moved |= "_hf_hook" in own and module is not model
        if "base_layer" in own["_modules"]:
            adapters.append(adapter_state(module))
        if "s1" in own and own["s1"] is not None:
            adapters.append(tuple(own[name] for name in FREEU))
        for parameter in own["_parameters"].values():
            if parameter is not None and not parameter.is_inference():  # which have no version
                identities += id(parameter)
                versions += parameter._version
    found = tuple(adapters)
    return Guests(cast, moved, (identities, versions, found), found)


def adapter_state(layer: nn.Module) -> tuple:
    """What peft's adapters on one layer do: which of them, how strongly, and merged or beside."""
    scaling = getattr(layer, "scaling", {})
    return (
        tuple(getattr(layer, "active_adapters", ())),
        getattr(layer, "disable_adapters", False),
        tuple(getattr(layer, "merged_adapters", ())),
        tuple(scaling.items()),
    )


def every(model: nn.Module) -> list[nn.Module]:
    """`model.modules()` in another order, and far faster; a module shared by two comes twice."""
    found = [model]
    for module in found:  # it grows meanwhile
        if children := module.__dict__["_modules"]:
            found += [child for child in children.values() if child is not None]
    return found
