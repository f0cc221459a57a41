"""A linear layer divided by its largest singular value."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from tvkernels.ops.power_iteration.api import power_iteration
from tvkernels.ops.spectral_linear.api import spectral_linear, spectral_sigma


class SpectralLinear(nn.Linear):
    """x W^T / sigma_max(W) + b (EI2, eq. 8).

    While gradients reach W, sigma is u^T W v with u and v from `power_iterate`, which the training
    step calls once (not the forward pass: under gradient checkpointing that runs twice). Otherwise
    sigma is exact, computed once and again only after the weight was trained, written or loaded.
    """

    def __init__(self, in_features: int, out_features: int, bias: bool = True, **factory):
        super().__init__(in_features, out_features, bias, **factory)
        device = self.weight.device
        self.register_buffer("u", torch.ones(out_features, device=device))
        self.register_buffer("v", torch.ones(in_features, device=device))
        self.register_buffer("exact", torch.ones((), device=device), persistent=False)
        self._stale, self._seen = True, None
        self._found: Tensor | None = None  # what `exact` holds
        self.offloaded = False  # and loses, where its old value is fetched for each call
        self.power_iterate(15)  # from any start; one a step follows the weight from there

    @torch.no_grad()
    def power_iterate(self, steps: int = 1) -> None:
        """Moves u and v towards the leading singular vectors of the weight."""
        u, v = power_iteration(self.weight, self.u, steps)
        self.u.copy_(u)
        self.v.copy_(v)

    @property
    def trains(self) -> bool:
        """Whether gradients reach the weight in the call under way."""
        return torch.is_grad_enabled() and self.weight.requires_grad

    @property
    def sigma(self) -> Tensor:
        """The largest singular value, 0-d, float32 at least."""
        if self.trains:
            self._stale = True
            # Cloned, as the next step writes u and v that this step's backward pass still reads.
            return spectral_sigma(self.weight, self.u.clone(), self.v.clone())
        if not torch.compiler.is_compiling() and not self.weight.is_inference():
            seen = (id(self.weight), self.weight._version)
            self._stale |= seen != self._seen
            self._seen = seen
        if self._stale:
            self._found = spectral_sigma(self.weight.detach()).to(self.exact)
            self.exact.copy_(self._found)
            self._stale = False
        return self._found if self.offloaded else self.exact

    def weight_changed(self) -> None:
        """To be called after a change that a weight's version does not show."""
        self._stale = True

    def fold(self) -> Tensor:
        """W / sigma_max(W), the weight of the equal plain linear layer."""
        sigma = spectral_sigma(self.weight.detach())
        return self.weight.detach() / torch.where(sigma > 0, sigma, 1).to(self.weight)

    def forward(self, x: Tensor) -> Tensor:
        """[..., in] -> [..., out]."""
        weight, bias = self.weight, self.bias
        if torch.is_autocast_enabled(x.device.type):
            dtype = torch.get_autocast_dtype(x.device.type)
            x, weight, bias = (None if t is None else t.to(dtype) for t in (x, weight, bias))
        return spectral_linear(x, weight, bias, sigma=self.sigma)

    def _apply(self, fn, *args, **kwargs):
        """Moves with the module; u, v and sigma stay float32 at least."""
        super()._apply(fn, *args, **kwargs)
        wide = self.weight.dtype if self.weight.dtype == torch.float64 else torch.float32
        self.u, self.v, self.exact = (t.to(wide) for t in (self.u, self.v, self.exact))
        self._stale = True
        return self

    def _load_from_state_dict(self, *args, **kwargs):
        super()._load_from_state_dict(*args, **kwargs)
        self._stale = True
