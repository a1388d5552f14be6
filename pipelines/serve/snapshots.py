"""The snapshots of streams: written by the workers that make them, read by those that go on.

They stand beside the sessions, in a `State`; what only asks which ones there are needs no torch.
"""

import json
import sys
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load, save

from ...actors.modes import SNAPSHOT
from ...actors.streams import Snapshot
from ...actors.timeline import Layout, Turn
from .state import KEEPING, KEPT, Kept, State, parsed, snapshot_name


class Snapshots(State):
    """A `State` whose snapshots can be read and written."""

    def __init__(self, address: str | Path) -> None:
        super().__init__(address)
        self._counts: dict[str, int] = {}  # snapshots that each stream has kept, for streams that were written here
        self._lock = threading.Lock()

    def keep(self, stream: str, block: int, snapshot: Snapshot) -> int:
        """Store a snapshot taken at the edge before block `block`; the newest three stay. Returns its bytes."""
        count = self._next_count(stream)
        mark = json.dumps({"count": count, "block": block})
        content = save(snapshot.tensors, {SNAPSHOT: json.dumps(snapshot.info), KEEPING: mark})
        self.storage.publish(snapshot_name(stream, count % KEPT), content, replace=True)
        return len(content)

    def newest(self, stream: str, frame: int, fits: Callable[[Kept], bool] = lambda kept: True) -> Snapshot | None:
        """The newest snapshot from which frame `frame` is still to be shown; fits: whether one will do.

        A broken file is passed over: an older snapshot, or the stream's beginning, gives the same pictures.
        """
        found = [kept for kept in self.kept(stream) if kept.frames_out <= frame and fits(kept)]
        for kept in sorted(found, key=lambda kept: kept.frames_out, reverse=True):
            snapshot = self._read(kept.name)
            if snapshot is not None and snapshot.info == kept.info:  # else it was overwritten at this moment
                return snapshot
        return None

    def let_go(self, stream: str) -> None:
        """Hold nothing of this stream in memory."""
        with self._lock:
            self._counts.pop(stream, None)

    def _next_count(self, stream: str) -> int:
        with self._lock:
            known = self._counts.get(stream)
        if known is None:  # another worker may have kept some
            known = max((kept.count + 1 for kept in self.kept(stream)), default=0)
        with self._lock:
            self._counts[stream] = known + 1
        return known

    def _read(self, name: str) -> Snapshot | None:
        try:
            content = self.storage.read(name)
            tensors = load(content)
        except (FileNotFoundError, SafetensorError):
            return None
        kept = parsed(name, content[8 : 8 + int.from_bytes(content[:8], "little")])
        return None if kept is None else Snapshot(tensors, kept.info)


class Keeper:
    """Stores snapshots in a thread of its own, so that no stream waits for the store.

    Of each stream the newest waits; one that was not yet written when the next came is passed over. A store that
    fails is told in `stats` and on stderr: the streams go on, and would be made again from an older snapshot.
    """

    def __init__(self, state: Snapshots, layout: Layout) -> None:
        self.state, self.layout = state, layout
        self._waiting: dict[str, Snapshot] = {}
        self._changed = threading.Condition()
        self._stopped = False
        self._figures: dict[str, Any] = {
            "written": 0,
            "passed_over": 0,
            "failed": 0,
            "bytes": 0,
            "seconds": 0.0,
            "error": "",
        }
        self._thread = threading.Thread(target=self._run, name="keeper", daemon=True)
        self._thread.start()

    def put(self, stream: str, snapshot: Snapshot) -> None:
        """Have a snapshot stored soon."""
        with self._changed:
            self._figures["passed_over"] += stream in self._waiting
            self._waiting[stream] = snapshot
            self._changed.notify_all()

    def write(self, stream: str, snapshot: Snapshot) -> bool:
        """Store a snapshot now; whether it is there."""
        began = time.perf_counter()
        try:
            size = self.state.keep(stream, block_of(snapshot, self.layout), snapshot)
        except OSError as error:
            print(f"stream {stream}: a snapshot could not be kept: {error}", file=sys.stderr)
            with self._changed:
                self._figures |= {"failed": self._figures["failed"] + 1, "error": str(error)}
            return False
        with self._changed:
            self._figures["written"] += 1
            self._figures["bytes"] += size
            self._figures["seconds"] += time.perf_counter() - began
        return True

    def drop(self, stream: str) -> None:
        """The stream is no longer here: what waits is not written."""
        with self._changed:
            self._waiting.pop(stream, None)
        self.state.let_go(stream)

    def stop(self) -> None:
        """Write what waits, and end."""
        with self._changed:
            self._stopped = True
            self._changed.notify_all()
        self._thread.join()

    def stats(self) -> dict[str, Any]:
        """Snapshots written, passed over and failed; bytes and seconds of all that were written; the last error."""
        with self._changed:
            return dict(self._figures)

    def _run(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._waiting or self._stopped)
                if not self._waiting:
                    return
                stream = next(iter(self._waiting))
                snapshot = self._waiting.pop(stream)
            self.write(stream, snapshot)


def block_of(snapshot: Snapshot, layout: Layout) -> int:
    """The number of blocks that were made before a snapshot."""
    position = snapshot.tensors["generator.cache.next_position"]
    return layout.blocks(int(snapshot.tensors["generator.origin"]) + int(position))


def prompts_agree(kept: Kept, prompt: str, turns: Sequence[Turn], layout: Layout) -> bool:
    """Whether a snapshot was made under the prompts of this log, as far as it goes.

    It was not where a worker took a prompt and died before anybody else knew of it, or did not hear of one.
    """
    held = [(layout.blocks(int(latents)), text) for latents, text in kept.info["prompts"]]
    return held == [(0, prompt), *((turn.block, turn.text) for turn in turns if turn.block < kept.block)]
