"""Many live streams on one student: what is most urgent is done first, in batches where shapes agree.

One thread works (`run`, or `tick` by hand); any thread may call the rest. Viewers' calls reach a stream's mailbox and
return; what needs the student (open, close, snapshot, measure) is done by the working thread between two units of
work, and by the caller where none runs.

What is in a batch changes the last bits of the arithmetic, and with them the pictures, a little. Measured with a small
student of random weights in float32 on the CPU, 8 blocks of 32x32 pixels in changing batches of 1 to 4 against the same
ones made alone: 1 of 75,000 values differs, by one grey level of 256. A stream that is computed alone gives the same
bytes again, from its beginning or from any of its snapshots.

Source of the order of work: earliest deadline first (Liu and Layland, Journal of the ACM 20, 1973).
"""

import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import asdict
from typing import Any, Final, TypeVar

from ..kernels.clips import Pixels
from .admission import Admission, Held, Kind, Speeds
from .figures import Figures
from .generator import NoRoom, Student
from .orders import Busy, StreamOrder, Taken
from .rounds import Round, next_round
from .sessions import Begun, Session
from .streams import Snapshot, Stream, StreamPlan, make_together, settle
from .timeline import Turn
from .warmup import finish, measure_blocks

T = TypeVar("T")
FAILURES: Final = (ArithmeticError, RuntimeError, ValueError)  # of one stream; torch's are RuntimeErrors


class Scheduler:
    """Serves the streams of a student, which nobody else may touch meanwhile.

    sessions: at most so many streams. ahead: chunks that may wait untaken per stream; then it pauses. keep: called
    with a snapshot before every `keep_every`-th block of a stream, from the working thread: it must not block or raise.
    load: share of the time that may be planned for streams with deadlines. batch: make no larger ones. size: height
    and width of orders that name none and have no image; the student's own by default. clock: seconds that never go
    back.
    """

    def __init__(
        self,
        student: Student,
        *,
        sessions: int | None = None,
        ahead: int = 2,
        keep_every: int = 4,
        keep: Callable[[str, Snapshot], None] | None = None,
        load: float = 0.9,
        batch: int | None = None,
        size: tuple[int, int] | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        for name, number in (("ahead", ahead), ("keep_every", keep_every), ("batch", batch)):
            if number is not None and number < 1:
                raise ValueError(f"{name}: must be 1 or more, got {number}")
        self.student, self.speeds = student, Speeds()
        self.size = size or student.default_size
        self.admission = Admission(student, self.speeds, sessions, load, self.size)
        self._ahead, self._batch = ahead, batch
        self._keep_every, self._keep, self._clock = keep_every, keep, clock
        self._mutex = threading.RLock()
        self._work = threading.Condition(self._mutex)
        self._sessions: dict[str, Session] = {}
        self._errands: deque[Callable[[], None]] = deque()
        self._worker: int | None = None  # the thread that runs
        self._stopping = False
        self._broken = ""
        self._figures = Figures()

    # --- Room ------------------------------------------------------------------------------------------------------

    def measure(self, height: int, width: int, batches: Sequence[int] = (1, 2, 4)) -> dict[int, float]:
        """Warm up, and time blocks of streams of this size whose windows are full: seconds per block, decoded, by batch
        size. Sizes that the budget has no room for are left out. What is seen later refines it.
        """
        return self._ask(lambda: measure_blocks(self.student, self.speeds, height, width, batches, self._clock))

    def measure_again(self) -> None:
        """Time one block of one stream anew, and believe that all else has become slower or faster by as much: what was
        measured while something else kept the machine busy would stand until blocks are made.
        """

        def measured() -> None:
            fresh, before = Speeds(), self.speeds.seconds(Kind(*self.size, False), 1)
            now = measure_blocks(self.student, fresh, *self.size, (1,), self._clock)
            if before and now:
                self.speeds.scale(now[1] / before)

        self._ask(measured)

    def refusal(self, order: StreamOrder) -> Busy | None:
        """Why there is no room for this stream, in words and figures; None: there is. ValueError where it cannot be
        made."""
        held = self.admission.held(self._plan(order), order.frame_rate)
        with self._mutex:
            return self.admission.refusal(held, self._held())

    def capacity(self) -> dict[str, Any]:
        """Sessions and bytes that are open and that could be, the load, and seconds per block."""
        with self._mutex:
            return self.admission.capacity(self._held())

    # --- Streams: calls from any thread ----------------------------------------------------------------------------

    def open(
        self, order: StreamOrder, *, snapshot: Snapshot | None = None, turns: Sequence[Turn] = (), frame: int = 0
    ) -> None:
        """Begin a stream; Busy where there is no room, ValueError where it cannot be made.

        To go on with one: `turns` are all its prompt switches, `snapshot` one of its, or None, and `frame` the first
        frame that its viewer does not have. What lies between is made again, silently; a stream that redraws a video
        needs its source again from the snapshot's `frames_out` on.
        """
        plan = self._plan(order)
        _check_resumed(plan, snapshot, frame)
        for text in _texts(order, snapshot, turns):  # here: the working thread then finds them encoded
            self.student.context(text)
        self._ask(lambda: self._open(order, plan, snapshot, turns, frame))

    def take(self, stream: str, frame: int, timeout: float = 0.0) -> Taken:
        """The pieces from frame `frame` on; waits up to `timeout` seconds for one. Those before are dropped.

        What was given is given again until a later frame is asked for. ValueError for a stream that is not here, and
        for a frame that was dropped or cannot be next.
        """
        with self._mutex:
            session = self._find(stream)
            session.acknowledge(frame, self._clock())
            self._work.notify_all()
            session.changed.wait_for(lambda: session.pieces or session.state != "running" or self._broken, timeout)
            return session.hand_out(self._clock())

    def prompt(self, stream: str, text: str, frame: int | None = None) -> Turn:
        """Follow another prompt from the next block edge on, at once dropping all pieces that were not taken.

        frame: the first one that was taken and will not be shown, of a caller who takes ahead of the viewer: those are
        dropped too, and the deadlines know of it. The turn says which block and frame the edge is, and how many frames
        are dropped in front of it: indices go on after them. Of several prompts before one edge the last one wins, and
        takes the turn's place in the log. The text is encoded here, in the caller's thread: no stream waits for it.
        """
        with self._mutex:
            self._find(stream).check_runs()
        self.student.context(text)
        with self._mutex:
            turn = self._find(stream).switch(text, frame)
            self._work.notify_all()
            return turn

    def pause(self, stream: str) -> None:
        """Make no further block, and let the deadlines wait."""
        with self._mutex:
            self._find(stream).pause(self._clock())

    def resume(self, stream: str) -> None:
        """Go on after a pause."""
        with self._mutex:
            self._find(stream).playback.resume(self._clock())
            self._work.notify_all()

    def feed(self, stream: str, frames: Pixels) -> None:
        """Source frames uint8 [T, H, W, 3] of a stream that redraws a video; ValueError when its queue is full."""
        with self._mutex:
            self._find(stream).feed(frames, self._clock())
            self._work.notify_all()

    def close_stream(self, stream: str) -> None:
        """Forget a stream; its memory is given back before anything else is done. One that is not here is no error."""
        with self._mutex:
            session = self._sessions.pop(stream, None)
            if session is None:
                return
            session.pieces.clear()
            session.end("ended", "it was closed")
            self._figures.close(session)
            self._post(session.stream.close)

    def snapshot(self, stream: str) -> Snapshot:
        """The stream's state at its next block edge. ValueError where it has ended or failed."""
        return self._ask(lambda: self._snapshot(stream))

    def stats(self) -> dict[str, Any]:
        """Counts of each stream and of all there ever were; the share of chunks in time; gaps between chunks, seconds;
        how many batches were made of which size.
        """
        with self._mutex:
            return self._figures.table(self._sessions)

    # --- Work ------------------------------------------------------------------------------------------------------

    def run(self) -> None:
        """Work until `stop`. An error that is no stream's own ends it and is raised."""
        with self._mutex:
            assert self._worker is None, "the scheduler runs already"
            self._worker = threading.get_ident()
        try:
            while not self._stopping:
                if not self.tick():
                    with self._mutex:
                        self._work.wait_for(lambda: self._stopping or self._errands or self._next())
        except BaseException as error:
            self._broken = f"{type(error).__name__}: {error}"
            raise
        finally:
            with self._mutex:
                self._run_errands()
                self._worker, self._stopping = None, False
                for session in self._sessions.values():
                    session.changed.notify_all()

    def stop(self) -> None:
        """End `run` after the unit of work that it is at. The streams stay."""
        with self._mutex:
            self._stopping = True
            self._work.notify_all()

    def tick(self) -> bool:
        """What was asked for, then one unit of work; False: there was nothing to do."""
        errands = self._run_errands()
        with self._mutex:
            unit = self._next()
            begun = [session.begin() for session in unit.making] if unit else []
        if unit is None:
            return errands
        if unit.showing:
            self._show(unit.showing)
        else:
            self._make(begun)
        return True

    def _make(self, batch: list[Begun]) -> None:
        """Make blocks together. Clean passes that are owed come first, then snapshots and prompt switches."""
        times = [self._clock()]
        alive = self._together(batch, _settle)
        times.append(self._clock())
        alive = [begun for begun in alive if self._together([begun], self._prepare)]
        times.append(self._clock())
        alive = self._together(alive, _make)
        finish(self.student)
        times.append(self._clock())
        making, upkeep = times[3] - times[2] + times[1] - times[0], times[2] - times[1]
        with self._mutex:
            self._figures.batches[len(batch)] += 1
            for begun in alive:
                begun.session.spent[begun.block] = (making + upkeep) / len(batch)
        self.speeds.saw_upkeep(len(batch), upkeep)
        if len(alive) == len(batch) and all(self._fills_window(begun) for begun in alive):
            self.speeds.saw_made(batch[0].session.held.kind, len(batch), making)

    def _show(self, session: Session) -> None:
        """Decode a latent frame, and hand its pictures over."""
        began = self._clock()
        try:
            frames = next(session.stream.shown())
        except FAILURES as error:
            self._fail(session, error)
            return
        now = self._clock()
        with self._mutex:
            piece = session.arrived(frames, now - began, now) if session.state == "running" else None
            if piece:
                session.changed.notify_all()
                self._figures.saw(session, piece, now)
                if piece.ends_chunk and piece.chunk:
                    self.speeds.saw_shown(session.held.kind, session.decoding)
            closes = session.state != "running"
        if closes:
            session.stream.close()

    def _together(self, batch: list[Begun], action: Callable[[list[Begun]], None]) -> list[Begun]:
        """Do it for all at once. If that fails, one by one: who fails alone has failed. Returns the others."""
        if not batch:
            return []
        try:
            action(batch)
        except FAILURES as error:
            if len(batch) > 1:
                return [begun for one in batch for begun in self._together([one], action)]
            self._fail(batch[0].session, error)
            return []
        return batch

    def _prepare(self, batch: list[Begun]) -> None:
        """A snapshot, if one is due at this edge; then the prompt switch."""
        [begun] = batch
        session, stream = begun.session, begun.session.stream
        if self._keep and begun.block % self._keep_every == 0 and session.kept_at < begun.block:
            self._keep(session.order.stream, stream.snapshot())
            session.kept_at = begun.block
        if begun.turn:
            stream.switch_prompt(begun.turn.text)

    def _fail(self, session: Session, error: Exception) -> None:
        """The stream ends, with its reason; the others go on."""
        with self._mutex:
            if session.state == "running":
                session.end("failed", str(error) or type(error).__name__)
        session.stream.close()

    def _next(self) -> Round | None:
        return next_round(self._sessions.values(), self._clock(), self._batch, self.speeds)

    def _fills_window(self, begun: Begun) -> bool:
        settings = self.student.settings
        return (begun.block + 1) * settings.block >= settings.window

    # --- What only the working thread does -------------------------------------------------------------------------

    def _ask(self, action: Callable[[], T]) -> T:
        """Have the working thread do something, and wait for it; where none runs, do it here."""
        result: Future[T] = Future()

        def errand() -> None:
            try:
                if self._broken:
                    raise RuntimeError(f"the scheduler has ended: {self._broken}")
                result.set_result(action())
            except BaseException as error:  # noqa: BLE001 -- raised where it was asked for
                result.set_exception(error)

        self._post(errand)
        return result.result()

    def _post(self, errand: Callable[[], None]) -> None:
        with self._mutex:
            if self._worker in (None, threading.get_ident()):
                errand()
            else:
                self._errands.append(errand)
                self._work.notify_all()

    def _run_errands(self) -> bool:
        done = False
        while True:
            with self._mutex:
                if not self._errands:
                    return done
                errand = self._errands.popleft()
            errand()
            done = True

    def _open(
        self, order: StreamOrder, plan: StreamPlan, snapshot: Snapshot | None, turns: Sequence[Turn], frame: int
    ) -> None:
        if order.stream in self._sessions:
            raise ValueError(f"stream {order.stream}: it is open already")
        held = self.admission.held(plan, order.frame_rate)
        with self._mutex:
            refusal = self.admission.refusal(held, self._held())
        if refusal:
            raise refusal
        stream = self._open_stream(order, plan, snapshot)
        try:
            with self._mutex:
                session = Session(order, stream, held, turns, frame, self._ahead, self._mutex, self._clock())
                self._sessions[order.stream] = session
                self._work.notify_all()
        except ValueError:
            stream.close()
            raise

    def _open_stream(self, order: StreamOrder, plan: StreamPlan, snapshot: Snapshot | None) -> Stream:
        try:
            if snapshot is not None:
                return self.student.restore(snapshot)
            return self.student.open(
                order.prompt,
                order.seed,
                height=plan.height,
                width=plan.width,
                image=order.image,
                redraw=order.redraw,
                mode=order.mode,
            )
        except NoRoom as error:
            raise Busy(str(error)) from None

    def _snapshot(self, name: str) -> Snapshot:
        with self._mutex:
            session = self._find(name)
        while session.state == "running" and session.has_undecoded:
            self._show(session)
        session.check_runs()
        return session.stream.snapshot()

    # --- Inside ----------------------------------------------------------------------------------------------------

    def _plan(self, order: StreamOrder) -> StreamPlan:
        height, width = (None, None) if order.image is not None else self.size
        return self.student.plan(
            order.prompt,
            order.seed,
            height=order.height or height,
            width=order.width or width,
            given=order.image,
            redraw=order.redraw,
            mode=order.mode,
        )

    def _find(self, stream: str) -> Session:
        if stream not in self._sessions:
            raise ValueError(f"stream {stream}: it is not open here")
        return self._sessions[stream]

    def _held(self) -> list[Held]:
        return [session.held for session in self._sessions.values() if session.state == "running"]


def _settle(batch: list[Begun]) -> None:
    settle([begun.session.stream for begun in batch])


def _make(batch: list[Begun]) -> None:
    if batch[0].source is not None:
        [begun] = batch
        assert begun.source is not None
        begun.session.stream.make_redrawn(begun.source)
    else:
        make_together([begun.session.stream for begun in batch])


def _texts(order: StreamOrder, snapshot: Snapshot | None, turns: Sequence[Turn]) -> list[str]:
    """The prompts that a stream needs from where it begins, or goes on."""
    before, begins = [order.prompt], 0
    if snapshot is not None:
        before.append(snapshot.info["prompts"][-1][1])
        begins = snapshot.info["frames_out"]
    return list(dict.fromkeys([*before, *(turn.text for turn in turns if turn.frame >= begins)]))


def _check_resumed(plan: StreamPlan, snapshot: Snapshot | None, frame: int) -> None:
    if frame < 0:
        raise ValueError(f"frame: must be 0 or more, got {frame}")
    if snapshot is None:
        return
    if snapshot.info["plan"] != asdict(plan):
        raise ValueError("snapshot: it is of a stream with another prompt, seed, size or mode")
    if snapshot.info["frames_out"] > frame:
        raise ValueError(f"snapshot: it was taken after frame {frame}, at {snapshot.info['frames_out']}")
