"""Decoding in a process of its own, beside the one that holds models.

A file may crash FFmpeg, or keep it busy for ever; and Python frames what is decoded, which would hold the interpreter's
lock against the thread that feeds the device. So a lane decodes in a child process: while it works on a clip, its owner
encodes the ones before.
"""

import signal
from collections.abc import Iterator, Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Final, Self

import numpy as np

from .child import Child
from .clips import BadVideo, Broken, Clip, ClipSettings, Skipped, Survey

LANE_SECONDS: Final = 600.0  # for one clip, or for one file's survey
LANE: Final = "import sys; from {module} import serve_lane; serve_lane(int(sys.argv[1]))"
ENVIRONMENT: Final = {"OMP_NUM_THREADS": "1"}  # the processors belong to the encoder and to other lanes


class LaneDied(Exception):
    """The lane's process has crashed, or did not answer in time. The next request starts another."""


class DecodeLane:
    """A `Decoder` in a child process, for one request at a time. The child starts with the first; `close` ends it.

    seconds: how long a clip or a survey may take before the child is killed. With a file that kills the child, decord
    is tried (`actors.decoder`); what kills both is a `Broken` clip with the reason "crashed".
    """

    def __init__(self, settings: ClipSettings, *, seconds: float = LANE_SECONDS) -> None:
        self._settings = settings
        self._seconds = seconds
        self.child: Child | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End the child, if there is one."""
        if self.child:
            self.child.close()
        self.child = None

    def survey(self, path: Path) -> Survey | Skipped:
        """`Decoder.survey`; a file that kills the child is a `BadVideo`, too, with the reason "crashed"."""
        try:
            (found,) = self._ask(("survey", path))
        except LaneDied as error:
            raise BadVideo(path, "crashed", str(error)) from error
        assert isinstance(found, Survey | Skipped)
        return found

    def clips(self, path: Path, only: Sequence[int]) -> Iterator[Clip | Skipped | Broken]:
        """`Decoder.clips`, for the clips with these indices, which rise."""
        left = list(only)
        while left:
            try:
                for outcome in self._ask(("clips", path, left, "pyav")):
                    yield outcome
                    left = [] if outcome.index is None else [index for index in left if index > outcome.index]
                return
            except LaneDied as error:
                yield from self._rescued(path, left[0], str(error))
                left = left[1:]

    def _rescued(self, path: Path, index: int, what: str) -> Iterator[Clip | Skipped | Broken]:
        try:
            for outcome in self._ask(("clips", path, [index], "decord")):
                if isinstance(outcome, Broken):
                    yield Broken(path, "crashed", what, outcome.start_seconds, index)
                else:
                    yield outcome
        except LaneDied:
            start = index * self._settings.stride / self._settings.frames_per_second
            yield Broken(path, "crashed", what, start, index)

    def _ask(self, request: tuple[Any, ...]) -> Iterator[Any]:
        """The child's answers to a request. Raises `LaneDied`, or what the child raised."""
        child = self.child or self._start()
        ended = False
        try:
            child.link.send(request)
            while True:
                kind, answer = self._receive(child.link)
                if kind == "end":
                    ended = True
                    return
                if kind == "bad":
                    ended = True
                    raise BadVideo(*answer)
                yield answer
        except (EOFError, OSError) as error:
            raise LaneDied("it crashes the decoder") from error
        finally:
            if not ended:  # an answer may still be on its way: the next request would take it for its own
                self.close()

    def _receive(self, link: Connection) -> tuple[str, Any]:
        if not link.poll(self._seconds):
            raise LaneDied(f"it keeps the decoder busy for more than {self._seconds:g} s")
        kind, answer = link.recv()
        if kind != "clip":
            return kind, answer
        shape, *rest = answer
        frames = np.empty(shape, np.uint8)
        link.recv_bytes_into(frames.data.cast("B"))
        return kind, Clip(frames, *rest)

    def _start(self) -> Child:
        self.child = Child(LANE.format(module=__name__), ENVIRONMENT)
        self.child.link.send(self._settings)
        return self.child


def serve_lane(descriptor: int) -> None:
    """What the child runs: answer requests on an inherited socket until its other end closes."""
    from .decoder import Decoder  # here only: FFmpeg stays out of the process that holds models

    signal.signal(signal.SIGPIPE, signal.SIG_IGN)
    link = Connection(descriptor)
    try:
        with Decoder(link.recv()) as decoder:
            while True:
                kind, *arguments = link.recv()
                try:
                    if kind == "survey":
                        link.send(("item", decoder.survey(*arguments)))
                    else:
                        _send_clips(link, decoder.clips(*arguments[:2], by=arguments[2]))
                    link.send(("end", None))
                except BadVideo as bad:
                    link.send(("bad", (bad.path, bad.reason, bad.text)))
                except (EOFError, BrokenPipeError, ConnectionResetError):
                    raise
                except Exception as error:  # noqa: BLE001 -- whatever a file makes the decoder raise, it is that file's
                    text = " ".join(f"the decoder fails: {type(error).__name__}: {error}".split())
                    link.send(("bad", (arguments[0], "crashed", text)))
    except (EOFError, BrokenPipeError, ConnectionResetError):
        return


def _send_clips(link: Connection, outcomes: Iterator[Clip | Skipped | Broken]) -> None:
    for outcome in outcomes:
        if isinstance(outcome, Clip):
            rest = (outcome.source, outcome.start_seconds, outcome.index, outcome.decoder)
            link.send(("clip", (outcome.frames.shape, *rest)))
            link.send_bytes(outcome.frames.data.cast("B"))
        else:
            link.send(("item", outcome))
