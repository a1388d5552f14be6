"""How gateways reach the pool and its workers, and one stream seen through that, on whichever worker it is."""

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import replace
from typing import Any, Final, Protocol

from ray.exceptions import RayActorError
from ray.serve.exceptions import RayServeException
from ray.serve.handle import DeploymentHandle

from ...actors.orders import Piece, StreamOrder
from ...actors.timeline import Turn
from .placement import Placed, Refused, Waiting
from .pool import WorkerGone, ask
from .terms import Moved, Moving, WorkerInfo

ASK_AGAIN: Final = 0.5  # seconds between two calls of one who waits for a place
AWAY: Final = (RayActorError, RayServeException)  # the pool's replica has died, and Serve starts another
ANSWER_SECONDS: Final = 30.0  # for a worker's answer, beyond what it was asked to wait


class Backend(Protocol):
    """The pool, and calls to workers. `call` raises what the worker raised, or WorkerGone."""

    async def place(
        self, model: str, order: StreamOrder, ticket: str | None, turns: Sequence[Turn], frame: int
    ) -> Placed | Waiting | Refused: ...

    async def left(self, stream: str) -> None: ...

    async def models(self) -> list[dict[str, Any]]: ...

    async def status(self) -> dict[str, Any]: ...

    async def call(self, worker: Any, method: str, *arguments: Any) -> Any: ...


class RayBackend:
    """The pool as a deployment of Ray Serve, its workers as actors."""

    def __init__(self, pool: DeploymentHandle) -> None:
        self._pool = pool

    async def place(
        self, model: str, order: StreamOrder, ticket: str | None, turns: Sequence[Turn], frame: int
    ) -> Placed | Waiting | Refused:
        """While the pool itself is away, everybody waits: Serve starts it again."""
        try:
            answer: Placed | Waiting | Refused = await self._pool.place.remote(
                model, order, ticket, turns=tuple(turns), frame=frame
            )
        except AWAY:
            return Waiting(ticket or "", 0)
        return answer

    async def left(self, stream: str) -> None:
        try:
            await self._pool.left.remote(stream)
        except AWAY:
            return  # its workers ended with it

    async def models(self) -> list[dict[str, Any]]:
        """None while the pool is away."""
        try:
            rows: list[dict[str, Any]] = await self._pool.models.remote()
        except AWAY:
            return []
        return rows

    async def status(self) -> dict[str, Any]:
        """Empty while the pool is away."""
        try:
            figures: dict[str, Any] = await self._pool.status.remote()
        except AWAY:
            return {}
        return figures

    async def call(self, worker: Any, method: str, *arguments: Any) -> Any:
        return await ask(worker, method, *arguments)


_late: Final[set["asyncio.Future[None]"]] = set()  # answers that nobody waits for any more


class Gone(RuntimeError):
    """The stream is no longer on its worker: place it again."""


class NoPlace(ValueError):
    """The pool refuses the stream. code: as in `Refused`."""

    def __init__(self, refused: Refused) -> None:
        super().__init__(refused.reason)
        self.code = refused.code


class PlacedStream:
    """A stream, wherever it is. next: the first frame that is not yet had; turns: the log of its prompts."""

    def __init__(
        self, backend: Backend, model: str, order: StreamOrder, turns: Sequence[Turn] = (), frame: int = 0
    ) -> None:
        self._backend, self.model, self.order = backend, model, order
        self.turns, self.next = list(turns), frame
        self._placed: Placed | None = None
        self._strayed = -1  # the frame at which the worker last had another idea of what is next

    @property
    def info(self) -> WorkerInfo:
        assert self._placed is not None
        return self._placed.info

    @property
    def begins(self) -> int:
        """The first frame that this worker computes: a stream that redraws a video needs its source from there on."""
        assert self._placed is not None
        return self._placed.begins

    @property
    def frames_per_chunk(self) -> int:
        return self.info.temporal * self.info.block

    @property
    def size(self) -> tuple[int, int]:
        """Height and width, which every order of a gateway names."""
        assert self.order.height is not None
        assert self.order.width is not None
        return self.order.height, self.order.width

    async def place(self, waiting: Callable[[int], Awaitable[None]]) -> None:
        """Find it a worker, however long that takes. waiting: told how many are ahead. NoPlace where it is refused."""
        ticket: str | None = None
        self._placed = None
        while True:
            answer = await self._ask(ticket)
            if isinstance(answer, Placed):
                self._placed = answer
                return
            if isinstance(answer, Refused):
                raise NoPlace(answer)
            ticket = answer.ticket or None
            await waiting(answer.position)
            await asyncio.sleep(ASK_AGAIN)

    async def _ask(self, ticket: str | None) -> Placed | Waiting | Refused:
        """One question to the pool. Who gives up while it is under way gives back what the answer may bring."""
        asking = asyncio.ensure_future(
            self._backend.place(self.model, self.order, ticket, tuple(self.turns), self.next)
        )
        try:
            return await asyncio.shield(asking)
        except asyncio.CancelledError:
            late = asyncio.ensure_future(self._give_back(asking))
            _late.add(late)
            late.add_done_callback(_late.discard)
            raise

    async def _give_back(self, asking: "asyncio.Future[Placed | Waiting | Refused]") -> None:
        await asyncio.wait({asking})
        if not asking.cancelled() and asking.exception() is None:
            await self.free()

    async def take(self, wait: float) -> Any:
        """What `Scheduler.take` gives from `next` on. Gone where the stream has left its worker."""
        try:
            taken = await self.call("take", self.next, wait, within=wait + ANSWER_SECONDS)
        except ValueError as error:  # another socket, or a call that was given up, has moved it on
            if self._strayed == self.next:
                raise
            self._strayed = self.next
            raise Gone(str(error)) from None
        if isinstance(taken, Moving):
            raise Gone(taken.reason)
        return taken

    async def prompt(self, text: str) -> Turn:
        """Switch the prompt. What was taken and not passed on is flushed too: `next` moves on."""
        turn: Turn = await self.call("prompt", text, self.next)
        flushed = 0
        if self.turns and self.turns[-1].block == turn.block:
            flushed = self.turns.pop().flushed
        self.turns.append(Turn(turn.block, text, len(self.turns) + 1, turn.frame, flushed))
        self._void()
        self.next = max(self.next, turn.frame)
        return self.turns[-1]

    def _void(self) -> None:
        """Switches that the viewer has not seen, as after another socket, are dropped with what lies before them."""
        had = self.next
        for place, turn in enumerate(self.turns):
            if turn.frame > had:
                self.turns[place] = replace(turn, flushed=max(turn.flushed, turn.frame - had))
                had = turn.frame

    def fresh(self, pieces: Sequence[Piece]) -> list[Piece]:
        """Of pieces that were taken, those that are still wanted."""
        return [piece for piece in pieces if piece.end > self.next]

    async def call(self, method: str, *arguments: Any, within: float = ANSWER_SECONDS) -> Any:
        """Call its worker. Gone where that has died, has let the stream go, or does not answer."""
        assert self._placed is not None
        try:
            async with asyncio.timeout(within):
                return await self._backend.call(self._placed.worker, method, self.order.stream, *arguments)
        except WorkerGone as error:
            raise Gone(f"worker {self._placed.id} was lost: {error}") from None
        except Moved as error:
            raise Gone(str(error)) from None
        except TimeoutError:
            raise Gone(f"worker {self._placed.id} does not answer") from None

    async def free(self) -> None:
        """Give the place back."""
        await self._backend.left(self.order.stream)
