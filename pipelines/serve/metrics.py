"""A gateway's figures, in Prometheus's text form."""

from collections import deque
from typing import Any, Final

import numpy as np
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

SECONDS: Final = (0.05, 0.1, 0.2, 0.3, 0.5, 0.75, 1.0, 1.5, 2.0, 3.0, 5.0, 10.0, 30.0)
GAPS: Final = (0.05, 0.1, 0.2, 0.4, 0.6, 0.7, 0.75, 0.8, 0.9, 1.0, 1.25, 1.5, 2.0, 4.0)
GAPS_KEPT: Final = 4096  # for the percentiles
PERCENTILES: Final = (0.5, 0.95, 0.99)


class Metrics:
    """What happened at this gateway. gateway: a label on every figure, so that several can be told apart."""

    def __init__(self, gateway: str) -> None:
        self.registry = CollectorRegistry()
        self._gateway = gateway
        self._gaps: deque[float] = deque(maxlen=GAPS_KEPT)
        self.sessions = self._gauge("sessions", "Streams with a viewer")
        self.queued = self._gauge("sessions_queued", "Viewers who wait for a place")
        self.slow = self._gauge("sessions_slow", "Streams that stand still because their viewer does not keep up")
        self.begun = self._counter("sessions_begun", "Streams that were begun")
        self.resumed = self._counter("sessions_resumed", "Streams that went on on a new socket")
        self.moved = self._counter("streams_moved", "Streams that went on on another worker")
        self.ended = self._labelled("sessions_ended", "Sockets that ended, by how", "how")
        self.refused = self._labelled("requests_refused", "Messages and requests that were refused, by code", "code")
        self.first_frame = self._histogram("first_frame_seconds", "From `start` to the first media, queue included")
        self.changed_frame = self._histogram("prompt_seconds", "From `prompt` to the first frame made under it")
        self.gap = self._histogram("chunk_gap_seconds", "Between the ends of two chunks of a playing stream", GAPS)
        self.standstill = self._histogram("move_seconds", "How long a stream stood still to change its worker")
        self.frames = self._counter("frames", "Frames that were sent")
        self.chunks = self._counter("chunks", "Chunks that were sent")
        self.late = self._counter("chunks_late", "Chunks that came after their deadline")
        self.underruns = self._counter("underruns", "Pieces that kept a player waiting")
        self.flushed = self._counter("frames_flushed", "Frames that a new prompt made void")
        self.sent_bytes = self._counter("sent_bytes", "Media that was sent")
        self.received_bytes = self._counter("received_bytes", "Messages that were received")
        self.videos = self._labelled("videos", "Videos that were ordered, by how they ended", "how")
        self._attainment = self._gauge("deadline_attainment", "Share of chunks that were in time")
        self._percentiles = self._labelled_gauge("chunk_gap", "Percentiles of the last gaps, seconds", "quantile")
        self._pool = {
            "workers": self._labelled_gauge("workers", "Workers that are ready", "model"),
            "streams": self._labelled_gauge("streams", "Streams on workers", "model"),
            "waiting": self._labelled_gauge("queue", "Orders that wait for a worker", "model"),
            "load": self._labelled_gauge("load", "Mean load of the ready workers, 0 to 1", "model"),
        }

    def note_gap(self, seconds: float) -> None:
        self.gap.observe(seconds)
        self._gaps.append(seconds)

    def note_chunk(self, late: bool) -> None:
        self.chunks.inc()
        if late:
            self.late.inc()

    def text(self, status: dict[str, Any]) -> bytes:
        """All figures. status: the pool's."""
        chunks, late = _value(self.chunks), _value(self.late)
        self._attainment.set(1 - late / chunks if chunks else 1.0)
        if self._gaps:
            for share, gap in zip(PERCENTILES, np.quantile(self._gaps, PERCENTILES), strict=True):
                self._percentiles.labels(self._gateway, str(share)).set(float(gap))
        for model, fleet in status.items():
            self._note_fleet(model, fleet)
        return generate_latest(self.registry)

    def _note_fleet(self, model: str, fleet: dict[str, Any]) -> None:
        ready = [worker["load"] for worker in fleet["workers"] if worker["state"] == "ready"]
        figures = {
            "workers": len(ready),
            "streams": fleet["streams"],
            "waiting": fleet["waiting"],
            "load": float(np.mean(ready)) if ready else 0.0,
        }
        for name, value in figures.items():
            self._pool[name].labels(self._gateway, model).set(value)

    # --- Making them -----------------------------------------------------------------------------------------------

    def _counter(self, name: str, words: str) -> Counter:
        return Counter(f"reelway_{name}", words, ["gateway"], registry=self.registry).labels(self._gateway)

    def _gauge(self, name: str, words: str) -> Gauge:
        return Gauge(f"reelway_{name}", words, ["gateway"], registry=self.registry).labels(self._gateway)

    def _histogram(self, name: str, words: str, buckets: tuple[float, ...] = SECONDS) -> Histogram:
        made = Histogram(f"reelway_{name}", words, ["gateway"], registry=self.registry, buckets=buckets)
        return made.labels(self._gateway)

    def _labelled(self, name: str, words: str, label: str) -> "Labelled":
        made = Counter(f"reelway_{name}", words, ["gateway", label], registry=self.registry)
        return Labelled(made, self._gateway)

    def _labelled_gauge(self, name: str, words: str, label: str) -> Gauge:
        return Gauge(f"reelway_{name}", words, ["gateway", label], registry=self.registry)


class Labelled:
    """A counter with one label beside the gateway's."""

    def __init__(self, counter: Counter, gateway: str) -> None:
        self._counter, self._gateway = counter, gateway

    def inc(self, value: str) -> None:
        self._counter.labels(self._gateway, value).inc()


def _value(counter: Counter) -> float:
    (sample,) = [sample for metric in counter.collect() for sample in metric.samples if sample.name.endswith("_total")]
    return float(sample.value)
