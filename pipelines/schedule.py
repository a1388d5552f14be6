"""The time of a video: how long it is, and which prompt holds from which second on."""

import math
import re
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Final

from ..actors.bench_report import FRAME_RATE
from ..actors.modes import CLIP_LATENTS
from ..kernels.causal.student import StudentSettings

FRAMES_PER_LATENT: Final = 4  # of every latent frame but a stream's first, which is one frame
ENTRY: Final = re.compile(r"\s*(?=\d)(?:(\d+)m)?(?:(\d+(?:\.\d+)?)s?)?\s*:(.*)", re.DOTALL)
NEXT: Final = re.compile(r";(?=\s*\d[\dms.]*\s*:)")
# What looks like another entry inside a prompt: a colon or a semicolon was forgotten, or a time is negative.
ENTRY_INSIDE: Final = re.compile(r";\s*-?(?:\d+m)?\d+(?:\.\d+)?s\b|(?<![\w.])-?(?:\d+m)?\d+(?:\.\d+)?s\s*:")
LONGEST_NAME: Final = 255  # bytes that a file system takes for a name
FORM: Final = "SECONDS: prompt, as in '0s: a red star; 4s: a blue star; 1m30s: an empty sky'"


@dataclass(frozen=True)
class Schedule:
    """entries: (seconds, prompt), the first at 0, rising."""

    entries: tuple[tuple[float, str], ...]

    def at(self, seconds: float) -> str:
        """The prompt for what begins at this second of the video."""
        return next(prompt for start, prompt in reversed(self.entries) if start <= seconds)


def frames_of(latents: int) -> int:
    """Pixel frames of a stream's first latent frames."""
    return 1 + FRAMES_PER_LATENT * (latents - 1) if latents else 0


def chunk_frames(settings: StudentSettings, *, continues: bool = False) -> tuple[int, int]:
    """Frames of the first chunk and of every later one; a stream that continues a video has no first one."""
    later = FRAMES_PER_LATENT * settings.block
    return (later if continues else frames_of(settings.size_of(0))), later


def length_of(settings: StudentSettings, seconds: float | None, blocks: int | None, *, continues: bool = False) -> int:
    """Frames of a video of so many seconds, or blocks; of a clip as Wan2.1 was trained on by default."""
    if seconds is not None:
        return max(1, round(seconds * FRAME_RATE))
    first, later = chunk_frames(settings, continues=continues)
    return first + later * ((blocks or math.ceil(CLIP_LATENTS / settings.block)) - 1)


def read_schedule(text: str) -> Schedule:
    """A schedule from its text, or from a file with an entry a line (lines that begin with # are comments).

    An entry is `4s: prompt`, `4.5: prompt` or `1m30s: prompt`. FileNotFoundError where it is neither an entry nor a
    file; ValueError that names the entry and the rule.
    """
    if ENTRY.fullmatch(text):
        parts = [part for part in NEXT.split(text) if part.strip()]
        return _checked([_entry(part, "--schedule") for part in parts], "--schedule")
    path = Path(text)
    is_file = len(path.name.encode()) <= LONGEST_NAME and path.is_file()
    if ":" in text and not is_file:
        raise ValueError(f"--schedule: must be a file, or {FORM}; got {text!r}")
    if not is_file:
        raise FileNotFoundError(f"--schedule: {text}: no such file, and no {FORM}")
    lines = enumerate(_read(path).splitlines(), 1)
    written = ((number, line) for number, line in lines if line.strip() and not line.lstrip().startswith("#"))
    return _checked([_entry(line, f"{path}:{number}") for number, line in written], str(path))


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError:
        raise ValueError(f"--schedule: {path}: not a text file in UTF-8") from None


def _entry(text: str, where: str) -> tuple[float, str]:
    match = ENTRY.fullmatch(text)
    if match is None:
        raise ValueError(f"{where}: must be {FORM}; got {text.strip()!r}")
    minutes, seconds, prompt = match.groups()
    if not prompt.strip():
        raise ValueError(f"{where}: no prompt in {text.strip()!r}")
    inside = ENTRY_INSIDE.search(prompt)
    if inside:
        found = prompt[inside.start() :].strip(" ;")
        raise ValueError(f"{where}: {found!r} stands inside a prompt and looks like an entry; must be {FORM}")
    return 60 * int(minutes or 0) + float(seconds or 0), " ".join(prompt.split())


def _checked(entries: list[tuple[float, str]], where: str) -> Schedule:
    if not entries:
        raise ValueError(f"{where}: no entry in it; an entry is {FORM}")
    times = [start for start, _ in entries]
    if times[0] != 0:
        raise ValueError(f"{where}: the first prompt must begin at 0s, got {times[0]:g}s")
    for earlier, later in pairwise(times):
        if later <= earlier:
            raise ValueError(f"{where}: times must rise, got {later:g}s after {earlier:g}s")
    return Schedule(tuple(entries))
