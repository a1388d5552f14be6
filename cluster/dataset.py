"""A data set's folder: what `dataset.json` says of its samples, how a field is kept, and who may write there."""

import json
import os
import secrets
import socket
import tarfile
import threading
import time
from collections.abc import Collection, Iterator, Mapping
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any, Literal, Protocol, Self

import safetensors.torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from safetensors import SafetensorError
from torch import Tensor

from .storage import DifferentContent, Staged, Storage

INFO = "dataset.json"
TAR_BLOCK = tarfile.BLOCKSIZE
FIELD_NAME = r"^[a-z0-9_]+\.(safetensors|txt|json|mp4|png|jpg)$"

# A sample's fields by name. The ending decides the value: `.safetensors` a table of tensors, `.txt` a text,
# `.json` what JSON can say, and media files their bytes. Nothing is ever pickled.
Sample = Mapping[str, Any]


class TensorSpec(BaseModel):
    """One tensor of a sample; None in `shape` is a size that differs between samples."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    shape: tuple[int | None, ...]
    dtype: str


class DatasetInfo(BaseModel):
    """What `dataset.json` says: exactly the fields of every sample; `fingerprint` covers all that decides bytes."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    schema_version: Literal[1] = 1
    kind: Annotated[str, Field(pattern=r"^[a-z][a-z0-9_-]*$")]
    fields: dict[Annotated[str, Field(pattern=FIELD_NAME)], dict[str, TensorSpec]]
    made_by: dict[str, Any]
    fingerprint: Annotated[str, Field(min_length=1)]

    def to_json(self) -> bytes:
        return (json.dumps(self.model_dump(mode="json"), indent=2, sort_keys=True) + "\n").encode()

    def check(self, sample: Sample) -> None:
        """Raises ValueError when a sample's fields, shapes or dtypes are not the data set's."""
        if sample.keys() != self.fields.keys():
            raise ValueError(f"fields must be {sorted(self.fields)}, got {sorted(sample)}")
        for field, tensors in self.fields.items():
            if field.endswith(".safetensors"):
                _check_tensors(field, tensors, sample[field])


def create_dataset(storage: Storage, info: DatasetInfo) -> None:
    """Write `dataset.json`; a folder that holds the same data set already is left as it is.

    Raises ValueError, naming the first line that differs, when the folder holds another data set.
    """
    try:
        storage.publish(INFO, info.to_json())
    except DifferentContent:
        stored, asked = read_dataset(storage).model_dump(mode="json"), info.model_dump(mode="json")
        name = next((name for name in asked if stored[name] != asked[name]), "layout")
        detail = f"{name} is {stored.get(name)!r} there and {asked.get(name)!r} here"
        raise ValueError(f"{storage.where(INFO)}: the folder holds another data set: {detail}") from None


def read_dataset(storage: Storage) -> DatasetInfo:
    """Read and validate `dataset.json`. FileNotFoundError or ValueError in one line."""
    content = storage.read(INFO)
    try:
        return DatasetInfo.model_validate_json(content)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"])) or "content"
        raise ValueError(f"{storage.where(INFO)}: {place}: {first['msg']}") from None


def encode_field(field: str, value: Any) -> bytes:
    """The bytes that keep a field's value; equal values give equal bytes. ValueError if it cannot be."""
    try:
        match field.rpartition(".")[2]:
            case "safetensors":
                tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in value.items()}
                return safetensors.torch.save(tensors)
            case "txt":
                return str.encode(value)
            case "json":
                text = json.dumps(value, sort_keys=True, ensure_ascii=False, allow_nan=False)
                return text.encode()
            case _:
                return bytes(memoryview(value))
    except (TypeError, AttributeError, ValueError, RuntimeError, SafetensorError) as error:
        raise ValueError(f"{field}: cannot keep a {type(value).__name__}: {error}") from error


def decode_field(field: str, data: bytes) -> Any:
    """The value that was kept; tensors are copied once out of `data`. ValueError when it is damaged."""
    try:
        match field.rpartition(".")[2]:
            case "safetensors":
                return safetensors.torch.load(data)
            case "txt":
                return data.decode()
            case "json":
                return json.loads(data)
            case _:
                return data
    except (ValueError, SafetensorError) as error:
        raise ValueError(f"{field}: cannot be decoded: {error}") from error


def _check_tensors(field: str, specs: Mapping[str, TensorSpec], tensors: Mapping[str, Tensor]) -> None:
    if specs.keys() != tensors.keys():
        raise ValueError(f"{field}: tensors must be {sorted(specs)}, got {sorted(tensors)}")
    for name, spec in specs.items():
        shape, dtype = tuple(tensors[name].shape), str(tensors[name].dtype).removeprefix("torch.")
        fits = len(shape) == len(spec.shape) and all(
            want in (None, have) for want, have in zip(spec.shape, shape, strict=True)
        )
        if not fits or dtype != spec.dtype:
            raise ValueError(f"{field}: {name} must be {spec.dtype} {list(spec.shape)}, got {dtype} {list(shape)}")


# --- A sample in a shard -----------------------------------------------------------------------------------


def write_member(staged: Staged, name: str, payload: bytes) -> None:
    """Append a file to a shard: plain ustar, with nothing in it that tells when, where or by whom it was made."""
    header = tarfile.TarInfo(name)  # whose defaults are mtime 0, uid and gid 0, no names, mode 0644
    header.size = len(payload)
    staged.write(header.tobuf(tarfile.USTAR_FORMAT))
    staged.write(payload)
    staged.write(bytes(-len(payload) % TAR_BLOCK))


def write_end(staged: Staged) -> None:
    """Append the mark that ends a tar."""
    staged.write(bytes(2 * TAR_BLOCK))


class ShardError(ValueError):
    """A shard, or one sample of it, that is damaged or missing."""

    def __init__(self, where: str, key: str = "", reason: str = "") -> None:
        super().__init__(where, key, reason)
        self.where, self.key, self.reason = where, key, reason

    def __str__(self) -> str:
        return ": ".join(part for part in (self.where, self.key, self.reason) if part)


@dataclass(frozen=True)
class Quarantined:
    """In a sample's place: the item cannot give one, for this reason, and trying again would not help."""

    reason: str


class Input(Protocol):
    """What a shard is read from."""

    def read(self, size: int, /) -> bytes: ...
    def seek(self, offset: int, whence: int, /) -> int: ...


def read_samples(
    file: Input, where: str, wanted: Collection[int] | None = None
) -> Iterator[tuple[int, str, dict[str, bytes]]]:
    """Samples as (place in the shard, key, bytes by field); of those that are not wanted only headers are read.

    Raises ShardError when the tar breaks off or is not of the layout.
    """
    last = max(wanted) if wanted else None
    place, key, fields = -1, "", dict[str, bytes]()
    while header := _read_header(file, where, key):
        its_key, _, field = header.name.partition(".")
        if its_key != key:
            if fields:
                yield place, key, fields
            place, key, fields = place + 1, its_key, {}
            if last is not None and place > last:
                return
        if wanted is None or place in wanted:
            fields[field] = _read_payload(file, where, key, header.size)
        else:
            file.seek(header.size + -header.size % TAR_BLOCK, 1)
    if fields:
        yield place, key, fields


def _read_header(file: Input, where: str, key: str) -> tarfile.TarInfo | None:
    """The next member's header; None at the end mark."""
    try:
        header = tarfile.TarInfo.frombuf(file.read(TAR_BLOCK), "ascii", "strict")
    except tarfile.EOFHeaderError:  # type: ignore[attr-defined]
        return None
    except (tarfile.HeaderError, UnicodeDecodeError) as error:
        place = f"after {key}" if key else "at the beginning"
        raise ShardError(where, "", f"breaks off or is damaged {place}: {error}") from error
    if not header.isreg():
        raise ShardError(where, header.name, "is not a plain file of a shard")
    return header


def _read_payload(file: Input, where: str, key: str, size: int) -> bytes:
    payload = file.read(size)
    padding = -size % TAR_BLOCK
    if len(payload) != size or len(file.read(padding)) != padding:
        raise ShardError(where, key, f"breaks off in a member of {size} bytes")
    return payload


def decode_sample(where: str, key: str, fields: dict[str, bytes]) -> dict[str, Any]:
    """The values of a sample's fields. ShardError when one is damaged.

    Empties `fields`, so that no more than one field is in memory both as bytes and as a value.
    """
    try:
        return {field: decode_field(field, fields.pop(field)) for field in list(fields)}
    except ValueError as error:
        raise ShardError(where, key, str(error)) from error


# --- Who may write -----------------------------------------------------------------------------------------

CLAIMS = "claims"


class ClaimHeld(ValueError):
    """Another job is writing to the folder."""


@dataclass(frozen=True)
class Holder:
    """The job behind a claim. `machine`: the boot and the process namespace in which `pid` has a meaning."""

    owner: str
    host: str
    machine: str
    pid: int
    started: str
    since: str
    lease: float
    held: bool

    def __str__(self) -> str:
        return f"{self.owner} on {self.host}, pid {self.pid}, since {self.since}"


class Claim:
    """The right to write to a folder, held from `with` to its end; `check()` says when it was lost.

    Each job writes a file of its own in `claims/`, then lists the folder, and has the claim when its file is
    the only live one. Of two jobs at least the later one sees the other, so there are never two holders, and
    no conditional write is needed: it works on every store whose listings show what was written before them
    (local file systems, S3, Google Cloud Storage). Of several that come at once, the lowest token stays.

    A file is dead when its process is (same machine), or when it was not renewed for its lease, both times
    read from the store's clock. The limit of a lease: a job that was frozen for longer than that, and wakes,
    may write until it looks at `check()`; it can then only repeat content or be refused by `publish`.
    """

    def __init__(self, storage: Storage, owner: str, lease: float = 300.0) -> None:
        self._storage, self._owner, self._lease = storage, owner, lease
        self._file = f"{secrets.token_hex(8)}.json"
        self._since = datetime.now(UTC).isoformat(timespec="seconds")
        self._stop, self._lost = threading.Event(), ""
        self._heart = threading.Thread(target=self._keep_alive, name=f"claim of {owner}", daemon=True)

    def __enter__(self) -> Self:
        try:
            self._write(held=False)  # a store may keep it and yet fail to say so
            self._wait_to_be_alone()
            self._write(held=True)
            self._storage.remove_stale(folder=CLAIMS)
        except BaseException:
            self._delete()
            raise
        self._heart.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._heart.join()
        self._delete()

    def check(self) -> None:
        """Raises ClaimHeld when another job has taken the folder over."""
        if self._lost:
            raise ClaimHeld(f"{self._storage.uri}: lost to another job: {self._lost}")

    def _wait_to_be_alone(self, patience: float = 20.0) -> None:
        deadline = time.monotonic() + patience
        while others := self._others():
            before = [holder for file, holder in others.items() if holder.held or file < self._file]
            if before or time.monotonic() > deadline:
                holder = before[0] if before else next(iter(others.values()))
                raise ClaimHeld(f"{self._storage.uri}: another job is writing here: {holder}")
            time.sleep(0.02)

    def _others(self) -> dict[str, Holder]:
        """The other live claims; dead ones are removed."""
        entries = {entry.name: entry for entry in self._storage.entries(CLAIMS)}
        own = entries.pop(self._file, None)
        if own is None:
            raise ClaimHeld(f"{self._storage.uri}: this claim was taken for dead and removed")
        holders = {file: holder for file in entries if (holder := self._read(file))}
        dead = {
            file
            for file, holder in holders.items()
            if own.modified - entries[file].modified > holder.lease or _is_dead(holder)
        }
        for file in dead:
            self._storage.delete(f"{CLAIMS}/{file}")
        return {file: holder for file, holder in holders.items() if file not in dead}

    def _read(self, file: str) -> Holder | None:
        try:
            return Holder(**json.loads(self._storage.read(f"{CLAIMS}/{file}")))
        except FileNotFoundError:
            return None

    def _write(self, held: bool) -> None:
        pid = os.getpid()
        holder = Holder(
            self._owner, socket.gethostname(), _machine(), pid, _start_of(pid), self._since, self._lease, held
        )
        content = json.dumps(asdict(holder)).encode()
        self._storage.publish(f"{CLAIMS}/{self._file}", content, replace=True)

    def _delete(self) -> None:
        self._storage.delete(f"{CLAIMS}/{self._file}")

    def _keep_alive(self) -> None:
        renewed = time.monotonic()
        while not self._stop.wait(self._lease / 4):
            try:
                held = [holder for holder in self._others().values() if holder.held]
                if held:
                    self._lost = str(held[0])
                    return
                self._write(held=True)
                renewed = time.monotonic()
            except ClaimHeld as error:
                self._lost = str(error)
                return
            except OSError as error:
                if time.monotonic() - renewed > self._lease:
                    self._lost = f"not renewed for {self._lease:g} s: {error}"
                    return


def claim(storage: Storage, owner: str, lease: float = 300.0) -> Claim:
    """The single writer's right to a folder: `with claim(storage, "reelway trajectories"): ...`.

    Raises ClaimHeld on entering, in a line that says which job is at work, where and since when.
    """
    return Claim(storage, owner, lease)


def _machine() -> str:
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return socket.gethostname()


def _start_of(pid: int) -> str:
    """When a process began, in kernel ticks, so that a pid used again is another process; "" if unknown."""
    try:
        state, *fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return ""
    return "dead" if state == "Z" else fields[18]


def _is_dead(holder: Holder) -> bool:
    if holder.machine != _machine():
        return False
    try:
        os.kill(holder.pid, 0)
    except ProcessLookupError:
        return True
    except PermissionError:
        pass
    return _start_of(holder.pid) != holder.started
