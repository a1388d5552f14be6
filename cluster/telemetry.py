"""What the processes of a training say while they work: metrics, signs of life, and where a stuck one stands."""

import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Any

PULSE_SECONDS = 1.0
SILENT_SECONDS = 15.0  # without a pulse, a process counts as stopped or starved
GONE_SECONDS = 5.0  # without a pulse of any rank, a start is over
LIBRARIES = ("site-packages", "dist-packages", f"{sys.prefix}/lib/python", f"{sys.base_prefix}/lib/python")
COLLECTIVES = ("torch/distributed", "deepspeed/comm")


@dataclass(frozen=True)
class Pulse:
    """One sign of life of a rank. beats: how often it came past a point that all ranks pass equally often.

    place: the innermost line of code that is not a library's. waits: it is inside a collective operation, so for
    another rank.
    """

    rank: int
    process: str
    beats: int
    place: str
    waits: bool


class Wish(Enum):
    """What a rank is answered: work on; end when the step is done; end now, because this start hangs."""

    WORK = 0
    STOP = 1
    DIE = 2


@dataclass(frozen=True)
class RankState:
    """A rank's last pulse; seconds since it came, and since `beats` last rose."""

    pulse: Pulse
    silent: float
    still: float

    def __str__(self) -> str:
        pulse = self.pulse
        if self.silent > SILENT_SECONDS:
            return f"rank {pulse.rank} ({pulse.process}) has been silent for {self.silent:.0f} s, last at {pulse.place}"
        return f"rank {pulse.rank} ({pulse.process}) stands at {pulse.place}"


@dataclass(frozen=True)
class Fatal:
    """An error that would come again if the run were repeated."""

    rank: int
    error: str
    message: str
    place: str


@dataclass(frozen=True)
class News:
    """What a board has gathered. rows: metrics since the last look."""

    rows: tuple[dict[str, float], ...]
    ranks: tuple[RankState, ...]
    starts: int
    fatal: Fatal | None
    stopped: bool


class Board:
    """Between the processes of a training and its driver; an actor of its own, so that it outlives both kinds."""

    def __init__(self) -> None:
        self._rows: list[dict[str, float]] = []
        self._pulses: dict[int, tuple[Pulse, float, float]] = {}
        self._attempts: list[int] = []
        self._fatal: Fatal | None = None
        self._condemned: int | None = None  # the attempt whose ranks shall end
        self._stop, self._stopped = False, False

    def pulse(self, attempt: int, pulse: Pulse) -> Wish:
        """Take a sign of life. What an earlier attempt left is dropped."""
        now = time.monotonic()
        if attempt not in self._attempts:
            self._attempts.append(attempt)
            self._pulses.clear()
        if attempt == self._attempts[-1]:
            before = self._pulses.get(pulse.rank)
            moved = now if before is None or before[0].beats != pulse.beats else before[2]
            self._pulses[pulse.rank] = (pulse, now, moved)
        if attempt == self._condemned:
            return Wish.DIE
        return Wish.STOP if self._stop else Wish.WORK

    def tell(self, row: dict[str, float]) -> None:
        self._rows.append(row)

    def fail(self, fatal: Fatal) -> None:
        self._fatal = self._fatal or fatal

    def ask_to_stop(self) -> None:
        self._stop = True

    def condemn(self) -> None:
        """Let all ranks of the present start end: it hangs."""
        self._condemned = self._attempts[-1]

    def stopped(self) -> None:
        """A rank ended because it was asked to."""
        self._stopped = True

    def left(self, rank: int) -> None:
        """A rank has ended its work: its silence means nothing from now on."""
        self._pulses.pop(rank, None)

    def look(self) -> News:
        """The news; the rows are handed out once."""
        now = time.monotonic()
        rows, self._rows = tuple(self._rows), []
        states = [RankState(pulse, now - seen, now - moved) for pulse, seen, moved in self._pulses.values()]
        ranks = tuple(sorted(states, key=lambda state: state.pulse.rank))
        return News(rows, ranks, len(self._attempts), self._fatal, self._stopped)


def stuck(ranks: Sequence[RankState], seconds: float, first_seconds: float) -> list[RankState]:
    """The ranks for which the others wait, once none has moved for `seconds`; empty while there is progress or no life.

    first_seconds: instead of `seconds` until the first beat of all, while networks are built and weights are read.
    In this order: who is silent; who is not inside a collective operation while others are; who came least far.
    """
    limit = seconds if any(state.pulse.beats for state in ranks) else first_seconds
    moves = any(state.still < limit for state in ranks)
    lives = any(state.silent < GONE_SECONDS for state in ranks)
    if moves or not lives:
        return []
    silent = [state for state in ranks if state.silent > SILENT_SECONDS]
    if silent:
        return silent
    busy = [state for state in ranks if not state.pulse.waits]
    if busy and len(busy) < len(ranks):
        return busy
    least = min(state.pulse.beats for state in ranks)
    return [state for state in ranks if state.pulse.beats == least]


def in_words(culprits: Sequence[RankState], ranks: int) -> str:
    """`nothing has moved for 60 s: rank 1 (pid 12 on a) stands at data.py:31 in take; 1 other waits`."""
    still = min(state.still for state in culprits)
    others = ranks - len(culprits)
    waiting = f"; {others} other{'s wait' if others > 1 else ' waits'}" if others else ""
    return f"nothing has moved for {still:.0f} s: {', '.join(map(str, culprits))}{waiting}"


class Heart(threading.Thread):
    """Sends a rank's pulse every second, from beside the thread that works; `beat` is called by that one."""

    def __init__(self, rank: int, process: str, send: Callable[[Pulse], Wish]) -> None:
        super().__init__(daemon=True, name="heart")
        self._rank, self._process, self._send = rank, process, send
        self._worker = threading.get_ident()
        self._beats = 0
        self._ended = threading.Event()
        self.asked_to_stop = threading.Event()

    def beat(self) -> None:
        """The rank came past a point that all ranks pass equally often."""
        self._beats += 1

    def run(self) -> None:
        while True:
            place, waits = whereabouts(self._worker)
            wish = self._send(Pulse(self._rank, self._process, self._beats, place, waits))
            if wish is Wish.DIE:
                os.kill(os.getpid(), signal.SIGKILL)  # what hangs may hold off every gentler end
            if wish is Wish.STOP:
                self.asked_to_stop.set()
            if self._ended.wait(PULSE_SECONDS):
                return

    def end(self) -> None:
        self._ended.set()
        self.join(timeout=10 * PULSE_SECONDS)


def whereabouts(thread: int) -> tuple[str, bool]:
    """`file:line in function` of a thread's innermost own code, and whether it is inside a collective operation."""
    frame: Any = sys._current_frames().get(thread)
    if frame is None:
        return "(the thread has ended)", False
    frames = [(entry.f_code.co_filename, line, entry.f_code.co_name) for entry, line in traceback.walk_stack(frame)]
    waits = any(part in file for file, _, _ in frames for part in COLLECTIVES)
    own = [entry for entry in frames if not any(part in entry[0] for part in LIBRARIES)]
    file, line, name = (own or frames)[0]
    return f"{Path(file).name}:{line} in {name}", waits
