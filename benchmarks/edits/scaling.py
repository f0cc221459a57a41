"""How time and memory grow with frames and tokens: least squares in logarithms over the rows."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

# What else must agree for rows to lie on one curve.
SAME = ("method", "model", "backend", "dtype", "provider", "runtime", "phase", "device")
QUANTITIES = ("seconds", "peak_bytes")


@dataclass(frozen=True)
class Fit:
    """y = scale * x ** exponent.

    Args:
        exponent, scale: the curve's.
        error: standard error of the exponent; None for two points, which leave none.
        residual: root mean square of the points' distances from the curve, as a share of it.
        points: their number.
    """

    exponent: float
    scale: float
    error: float | None
    residual: float
    points: int


@dataclass(frozen=True)
class Curve:
    """A fit, and what it is of.

    Args:
        of: values of `SAME`, and of "frames" or "size", whichever is held.
        quantity: of `QUANTITIES`.
        against: "frames" or "tokens" of one frame's latents.
        fit: over the values of `against` that were measured.
    """

    of: dict
    quantity: str
    against: str
    fit: Fit


def fit(xs: Sequence[float], ys: Sequence[float]) -> Fit:
    """The power law nearest to points above zero, in the logarithms' least squares.

    Raises:
        ValueError: fewer than two different xs, or a value that is not above zero.
    """
    x, y = np.asarray(xs, np.float64), np.asarray(ys, np.float64)
    if len(np.unique(x)) < 2 or (x <= 0).any() or (y <= 0).any():
        raise ValueError("a power law needs two different points, all above zero")
    x, y = np.log(x), np.log(y)
    centred = x - x.mean()
    slope = (centred @ y) / (centred @ centred)
    start = y.mean() - slope * x.mean()
    left = y - start - slope * x
    error = None
    if len(x) > 2:
        error = float(np.sqrt(left @ left / (len(x) - 2) / (centred @ centred)))
    return Fit(
        float(slope), float(np.exp(start)), error, float(np.sqrt(left @ left / len(x))), len(x)
    )


def curves(rows: Iterable[dict]) -> list[Curve]:
    """Every curve that rows of `tvk bench pipelines` have two points of; the last row of a point.

    A phase that edits one picture whatever the clip is, StableVideo's, has none over frames.
    """
    rows = [row for row in rows if row.get("seconds")]
    found = []
    for against, held in (("frames", "size"), ("tokens", "frames")):
        groups: dict[tuple, dict] = {}
        for row in rows:
            size = tuple(row["size"])
            key = (*(row[name] for name in SAME), size if held == "size" else row["frames"])
            groups.setdefault(key, {})[row[against]] = row
        for key, points in groups.items():
            if len(points) < 2:
                continue
            of = dict(zip((*SAME, held), key, strict=True))
            for quantity in QUANTITIES:
                ys = [row[quantity] for row in points.values()]
                if all(ys):
                    found.append(Curve(of, quantity, against, fit(list(points), ys)))
    return found
