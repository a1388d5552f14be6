"""Seconds that cost nothing: an event loop whose clock stands still while there is anything to do, and jumps to the
next moment that somebody waits for when there is not. What computes takes no time, however busy the machine is.
"""

import asyncio
import selectors
from collections.abc import Awaitable, Callable
from types import ModuleType, SimpleNamespace
from typing import Any, Final, TypeVar

import pytest

T = TypeVar("T")
SETTLE: Final = 0.002  # real seconds for what was sent on loopback to arrive, before the clock jumps


class VirtualLoop(asyncio.SelectorEventLoop):
    """For sockets on loopback whose both ends are in this loop; threads would not be waited for."""

    def __init__(self) -> None:
        self._now = 1000.0
        super().__init__(_Jumping(self._jump))

    def time(self) -> float:
        return self._now

    def _jump(self, seconds: float) -> None:
        self._now += seconds


class _Jumping(selectors.DefaultSelector):
    """Where a wait would begin, it is over."""

    def __init__(self, jump: Callable[[float], None]) -> None:
        super().__init__()
        self._jump = jump

    def select(self, timeout: float | None = None) -> Any:
        if timeout is None or timeout <= 0:
            return super().select(timeout)
        ready = super().select(SETTLE)
        if not ready:
            self._jump(timeout)
        return ready


def run_virtually(main: Callable[[], Awaitable[T]], *modules: ModuleType) -> T:
    """Run a coroutine in virtual time. modules: those that ask `time.monotonic` get the loop's time."""

    async def run() -> T:
        return await main()

    with asyncio.Runner(loop_factory=VirtualLoop) as runner, pytest.MonkeyPatch.context() as patch:
        clock = SimpleNamespace(monotonic=runner.get_loop().time)
        for module in modules:
            patch.setattr(module, "time", clock)
        return runner.run(run())
