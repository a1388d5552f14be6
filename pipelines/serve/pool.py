"""The pool: it owns the workers, gives every stream its place, and keeps as many workers as are needed.

One replica of a Ray Serve deployment. The workers are plain Ray actors and end with it: a stream lives on one worker,
and Serve can neither send a call to a certain replica nor tell one that it is to go. All decisions are made in
`placement`; here they are carried out.
"""

import asyncio
import hashlib
import time
import traceback
from collections.abc import Coroutine, Mapping, Sequence
from dataclasses import replace
from typing import Any, Final, Protocol

import ray
from ray import serve
from ray.exceptions import ActorUnavailableError, RayActorError, RayTaskError

from ... import __version__
from ...actors.orders import Busy, StreamOrder, TooSlow
from ...actors.timeline import Turn
from ...cluster.pool_host import reason_of_death
from .placement import Fleet, FleetSettings, Member, Placed, Refused, Waiting
from .terms import Moved, WorkerSettings

TICK: Final = 0.5  # seconds between two looks at a worker, and at the fleets
ANSWER_SECONDS: Final = 10.0  # for a worker to say how it is
MISSES: Final = 3  # such answers missed in a row, and the worker counts as dead
OPEN_SECONDS: Final = 120.0  # for a stream to be opened: a large snapshot may have to be read
SURGE_STEP: Final = 0.05


class WorkerGone(RuntimeError):
    """The worker's process has died, or cannot be reached now (`dead` is False)."""

    def __init__(self, reason: str, dead: bool = True) -> None:
        super().__init__(reason)
        self.dead = dead


class Hands(Protocol):
    """How the pool reaches its workers."""

    def start(self, worker: str, model: str, settings: FleetSettings) -> Any: ...

    async def call(self, handle: Any, method: str, *arguments: Any) -> Any: ...

    def kill(self, handle: Any) -> None: ...


async def ask(handle: Any, method: str, *arguments: Any) -> Any:
    """Call a worker that is a Ray actor. Raises what the worker raised, as it was raised there, or WorkerGone."""
    try:
        return await handle.call.remote(method, *arguments)
    except RayTaskError as error:
        raise error.cause from None
    except RayActorError as error:
        raise WorkerGone(reason_of_death(error), not isinstance(error, ActorUnavailableError)) from None


class WorkerProcess:
    """A `StreamWorker` as an actor. It is imported where it runs, and torch with it: the pool starts without."""

    def __init__(self, worker: str, model: str, settings: WorkerSettings) -> None:
        from .worker import StreamWorker

        self._worker = StreamWorker(worker, model, settings)

    async def call(self, method: str, *arguments: Any) -> Any:
        return await getattr(self._worker, method)(*arguments)


class RayHands:
    """Workers as Ray actors of the process that starts them."""

    def start(self, worker: str, model: str, settings: FleetSettings) -> Any:
        actor = ray.remote(WorkerProcess).options(
            num_cpus=settings.cpus, num_gpus=settings.gpus, memory=settings.memory, max_restarts=0, max_task_retries=0
        )
        return actor.remote(worker, model, settings.worker)

    async def call(self, handle: Any, method: str, *arguments: Any) -> Any:
        return await ask(handle, method, *arguments)

    def kill(self, handle: Any) -> None:
        ray.kill(handle)


class Pool:
    """All methods are for one event loop; `begin` starts the pool's own work on it."""

    def __init__(self, models: Mapping[str, FleetSettings], hands: Hands | None = None) -> None:
        self.fleets = {model: Fleet(model, settings) for model, settings in models.items()}
        self.hands: Hands = hands or RayHands()
        self._tasks: set[asyncio.Task[Any]] = set()

    def begin(self) -> None:
        """Start the minimum of workers, and look after them from now on."""
        self._go(self._watch())

    async def stop(self) -> None:
        """End all workers. Streams can go on in another pool with the same store."""
        for task in self._tasks:
            task.cancel()
        for fleet in self.fleets.values():
            for member in list(fleet.members.values()):
                self._end(fleet, member)

    # --- For gateways ----------------------------------------------------------------------------------------------

    async def place(
        self,
        model: str,
        order: StreamOrder,
        ticket: str | None = None,
        *,
        turns: Sequence[Turn] = (),
        frame: int = 0,
    ) -> Placed | Waiting | Refused:
        """Open a stream on a worker that has room, or say where it stands in the queue.

        turns, frame: a stream that ran before goes on under these prompts so that `frame` is its next frame.
        """
        fleet = self.fleets.get(model)
        if fleet is None:
            return Refused(f"model: must be one of {', '.join(self.fleets)}, got {model!r}")
        now, resumed = time.monotonic(), frame > 0 or bool(turns)
        outcome: Placed | Refused | None = None
        if fleet.may_try(fleet.queue.position(ticket, resumed, now)):
            outcome = await self._try_all(fleet, order, turns, frame)
        if outcome is None and (reason := fleet.hopeless()) is not None:
            outcome = Refused(reason, "unavailable")
        answer = outcome or fleet.queue.join(ticket, resumed, time.monotonic())
        self._count(fleet, answer, ticket, resumed)
        return answer

    async def left(self, stream: str) -> None:
        """A stream has ended, or its viewer is gone: free it wherever it is."""
        for fleet in self.fleets.values():
            for member in [member for member in fleet.members.values() if stream in member.streams]:
                member.free(stream, time.monotonic())
                await self._quietly(member, "close", stream)

    async def models(self) -> list[dict[str, Any]]:
        """Name, ready workers, and what a ready worker says of its student (None before the first is ready)."""
        rows = []
        for name, fleet in self.fleets.items():
            ready = fleet.of("ready")
            rows.append({"id": name, "ready": len(ready), "info": ready[-1].info if ready else None})
        return rows

    async def status(self) -> dict[str, Any]:
        """All figures: for each model its fleet, for each worker what it said last."""
        now = time.monotonic()
        return {model: fleet.status(now) for model, fleet in self.fleets.items()}

    # --- For operators ---------------------------------------------------------------------------------------------

    async def drain(self, worker: str) -> None:
        """Let a worker go once its streams have moved. If it is its model's only one, another is started first."""
        fleet, member = self._find(worker)
        if fleet.of("ready") == [member]:
            await self._started(fleet, self._launch(fleet))
        await self._move_out(fleet, member)

    async def upgrade(self, model: str, worker: WorkerSettings | None = None) -> int:
        """Replace a model's workers one by one, by ones with other settings if given; returns how many.

        Streams move to the new workers. Where the student is another one they cannot: their workers take no new
        streams, and end with the last that they have. ValueError where a new worker does not start: the old ones stay.
        The cluster needs room for one worker more than there are.
        """
        fleet = self.fleets.get(model)
        if fleet is None:
            raise ValueError(f"model: must be one of {', '.join(self.fleets)}, got {model!r}")
        if fleet.upgrading:
            raise ValueError(f"model {model}: an upgrade is going on")
        before, fleet.upgrading = fleet.settings, True
        fleet.settings = replace(before, worker=worker or before.worker)
        fleet.generation += 1
        old = [member for member in fleet.members.values() if member.generation < fleet.generation]
        try:
            for member in old:
                new = await self._started(fleet, self._launch(fleet))
                if new is None:
                    fleet.settings = before
                    raise ValueError(f"model {model}: a new worker could not be started: {fleet.error}; the old stay")
                await self._give_way(fleet, member, new)
        finally:
            fleet.upgrading = False
        return len(old)

    # --- Placing ---------------------------------------------------------------------------------------------------

    async def _try_all(
        self, fleet: Fleet, order: StreamOrder, turns: Sequence[Turn], frame: int
    ) -> Placed | Refused | None:
        """Ask the workers one after the other; None where none has room now."""
        for member in fleet.of("retiring", "draining"):
            if order.stream in member.streams:  # its viewer came back before it had heard that the stream moves
                member.free(order.stream, time.monotonic())
                await self._quietly(member, "close", order.stream)
        outcomes = []
        for member in fleet.candidates(order.stream):
            outcome = await self._try(fleet, member, order, turns, frame)
            if isinstance(outcome, Placed) or (outcome is not None and outcome.code != "busy"):
                return outcome
            outcomes.append(outcome)
        # Too slow for this one stream, all of them, which may pass. Who streamed before waits for that.
        resumed = frame > 0 or bool(turns)
        return outcomes[0] if outcomes and None not in outcomes and not resumed else None

    async def _try(
        self, fleet: Fleet, member: Member, order: StreamOrder, turns: Sequence[Turn], frame: int
    ) -> Placed | Refused | None:
        for _ in range(2):
            try:
                async with asyncio.timeout(OPEN_SECONDS):
                    begins = await self.hands.call(member.handle, "open", order, tuple(turns), frame)
            except Busy as error:
                if not await self._is_empty(member):
                    return None
                # Asked twice: the last stream may have left in between.
                refused = Refused(str(error), "busy" if isinstance(error, TooSlow) else "invalid")
            except Moved:
                return None
            except WorkerGone as error:
                self._unreachable(fleet, member, error)
                return None
            except TimeoutError:
                return None
            except ValueError as error:
                return Refused(str(error))
            else:
                assert member.info is not None
                member.take(order.stream, time.monotonic())
                return Placed(member.handle, member.id, member.info, begins)
        return refused

    async def _is_empty(self, member: Member) -> bool:
        """Whether a worker has no stream at all: what it refuses now, it would always refuse."""
        try:
            async with asyncio.timeout(ANSWER_SECONDS):
                figures = await self.hands.call(member.handle, "stats")
        except (WorkerGone, TimeoutError):
            return False
        return not figures["here"]

    def _count(self, fleet: Fleet, answer: Placed | Waiting | Refused, ticket: str | None, resumed: bool) -> None:
        if isinstance(answer, Waiting):
            return
        fleet.queue.leave(ticket)
        name = "refused" if isinstance(answer, Refused) else "moved" if resumed else "placed"
        fleet.counts[name] += 1

    # --- Looking after the workers ---------------------------------------------------------------------------------

    async def _watch(self) -> None:
        while True:
            for fleet in self.fleets.values():
                self._carry_out(fleet)
            await asyncio.sleep(TICK)

    def _carry_out(self, fleet: Fleet) -> None:
        plan = fleet.plan(time.monotonic())
        for _ in range(plan.start):
            self._launch(fleet)
        if plan.drain is not None:
            self._go(self._move_out(fleet, fleet.members[plan.drain]))
        for member in fleet.of("retiring"):
            if not member.streams:
                self._go(self._move_out(fleet, member))

    def _launch(self, fleet: Fleet) -> Member:
        member = fleet.add(None, time.monotonic())
        member.handle = self.hands.start(member.id, fleet.model, fleet.settings)
        self._go(self._tend(fleet, member))
        return member

    async def _tend(self, fleet: Fleet, member: Member) -> None:
        """One worker from its start to its end."""
        try:
            async with asyncio.timeout(fleet.settings.start_seconds):
                info = await self.hands.call(member.handle, "ready")
        except Exception as error:  # noqa: BLE001 -- whatever it is, it is told to those who wait, and in the status
            if member.id not in fleet.members:  # it was ended before it had started
                return
            reason = str(error) or f"{type(error).__name__} after {fleet.settings.start_seconds:g} s"
            fleet.failed_start(member, reason, time.monotonic())
            self.hands.kill(member.handle)
            return
        fleet.started(member, info, time.monotonic())
        while member.id in fleet.members:
            await self._look(fleet, member)
            await asyncio.sleep(TICK)

    async def _look(self, fleet: Fleet, member: Member) -> None:
        asked = time.monotonic()
        try:
            async with asyncio.timeout(ANSWER_SECONDS):
                figures = await self.hands.call(member.handle, "stats")
        except WorkerGone as error:
            self._unreachable(fleet, member, error)
        except TimeoutError:
            self._unreachable(fleet, member, WorkerGone(f"no answer for {ANSWER_SECONDS:g} s", dead=False))
        except Exception as error:  # noqa: BLE001 -- who cannot say how it is: told in the status, and replaced
            reason = f"{type(error).__name__}: {error}"
            self._unreachable(fleet, member, WorkerGone(reason, dead=False))
        else:
            fleet.update(member, figures, asked)
            if figures["broken"]:
                self._unreachable(fleet, member, WorkerGone(figures["broken"]))

    def _unreachable(self, fleet: Fleet, member: Member, error: WorkerGone) -> None:
        member.missed += 1
        if error.dead or member.missed >= MISSES:
            fleet.lost(member, str(error))
            self.hands.kill(member.handle)

    async def _started(self, fleet: Fleet, member: Member) -> Member | None:
        """Wait for a worker; None where it could not be started."""
        while member.state == "starting" and member.id in fleet.members:
            await asyncio.sleep(SURGE_STEP)
        return fleet.members.get(member.id)

    async def _give_way(self, fleet: Fleet, member: Member, new: Member) -> None:
        """Let a worker of an older generation go."""
        if member.id not in fleet.members:
            return
        assert new.info is not None
        if member.info is not None and member.info.fingerprint != new.info.fingerprint:
            member.state = "retiring"
        else:
            await self._move_out(fleet, member)

    async def _move_out(self, fleet: Fleet, member: Member) -> None:
        """Drain a worker, wait until its streams have left it, and end it."""
        if member.state == "draining":
            return
        was_ready, member.state, member.since = member.info is not None, "draining", time.monotonic()
        try:
            if was_ready:
                async with asyncio.timeout(fleet.settings.drain_seconds):
                    await self.hands.call(member.handle, "drain")
                    while (await self.hands.call(member.handle, "stats"))["here"]:
                        await asyncio.sleep(TICK / 2)
                    await self.hands.call(member.handle, "stop")
        except (WorkerGone, TimeoutError):
            pass  # what is still there goes on from its last snapshot, as after a crash
        finally:
            fleet.counts["drained"] += 1
            self._end(fleet, member)

    def _end(self, fleet: Fleet, member: Member) -> None:
        if fleet.members.pop(member.id, None) is not None:
            self.hands.kill(member.handle)

    # --- Inside ----------------------------------------------------------------------------------------------------

    def _find(self, worker: str) -> tuple[Fleet, Member]:
        for fleet in self.fleets.values():
            if worker in fleet.members:
                return fleet, fleet.members[worker]
        raise ValueError(f"worker: there is no {worker!r}")

    async def _quietly(self, member: Member, method: str, *arguments: Any) -> None:
        """Call a worker that may be gone already."""
        try:
            async with asyncio.timeout(ANSWER_SECONDS):
                await self.hands.call(member.handle, method, *arguments)
        except (WorkerGone, TimeoutError):
            return

    def _go(self, work: Coroutine[Any, Any, None]) -> None:
        """Run something beside what goes on; a failure is shown, and ends nothing else."""
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._done)

    def _done(self, task: asyncio.Task[Any]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            traceback.print_exception(error)


class _Served(Pool):
    """A pool whose work begins with its replica."""

    async def __init__(self, models: Mapping[str, FleetSettings]) -> None:  # type: ignore[misc]  # Serve awaits it
        super().__init__(models)
        self.begin()


def pool_application(models: Mapping[str, FleetSettings]) -> serve.Application:
    """The pool as an application of Ray Serve, to be bound to gateways or run by itself."""
    deployed = serve.deployment(
        name="Pool", num_replicas=1, max_ongoing_requests=100_000, ray_actor_options={"num_cpus": 0}
    )
    return with_version(deployed(_Served), repr(sorted(models.items()))).bind(dict(models))


def with_version(deployment: serve.Deployment, content: str) -> serve.Deployment:
    """The deployment, whose replicas live on when it is run again with the same content.

    `serve.run` gives every deployment a version by chance, and so restarts all. The option that names one is Ray's own
    (2.60); test_serve_live.py tells when it has gone.
    """
    digest = hashlib.sha256(f"{__version__}\n{content}".encode()).hexdigest()
    return deployment.options(version=digest[:16], _internal=True)
