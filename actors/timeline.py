"""Where the frames of a live stream lie: in blocks, under prompts, and in time. Plain numbers, no model."""

import math
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ..kernels.causal.student import StudentSettings


@dataclass(frozen=True)
class Layout:
    """Blocks of a stream in pixel frames. first, block: latent frames; factor: pixel frames of every latent frame but
    the stream's first, which is one.
    """

    first: int
    block: int
    factor: int

    @classmethod
    def of(cls, settings: "StudentSettings", factor: int) -> "Layout":
        return cls(settings.size_of(0), settings.block, factor)

    def start(self, block: int) -> int:
        """The first frame of a block."""
        return 0 if block == 0 else self.factor * (self.first + (block - 1) * self.block - 1) + 1

    def size(self, block: int) -> int:
        """Frames of a block."""
        return self.start(block + 1) - self.start(block)

    def holding(self, frame: int) -> int:
        """The block that holds a frame."""
        beyond = frame - self.start(1)
        return 0 if beyond < 0 else 1 + beyond // (self.factor * self.block)

    def edge(self, frame: int) -> int:
        """The first block that begins at this frame or after it."""
        block = self.holding(frame)
        return block if self.start(block) == frame else block + 1

    def blocks(self, latents: int) -> int:
        """Blocks in so many latent frames, which fill whole ones."""
        return 0 if latents == 0 else 1 + (latents - self.first) // self.block


@dataclass(frozen=True)
class Turn:
    """A prompt switch: it holds from block `block` on. The log of them makes a replay exact.

    index: of the prompt among the stream's, 0 being the one that it was opened with. frame: the block's first frame.
    flushed: frames right before it, of the old prompt, that were dropped and are never shown.
    """

    block: int
    text: str
    index: int = 0
    frame: int = 0
    flushed: int = 0


class Turns:
    """A stream's log of prompt switches, one per block at most."""

    def __init__(self, layout: Layout, turns: Sequence[Turn] = ()) -> None:
        """ValueError where the blocks do not rise, or more is flushed than there was."""
        self._layout = layout
        self._turns: list[Turn] = []
        self._flushed = [0]  # in front of the first turn, of the second, ...
        if any(later.block <= earlier.block for earlier, later in pairwise(turns)):
            raise ValueError(f"turns: their blocks must rise, got {[turn.block for turn in turns]}")
        for turn in turns:
            if turn.block < 0 or not 0 <= turn.flushed <= layout.start(turn.block):
                raise ValueError(f"turns: no such block or flush: block {turn.block}, flushed {turn.flushed}")
            self.switch(turn.block, turn.text, layout.start(turn.block) - turn.flushed)

    @property
    def log(self) -> tuple[Turn, ...]:
        return tuple(self._turns)

    @property
    def last_block(self) -> int:
        """The block of the last switch; 0 if there was none."""
        return self._turns[-1].block if self._turns else 0

    @property
    def flushed(self) -> int:
        """Frames that were dropped so far, by all switches."""
        return self._flushed[-1]

    def switch(self, block: int, text: str, seen: int) -> Turn:
        """Note a switch. seen: the first frame that the viewer does not have; what lies between is flushed.

        A switch at the same block as the last one takes its place.
        """
        frame, replaced = self._layout.start(block), 0
        if self._turns and self._turns[-1].block == block:
            replaced = self._turns.pop().flushed
            self._flushed.pop()
        before = self._turns[-1].frame if self._turns else 0  # what lies in front of it was flushed by then, or seen
        flushed = max(frame - max(seen, before), replaced)
        assert block >= self.last_block
        turn = Turn(block, text, len(self._turns) + 1, frame, max(0, flushed))
        self._turns.append(turn)
        self._flushed.append(self.flushed + turn.flushed)
        return turn

    def at(self, block: int) -> Turn | None:
        """The switch that takes effect at this block."""
        count = self.prompt_of(block)
        turn = self._turns[count - 1] if count else None
        return turn if turn and turn.block == block else None

    def prompt_of(self, block: int) -> int:
        """Index of the prompt that makes this block."""
        return bisect_right(self._turns, block, key=lambda turn: turn.block)

    def is_flushed(self, first: int, end: int) -> bool:
        """Whether the picture of frames `first` to `end` is of a range that was dropped."""
        following = self._following(first)
        return following is not None and end > following.frame - following.flushed

    def shown(self, frame: int) -> int:
        """How many frames are shown before this one. Of a dropped one: before the first one that takes its place."""
        count = bisect_right(self._turns, frame, key=lambda turn: turn.frame)
        following = self._following(frame)
        edge = frame if following is None else min(frame, following.frame - following.flushed)
        return edge - self._flushed[count]

    def _following(self, frame: int) -> Turn | None:
        """The first switch after this frame."""
        count = bisect_right(self._turns, frame, key=lambda turn: turn.frame)
        return self._turns[count] if count < len(self._turns) else None


class Playback:
    """When each shown frame is due. Times are seconds of one clock that never goes back.

    Playback starts when the first picture is taken. A picture that is taken after it was due has kept the player
    waiting, so all after it are due later by as much; a pause does the same. Before playback starts, frames are due one
    after the other from the moment the stream was opened: a stream that is replayed after a failure catches up at the
    speed that was admitted for it, or faster where nobody else needs the time.
    """

    def __init__(self, rate: float | None, shown: int, now: float) -> None:
        """rate: frames per second; None: nothing is ever due. shown: the first frame to be made."""
        self.rate = rate
        self.started = False
        self._origin = now - self._length(shown)
        self._paused: float | None = None

    @property
    def is_paused(self) -> bool:
        return self._paused is not None

    def due(self, shown: int, now: float) -> float:
        """When the frame is due before which `shown` frames are shown."""
        waited = 0.0 if self._paused is None else now - self._paused
        return math.inf if self.rate is None else self._origin + waited + self._length(shown)

    def take(self, shown: int, now: float) -> None:
        """That frame was taken for the first time."""
        begins = (now if self._paused is None else self._paused) - self._length(shown)
        self._origin = max(begins, self._origin) if self.started else begins
        self.started = True

    def pause(self, now: float) -> None:
        self._paused = now if self._paused is None else self._paused

    def resume(self, now: float) -> None:
        if self._paused is not None:
            self._origin += now - self._paused
            self._paused = None

    def _length(self, frames: int) -> float:
        return 0.0 if self.rate is None else frames / self.rate
