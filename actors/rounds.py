"""What a student does next, of all that its streams are waiting for: earliest deadline first, in batches.

Work comes in units: making one block of one or more streams, and decoding one latent frame of one stream. A unit is
never interrupted, so a new stream waits for one unit at most. Earliest deadline first keeps every deadline that can be
kept, if a unit is short beside them (Liu and Layland, Journal of the ACM 20, 1973).
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass

from .admission import Kind, Speeds
from .sessions import Session
from .streams import may_share


@dataclass(frozen=True)
class Round:
    """A unit of work: streams whose next blocks are made together, or one whose next latent frame is decoded."""

    making: tuple[Session, ...] = ()
    showing: Session | None = None


def next_round(sessions: Collection[Session], now: float, most: int | None, speeds: Speeds) -> Round | None:
    """The most urgent unit; None: nothing can be done. sessions: in the order in which they were opened. most: of
    streams in a batch, None: any.

    Streams without deadlines come last. Among equals decoding comes first, so that all are ready for the next batch;
    then the stream with fewer blocks, then the older one.
    """
    ready = [session for session in sessions if session.state == "running"]
    ready = [session for session in ready if session.has_undecoded or session.wants_block]
    first = min(ready, key=lambda session: (session.due(now), not session.has_undecoded, session.begun), default=None)
    if first is None:
        return None
    if first.has_undecoded:
        return Round(showing=first)
    return Round(making=tuple(_batch(first, sessions, ready, now, most or len(sessions), speeds)))


def _batch(
    first: Session, sessions: Collection[Session], ready: Sequence[Session], now: float, most: int, speeds: Speeds
) -> list[Session]:
    """`first` and those whose blocks are made with its block."""
    batch, kind = [first], Kind.of(first.plan)
    alone = speeds.making(kind, 1)
    if first.plan.redraw is not None or most == 1:
        return batch
    shape = may_share(first.stream)
    mates = [session for session in sessions if session is not first and session.may_join]
    mates = [session for session in mates if may_share(session.stream) == shape]
    mates.sort(key=lambda session: session.block_due(now))
    if alone is None:
        return (batch + mates)[:most]
    latest = _latest_end(first, [s for s in ready if s is not first and s not in mates], sessions, now, speeds)
    for mate in mates:
        if len(batch) == most:
            break
        before, after = (speeds.making(kind, size) or 0.0 for size in (len(batch), len(batch) + 1))
        in_time = now + after <= latest
        both_late = now + alone > latest and mate.block_due(now) < now + before + alone
        if in_time or both_late:
            batch.append(mate)
    return batch


def _latest_end(
    first: Session, others: Sequence[Session], sessions: Collection[Session], now: float, speeds: Speeds
) -> float:
    """When the batch must be made and its first block decoded, so that nobody is late who need not be.

    others: those that wait for work of their own after this. A batch without deadlines takes no longer than a chunk of
    a stream that has one lasts: such streams have all the chunks in hand that may wait, or they would come first.
    """
    ends = [first.due(now)]
    for other in others:
        ends.append(other.due(now) - (speeds.making(Kind.of(other.plan), 1) or 0.0))
    if not first.is_live:
        live = [session for session in sessions if session.state == "running" and not session.playback.is_paused]
        rates = [session.order.frame_rate for session in live if session.order.frame_rate is not None]
        if rates:
            ends.append(now + first.layout.size(1) / max(rates))
    return min(ends)
