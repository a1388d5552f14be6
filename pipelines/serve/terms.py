"""What pool and gateways know of a worker. Without torch, which only the workers themselves need."""

from dataclasses import dataclass
from typing import Any, Literal

from ...actors.orders import Piece


@dataclass(frozen=True)
class WorkerSettings:
    """How a worker runs. path: the student's folder; state: address of the store, None: snapshots are not kept.

    dtype: "float32" or "bfloat16", None: the device's default. threads: of torch. budget: bytes of streams.
    keep_every: blocks between two snapshots of a stream, None: as `usual_distance` has it. size: height and width of
    orders that name none, which the worker is warmed up with; None: the student's own. abandoned_seconds: after so
    long without any call a stream is closed.
    """

    path: str
    state: str | None = None
    device: str = "cpu"
    dtype: str | None = None
    threads: int | None = None
    budget: int | None = None
    sessions: int | None = None
    ahead: int = 2
    keep_every: int | None = None
    load: float = 0.9
    size: tuple[int, int] | None = None
    batches: tuple[int, ...] = (1, 2, 4)
    abandoned_seconds: float = 60.0


@dataclass(frozen=True)
class WorkerInfo:
    """A worker that is ready. fingerprint: of its student; snapshots go from one worker to another if it is the same.

    size: height and width of orders that name none. temporal: frames of a latent frame after the first. block,
    first_block: latent frames. keep_every: blocks between two snapshots of a stream. snapshot_bytes: of one.
    """

    id: str
    node: str
    pid: int
    model: str
    device: str
    fingerprint: str
    capacity: dict[str, Any]
    size: tuple[int, int]
    block: int
    first_block: int
    temporal: int
    keep_every: int
    snapshot_bytes: int


@dataclass(frozen=True)
class Moving:
    """What `take` gives once a stream has left its worker: ask the pool for another one and go on there."""

    pieces: tuple[Piece, ...] = ()
    state: Literal["moved"] = "moved"
    reason: str = ""
    due: int = 0


class Moved(ValueError):
    """The stream has left this worker, or the worker takes none: ask the pool for another one."""
