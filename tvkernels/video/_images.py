"""Images, and folders of them, through Pillow."""

from __future__ import annotations

import logging
import re
from pathlib import Path
from typing import TYPE_CHECKING

from tvkernels.video._files import VideoError, need

if TYPE_CHECKING:
    import numpy as np

log = logging.getLogger(__name__)

IMAGES = (".png", ".jpg", ".jpeg", ".jfif", ".webp", ".bmp", ".tif", ".tiff", ".avif")

# What systems leave in folders, beside names that begin with a dot (.DS_Store, ._frame.png).
SYSTEM_FILES = ("thumbs.db", "ehthumbs.db", "desktop.ini", "icon\r", "__macosx")
NAMED = 3  # of what is passed over


def natural_order(file: Path) -> tuple:
    """A key under which frame 2 comes before frame 10."""
    parts = re.split(r"(\d+)", file.name)
    return [int(part) if part.isdecimal() else part.lower() for part in parts], file.name


def images_in(folder: Path) -> list[Path]:
    """Its images in natural order. What else is there is said, the system's own files are not."""
    entries = sorted(
        (f for f in folder.iterdir() if f.name[0] != "." and f.name.lower() not in SYSTEM_FILES),
        key=natural_order,
    )
    images = [file for file in entries if file.suffix.lower() in IMAGES and file.is_file()]
    others = [file.name for file in entries if file not in images]
    if others and images:
        names = ", ".join(others[:NAMED]) + (", ..." if len(others) > NAMED else "")
        log.warning("%s: passed over %d that are no images: %s", folder, len(others), names)
    return images


def eight_bits(picture):
    """A PIL image, one of 16 bits scaled to 8: Pillow would cut it off at 255."""
    if not picture.mode.startswith("I"):
        return picture
    values = need("numpy").asarray(picture).clip(0, 65535) // 257
    return need("PIL.Image").fromarray(values.astype("uint8"))


def on(colour: str, picture) -> np.ndarray:
    """A PIL image laid on a colour where it is transparent: uint8 [H, W, 3]."""
    image = need("PIL.Image")
    if "A" in picture.getbands() or "transparency" in picture.info:
        picture = picture.convert("RGBA")
        picture = image.alpha_composite(image.new("RGBA", picture.size, colour), picture)
    return need("numpy").asarray(picture.convert("RGB"))


def read_image(file: Path, colour: str = "white") -> np.ndarray:
    """uint8 [H, W, 3], upright, laid on ``colour``."""
    unreadable = (need("PIL.Image").DecompressionBombError,)
    try:
        with need("PIL.Image").open(file) as picture:
            return on(colour, eight_bits(need("PIL.ImageOps").exif_transpose(picture)))
    except (*unreadable, OSError, SyntaxError, ValueError) as error:
        raise VideoError(f"{file} is not an image that can be read: {error}") from error
