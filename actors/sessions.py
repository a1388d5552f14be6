"""A stream as its viewer sees it: pictures with their deadlines, and the mailbox between viewer and scheduler.

A `Session` is guarded by the scheduler's lock. Viewers touch the mailbox only; `stream`, which holds the model's state,
belongs to the scheduler's thread.
"""

import math
import threading
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np

from ..kernels.clips import Pixels
from .admission import Held
from .orders import Piece, State, StreamOrder, Taken
from .streams import Stream, StreamPlan
from .timeline import Layout, Playback, Turn, Turns

SOURCE_CHUNKS: Final = 3  # chunks of source frames that may wait


@dataclass
class Counts:
    """Frames made and taken. late: frames that came after their deadline while the video played; underruns: pieces of
    them. chunks: whole ones that were shown; chunks_late: those with a late piece.
    """

    made: int = 0
    taken: int = 0
    late: int = 0
    underruns: int = 0
    chunks: int = 0
    chunks_late: int = 0


@dataclass(frozen=True)
class Begun:
    """A block that is about to be made: the switch that takes effect with it, and its source [T, H, W, 3]."""

    session: "Session"
    block: int
    turn: Turn | None
    source: Pixels | None


class Session:
    """One stream and its mailbox. Frame indices are the stream's; times are seconds of the scheduler's clock."""

    def __init__(
        self,
        order: StreamOrder,
        stream: Stream,
        held: Held,
        turns: Sequence[Turn],
        frame: int,
        ahead: int,
        mutex: "threading.RLock",
        now: float,
    ) -> None:
        """stream: new or restored. frame: the viewer has those before it; they are made again without being shown.
        ahead: chunks that may wait.
        """
        self.order, self.stream, self.held, self.ahead, self.opened = order, stream, held, ahead, now
        self.plan: StreamPlan = stream.plan
        self.layout = Layout.of(stream.generator.settings, stream.student.vae.temporal_factor)
        self.turns = Turns(self.layout, turns)
        self.changed = threading.Condition(mutex)
        self.begun = self.layout.blocks(stream.latents_done)  # blocks that are made or being made
        self.kept_at = self.begun  # the block before which the last snapshot was taken
        self.next_frame = stream.frames_out  # the next one to be decoded
        self.acknowledged = self.seen = frame  # seen: the first frame that was never handed out
        self.playback = Playback(order.frame_rate, self.turns.shown(self.next_frame), now)
        self.pieces: deque[Piece] = deque()  # not acknowledged
        self.source: deque[tuple[float, Pixels]] = deque()  # when a frame came, and the frame
        self.spent: dict[int, float] = {}  # seconds, by block that is not decoded to its end
        self.state: State = "running"
        self.reason = ""
        self.counts = Counts()
        self.first_seconds: float | None = None  # from opening to the first piece
        self.last_chunk: float | None = None  # when one was last there as a whole
        self.decoding = 0.0  # seconds spent on the block that is being decoded, or was the last one
        self._room_since = -math.inf  # when there last was room again for a further chunk
        self._possible_since = -math.inf  # when there was room, and a source, for the block that was begun last
        self._chunk_is_late = False

    # --- The viewer's side -----------------------------------------------------------------------------------------

    def acknowledge(self, frame: int, now: float) -> None:
        """The viewer has all before `frame`, which is dropped. ValueError where it cannot be the next."""
        latest = max(self.seen, self.turns.log[-1].frame if self.turns.log else 0)
        if frame < self.acknowledged:
            raise ValueError(f"frame: {frame} is gone, {self.acknowledged} is the first one kept; open the stream anew")
        if frame > latest:
            raise ValueError(f"frame: at most {latest} can be the next one, got {frame}")
        was_full = self._is_full
        self.acknowledged, self.seen = frame, max(self.seen, frame)
        while self.pieces and self.pieces[0].end <= frame:
            self.pieces.popleft()
        if was_full and not self._is_full:
            self._room_since = now

    def hand_out(self, now: float) -> Taken:
        """All pieces that are there."""
        new = [piece for piece in self.pieces if piece.end > self.seen]
        if new:
            self.playback.take(self.turns.shown(new[0].first), now)
            self.counts.taken += sum(piece.end - max(piece.first, self.seen) for piece in new)
            self.seen = new[-1].end
        return Taken(tuple(self.pieces), self.state, self.reason, self.source_due)

    def switch(self, text: str, frame: int | None = None) -> Turn:
        """From the next block on, follow `text`; what the viewer does not have is flushed.

        frame: the first one that was handed out and that the viewer will not be shown; None: all of those are shown.
        """
        self.check_runs()
        had = self.seen if frame is None else min(max(frame, self.acknowledged), self.seen)
        block = max(self.begun, self.turns.last_block, self.layout.edge(had))
        turn = self.turns.switch(block, text, had)
        self.pieces = deque(piece for piece in self.pieces if piece.end <= had)
        return turn

    def feed(self, frames: Pixels, now: float) -> None:
        """Queue source frames. ValueError where they do not fit, in shape or in number; then none is taken."""
        self.check_runs()
        if self.plan.redraw is None:
            raise ValueError("feed: the stream was not opened for it; its order needs `redraw`")
        size = (self.plan.height, self.plan.width, 3)
        if frames.dtype != np.uint8 or frames.ndim != 4 or frames.shape[1:] != size:
            raise ValueError(
                f"feed: uint8 frames [T, {size[0]}, {size[1]}, 3] are due, got {frames.dtype} {frames.shape}"
            )
        most = SOURCE_CHUNKS * self.layout.size(1)
        if len(self.source) + len(frames) > most:
            raise ValueError(f"feed: {len(self.source)} frames wait, {most} may, {len(frames)} more are too many")
        self.source.extend((now, frame) for frame in frames)

    def pause(self, now: float) -> None:
        self.playback.pause(now)
        self.last_chunk = None

    @property
    def source_due(self) -> int:
        """Source frames that are missing for the next block."""
        if self.plan.redraw is None or self.state != "running" or self._is_begun:
            return 0
        return max(0, self.layout.size(self.begun) - len(self.source))

    def check_runs(self) -> None:
        if self.state != "running":
            raise ValueError(f"stream {self.order.stream}: it has {self.state} ({self.reason})")

    # --- The scheduler's side --------------------------------------------------------------------------------------

    @property
    def is_live(self) -> bool:
        """Whether it has deadlines."""
        return self.order.frame_rate is not None

    @property
    def has_undecoded(self) -> bool:
        """Whether a block was begun and not decoded to its end."""
        return self.next_frame < self.layout.start(self.begun)

    @property
    def wants_block(self) -> bool:
        """Whether its next block should be made."""
        return not self.has_undecoded and self._may_make

    @property
    def may_join(self) -> bool:
        """Whether its next block may be made with another stream's, even before the last one is decoded."""
        most = 1 if self.stream.may_run_ahead else 0
        return self.plan.redraw is None and len(self._undecoded) <= most and self._may_make

    def due(self, now: float) -> float:
        """Deadline of the frame that is next to be decoded."""
        return self._due(self.next_frame, now)

    def block_due(self, now: float) -> float:
        """Deadline of the block that is next to be made."""
        return self._due(self.layout.start(self.begun), now)

    def begin(self) -> Begun:
        """Take what the next block needs out of the mailbox."""
        block, source = self.begun, None
        self._possible_since = self._next_possible
        if self.plan.redraw is not None:
            source = np.stack([self.source.popleft()[1] for _ in range(self.layout.size(block))])
        self.begun += 1
        return Begun(self, block, self.turns.at(block), source)

    def arrived(self, frames: Pixels, seconds: float, now: float) -> Piece | None:
        """The next frames were decoded, in so many seconds. The piece, if it is one to be shown."""
        first, chunk, stop = self.next_frame, self.layout.holding(self.next_frame), self._stop
        self.decoding = seconds + (0.0 if first == self.layout.start(chunk) else self.decoding)
        self.next_frame = first + len(frames)
        self.spent[chunk] = self.spent.get(chunk, 0.0) + seconds
        ends_chunk = self.next_frame == self.layout.start(chunk + 1)
        spent = self.spent.pop(chunk) if ends_chunk else self.spent[chunk]
        if stop is not None and self.next_frame >= stop:
            frames = frames[: stop - first]
            self.end("ended", "all frames were made")
        end = first + len(frames)
        if end <= self.acknowledged or self.turns.is_flushed(first, end):
            return None
        late = self._lateness(first, now)
        piece = Piece(first, frames, chunk, ends_chunk, self.turns.prompt_of(chunk), spent, late)
        self._count(piece, now)
        self.pieces.append(piece)
        return piece

    def end(self, state: State, reason: str) -> None:
        """Nothing more will be made. What waits can still be taken."""
        self.state, self.reason = state, reason
        self.source.clear()
        self.changed.notify_all()

    # --- Inside ----------------------------------------------------------------------------------------------------

    @property
    def _stop(self) -> int | None:
        """The frame before which the stream ends."""
        return None if self.order.frames is None else self.order.frames + self.turns.flushed

    @property
    def _is_begun(self) -> bool:
        """Whether its last block was begun."""
        return self._stop is not None and self.layout.start(self.begun) >= self._stop

    @property
    def _undecoded(self) -> range:
        """Blocks that were begun and not decoded to their ends."""
        return range(self.layout.holding(self.next_frame), self.begun)

    @property
    def _may_make(self) -> bool:
        if self.state != "running" or self.playback.is_paused:
            return False
        return not (self._is_begun or self.source_due or self._is_full)

    @property
    def _is_full(self) -> bool:
        """Whether as many chunks wait as may."""
        unseen = {block for block in self._undecoded if not self._is_dropped(self.layout.start(block + 1))}
        return len(unseen | {piece.chunk for piece in self.pieces}) >= self.ahead

    @property
    def _next_possible(self) -> float:
        """Since when there has been room, and a source, for the next block."""
        needed = 0 if self.plan.redraw is None else self.layout.size(self.begun)
        came = self.source[needed - 1][0] if 0 < needed <= len(self.source) else -math.inf
        return max(came, self._room_since)

    def _is_dropped(self, end: int) -> bool:
        """Whether nobody will see the picture that ends before frame `end`."""
        return end <= self.acknowledged or self.turns.is_flushed(end - 1, end)

    def _due(self, frame: int, now: float) -> float:
        """When playback needs the frame; but a viewer who was slow, to take or to feed, lets it a chunk's time."""
        due = self.playback.due(self.turns.shown(frame), now)
        if self.order.frame_rate is None:
            return due
        since = self._next_possible if frame >= self.layout.start(self.begun) else self._possible_since
        return max(due, since + self.layout.size(1) / self.order.frame_rate)

    def _lateness(self, first: int, now: float) -> float:
        if self.order.frame_rate is None:
            return 0.0
        if not self.playback.started:  # it is due so long after the first one is taken
            return -max(0, self.turns.shown(first) - self.turns.shown(self.seen)) / self.order.frame_rate
        return now - self._due(first, now)

    def _count(self, piece: Piece, now: float) -> None:
        counts, size = self.counts, len(piece.frames)
        self.first_seconds = now - self.opened if self.first_seconds is None else self.first_seconds
        counts.made += size
        if piece.late > 0:
            counts.late += size
            counts.underruns += 1
            self._chunk_is_late = True
        if piece.ends_chunk:
            counts.chunks += 1
            counts.chunks_late += self._chunk_is_late
            self._chunk_is_late = False
