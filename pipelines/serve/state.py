"""What outlives a worker: who streams what, and each stream's newest snapshots, in a folder or an object store.

A stream keeps `KEPT` snapshots in as many files, which are written in turn. So nothing has to be listed or deleted
while it runs, and no index can disagree with the files: a file's header says which block it is of.
"""

import io
import json
import re
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
from PIL import Image
from pydantic import BaseModel, ConfigDict, ValidationError
from safetensors import SafetensorError
from safetensors.torch import load, save

from ...actors.streams import NAME, Snapshot
from ...actors.timeline import Layout, Turn
from ...cluster.storage import Storage
from ...kernels.clips import Pixels

KEPT: Final = 3
SESSIONS, SNAPSHOTS = "sessions", "snapshots"
KEEPING: Final = "reelway.kept"  # of the JSON in a file's header that says which snapshot it is
HEADER_BYTES: Final = 100_000_000  # the largest header that the format allows
STREAM_ID: Final = re.compile(r"[A-Za-z0-9_-]{1,64}")


class SessionRecord(BaseModel):
    """A viewer's session. order: what the stream was opened with, as JSON; its image or source video stands beside it.

    turns: its prompt switches, at rising blocks. owner: hash of the key that opened it. begun, ended: seconds since
    1970; ended None: it may go on.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)
    version: int = 1
    stream: str
    model: str
    order: dict[str, Any]
    turns: tuple[Turn, ...] = ()
    owner: str = ""
    frames_taken: int = 0
    begun: float
    ended: float | None = None
    reason: str = ""


@dataclass(frozen=True)
class Kept:
    """A snapshot in the store. count: how many the stream had kept before it; info: the snapshot's own."""

    name: str
    count: int
    block: int
    info: dict[str, Any]

    @property
    def frames_out(self) -> int:
        return int(self.info["frames_out"])


class State:
    """Sessions and snapshots at a storage address. All methods block and may be called from any thread.

    Two writers for one stream do no harm but waste: what is found is checked, and a file is whole or not there.
    """

    def __init__(self, address: str | Path) -> None:
        self.storage = Storage.open(address)
        self._counts: dict[str, int] = {}  # snapshots that each stream has kept, for streams that were written here
        self._lock = threading.Lock()

    # --- Sessions --------------------------------------------------------------------------------------------------

    def write_session(self, record: SessionRecord, image: Pixels | None = None, video: bytes | None = None) -> None:
        """Write the record, in the place of the one before; image (uint8 [H, W, 3]) and video (a file) come once."""
        if video is not None:
            self.storage.publish(_session(record.stream, "video"), video, replace=True)
        if image is not None:
            file = io.BytesIO()
            Image.fromarray(image).save(file, "PNG")
            self.storage.publish(_session(record.stream, "png"), file.getvalue(), replace=True)
        content = record.model_dump_json(indent=1).encode()
        self.storage.publish(_session(record.stream, "json"), content, replace=True)

    def read_session(self, stream: str) -> SessionRecord:
        """FileNotFoundError where there is no such session, ValueError where its record is broken."""
        name = _session(stream, "json")
        try:
            return SessionRecord.model_validate_json(self.storage.read(name))
        except ValidationError as error:
            raise ValueError(f"{self.storage.where(name)}: not a session ({error.errors()[0]['msg']})") from None

    def read_image(self, stream: str) -> Pixels | None:
        """The image that the session was begun with, uint8 [H, W, 3]."""
        name = _session(stream, "png")
        if not self.storage.exists(name):
            return None
        return np.array(Image.open(io.BytesIO(self.storage.read(name))).convert("RGB"))

    def read_video(self, stream: str) -> bytes | None:
        """The source video's file that the session was begun with."""
        name = _session(stream, "video")
        return self.storage.read(name) if self.storage.exists(name) else None

    # --- Snapshots -------------------------------------------------------------------------------------------------

    def keep(self, stream: str, block: int, snapshot: Snapshot) -> int:
        """Store a snapshot taken at the edge before block `block`; the newest three stay. Returns its bytes."""
        count = self._next_count(stream)
        mark = json.dumps({"count": count, "block": block})
        content = save(snapshot.tensors, {NAME: json.dumps(snapshot.info), KEEPING: mark})
        self.storage.publish(_snapshot(stream, count % KEPT), content, replace=True)
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

    def kept(self, stream: str) -> list[Kept]:
        """The snapshots that are there, oldest first."""
        found = [self._header(_snapshot(stream, slot)) for slot in range(KEPT)]
        return sorted((kept for kept in found if kept is not None), key=lambda kept: kept.count)

    def forget(self, stream: str) -> None:
        """Remove the session and its snapshots; what is gone already is no error."""
        self.let_go(stream)
        names = [_snapshot(stream, slot) for slot in range(KEPT)]
        names += [_session(stream, suffix) for suffix in ("png", "video", "json")]
        for name in names:
            self.storage.delete(name)

    def sweep(self, older_than: float) -> list[str]:
        """Forget the streams of which nothing was written for `older_than` seconds; returns them."""
        written: dict[str, float] = {}
        for folder in (SESSIONS, SNAPSHOTS):
            self.storage.remove_stale(older_than, folder)
            for entry in self.storage.entries(folder):
                stream = entry.name.split(".")[0]
                written[stream] = max(entry.modified, written.get(stream, 0.0))
        before = time.time() - older_than
        stale = [stream for stream, modified in written.items() if modified < before and STREAM_ID.fullmatch(stream)]
        for stream in stale:
            self.forget(stream)
        return stale

    def let_go(self, stream: str) -> None:
        """Hold nothing of this stream in memory."""
        with self._lock:
            self._counts.pop(stream, None)

    # --- Inside ----------------------------------------------------------------------------------------------------

    def _next_count(self, stream: str) -> int:
        with self._lock:
            known = self._counts.get(stream)
        if known is None:  # another worker may have kept some
            known = max((kept.count + 1 for kept in self.kept(stream)), default=0)
        with self._lock:
            self._counts[stream] = known + 1
        return known

    def _header(self, name: str) -> Kept | None:
        """What a snapshot's file says of itself; None where there is none or it is broken."""
        try:
            with self.storage.open_input(name) as file:
                size = int.from_bytes(file.read(8), "little")
                header = file.read(size) if size <= HEADER_BYTES else b""
        except FileNotFoundError:
            return None
        return _parsed(name, header)

    def _read(self, name: str) -> Snapshot | None:
        try:
            content = self.storage.read(name)
            tensors = load(content)
        except (FileNotFoundError, SafetensorError):
            return None
        kept = _parsed(name, content[8 : 8 + int.from_bytes(content[:8], "little")])
        return None if kept is None else Snapshot(tensors, kept.info)


class Keeper:
    """Stores snapshots in a thread of its own, so that no stream waits for the store.

    Of each stream the newest waits; one that was not yet written when the next came is passed over. A store that
    fails is told in `stats` and on stderr: the streams go on, and would be made again from an older snapshot.
    """

    def __init__(self, state: State, layout: Layout) -> None:
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


def _parsed(name: str, header: bytes) -> Kept | None:
    try:
        metadata = json.loads(header)["__metadata__"]
        mark = json.loads(metadata[KEEPING])
        return Kept(name, int(mark["count"]), int(mark["block"]), json.loads(metadata[NAME]))
    except (ValueError, KeyError, TypeError):
        return None


def _session(stream: str, suffix: str) -> str:
    return f"{SESSIONS}/{_checked(stream)}.{suffix}"


def _snapshot(stream: str, slot: int) -> str:
    return f"{SNAPSHOTS}/{_checked(stream)}.{slot}.safetensors"


def _checked(stream: str) -> str:
    """Ids come from clients, and become names of files."""
    if not STREAM_ID.fullmatch(stream):
        raise ValueError(f"stream: an id has 1 to 64 letters, digits, - and _, got {stream[:80]!r}")
    return stream
