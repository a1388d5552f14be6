"""Contact sheets: videos as rows of frames with a line of text above each."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

COLUMNS = 9
LINE_HEIGHT = 15
GAP = 3
FONT = ImageFont.load_default(size=12)


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
    lines = _wrapped(text, columns * (width + GAP) - 4)
    top = LINE_HEIGHT * len(lines) + GAP
    strip = Image.new("RGB", (columns * (width + GAP), top + height + GAP), "white")
    for line, words in enumerate(lines):
        ImageDraw.Draw(strip).text((2, 2 + LINE_HEIGHT * line), words, fill="black", font=FONT)
    for column, index in enumerate(chosen):
        frame = Image.fromarray(frames[index]).resize((width, height), Image.Resampling.NEAREST)
        strip.paste(frame, (column * (width + GAP), top))
    return strip


def _wrapped(text: str, width: int) -> list[str]:
    """Lines of at most `width` pixels, broken between words; a word that is wider has a line of its own."""
    lines: list[str] = []
    for word in text.split():
        longer = f"{lines[-1]} {word}" if lines else word
        if lines and FONT.getlength(longer) <= width:
            lines[-1] = longer
        else:
            lines.append(word)
    return lines or [""]
