"""How many streams a student can serve in time: what a block costs, measured, and the load that follows from it."""

import threading
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, Final, NamedTuple

from .generator import Student
from .orders import Busy, TooSlow
from .streams import StreamPlan
from .timeline import Layout

LIVE_RATE: Final = 16.0  # frames per second that `capacity` reckons with: Wan2.1's
MOST: Final = 10_000  # streams; no machine serves more
NEW: Final = 0.2  # weight of what was seen last, in a moving mean


class Kind(NamedTuple):
    """Streams whose blocks cost the same."""

    height: int
    width: int
    redraws: bool

    @classmethod
    def of(cls, plan: StreamPlan) -> "Kind":
        return cls(plan.height, plan.width, plan.redraw is not None)

    @property
    def pixels(self) -> int:
        return self.height * self.width


class Held(NamedTuple):
    """What an open stream takes: rate in frames per second, None without deadlines; bytes of memory."""

    kind: Kind
    rate: float | None
    bytes: int


@dataclass
class Costs:
    """Seconds per block of one kind. making: of a whole batch, by its size. showing: decoding one stream's block."""

    making: dict[int, float] = field(default_factory=dict)
    showing: float = 0.0

    def of_batch(self, batch: int) -> float:
        """Seconds to make a batch: as measured, or between two measured ones, or in proportion to the largest."""
        below = max((size for size in self.making if size <= batch), default=None)
        above = min((size for size in self.making if size >= batch), default=None)
        if above is None:
            assert below is not None
            return self.making[below] * batch / below
        if below is None or below == above:
            return self.making[above]
        share = (batch - below) / (above - below)
        return (1 - share) * self.making[below] + share * self.making[above]


class Speeds:
    """What blocks cost: measured at first, then a moving mean of what is seen. Any thread may ask."""

    def __init__(self) -> None:
        self._costs: dict[Kind, Costs] = {}
        self._upkeep, self._blocks = 0.0, 0
        self._lock = threading.Lock()

    def saw_made(self, kind: Kind, batch: int, seconds: float) -> None:
        with self._lock:
            making = self._costs.setdefault(kind, Costs()).making
            making[batch] = _moved(making.get(batch), seconds)

    def saw_shown(self, kind: Kind, seconds: float) -> None:
        with self._lock:
            costs = self._costs.setdefault(kind, Costs())
            costs.showing = _moved(costs.showing or None, seconds)

    def saw_upkeep(self, blocks: int, seconds: float) -> None:
        """Snapshots and prompt switches, beside so many blocks."""
        with self._lock:
            self._upkeep += seconds
            self._blocks += blocks

    def scale(self, factor: float) -> None:
        """Everything takes so many times as long as was measured."""
        with self._lock:
            for costs in self._costs.values():
                costs.making = {batch: factor * seconds for batch, seconds in costs.making.items()}
                costs.showing *= factor
            self._upkeep *= factor

    def making(self, kind: Kind, batch: int) -> float | None:
        """Seconds until a batch is made, and the block of one of its streams decoded; None: nothing is known."""
        with self._lock:
            found = self._find(kind)
            return found and found[1] * (found[0].of_batch(batch) + found[0].showing)

    def seconds(self, kind: Kind, batch: int) -> float | None:
        """Seconds per block of a batch, everything included."""
        with self._lock:
            found = self._find(kind)
            if found is None:
                return None
            upkeep = self._upkeep / self._blocks if self._blocks else 0.0
            return found[1] * (found[0].of_batch(batch) + batch * found[0].showing) + batch * upkeep

    def share(self, kind: Kind, streams: int) -> float | None:
        """The least seconds for one stream's block where `streams` streams can be batched."""
        with self._lock:
            found = self._find(kind)
            sizes = {streams, *(size for size in found[0].making if size <= streams)} if found else set()
        shares = [seconds / size for size in sizes if (seconds := self.seconds(kind, size)) is not None]
        return min(shares, default=None)

    def table(self) -> dict[str, dict[int, float]]:
        """Seconds per block by kind and measured batch size."""
        with self._lock:
            kinds = {kind: sorted(costs.making) for kind, costs in self._costs.items()}
        return {
            f"{kind.width}x{kind.height}{' redrawn' if kind.redraws else ''}": {
                size: round(self.seconds(kind, size) or 0.0, 6) for size in sizes
            }
            for kind, sizes in kinds.items()
        }

    def _find(self, kind: Kind) -> tuple[Costs, float] | None:
        """What is known of this kind, or of the most alike, and how many times its pixels this one has."""
        known = [seen for seen, costs in self._costs.items() if costs.making]
        if not known:
            return None
        near = min(known, key=lambda seen: (abs(seen.pixels - kind.pixels), seen.redraws != kind.redraws))
        return self._costs[near], kind.pixels / near.pixels


class Admission:
    """Says whether another stream has room. sessions: at most so many; load: share of the time that may be planned;
    size: height and width of the usual stream, which `capacity` reckons with.

    The load is the sum, over the streams that have a frame rate, of blocks per second times seconds per block, in
    the batches that so many streams can make. Below the limit every stream keeps its frame rate.
    """

    def __init__(
        self, student: Student, speeds: Speeds, sessions: int | None, load: float, size: tuple[int, int]
    ) -> None:
        if not 0 < load <= 1:
            raise ValueError(f"load: must lie in (0, 1], got {load:g}")
        if sessions is not None and sessions < 1:
            raise ValueError(f"sessions: must be 1 or more, got {sessions}")
        self.student, self.speeds = student, speeds
        self.sessions, self.limit, self.size = sessions, load, size
        self.frames = Layout.of(student.settings, student.vae.temporal_factor).size(1)  # of every block but the first

    def held(self, plan: StreamPlan, rate: float | None) -> Held:
        return Held(Kind.of(plan), rate, self.student.bytes_of(plan).total)

    def load(self, streams: Iterable[Held]) -> float | None:
        """Share of the time that the live ones of these streams need; None where nothing was measured."""
        counts: Counter[Kind] = Counter()
        rates: dict[Kind, float] = {}
        for stream in streams:
            if stream.rate is not None:
                counts[stream.kind] += 1
                rates[stream.kind] = rates.get(stream.kind, 0.0) + stream.rate
        total = 0.0
        for kind, rate in rates.items():
            share = self.speeds.share(kind, counts[kind])
            if share is None:
                return None
            total += share * rate / self.frames
        return total

    def refusal(self, asked: Held, streams: list[Held]) -> Busy | None:
        """Why there is no room for one more, in words and figures; None where there is."""
        budget, held = self.student.budget, sum(stream.bytes for stream in streams)
        if budget is not None and held + asked.bytes > budget:
            size = f"{asked.kind.width}x{asked.kind.height}"
            rest = f"{len(streams)} open streams hold {held / 1e6:.1f} of {budget / 1e6:.1f} MB"
            return Busy(f"memory: a stream of {size} needs {asked.bytes / 1e6:.1f} MB; {rest}")
        if self.sessions is not None and len(streams) >= self.sessions:
            return Busy(f"sessions: {len(streams)} of {self.sessions} are open")
        load = self.load([*streams, asked])
        if asked.rate is None or load is None or load <= self.limit:
            return None
        live = sum(stream.rate is not None for stream in streams)
        each = f"{self.speeds.share(asked.kind, live + 1):.3g} s per block of {self.frames} frames"
        return TooSlow(f"speed: with {live + 1} live streams the load would be {load:.3f} of {self.limit:g} ({each})")

    def capacity(self, streams: list[Held]) -> dict[str, Any]:
        """Figures for whoever places streams; "most": of the usual size at 16 frames per second, None: no end is
        known."""
        height, width = self.size
        kind, budget = Kind(height, width, False), self.student.budget
        each = self.student.bytes_per_stream(height, width).total
        return {
            "sessions": len(streams),
            "live": sum(stream.rate is not None for stream in streams),
            "most_sessions": self.sessions,
            "bytes": sum(stream.bytes for stream in streams),
            "bytes_budget": budget,
            "bytes_per_stream": each,
            "most_by_bytes": None if budget is None else budget // each,
            "most_by_speed": self._most(kind),
            "load": self.load(streams) or 0.0,
            "load_limit": self.limit,
            "seconds_per_block": self.speeds.table(),
        }

    def _most(self, kind: Kind) -> int | None:
        """Streams of a kind that the speed allows, searched by halves: more of them need more."""
        fits, over = 0, MOST
        while over - fits > 1:
            middle = (fits + over) // 2
            load = self.load([Held(kind, LIVE_RATE, 0)] * middle)
            if load is None:
                return None
            fits, over = (middle, over) if load <= self.limit else (fits, middle)
        return fits


def _moved(mean: float | None, seconds: float) -> float:
    return seconds if mean is None else mean + NEW * (seconds - mean)
