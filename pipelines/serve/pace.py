"""The small clocks and logs of a live session. Times are arguments, so that each can be tested by itself."""

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, replace

from ...actors.orders import Piece
from ...actors.timeline import Turn
from .limits import Rate
from .protocol import BadMessage, Chunk, PromptShown


class Pace:
    """When media goes out: `lead` seconds before a player that began with the first frame needs it."""

    def __init__(self, rate: float, lead: float) -> None:
        self._rate, self._lead = rate, lead
        self._frames = 0
        self._zero: float | None = None  # when the player shows the first frame
        self._stopped: float | None = None
        self._last_chunk: float | None = None

    def delay(self, now: float) -> float:
        """Seconds until the next piece should go out; not above 0: now."""
        return 0.0 if self._zero is None else self._zero + self._frames / self._rate - self._lead - now

    def sent(self, frames: int, now: float) -> float:
        """Note a piece that went out. Returns how long the player had to wait for it, which delays all that follow."""
        if self._zero is None:
            self._zero = now
        waited = max(0.0, now - (self._zero + self._frames / self._rate))
        self._zero += waited
        self._frames += frames
        return waited

    def gap(self, now: float) -> float | None:
        """Note the end of a chunk. Seconds since the last one; None where the stream stood still between them."""
        last, self._last_chunk = self._last_chunk, now
        return None if last is None else now - last

    def stop(self, now: float) -> None:
        """The stream stands still, and so does the player, sooner or later."""
        self._stopped, self._last_chunk = now, None

    def go_on(self, now: float) -> None:
        if self._stopped is not None and self._zero is not None:
            self._zero += now - self._stopped
        self._stopped = None


class Unseen:
    """Frames that were sent and that the viewer has not said to have. most: as many as may be."""

    def __init__(self, most: float) -> None:
        self.most = most
        self._pieces: deque[tuple[int, int]] = deque()  # index after the last frame, number of frames
        self._count = 0

    def sent(self, first: int, frames: int) -> None:
        self._pieces.append((first + frames, frames))
        self._count += frames

    def note(self, frame: int) -> None:
        """The viewer has all before `frame`."""
        while self._pieces and self._pieces[0][0] <= frame:
            self._count -= self._pieces.popleft()[1]

    @property
    def is_too_much(self) -> bool:
        return self._count > self.most


class ChunkLog:
    """A chunk that is being sent."""

    def __init__(self, piece: Piece, first: int) -> None:
        self.index, self.first = piece.chunk, first
        self.frames = self.size = 0
        self.late = piece.late

    def add(self, frames: int, size: int) -> None:
        self.frames += frames
        self.size += size

    def record(self, last: Piece) -> Chunk:
        self.late = max(self.late, last.late)
        return Chunk(
            index=self.index,
            first=self.first,
            frames=self.frames,
            prompt=last.prompt,
            seconds=last.seconds,
            late=self.late,
            media_bytes=self.size,
        )


@dataclass(frozen=True)
class Wanted:
    """A prompt that came. replaced: how many before it were not passed on."""

    text: str
    came: float
    replaced: int


@dataclass(frozen=True)
class _Coming:
    """A prompt that the worker has taken, and that no frame shows yet. since: the first frame that was dropped."""

    wanted: Wanted
    turn: Turn
    since: int
    replaced: int


class PromptLog:
    """A stream's prompts from message to picture. Of several that wait, the last one wins."""

    def __init__(self, rate: Rate, missed: Sequence[Turn] = (), now: float = 0.0) -> None:
        """missed: what an earlier socket asked for, and this one's viewer has not seen."""
        self._rate = rate
        self.wanted: Wanted | None = None
        self._coming = [_Coming(Wanted(turn.text, now, 0), turn, turn.frame - turn.flushed, 0) for turn in missed]

    def want(self, text: str, now: float) -> None:
        """BadMessage where they come too fast."""
        if not self._rate.take(now):
            raise BadMessage("too_many_prompts", f"prompt: at most {self._rate.most} in {self._rate.seconds:g} s")
        replaced = 0 if self.wanted is None else self.wanted.replaced + 1
        self.wanted = Wanted(text, now, replaced)

    def took(self, wanted: Wanted, turn: Turn, since: int) -> None:
        """The worker has taken a prompt; frames from `since` to the turn's were dropped for it."""
        self._coming = [_merge([*self._coming, _Coming(wanted, turn, since, wanted.replaced)])]
        if self.wanted is wanted:
            self.wanted = None
        elif self.wanted is not None:  # it came while this one was being passed on, so it has not replaced it
            self.wanted = replace(self.wanted, replaced=self.wanted.replaced - wanted.replaced - 1)

    def shown(self, first: int, chunk: int, now: float) -> PromptShown | None:
        """The record that belongs before a piece, if it is the first of a new prompt."""
        begun = [coming for coming in self._coming if coming.turn.block <= chunk]
        if not begun:
            return None
        self._coming = self._coming[len(begun) :]
        coming = _merge(begun)
        return PromptShown(
            index=coming.turn.index,
            text=coming.turn.text,
            block=coming.turn.block,
            frame=first,
            flushed=max(0, coming.turn.frame - coming.since),
            replaced=coming.replaced,
            seconds=now - coming.wanted.came,
        )


def _merge(several: Sequence[_Coming]) -> _Coming:
    """The last one, in whose place the others were never seen."""
    replaced = sum(one.replaced for one in several) + len(several) - 1
    return replace(several[-1], since=min(one.since for one in several), replaced=replaced)
