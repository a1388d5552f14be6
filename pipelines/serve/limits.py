"""How much one client may ask for. Counts are a gateway's own, and times come from outside."""

from collections import Counter, deque
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final

from .config import LimitsConfig
from .protocol import BadMessage

OWNERS_KEPT: Final = 10_000  # rates that are remembered
MINUTE: Final = 60.0


class Rate:
    """At most `most` events in any `seconds`."""

    def __init__(self, most: int, seconds: float) -> None:
        self.most, self.seconds = most, seconds
        self._times: deque[float] = deque()

    def take(self, now: float) -> bool:
        """Whether one more may happen now; if so, it counts."""
        while self._times and self._times[0] <= now - self.seconds:
            self._times.popleft()
        if len(self._times) >= self.most:
            return False
        self._times.append(now)
        return True

    def is_idle(self, now: float) -> bool:
        return not self._times or self._times[-1] <= now - self.seconds


class Limits:
    """What the owners of keys have open, and how often they came."""

    def __init__(self, config: LimitsConfig) -> None:
        self.config = config
        self._open: Counter[str] = Counter()
        self._requests: dict[str, Rate] = {}

    def check_prompt(self, text: str) -> None:
        """BadMessage where it is too long."""
        if len(text) > self.config.prompt_length:
            limit = self.config.prompt_length
            raise BadMessage("prompt_too_long", f"prompt: at most {limit} characters, got {len(text)}")

    def check_size(self, field: str, size: int) -> None:
        """BadMessage where an upload is too large; size in bytes."""
        if size > self.config.upload_bytes:
            raise BadMessage("too_large", f"{field}: at most {self.config.upload_bytes} bytes, got {size}")

    def prompts(self) -> Rate:
        """The rate of one stream's prompts: a second's worth may come at once."""
        rate = self.config.prompts_per_second
        return Rate(max(1, round(rate)), max(1, round(rate)) / rate)

    def request(self, owner: str, now: float) -> None:
        """Count a stream or video that is begun. BadMessage where there were too many within a minute."""
        if len(self._requests) >= OWNERS_KEPT:
            self._requests = {name: rate for name, rate in self._requests.items() if not rate.is_idle(now)}
        rate = self._requests.setdefault(owner, Rate(self.config.requests_per_minute, MINUTE))
        if not rate.take(now):
            raise BadMessage("too_many_requests", f"requests: at most {rate.most} in a minute; try again later")

    @contextmanager
    def session(self, owner: str) -> Iterator[None]:
        """Count an open stream. BadMessage where the owner has as many as may be."""
        most = self.config.sessions_per_key
        if self._open[owner] >= most:
            raise BadMessage("too_many_sessions", f"sessions: at most {most} at once for one key")
        self._open[owner] += 1
        try:
            yield
        finally:
            self._open[owner] -= 1
            if not self._open[owner]:
                del self._open[owner]
