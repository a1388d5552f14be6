"""What the pool decides, without Ray: who waits, who is asked first, when workers are started and let go.

Nothing here waits or starts anything, and the time is an argument, so that every decision can be tested by itself.
"""

import math
import secrets
from dataclasses import dataclass, field
from typing import Any, Final, Literal

from .terms import WorkerInfo, WorkerSettings

HIGH_LOAD: Final = 0.85  # mean load of the workers above which another one is started
LOW_LOAD: Final = 0.5  # load that the others may have after a worker with streams is let go
LONGEST_BACKOFF: Final = 60.0
UNBOUNDED: Final = 1 << 20  # streams of a worker that knows no limit
HOPELESS_STARTS: Final = 3  # failed in a row, with no worker left: those who wait are told


@dataclass(frozen=True)
class FleetSettings:
    """The workers of one model. cpus, gpus, memory (bytes): what Ray sets aside for each.

    queue: orders that may wait. idle_seconds: how long a worker must be spare before it is let go. start_seconds: for a
    worker to be ready. drain_seconds: for streams to leave a worker. ticket_seconds: how long a place in the queue
    lasts without being renewed.
    """

    worker: WorkerSettings
    min_workers: int = 1
    max_workers: int = 1
    cpus: float = 1.0
    gpus: float = 0.0
    memory: int | None = None
    queue: int = 100
    idle_seconds: float = 60.0
    start_seconds: float = 300.0
    drain_seconds: float = 20.0
    ticket_seconds: float = 5.0

    def __post_init__(self) -> None:
        if not 0 <= self.min_workers <= self.max_workers or self.max_workers < 1:
            raise ValueError(
                f"min_workers, max_workers: must be 0 <= min <= max and max >= 1, "
                f"got {self.min_workers} and {self.max_workers}"
            )


@dataclass(frozen=True)
class Placed:
    """worker: the handle to call. begins: index of the first frame that is computed (see `StreamWorker.open`)."""

    worker: Any
    id: str
    info: WorkerInfo
    begins: int


@dataclass(frozen=True)
class Waiting:
    """position: how many are ahead. Ask again with the ticket, at least every `ticket_seconds`."""

    ticket: str
    position: int


@dataclass(frozen=True)
class Refused:
    """The order cannot be served; asking again does not help. code: "busy", "invalid" or "unavailable"."""

    reason: str
    code: Literal["busy", "invalid", "unavailable"] = "invalid"


# --- The queue -------------------------------------------------------------------------------------------------------


@dataclass
class _Ticket:
    renewed: float
    resumed: bool


class Queue:
    """Who waits for a model, in the order in which they came; streams that were running before come first."""

    def __init__(self, most: int, ticket_seconds: float) -> None:
        self.most, self.ticket_seconds = most, ticket_seconds
        self._tickets: dict[str, _Ticket] = {}

    def __len__(self) -> int:
        return len(self._tickets)

    def position(self, ticket: str | None, resumed: bool, now: float) -> int:
        """How many are ahead of a ticket, or of one who comes without; renews the ticket."""
        self.expire(now)
        if ticket is not None and ticket in self._tickets:
            self._tickets[ticket].renewed = now
            return self._line().index(ticket)
        return sum(other.resumed for other in self._tickets.values()) if resumed else len(self)

    def join(self, ticket: str | None, resumed: bool, now: float) -> Waiting | Refused:
        """A place in the queue: the ticket's own if it still has one. Streams that ran before are never refused."""
        if ticket is None or ticket not in self._tickets:
            if len(self) >= self.most and not resumed:
                return Refused(f"queue: {len(self)} are waiting, which is the most that may", "busy")
            ticket = secrets.token_hex(8)
            self._tickets[ticket] = _Ticket(now, resumed)
        return Waiting(ticket, self._line().index(ticket))

    def leave(self, ticket: str | None) -> None:
        self._tickets.pop(ticket or "", None)

    def expire(self, now: float) -> None:
        """Drop the tickets that were not renewed in time."""
        before = now - self.ticket_seconds
        self._tickets = {name: ticket for name, ticket in self._tickets.items() if ticket.renewed >= before}

    def _line(self) -> list[str]:
        return sorted(self._tickets, key=lambda name: not self._tickets[name].resumed)  # stable: else in their order


# --- The workers -----------------------------------------------------------------------------------------------------


@dataclass
class Member:
    """A worker as the pool knows it. state "retiring": takes no more streams and ends with its last one.

    figures: its latest `StreamWorker.stats`. missed: calls for them in a row that gave no answer. took, freed: streams
    that came and went, and when, which an answer that is on its way may not know of.
    """

    id: str
    handle: Any
    generation: int
    since: float
    state: Literal["starting", "ready", "retiring", "draining"] = "starting"
    info: WorkerInfo | None = None
    streams: set[str] = field(default_factory=set)
    figures: dict[str, Any] = field(default_factory=dict)
    missed: int = 0
    took: dict[str, float] = field(default_factory=dict)
    freed: dict[str, float] = field(default_factory=dict)

    def take(self, stream: str, now: float) -> None:
        """A stream was placed here."""
        self.streams.add(stream)
        self.freed.pop(stream, None)
        self.took[stream] = now

    def free(self, stream: str, now: float) -> None:
        """A stream has left."""
        self.streams.discard(stream)
        self.took.pop(stream, None)
        self.freed[stream] = now

    def hear(self, here: list[str], asked: float) -> None:
        """The worker says which streams it has; what came or went since it was asked is not in its words."""
        self.took = {stream: when for stream, when in self.took.items() if when >= asked}
        self.freed = {stream: when for stream, when in self.freed.items() if when >= asked}
        self.streams = (set(here) | self.took.keys()) - self.freed.keys()

    @property
    def load(self) -> float:
        """0 to 1: the share of its speed, its memory or its sessions that is taken, whichever is largest."""
        return load_of(self.figures["capacity"]) if self.figures else 0.0

    @property
    def room(self) -> int:
        """Streams of the usual kind that it could take now, by what it said last."""
        if not self.figures:
            return 1
        return max(0, most_of(self.figures["capacity"]) - len(self.streams))


@dataclass(frozen=True)
class Plan:
    """What is to be done now: workers to start, and one that may be let go."""

    start: int = 0
    drain: str | None = None


class Fleet:
    """The workers of one model, and who waits for them."""

    def __init__(self, model: str, settings: FleetSettings) -> None:
        self.model, self.settings = model, settings
        self.members: dict[str, Member] = {}
        self.queue = Queue(settings.queue, settings.ticket_seconds)
        self.generation = 0
        self.upgrading = False
        self.counts = {"started": 0, "died": 0, "failed_starts": 0, "drained": 0, "placed": 0, "moved": 0, "refused": 0}
        self.error = ""  # of the last worker that died or did not start
        self._failures = 0  # starts in a row that failed
        self._not_before = 0.0
        self._spare: tuple[str, float] | None = None  # a worker that is not needed, and since when

    def of(self, *states: str) -> list[Member]:
        return [member for member in self.members.values() if member.state in states]

    def candidates(self, stream: str) -> list[Member]:
        """Workers that may take a stream: where it runs already, then the newest generation, then by load."""

        def rank(member: Member) -> tuple[Any, ...]:
            return stream not in member.streams, -member.generation, member.load, len(member.streams), member.id

        return sorted(self.of("ready"), key=rank)

    def may_try(self, position: int) -> bool:
        """Whether one with so many ahead may ask the workers now: those ahead leave room, or nobody is ahead."""
        return position == 0 or position < sum(member.room for member in self.of("ready"))

    def hopeless(self) -> str | None:
        """Why waiting is in vain, where it is."""
        if self._failures < HOPELESS_STARTS or self.of("ready", "draining", "retiring"):
            return None
        return f"model {self.model}: its workers cannot be started: {self.error}"

    # --- What happened to workers ----------------------------------------------------------------------------------

    def add(self, handle: Any, now: float) -> Member:
        member = Member(f"{self.model}-{secrets.token_hex(4)}", handle, self.generation, now)
        self.members[member.id] = member
        return member

    def started(self, member: Member, info: WorkerInfo, now: float) -> None:
        member.state, member.info, member.since = "ready", info, now
        self._failures, self._not_before = 0, 0.0
        self.counts["started"] += 1

    def failed_start(self, member: Member, reason: str, now: float) -> None:
        """The next start waits for a while, twice as long each time."""
        self.members.pop(member.id, None)
        self.error = reason
        self.counts["failed_starts"] += 1
        self._failures += 1
        self._not_before = now + min(LONGEST_BACKOFF, 2.0 ** (self._failures - 1))

    def lost(self, member: Member, reason: str) -> None:
        if self.members.pop(member.id, None) is not None:
            self.counts["died"] += 1
            self.error = f"worker {member.id}: {reason}"

    def update(self, member: Member, figures: dict[str, Any], asked: float = 0.0) -> None:
        """Take over what a worker says of itself. asked: when it was."""
        member.figures, member.missed = figures, 0
        member.hear(figures["here"], asked)

    # --- Scaling ---------------------------------------------------------------------------------------------------

    def plan(self, now: float) -> Plan:
        """What brings the fleet to what is asked of it: never below the minimum, never above the maximum."""
        self.queue.expire(now)
        start = self._missing() if now >= self._not_before else 0
        if start or self.upgrading:
            self._spare = None
            return Plan(start)
        return Plan(0, self._released(now))

    def _missing(self) -> int:
        alive, starting = self.of("starting", "ready"), len(self.of("starting"))
        missing = max(0, self.settings.min_workers - len(alive))
        if not self.upgrading:
            missing = max(missing, self._demand() - starting)
        return max(0, min(missing, self.settings.max_workers - len(alive)))

    def _demand(self) -> int:
        """Workers wanted beside those that are ready, for those who wait and for the load."""
        ready = self.of("ready")
        if len(self.queue):
            each = max(1.0, sum(len(member.streams) for member in ready) / max(1, len(ready)))
            return math.ceil(len(self.queue) / each)
        return int(bool(ready) and sum(member.load for member in ready) / len(ready) > HIGH_LOAD)

    def _released(self, now: float) -> str | None:
        """A worker that was not needed for `idle_seconds`; its streams move to the others."""
        spare = self._spare_worker()
        if spare is None:
            self._spare = None
        elif self._spare is None or self._spare[0] != spare:
            self._spare = (spare, now)
        elif now - self._spare[1] >= self.settings.idle_seconds:
            self._spare = None
            return spare
        return None

    def _spare_worker(self) -> str | None:
        ready = self.of("ready")
        if len(self.queue) or self.of("starting", "draining") or len(ready) <= self.settings.min_workers:
            return None
        least = min(ready, key=lambda member: (member.load, len(member.streams), -member.since, member.id))
        if len(ready) == 1:  # a model without a minimum
            return None if least.streams else least.id
        rest = sum(member.load for member in ready) / (len(ready) - 1)
        return least.id if rest <= (LOW_LOAD if least.streams else HIGH_LOAD) else None

    # --- Telling ---------------------------------------------------------------------------------------------------

    def status(self, now: float) -> dict[str, Any]:
        """Figures for people and metrics."""
        return {
            "model": self.model,
            "min_workers": self.settings.min_workers,
            "max_workers": self.settings.max_workers,
            "generation": self.generation,
            "upgrading": self.upgrading,
            "waiting": len(self.queue),
            "streams": sum(len(member.streams) for member in self.members.values()),
            "counts": dict(self.counts),
            "error": self.error,
            "workers": [_member_status(member, now) for member in self.members.values()],
        }


def load_of(capacity: dict[str, Any]) -> float:
    """Of what a worker may take, the share that is taken: of its speed, its sessions or its bytes."""
    shares = [capacity["load"] / capacity["load_limit"]]
    for taken, most in (("sessions", "most_sessions"), ("bytes", "bytes_budget")):
        if capacity[most] is not None:
            shares.append(capacity[taken] / capacity[most] if capacity[most] else 1.0)
    return float(max(shares))


def most_of(capacity: dict[str, Any]) -> int:
    """Streams of the student's own size at the usual frame rate that a worker can have."""
    limits = (capacity[name] for name in ("most_sessions", "most_by_bytes", "most_by_speed"))
    return min((limit for limit in limits if limit is not None), default=UNBOUNDED)


def _member_status(member: Member, now: float) -> dict[str, Any]:
    return {
        "id": member.id,
        "state": member.state,
        "generation": member.generation,
        "seconds": now - member.since,
        "pid": member.info.pid if member.info else None,
        "node": member.info.node if member.info else None,
        "device": member.info.device if member.info else None,
        "keep_every": member.info.keep_every if member.info else None,
        "snapshot_bytes": member.info.snapshot_bytes if member.info else None,
        "streams": len(member.streams),
        "load": member.load,
        "room": member.room,
        "figures": member.figures,
    }
