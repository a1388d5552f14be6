"""Contact sheets: videos as rows of frames with a line of text above each."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

COLUMNS = 9
TEXT_HEIGHT = 18
GAP = 3


def contact_sheet(
    rows: Sequence[tuple[str, np.ndarray]], path: Path, *, columns: int = COLUMNS, scale: int = 2
) -> None:
    """Write a PNG. rows: (text, frames uint8 [T, H, W, 3]); `columns` frames of each, evenly spread, enlarged."""
    strips = [_strip(text, frames, columns, scale) for text, frames in rows]
    width = max(strip.width for strip in strips)
    sheet = Image.new("RGB", (width, sum(strip.height for strip in strips)), "white")
    top = 0
    for strip in strips:
        sheet.paste(strip, (0, top))
        top += strip.height
    path.parent.mkdir(parents=True, exist_ok=True)
    sheet.save(path)


def _strip(text: str, frames: np.ndarray, columns: int, scale: int) -> Image.Image:
    chosen = np.linspace(0, len(frames) - 1, min(columns, len(frames))).round().astype(int)
    height, width = (side * scale for side in frames.shape[1:3])
    strip = Image.new("RGB", (columns * (width + GAP), height + TEXT_HEIGHT + GAP), "white")
    ImageDraw.Draw(strip).text((2, 2), text, fill="black", font=ImageFont.load_default(size=12))
    for column, index in enumerate(chosen):
        frame = Image.fromarray(frames[index]).resize((width, height), Image.Resampling.NEAREST)
        strip.paste(frame, (column * (width + GAP), TEXT_HEIGHT))
    return strip
