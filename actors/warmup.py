"""What a block costs on this machine, measured before the first stream is served."""

from collections.abc import Callable, Sequence
from typing import Final

import torch

from .admission import Kind, Speeds
from .generator import NoRoom, Student
from .streams import Stream, make_together

TIMED: Final = 2  # blocks per batch size, after one that warms up


def finish(student: Student) -> None:
    """Wait until the device has done what it was given, so that times are of the work."""
    if student.device.type == "cuda":
        torch.cuda.synchronize(student.device)


def measure_blocks(
    student: Student, speeds: Speeds, height: int, width: int, batches: Sequence[int], clock: Callable[[], float]
) -> dict[int, float]:
    """Seconds per block, decoded, by batch size, of streams of this size; `speeds` learns them too.

    Sizes that the student's budget has no room for are left out.
    """
    kind, measured = Kind(height, width, False), []
    for batch in batches:
        streams: list[Stream] = []
        try:
            for _ in range(batch):
                streams.append(student.open("", height=height, width=width))
                _fill_window(streams[-1])
            making, showing = _time(student, streams, clock)
        except NoRoom:
            continue
        finally:
            for stream in streams:
                stream.close()
        speeds.saw_made(kind, batch, making)
        speeds.saw_shown(kind, showing)
        measured.append(batch)
    return {batch: seconds for batch in measured if (seconds := speeds.seconds(kind, batch)) is not None}


def _fill_window(stream: Stream) -> None:
    """As it is for nearly all of a stream's life: the next block evicts."""
    settings, device = stream.generator.settings, stream.student.device
    while len(stream.generator.cache) + settings.block <= settings.window:
        shape = (1, stream.generator.next_size, *stream.generator.frame_shape)
        stream.generator.append(torch.zeros(shape, device=device))


def _time(student: Student, streams: list[Stream], clock: Callable[[], float]) -> tuple[float, float]:
    """Mean seconds of making a batch, and of decoding one stream's block."""
    making = showing = 0.0
    for turn in range(1 + TIMED):
        began = clock()
        make_together(streams)
        finish(student)
        made = clock()
        for stream in streams:
            stream.next_chunk()
        if turn > 0:
            making += (made - began) / TIMED
            showing += (clock() - made) / TIMED / len(streams)
    return making, showing
