"""Clips side by side on one picture."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from tvkernels.video._files import VideoError, atomic_path, check_output, need

if TYPE_CHECKING:
    import numpy as np

PAPER, INK, PALE_INK = "white", "#1a1a1a", "#6b6b6b"
MARGIN, GAP = 12, 3


def contact_sheet(
    rows: Sequence[tuple[str, np.ndarray]],
    path: str | os.PathLike,
    *,
    columns: int = 8,
    height: int = 128,
) -> Path:
    """Write a PNG with one labelled row of frames for each clip.

    Args:
        rows: (label, frames uint8 [F, H, W, 3]) from top to bottom. A label's first line is
            dark, the lines after a line break are smaller and pale. Clips may differ in size
            and number of frames.
        path: output, ends in ``.png``.
        columns: most frames shown of a clip, evenly spaced from its first to its last.
        height: of every shown frame, in pixels; the width follows the clip's proportions.

    Returns:
        The path written.

    Raises:
        VideoError: no rows, a row without frames, or a failed write.
    """
    path = check_output(path, (".png",))
    if not rows:
        raise VideoError("a contact sheet needs at least one row")
    image, draw_on = need("PIL.Image"), need("PIL.ImageDraw").Draw
    strips = [_strip(label, frames, columns, height) for label, frames in rows]
    fonts = _fonts(height)
    ruler = draw_on(image.new("RGB", (1, 1)))
    labels = [_lines(label, fonts) for label, _ in rows]
    gutter = MARGIN + max(ruler.textlength(text, font) for row in labels for text, font, _ in row)
    left = round(gutter) + MARGIN
    width = left + max(strip.width for strip in strips) + MARGIN
    sheet = image.new("RGB", (width, 2 * MARGIN + len(rows) * (height + GAP) - GAP), PAPER)
    pen = draw_on(sheet)
    for index, (strip, lines) in enumerate(zip(strips, labels, strict=True)):
        top = MARGIN + index * (height + GAP)
        sheet.paste(strip, (left, top))
        y = top + (height - sum(1.3 * font.size for _, font, _ in lines)) / 2
        for text, font, ink in lines:
            pen.text((MARGIN, y), text, ink, font)
            y += 1.3 * font.size
    with atomic_path(path) as temporary:
        sheet.save(temporary)
    return path


def _strip(label: str, frames: np.ndarray, columns: int, height: int):
    image = need("PIL.Image")
    if not len(frames):
        raise VideoError(f"row {label!r} of the contact sheet has no frames")
    count = min(columns, len(frames))
    chosen = [round(i * (len(frames) - 1) / max(count - 1, 1)) for i in range(count)]
    width = max(1, round(frames[0].shape[1] * height / frames[0].shape[0]))
    strip = image.new("RGB", (count * (width + GAP) - GAP, height), PAPER)
    for column, index in enumerate(chosen):
        picture = image.fromarray(frames[index])
        if picture.size != (width, height):
            picture = picture.resize((width, height), image.Resampling.LANCZOS)
        strip.paste(picture, (column * (width + GAP), 0))
    return strip


def _fonts(height: int):
    font = need("PIL.ImageFont").load_default
    return font(max(11, min(18, height // 7))), font(max(9, min(14, height // 9)))


def _lines(label: str, fonts) -> list:
    head, *rest = label.split("\n")
    return [(head, fonts[0], INK), *((text, fonts[1], PALE_INK) for text in rest)]
