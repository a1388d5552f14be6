"""Figures of a scheduler: what was made and taken, what came in time, and how evenly."""

from collections import Counter, deque
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any, Final

import numpy as np

from .orders import Piece
from .sessions import Counts, Session

GAPS_KEPT: Final = 4096


class Figures:
    """Guarded by the scheduler's lock. batches: how many were made, by size."""

    def __init__(self) -> None:
        self.batches: Counter[int] = Counter()
        self._past: Counter[str] = Counter()  # of streams that are closed
        self._gaps: deque[float] = deque(maxlen=GAPS_KEPT)

    def saw(self, session: Session, piece: Piece, now: float) -> None:
        """A piece is there to be taken."""
        if piece.ends_chunk:
            if session.last_chunk is not None:
                self._gaps.append(now - session.last_chunk)
            session.last_chunk = now

    def close(self, session: Session) -> None:
        self._past.update(asdict(session.counts))

    def table(self, sessions: Mapping[str, Session]) -> dict[str, Any]:
        """in_time: share of the chunks that had all their pieces there before the deadline; chunk_gap: seconds."""
        totals = Counter(asdict(Counts()) | self._past)
        for session in sessions.values():
            totals.update(asdict(session.counts))
        spread = np.percentile(self._gaps, (50, 95, 99)).tolist() if self._gaps else [0.0] * 3
        return {
            "streams": {name: _row(session) for name, session in sessions.items()},
            "totals": dict(totals),
            "in_time": 1 - totals["chunks_late"] / totals["chunks"] if totals["chunks"] else 1.0,
            "chunk_gap": dict(zip(("p50", "p95", "p99"), spread, strict=True)),
            "batches": dict(sorted(self.batches.items())),
        }


def _row(session: Session) -> dict[str, Any]:
    row = asdict(session.counts)
    row |= {"flushed": session.turns.flushed, "state": session.state, "paused": session.playback.is_paused}
    return row | {"waiting": len(session.pieces), "first_seconds": session.first_seconds}
