"""What outlives a worker: who streams what, and which snapshots there are, in a folder or an object store.

A stream keeps `KEPT` snapshots in as many files, which are written in turn. So nothing has to be listed or deleted
while it runs, and no index can disagree with the files: a file's header says which block it is of.
"""

import io
import json
import re
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
from PIL import Image
from pydantic import BaseModel, ConfigDict, ValidationError

from ...actors.modes import SNAPSHOT
from ...actors.timeline import Turn
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

    def kept(self, stream: str) -> list[Kept]:
        """The snapshots that are there, oldest first."""
        found = [self._header(snapshot_name(stream, slot)) for slot in range(KEPT)]
        return sorted((kept for kept in found if kept is not None), key=lambda kept: kept.count)

    def forget(self, stream: str) -> None:
        """Remove the session and its snapshots; what is gone already is no error."""
        names = [snapshot_name(stream, slot) for slot in range(KEPT)]
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

    # --- Inside ----------------------------------------------------------------------------------------------------

    def _header(self, name: str) -> Kept | None:
        """What a snapshot's file says of itself; None where there is none or it is broken."""
        try:
            with self.storage.open_input(name) as file:
                size = int.from_bytes(file.read(8), "little")
                header = file.read(size) if size <= HEADER_BYTES else b""
        except FileNotFoundError:
            return None
        return parsed(name, header)


def parsed(name: str, header: bytes) -> Kept | None:
    try:
        metadata = json.loads(header)["__metadata__"]
        mark = json.loads(metadata[KEEPING])
        return Kept(name, int(mark["count"]), int(mark["block"]), json.loads(metadata[SNAPSHOT]))
    except (ValueError, KeyError, TypeError):
        return None


def _session(stream: str, suffix: str) -> str:
    return f"{SESSIONS}/{_checked(stream)}.{suffix}"


def snapshot_name(stream: str, slot: int) -> str:
    return f"{SNAPSHOTS}/{_checked(stream)}.{slot}.safetensors"


def _checked(stream: str) -> str:
    """Ids come from clients, and become names of files."""
    if not STREAM_ID.fullmatch(stream):
        raise ValueError(f"stream: an id has 1 to 64 letters, digits, - and _, got {stream[:80]!r}")
    return stream
