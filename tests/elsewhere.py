"""A device that is one in name only: tensors say cuda:0 and hold their values on the CPU.

A call that mixes them with the CPU's own is an error, as on a GPU, so that a pipeline that forgets
to bring something along is seen without one. What no tensor shows, streams, events, pinned memory
and kernels, is not there.
"""

import contextlib
from unittest import mock

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, return_and_correct_aliasing
from torch.utils._pytree import tree_leaves, tree_map_only

DEVICE = torch.device("cuda", 0)
# What may see both sides: copies between them, and indices, which a GPU takes from the host.
BETWEEN = ("aten::copy_", "aten::_to_copy", "aten::index", "aten::index_put_")
BELOW_AUTOGRAD = ("AutogradCPU", "AutogradOther", "AutogradMeta", "ADInplaceOrView")


class Elsewhere(Tensor):
    """A tensor of that device.

    C++ takes it for one of "meta", which needs no GPU; Python is told another name.
    """

    device = property(lambda self: DEVICE)
    is_cuda = property(lambda self: True)
    is_cpu = is_meta = property(lambda self: False)

    @staticmethod
    def __new__(cls, values: Tensor):
        return Tensor._make_wrapper_subclass(
            cls, values.size(), strides=values.stride(), storage_offset=values.storage_offset(),
            dtype=values.dtype, device="meta", requires_grad=values.requires_grad,
        )  # fmt: skip

    def __init__(self, values: Tensor):
        self.values = values

    def __getitem__(self, index):
        listed = index if isinstance(index, tuple) else (index,)
        listed = tuple(torch.tensor(i) if isinstance(i, list) else i for i in listed)
        return super().__getitem__(listed if isinstance(index, tuple) else listed[0])

    def new_tensor(self, data, *, dtype=None):
        return torch.tensor(data, dtype=dtype or self.dtype).to(DEVICE)

    def __repr__(self, **kwargs):
        return f"Elsewhere({self.values})"

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        return _call(function, args, kwargs or {})


class _Mode(TorchDispatchMode):
    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        return _call(function, args, kwargs or {})


def _call(function, args, kwargs):
    name = function._schema.name
    given = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
    there = any(isinstance(x, Elsewhere) for x in given)
    if there and name not in BETWEEN:
        for x in given:
            if not isinstance(x, Elsewhere) and x.dim():
                raise RuntimeError(f"{name}: {tuple(x.shape)} is on the cpu, others on {DEVICE}")
    own_args, own_kwargs = tree_map_only(Elsewhere, lambda x: x.values, (args, kwargs))
    if own_kwargs.get("device") is not None:
        there = torch.device(own_kwargs["device"]).type != "cpu"
        own_kwargs["device"] = "cpu"
    elif name == "aten::copy_":
        there = isinstance(args[0], Elsewhere)
    with _ops_of_ours() if function.namespace == "tvkernels" else contextlib.nullcontext():
        result = function(*own_args, **own_kwargs)
    if not there:
        return result
    result = tree_map_only(
        Tensor, lambda x: x if isinstance(x, Elsewhere) else Elsewhere(x), result
    )
    return return_and_correct_aliasing(function, args, kwargs, result)


@contextlib.contextmanager
def _ops_of_ours():
    """As where they are called without a mode: a backward may ask autograd itself."""
    excluded = torch._C._dispatch_tls_local_exclude_set()
    for key in BELOW_AUTOGRAD:
        excluded = excluded.remove(getattr(torch._C.DispatchKey, key))
    included = torch._C._dispatch_tls_local_include_set()
    with torch.no_grad(), torch._C._ForceDispatchKeyGuard(included, excluded):
        yield


@contextlib.contextmanager
def elsewhere():
    """Inside, "cuda" is that device; gives its name."""
    make = torch.tensor  # does not ask a mode

    def tensor(data, *, device="cpu", **kwargs):
        return make(data, **kwargs).to(device)

    swaps = torch.__future__.get_swap_module_params_on_conversion()
    torch.__future__.set_swap_module_params_on_conversion(True)
    try:
        with (
            mock.patch.object(torch, "tensor", tensor),
            mock.patch.object(torch.cuda, "_lazy_init", lambda: None),
            _Mode(),
        ):
            yield DEVICE
    finally:
        torch.__future__.set_swap_module_params_on_conversion(swaps)
