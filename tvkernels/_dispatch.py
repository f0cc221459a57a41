"""One registration for every op: schema, fake, backends with reasons, exact gradients.

An op's api.py declares an `Op`; its backends are the modules beside it. Each backend module has
``why_not(*args) -> list[str]`` and ``forward(*args)``, may have ``backward(grads, *args)``, and
``why_not_backward(*args)`` where that does not serve every call; args are those of the schema
without the closing backend name.
"""

from __future__ import annotations

import contextlib
import contextvars
import importlib
import warnings
from collections.abc import Callable, Iterator, Sequence
from types import ModuleType

import torch
from torch import Tensor

from tvkernels._ranges import span

# The order "auto" tries them in: native is our C++ for CPUs, cpu composed PyTorch. CUDA C++ comes
# after Triton until a measurement puts it first: it takes what Triton has a reason against.
BACKENDS = ("triton", "cuda", "native", "cpu", "reference")
# "auto" leaves tensors on a CPU to the other backends: Triton's interpreter, the one thing here
# that could take them, is for tests and runs by name.
ON_DEVICE = ("cuda", "triton")
# Kernels of our own: autograd does not see inside, so where one brings no backward, cpu's serves.
OPAQUE = (*ON_DEVICE, "native")
_AUTO = contextvars.ContextVar("backends that auto tries", default=BACKENDS)
PLAIN = (Tensor, torch.nn.Parameter)
LIBRARY = torch.library.Library("tvkernels", "DEF")


def exporting() -> bool:
    """Whether torch.export traces, so that an op is to be what it decomposes to.

    Dynamo of torch 2.11 takes every compilation for an export. An export that goes through it,
    strict=True, keeps the ops themselves.
    """
    return torch.compiler.is_exporting() and not torch.compiler.is_dynamo_compiling()


class _Ops(dict[str, "Op"]):
    """name -> `Op`. One whose contract has not been imported yet is, when it is asked for."""

    def __missing__(self, name: str) -> Op:
        importlib.import_module(f"tvkernels.ops.{name}.api")
        return dict(self)[name]


OPS = _Ops()


@contextlib.contextmanager
def auto_takes(*names: str) -> Iterator[None]:
    """Inside, "auto" tries these backends alone, in this order: for tests and comparisons."""
    unknown = set(names) - set(BACKENDS)
    if unknown or not names:
        raise ValueError(f"unknown backends {sorted(unknown)}: use {', '.join(BACKENDS)}")
    token = _AUTO.set(names)
    try:
        yield
    finally:
        _AUTO.reset(token)


class BackendError(RuntimeError):
    """No backend, or not the named one, can run this call; the text lists every reason."""


class Op:
    """One registered op of the namespace `tvkernels`.

    Args:
        name: the op's name and the name of its folder in `tvkernels.ops`.
        args: schema of the arguments without the backend, "Tensor q, Tensor k, float? scale".
        returns: schema of the results, "Tensor" or "(Tensor, Tensor)".
        fake: shapes of the results: called with the arguments, returns empty tensors.
        backends: names of the backend modules that exist, in any order.
        differentiable: positions of the arguments that gradients reach, () for none.
    """

    def __init__(
        self,
        name: str,
        args: str,
        returns: str,
        fake: Callable,
        *,
        backends: Sequence[str] = ("cpu", "reference"),
        differentiable: Sequence[int] = (),
    ):
        self.name, self.backends, self.differentiable = name, tuple(backends), differentiable
        self._modules: dict[str, ModuleType] = {}
        OPS[name] = self
        self.overload = self._define(
            name, f"{args}, str backend", returns, self._run, lambda *a: fake(*a[:-1])
        )
        self._mutates = self.overload._schema.is_mutable  # autograd counts what changes
        if differentiable:
            self._backward = self._define(
                f"{name}_backward",
                f"Tensor?[] grads, {args}, str backend",
                "Tensor[]",
                self._run_backward,
                lambda grads, *a: [torch.empty_like(a[i]) for i in self._reached(a)],
            )
            torch.library.register_autograd(
                f"tvkernels::{name}",
                self._autograd_backward,
                setup_context=self._setup_context,
                lib=LIBRARY,
            )

    @staticmethod
    def _define(name: str, args: str, returns: str, run: Callable, fake: Callable):
        LIBRARY.define(f"{name}({args}) -> {returns}", tags=(torch.Tag.pt2_compliant_tag,))
        LIBRARY.impl(name, run, "CompositeExplicitAutograd")
        torch.library.register_fake(f"tvkernels::{name}", fake, lib=LIBRARY)
        return getattr(torch.ops.tvkernels, name).default

    def __call__(self, *args, backend: str = "auto"):
        """Calls the registered op; gradients, compile and export see one node.

        Where nothing looks, its backend is called at once: PyTorch's way through a registered
        Python op takes 40 us of the 105 that a call took (one thread of an EPYC).

        Raises:
            ValueError: no backend has this name.
            RuntimeError: an input requires gradients and the op has none.
        """
        if backend != "auto" and backend not in BACKENDS:
            raise ValueError(f"unknown backend {backend!r}: use auto, {', '.join(BACKENDS)}")
        lost = not self.differentiable and torch.is_grad_enabled()
        if lost and any(isinstance(a, Tensor) and a.requires_grad for a in args):
            raise RuntimeError(
                f"{self.name} has no gradients, but an input requires them: "
                "call it under torch.no_grad() or detach the input"
            )
        if not self._mutates and _unseen(args):
            return self._run(*args, backend)
        return self.overload(*args, backend)

    def backend(self, name: str) -> ModuleType:
        """The backend's module, imported on first use."""
        if name not in self._modules:
            self._modules[name] = importlib.import_module(f"tvkernels.ops.{self.name}.{name}")
        return self._modules[name]

    def why_not(self, name: str, *args) -> list[str]:
        """Every reason against running this call on backend `name`; empty if it runs."""
        if name not in self.backends:
            return [f"{self.name} has no {name} backend in this version"]
        try:
            module = self.backend(name)
        except ImportError as error:
            return [str(error)]
        return module.why_not(*args)

    def resolve(self, backend: str, *args) -> ModuleType:
        """The module that runs this call.

        Raises:
            BackendError: the named backend cannot run it, or with "auto" none can.
        """
        names = _AUTO.get() if backend == "auto" else (backend,)
        reasons = {}
        on_cpu = backend == "auto" and _device_type(args) == "cpu"
        for name in names:
            if on_cpu and name in ON_DEVICE and name in self.backends:
                # Not asked: that would load triton, 66 MiB of memory.
                reasons[name] = ["on CPU tensors it runs by name only"]
                continue
            reasons[name] = self.why_not(name, *args)
            if not reasons[name]:
                slow = name == "reference" or (name == "cpu" and _device_type(args) == "cuda")
                if backend == "auto" and slow and len(names) > 1:
                    _say_once(self.name, tuple(f"{n}: {', '.join(r)}" for n, r in reasons.items()))
                return self.backend(name)
        lines = [f"  {name}: {reason}" for name, why in reasons.items() for reason in why]
        raise BackendError("\n".join([f"{self.name}: no backend can run this call", *lines]))

    def _run(self, *args):
        *args, backend = args
        with span("op", self.name), _no_autocast(args):
            return self.resolve(backend, *args).forward(*args)

    def _reached(self, args) -> list[int]:
        return [i for i in self.differentiable if args[i] is not None]

    def _run_backward(self, grads, *args):
        *args, backend = args
        module = self.resolve(backend, *args)
        with span("op", f"{self.name}_backward"), _no_autocast(args):
            if backend_name(module) in OPAQUE and not brings_backward(module, args):
                module = self.backend("cpu")  # composed PyTorch, which runs on every device
            if hasattr(module, "backward"):
                found = module.backward(grads, *args)
            else:
                found = self._recompute(module.forward, grads, args)
        # No result may be an input itself: a compiler reuses an input's memory after its last use.
        found = [g.clone() if any(g is given for given in grads) else g for g in found]
        reached = self._reached(args)
        return [_laid_out_as(args[i], g) for i, g in zip(reached, found, strict=True)]

    def _recompute(self, forward: Callable, grads, args) -> list[Tensor]:
        """Exact gradients of a backend composed of torch ops, by running it again."""
        args, reached = list(args), self._reached(args)
        for i in reached:
            args[i] = args[i].detach().requires_grad_()
        with torch.enable_grad():
            results = forward(*args)
        results = results if isinstance(results, tuple) else (results,)
        pairs = zip(results, grads, strict=True)
        pairs = [(r, g) for r, g in pairs if g is not None and r.requires_grad]
        leaves = [args[i] for i in reached]
        found = [None] * len(leaves)
        if pairs:
            outs, outer = zip(*pairs, strict=True)
            found = torch.autograd.grad(outs, leaves, outer, allow_unused=True)
        return [
            torch.zeros_like(leaf) if g is None else torch.empty_like(leaf).copy_(g)
            for leaf, g in zip(leaves, found, strict=True)
        ]

    def _setup_context(self, ctx, inputs, output):
        tensors = [x for x in inputs if isinstance(x, Tensor)]
        ctx.save_for_backward(*tensors)
        ctx.others = [None if isinstance(x, Tensor) else x for x in inputs]
        ctx.tensor_at = [isinstance(x, Tensor) for x in inputs]
        ctx.set_materialize_grads(False)

    def _autograd_backward(self, ctx, *grads):
        saved = iter(ctx.saved_tensors)
        args = [
            next(saved) if is_tensor else other
            for is_tensor, other in zip(ctx.tensor_at, ctx.others, strict=True)
        ]
        results = [None] * len(args)
        if any(g is not None for g in grads):
            reached = self._reached(args)
            found = self._backward(list(grads), *args)
            for i, grad in zip(reached, _once(found, self.name, args), strict=True):
                results[i] = grad if ctx.needs_input_grad[i] else None
        return tuple(results)


def _unseen(args) -> bool:
    """Whether no gradient, compiler, tracer, mode, transform or profiler is to see a call as an
    op, and its tensors are plain ones on a CPU or a GPU.
    """
    if (
        torch.compiler.is_compiling()
        or torch._C._len_torch_dispatch_stack()
        or torch._C._get_tracing_state() is not None
        or torch._C._functorch.peek_interpreter_stack() is not None
        or torch.autograd.forward_ad._current_level >= 0
        or torch.autograd._profiler_enabled()
    ):
        return False
    graded = torch.is_grad_enabled()
    for x in args:
        if isinstance(x, Tensor) and (
            type(x) not in PLAIN or not (x.is_cpu or x.is_cuda) or x.is_neg()
            or (graded and x.requires_grad)
        ):  # fmt: skip
            return False
    return True


def _once(grads: list[Tensor], name: str, args) -> Sequence[Tensor]:
    """Gradients whose own derivative is an error, where one may be asked for.

    Else it would be silently incomplete. A transform of torch.func asks each time, and sees none.
    """
    asked = torch.is_grad_enabled() and torch._C._functorch.peek_interpreter_stack() is None
    if not asked or not any(isinstance(x, Tensor) and x.requires_grad for x in args):
        return grads
    refuse = torch._C._functions.DelayedError(f"{name} can be differentiated once", len(grads))
    found = refuse(*(g.detach().requires_grad_() for g in grads))
    return found if isinstance(found, tuple) else (found,)


def _laid_out_as(x: Tensor, grad: Tensor) -> Tensor:
    """`grad`, copied if need be to the strides that the registered fake promises."""
    expected = torch.empty_like(x, device="meta").stride()
    return grad if grad.stride() == expected else torch.empty_like(x).copy_(grad)


def backend_name(module: ModuleType) -> str:
    """The name of a backend's module, "cpu"."""
    return module.__name__.rpartition(".")[2]


def brings_backward(module: ModuleType, args) -> bool:
    """Whether a backend has a backward for this call; `why_not_backward(*args)` may refuse it."""
    refuse = getattr(module, "why_not_backward", lambda *args: [])
    return hasattr(module, "backward") and not refuse(*args)


def _device_type(args) -> str:
    for x in args:
        if isinstance(x, Tensor):
            return "cpu" if x.is_cpu else x.device.type
    return "cpu"


def _no_autocast(args):
    """Kernels see the dtypes they are given: autocast inside would break the contract."""
    device = _device_type(args)
    if torch.is_autocast_enabled(device):
        return torch.autocast(device, enabled=False)
    return contextlib.nullcontext()


_SAID: set[str] = set()


def _say_once(op: str, reasons: tuple[str, ...]) -> None:
    if op not in _SAID:
        _SAID.add(op)
        warnings.warn(
            f"{op} runs without a kernel: {'; '.join(reasons)}", RuntimeWarning, stacklevel=4
        )
