"""Which shards a data set shall have, which it has, and the manifest: one Parquet row per shard.

A shard is done when its tar and, after it, its record (`shard-000123.json`) have been published. The records
are the truth; `manifest.parquet` is made from them, for readers, and may be made again at any time.
"""

import hashlib
import io
import json
import re
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Annotated, Any

import numpy
import pyarrow
import pyarrow.compute
import pyarrow.parquet
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from .storage import LocalStorage, Storage

MANIFEST = "manifest.parquet"
# No dots: WebDataset takes what stands before the first dot for the key. 60 characters leave room for a field
# in the 100 that a tar header has.
KEY = r"^[A-Za-z0-9][A-Za-z0-9_-]{0,59}$"
_SHARD = re.compile(r"^shard-(\d{6,})\.(tar|json)$")
# Records read at once. Sixteen hide an object store's latency; on a disk they would wait for each other's lock.
_STORE_READERS, _DISK_READERS = 16, 4
_STRETCH = 32  # records that one of them reads in a row


@dataclass(frozen=True)
class ShardPlan:
    """One shard to be made: its number, its items sorted by key, and a fingerprint of what decides its bytes.

    Sent to another process it takes only its own items along.
    """

    index: int
    items: pyarrow.Table
    fingerprint: str

    @property
    def name(self) -> str:
        return shard_name(self.index)

    @property
    def keys(self) -> list[str]:
        return list(self.items.column("key").to_pylist())

    def __reduce__(self) -> tuple[Any, ...]:
        sink = pyarrow.BufferOutputStream()
        with pyarrow.ipc.new_stream(sink, self.items.schema) as writer:
            writer.write_table(self.items)
        return _restore_plan, (self.index, sink.getvalue().to_pybytes(), self.fingerprint)


class ManifestRow(BaseModel):
    """One shard of the manifest. `fingerprint` is its plan's; None when only the tar is known.

    `quarantined` counts the planned items that gave no sample.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: Annotated[str, Field(pattern=r"^shard-\d{6,}\.tar$")]
    samples: Annotated[int, Field(ge=0)]
    bytes: Annotated[int, Field(ge=0)]
    sha256: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
    first_key: str
    last_key: str
    quarantined: Annotated[int, Field(ge=0)] = 0
    fingerprint: str | None = None


class ShardRecord(ManifestRow):
    """What stands beside a shard: its row, and why each quarantined item gave no sample."""

    reasons: dict[str, str] = {}

    def to_json(self) -> bytes:
        return (json.dumps(self.model_dump(mode="json"), sort_keys=True) + "\n").encode()

    def to_row(self) -> ManifestRow:
        return ManifestRow(**self.model_dump(exclude={"reasons"}))


_SCHEMA = pyarrow.schema(
    [
        pyarrow.field("name", pyarrow.string(), nullable=False),
        pyarrow.field("samples", pyarrow.int64(), nullable=False),
        pyarrow.field("bytes", pyarrow.int64(), nullable=False),
        pyarrow.field("sha256", pyarrow.string(), nullable=False),
        pyarrow.field("first_key", pyarrow.string(), nullable=False),
        pyarrow.field("last_key", pyarrow.string(), nullable=False),
        pyarrow.field("quarantined", pyarrow.int64(), nullable=False),
        pyarrow.field("fingerprint", pyarrow.string()),
    ]
)


def shard_name(index: int) -> str:
    return f"shard-{index:06d}.tar"


def shard_index(name: str) -> int | None:
    """The number in the name of a shard or of its record; None for other files."""
    match = _SHARD.match(name)
    return int(match[1]) if match else None


def record_name(name: str) -> str:
    """The record that stands beside a shard."""
    return name.removesuffix(".tar") + ".json"


def tar_name(record: str) -> str:
    """The shard that a record stands beside."""
    return record.removesuffix(".json") + ".tar"


def plan(items: pyarrow.Table | Iterable[str], per_shard: int, fingerprint: str) -> list[ShardPlan]:
    """Deal items out to shards in the order given; within a shard they are sorted by key.

    Args:
        items: a table with a `key` column of unique strings and whatever else makes a sample (prompt, seed);
            or the keys alone.
        per_shard: items of a shard; the last may have fewer.
        fingerprint: of all else that decides the bytes: models, settings, precision, batch, code.

    Raises ValueError on a key that is malformed or there twice.
    """
    if per_shard < 1:
        raise ValueError(f"per_shard: must be at least 1, got {per_shard}")
    table = items if isinstance(items, pyarrow.Table) else _table_of_keys(list(items))
    if "key" not in table.column_names:
        raise ValueError(f"items: need a column 'key', got {table.column_names}")
    _check_keys(table.column("key"))
    order = pyarrow.table({"shard": numpy.arange(table.num_rows) // per_shard, "key": table.column("key")})
    by_shard_and_key = [("shard", "ascending"), ("key", "ascending")]
    places = pyarrow.compute.sort_indices(order, sort_keys=by_shard_and_key).to_numpy()
    if not numpy.array_equal(places, numpy.arange(table.num_rows)):  # in order already: a copy is saved
        table = table.take(places)
    table = table.combine_chunks()
    slices = [table.slice(start, per_shard) for start in range(0, table.num_rows, per_shard)]
    return [ShardPlan(i, part, _fingerprint(fingerprint, part)) for i, part in enumerate(slices)]


def pending(storage: Storage, shards: Sequence[ShardPlan]) -> list[ShardPlan]:
    """The shards still to be made: those without a sound record, and those whose tar is gone or has another size.

    Reads the folder's listing and those records that are newer than the manifest, but no tar.
    Raises ValueError when the folder holds a shard that was planned otherwise, or that is not of the plan.
    """
    planned = {shard.name: shard.fingerprint for shard in shards}
    folder = _list_shards(storage)
    strangers = sorted((folder.tars.keys() | folder.records.keys()) - planned.keys())
    if strangers:
        count = f"{len(strangers)} of the shards there are not of this plan"
        raise ValueError(f"{storage.where(strangers[0])}: {count}: other samples, or another number in a shard")
    rows = _rows(storage, folder, _rows_older_than_manifest(storage, folder))
    for name, row in rows.items():
        if row.fingerprint != planned[name]:
            detail = f"fingerprint {row.fingerprint}, this plan's is {planned[name]}"
            raise ValueError(f"{storage.where(name)}: was planned otherwise: {detail}")
    whole = {name for name, row in rows.items() if folder.tars.get(name) == row.bytes}
    return [shard for shard in shards if shard.name not in whole]


def recorded_rows(storage: Storage) -> list[ManifestRow]:
    """The rows of all shards that have a record, in the order of their numbers.

    Raises ValueError when a shard has a record but its tar is gone or has another size.
    """
    folder = _list_shards(storage)
    rows = _rows(storage, folder, {})
    for name, row in rows.items():
        if folder.tars.get(name) != row.bytes:
            found = folder.tars.get(name, "no")
            raise ValueError(f"{storage.where(name)}: has {found} bytes, its record says {row.bytes}")
    return sorted(rows.values(), key=_number)


def merge_manifest(storage: Storage) -> list[ManifestRow]:
    """Make `manifest.parquet` of all records, in one step; returns its rows. The same rows give the same bytes."""
    rows = recorded_rows(storage)
    write_manifest(storage, rows)
    return rows


def seal(storage: Storage) -> list[ManifestRow]:
    """Of all shards, for who holds the claim: away with what killed workers left half written, then the manifest."""
    storage.remove_stale(older_than=0.0)
    return merge_manifest(storage)


def write_manifest(storage: Storage, rows: Sequence[ManifestRow]) -> None:
    """Publish `manifest.parquet` in the order of the shards' numbers."""
    ordered = [row.model_dump() for row in sorted(rows, key=_number)]
    sink = io.BytesIO()
    table = pyarrow.Table.from_pylist(ordered, schema=_SCHEMA)
    pyarrow.parquet.write_table(table, sink, compression="zstd", row_group_size=1 << 16)
    storage.publish(MANIFEST, sink.getvalue(), replace=True)


def read_manifest(storage: Storage) -> list[ManifestRow]:
    """The rows of `manifest.parquet`. FileNotFoundError or ValueError in one line."""
    content = storage.read(MANIFEST)
    where = storage.where(MANIFEST)
    try:
        table = table_of(content)
        return [ManifestRow(**row) for row in table.to_pylist()]
    except ValidationError as error:
        first = error.errors()[0]
        raise ValueError(f"{where}: {'.'.join(map(str, first['loc']))}: {first['msg']}") from None
    except (pyarrow.ArrowException, OSError, TypeError) as error:
        raise ValueError(f"{where}: not a manifest: {str(error).splitlines()[0]}") from None


def table_of(content: bytes) -> pyarrow.Table:
    """A Parquet file's table, read in this thread alone.

    `read_table` leaves it to Arrow's threads to let go of the bytes; one that does so while Python ends aborts the
    process.
    """
    with pyarrow.parquet.ParquetFile(pyarrow.BufferReader(content)) as file:
        return file.read(use_threads=False)


def read_record(storage: Storage, name: str) -> ShardRecord | None:
    """The record beside a shard; None when there is none. ValueError when it is damaged."""
    try:
        content = storage.read(record_name(name))
    except FileNotFoundError:
        return None
    try:
        return ShardRecord.model_validate_json(content)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"])) or "content"
        raise ValueError(f"{storage.where(record_name(name))}: {place}: {first['msg']}") from None


def read_sound_record(storage: Storage, name: str) -> ShardRecord | None:
    """The record beside a shard; None when there is none, or a damaged one: then the shard is not done."""
    try:
        return read_record(storage, name)
    except ValueError:
        return None


def tar_names(storage: Storage) -> set[str]:
    """The shards that have a tar."""
    return set(_list_shards(storage).tars)


def recorded_names(storage: Storage) -> set[str]:
    """The shards that have a record."""
    return set(_list_shards(storage).records)


def missing_between(names: Iterable[str]) -> list[str]:
    """The shards that the numbers of the given ones leave out."""
    numbers = {index for name in names if (index := shard_index(name)) is not None}
    return [shard_name(i) for i in range(max(numbers, default=-1) + 1) if i not in numbers]


@dataclass(frozen=True)
class _Folder:
    """A listing: bytes of each tar, and when each shard's record and the manifest were written."""

    tars: dict[str, int]
    records: dict[str, float]
    manifest: float | None


def _list_shards(storage: Storage) -> _Folder:
    entries = storage.entries()
    shards = [entry for entry in entries if shard_index(entry.name) is not None]
    tars = {entry.name: entry.size for entry in shards if entry.name.endswith(".tar")}
    records = {tar_name(entry.name): entry.modified for entry in shards if entry.name.endswith(".json")}
    manifest = next((entry.modified for entry in entries if entry.name == MANIFEST), None)
    return _Folder(tars, records, manifest)


def _rows_older_than_manifest(storage: Storage, folder: _Folder) -> dict[str, ManifestRow]:
    if folder.manifest is None:
        return {}
    return {
        row.name: row
        for row in read_manifest(storage)
        if folder.records.get(row.name, folder.manifest) < folder.manifest
    }


def _rows(storage: Storage, folder: _Folder, known: dict[str, ManifestRow]) -> dict[str, ManifestRow]:
    """The rows of all shards with a sound record; those that are `known` are not read again."""
    unknown = sorted(folder.records.keys() - known.keys())
    # By stretches: a task for each record costs as much as reading it does.
    stretches = [unknown[start : start + _STRETCH] for start in range(0, len(unknown), _STRETCH)]
    with ThreadPoolExecutor(_DISK_READERS if isinstance(storage, LocalStorage) else _STORE_READERS) as readers:
        found = readers.map(lambda names: _recorded(storage, names), stretches)
        return known | {row.name: row for rows in found for row in rows}


def _recorded(storage: Storage, names: Sequence[str]) -> list[ManifestRow]:
    records = (read_sound_record(storage, name) for name in names)
    return [record.to_row() for record in records if record is not None]


def _number(row: ManifestRow) -> int:
    index = shard_index(row.name)
    assert index is not None, f"not a shard: {row.name}"
    return index


def _table_of_keys(keys: list[str]) -> pyarrow.Table:
    return pyarrow.table({"key": pyarrow.array(keys, None if keys else pyarrow.string())})


def _check_keys(keys: pyarrow.ChunkedArray) -> None:
    if not pyarrow.types.is_string(keys.type) and not pyarrow.types.is_large_string(keys.type):
        raise ValueError(f"items: keys must be strings, got {keys.type}")
    fine = pyarrow.compute.fill_null(pyarrow.compute.match_substring_regex(keys, KEY), False)
    bad = keys.filter(pyarrow.compute.invert(fine))
    if len(bad):
        rule = "letters, digits, '_' and '-', the first not a sign, at most 60"
        raise ValueError(f"items: key {bad[0].as_py()!r}: must be {rule}")
    if pyarrow.compute.count_distinct(keys).as_py() != len(keys):
        counts = pyarrow.compute.value_counts(keys)
        twice = counts.filter(pyarrow.compute.greater(counts.field("counts"), 1))
        raise ValueError(f"items: key {twice[0]['values'].as_py()!r} is there {twice[0]['counts']} times")


def _fingerprint(of_the_set: str, items: pyarrow.Table) -> str:
    try:
        content = json.dumps([of_the_set, items.to_pydict()], sort_keys=True)
    except TypeError as error:
        raise ValueError(f"items: columns must hold what JSON can say: {error}") from None
    return hashlib.sha256(content.encode()).hexdigest()[:16]


def _restore_plan(index: int, items: bytes, fingerprint: str) -> ShardPlan:
    return ShardPlan(index, pyarrow.ipc.open_stream(items).read_all(), fingerprint)
