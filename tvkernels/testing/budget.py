"""The error budget of design section 5: no hand-set tolerances."""

from __future__ import annotations

import torch
from torch import Tensor


def assert_error_budget(
    actual: Tensor, low: Tensor, exact: Tensor, *, factor: float = 2.0, what: str = "output"
) -> None:
    """Checks ``max|actual - exact| <= factor * (max|low - exact| + one rounding step)``.

    Args:
        actual: the result under test.
        low: the same maths in plain PyTorch at actual's dtype.
        exact: the same maths in float64.
        factor: allowed multiple.
        what: name of the result in the message.
    Raises:
        AssertionError: shape, dtype or error out of bounds, or a value that is not finite.
    """
    error, bound = error_and_budget(actual, low, exact, factor=factor, what=what)
    assert error <= bound, f"{what}: error {error:.3e} above its budget of {bound:.3e}"


def error_and_budget(
    actual: Tensor, low: Tensor, exact: Tensor, *, factor: float = 2.0, what: str = "output"
) -> tuple[float, float]:
    """The two sides of `assert_error_budget`, which explains the arguments.

    Raises:
        AssertionError: shape or dtype differ, or a value is not finite.
    """
    assert actual.shape == exact.shape, f"{what}: shape {actual.shape}, expected {exact.shape}"
    assert actual.dtype == low.dtype, f"{what}: dtype {actual.dtype}, expected {low.dtype}"
    if not exact.numel():
        return 0.0, 0.0
    assert torch.isfinite(actual).all(), f"{what} holds values that are not finite"
    exact = exact.double()
    error = (actual.double() - exact).abs().max().item()
    step = torch.finfo(actual.dtype).eps * exact.abs().max().item()
    return error, factor * ((low.double() - exact).abs().max().item() + step)
