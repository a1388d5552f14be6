"""Decoding ahead of the one who consumes: several lanes at work, few clips waiting, one fixed order."""

import threading
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from queue import SimpleQueue
from typing import Final

from ..cluster.dataset import Quarantined
from .clips import BadVideo, Broken, Clip, ClipSettings, Skipped
from .decode_lane import DecodeLane
from .sources import VideoFolder
from .survey import FILTER

DECODE: Final = "decode"  # the stage of what cannot be decoded


@dataclass(frozen=True)
class Job:
    """Clips of one video: the indices, rising."""

    path: str
    clips: tuple[int, ...]


def quarantined(stage: str, reason: str, text: str) -> Quarantined:
    """A reason that can be taken apart again: `stage: reason: text`."""
    return Quarantined(f"{stage}: {reason}: {text}")


class DecodeAhead:
    """Decodes jobs on `lanes` child processes. A lane works on one video; it stops when `ahead` of its clips wait.

    A further video is begun when a lane is free and fewer than `ahead` planned clips are before it, so at most
    (lanes + 1) · ahead clips are in memory. What comes out, and in which order, depends on neither.
    """

    def __init__(self, videos: VideoFolder, settings: ClipSettings, *, lanes: int, ahead: int) -> None:
        assert lanes >= 1
        assert ahead >= 1
        self._videos = videos
        self._ahead = ahead
        self._all = [DecodeLane(settings) for _ in range(lanes)]
        self._free: SimpleQueue[DecodeLane] = SimpleQueue()
        for lane in self._all:
            self._free.put(lane)
        self._waiting: deque[_Channel] = deque()

    @property
    def ready(self) -> int:
        """Clips that are decoded and not yet taken."""
        return sum(len(channel) for channel in list(self._waiting))

    def close(self) -> None:
        """End the lanes."""
        for lane in self._all:
            lane.close()

    def outcomes(self, jobs: Iterable[Job]) -> Iterator[Clip | Quarantined]:
        """Exactly one for every clip of every job, in order. Raises what kept a video from being fetched."""
        source, planned = iter(jobs), 0
        self._waiting.clear()
        with ThreadPoolExecutor(len(self._all), thread_name_prefix="decode") as threads:

            def begin() -> int:
                begun = 0
                while len(self._waiting) < len(self._all) or planned + begun < self._ahead:
                    job = next(source, None)
                    if job is None:
                        break
                    channel = _Channel(self._ahead)
                    self._waiting.append(channel)
                    threads.submit(self._work, job, channel)
                    begun += len(job.clips)
                return begun

            try:
                while planned := planned + begin():
                    for outcome in self._waiting[0]:
                        yield outcome
                        planned -= 1
                        planned += begin()
                    self._waiting.popleft()
            finally:
                for channel in self._waiting:
                    channel.abandon()

    def _work(self, job: Job, channel: "_Channel") -> None:
        lane = self._free.get()
        try:
            if channel.abandoned:
                return
            for outcome in self._decode(job, lane):
                if not channel.put(outcome):
                    return
            channel.end()
        except BaseException as error:  # noqa: BLE001 -- raised again where the outcomes are taken
            channel.end(error)
        finally:
            self._free.put(lane)

    def _decode(self, job: Job, lane: DecodeLane) -> Iterator[Clip | Quarantined]:
        due = deque(job.clips)
        rest = quarantined(DECODE, "gone", "the video holds fewer clips than when it was surveyed")
        try:
            with self._videos.local(job.path) as path:
                for outcome in lane.clips(path, job.clips):
                    if outcome.index is None:
                        rest = _reason(outcome)
                        continue
                    asked = due.popleft()
                    assert asked == outcome.index, f"{job.path}: clip {outcome.index} came where {asked} is due"
                    yield outcome if isinstance(outcome, Clip) else _reason(outcome)
        except BadVideo as bad:
            rest = quarantined(DECODE, bad.reason, bad.text)
        for _ in due:
            yield rest


def jobs_of(items: Sequence[tuple[str, int]]) -> list[Job]:
    """Neighbouring clips of one video as one job. items: path and clip index, in the order of the outcomes."""
    grouped: list[tuple[str, list[int]]] = []
    for path, clip in items:
        if grouped and grouped[-1][0] == path and grouped[-1][1][-1] < clip:
            grouped[-1][1].append(clip)
        else:
            grouped.append((path, [clip]))
    return [Job(path, tuple(clips)) for path, clips in grouped]


def _reason(outcome: Skipped | Broken) -> Quarantined:
    stage = FILTER if isinstance(outcome, Skipped) else DECODE
    return quarantined(stage, outcome.reason, outcome.text)


class _Channel:
    """A bounded queue from one thread to another, which either side may end."""

    def __init__(self, capacity: int) -> None:
        self._capacity = capacity
        self._items: deque[Clip | Quarantined] = deque()
        self._changed = threading.Condition()
        self._ended = self.abandoned = False
        self._error: BaseException | None = None

    def __len__(self) -> int:
        return len(self._items)

    def put(self, item: Clip | Quarantined) -> bool:
        """Wait for room. False: nobody takes it any more."""
        with self._changed:
            self._changed.wait_for(lambda: self.abandoned or len(self._items) < self._capacity)
            self._items.append(item)
            self._changed.notify_all()
            return not self.abandoned

    def end(self, error: BaseException | None = None) -> None:
        """Nothing more will come."""
        with self._changed:
            self._ended, self._error = True, error
            self._changed.notify_all()

    def abandon(self) -> None:
        """Nothing more will be taken."""
        with self._changed:
            self.abandoned = True
            self._changed.notify_all()

    def __iter__(self) -> Iterator[Clip | Quarantined]:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._items or self._ended)
                if not self._items:
                    if self._error:
                        raise self._error
                    return
                item = self._items.popleft()
                self._changed.notify_all()
            yield item
