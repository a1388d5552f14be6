"""Shards: how they are written, read in a training job's order, checked and repaired."""

import hashlib
import logging
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from typing import Any, Literal, Self

import numpy
import webdataset
from torch.utils.data import DataLoader, get_worker_info

from .dataset import (
    DatasetInfo,
    Quarantined,
    Sample,
    ShardError,
    decode_sample,
    encode_field,
    read_dataset,
    read_samples,
    write_end,
    write_member,
)
from .manifest import (
    ManifestRow,
    ShardPlan,
    ShardRecord,
    missing_between,
    read_manifest,
    read_record,
    read_sound_record,
    record_name,
    recorded_names,
    tar_names,
    write_manifest,
)
from .storage import DifferentContent, HashedInput, LocalStorage, Staged, Storage

log = logging.getLogger(__name__)

_SCANNERS = 4  # shards that are checked at once


# --- Writing -----------------------------------------------------------------------------------------------


def write_shard(storage: Storage, shard: ShardPlan, samples: Iterable[tuple[str, Sample | Quarantined]]) -> ManifestRow:
    """Make one shard, whole or not at all, and after it its record.

    `samples` gives (key, sample) in the plan's order; it is consumed one at a time, and not at all when the
    shard is there already. A tar that was torn is made anew.

    Raises ValueError, naming shard and key, for a sample that is not of the data set or not the one that is
    due, and DifferentContent when the shard exists with other content.
    """
    record = read_sound_record(storage, shard.name)
    where = storage.where(shard.name)
    if record and record.fingerprint != shard.fingerprint:
        detail = f"fingerprint {record.fingerprint}, this plan's is {shard.fingerprint}"
        raise DifferentContent(f"{where}: was planned otherwise: {detail}")
    if record and storage.exists(shard.name) and storage.size(shard.name) == record.bytes:
        return record.to_row()
    info = read_dataset(storage)
    with storage.stage(shard.name) as staged:
        made = _write_tar(staged, shard, samples, info, where)
        staged.close()
        if record and record.sha256 != made.sha256:
            raise DifferentContent(
                f"{where}: made again, its content is another than its record says; remove the record to accept it"
            )
        _publish_tar(storage, shard.name, staged, is_recorded=record is not None)
    storage.publish(record_name(shard.name), made.to_json(), replace=True)
    return made.to_row()


def _publish_tar(storage: Storage, name: str, staged: Staged, is_recorded: bool) -> None:
    """A tar with other bytes in the way is torn if it cannot be read or is not what its record promised."""
    try:
        storage.publish(name, staged.path)
    except DifferentContent:
        if not is_recorded and _is_whole(storage, name):
            raise
        storage.publish(name, staged.path, replace=True)


def _write_tar(
    staged: Staged,
    shard: ShardPlan,
    samples: Iterable[tuple[str, Sample | Quarantined]],
    info: DatasetInfo,
    where: str,
) -> ShardRecord:
    keys: list[str] = []
    reasons: dict[str, str] = {}
    due = iter(shard.keys)
    for key, sample in samples:
        expected = next(due, "the end")
        if key != expected:
            raise ShardError(where, key, f"came where {expected} is due")
        if isinstance(sample, Quarantined):
            reasons[key] = sample.reason
            continue
        try:
            info.check(sample)
            for field in sorted(sample):
                write_member(staged, f"{key}.{field}", encode_field(field, sample[field]))
        except ValueError as error:
            raise ShardError(where, key, str(error)) from error
        keys.append(key)
    if missing := next(due, None):
        raise ShardError(where, missing, "no sample came for it")
    write_end(staged)
    first, last = (keys[0], keys[-1]) if keys else ("", "")
    return ShardRecord(
        name=shard.name,
        samples=len(keys),
        bytes=staged.bytes,
        sha256=staged.sha256,
        first_key=first,
        last_key=last,
        quarantined=len(reasons),
        fingerprint=shard.fingerprint,
        reasons=reasons,
    )


def _is_whole(storage: Storage, name: str) -> bool:
    try:
        with storage.open_input(name) as file:
            for _ in read_samples(file, storage.where(name)):
                pass
    except ShardError:
        return False
    return True


# --- Reading a data set --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Reading:
    """How a job reads a data set.

    `seed` decides the order of every epoch. `rank` of `world` processes read, each with `workers` DataLoader
    workers. `window` is how many samples the order is mixed over, and how many wait in memory at most (1: only
    whole shards are mixed). `check` hashes each shard before it is used, which reads it twice. `damaged` says
    whether a damaged shard or sample ends the job, or is left out and counted.
    """

    seed: int = 0
    rank: int = 0
    world: int = 1
    workers: int = 1
    window: int = 64
    check: bool = False
    damaged: Literal["fatal", "skip"] = "fatal"

    def __post_init__(self) -> None:
        if not 0 <= self.rank < self.world:
            raise ValueError(f"rank: must be from 0 to {self.world - 1}, got {self.rank}")
        if self.workers < 1 or self.window < 1:
            raise ValueError(f"workers, window: must be at least 1, got {self.workers}, {self.window}")
        if self.damaged not in ("fatal", "skip"):
            raise ValueError(f"damaged: must be 'fatal' or 'skip', got {self.damaged!r}")


@dataclass(frozen=True)
class _Piece:
    """What one reader takes of one shard: places in the shard, and each one's number in the reader's stream."""

    row: ManifestRow
    numbers: dict[int, int]


class ShardReader(webdataset.DataPipeline):
    """A WebDataset pipeline over a manifest: one pass is one epoch, and the next pass is the next epoch.

    The shards of an epoch are shuffled and laid end to end, and the readers (world × workers) get equal
    stretches of that line: every sample is read exactly once per epoch, and the readers' numbers of samples
    differ by one at most (also the ranks'), whatever the shards' sizes. A shard in which a stretch ends is
    opened by two readers. Damaged samples, if they are to be left out, shorten only their reader's epoch;
    `skipped` counts them, and `damage` and the log say which and why (of worker processes, only the log).

    The order depends on nothing but the manifest and `Reading`, so a cursor is a few integers: `state()` at any
    sample, and `from_state` goes on with the next, in the same order. Samples are read one shard after the
    other; only what is still to come is read again.

    A sample is a dict: fields by name, `__key__`, `__shard__`, `__worker__` and `__position__`. Further
    WebDataset stages may be added with `append`; the cursor counts what leaves the reader, so these should
    give one for one.
    """

    def __init__(
        self, storage: Storage, rows: Sequence[ManifestRow] | None = None, reading: Reading | None = None
    ) -> None:
        super().__init__(self._pieces, self._read, self._in_order)
        self.storage = storage
        self.rows = list(read_manifest(storage) if rows is None else rows)
        self.reading = reading or Reading()
        self.epoch = 0
        self.positions = [0] * self.reading.workers
        self.delivered = [0] * self.reading.workers
        self.damage: list[ShardError] = []
        self._skipped_earlier = 0
        self._first_worker = 0

    @classmethod
    def from_state(
        cls, storage: Storage, rows: Sequence[ManifestRow] | None, reading: Reading, state: dict[str, Any]
    ) -> Self:
        """A reader that goes on after `state`. ValueError when manifest or reading are not the state's."""
        reader = cls(storage, rows, reading)
        for name, value in reader._identity().items():
            if state.get(name) != value:
                raise ValueError(f"{storage.uri}: cannot go on reading: {name} was {state.get(name)}, is now {value}")
        reader.epoch, reader._skipped_earlier = state["epoch"], state["skipped_earlier"]
        reader.positions, reader.delivered = list(state["positions"]), list(state["delivered"])
        return reader

    def state(self) -> dict[str, Any]:
        """The cursor after the samples given out so far; plain JSON."""
        cursor = {
            "epoch": self.epoch,
            "skipped_earlier": self._skipped_earlier,
            "positions": list(self.positions),
            "delivered": list(self.delivered),
        }
        return self._identity() | cursor

    @property
    def skipped(self) -> int:
        """Damaged samples that were left out since the first epoch."""
        return self._skipped_earlier + sum(self.positions) - sum(self.delivered)

    def __len__(self) -> int:
        """Samples that this rank's workers are to read in an epoch."""
        return sum(end - start for start, end in map(self._stretch, range(self.reading.workers)))

    def _end_epoch(self) -> None:
        self._skipped_earlier += len(self) - sum(self.delivered)
        self.epoch += 1
        self.positions = [0] * self.reading.workers
        self.delivered = [0] * self.reading.workers

    def through_workers(self) -> Iterator[dict[str, Any]]:
        """The rest of the epoch, read by `workers` processes in turn; the cursor is kept here.

        After a restart the turn goes on where it was, as long as no sample was left out.
        """
        self._first_worker = self.delivered.index(min(self.delivered))
        loader: DataLoader[dict[str, Any]] = DataLoader(
            self,
            batch_size=None,
            num_workers=self.reading.workers,
            # A forked child may not use an object store's client of its parent.
            multiprocessing_context="fork" if isinstance(self.storage, LocalStorage) else "spawn",
        )
        for sample in loader:
            self.positions[sample["__worker__"]] = sample["__position__"]
            self.delivered[sample["__worker__"]] += 1
            yield sample
        self._end_epoch()

    def _identity(self) -> dict[str, Any]:
        content = "\n".join(f"{row.name} {row.samples} {row.sha256}" for row in self.rows)
        reading = asdict(self.reading)
        fixed = {name: reading[name] for name in ("seed", "rank", "world", "workers", "window")}
        return {"manifest": hashlib.sha256(content.encode()).hexdigest()[:16]} | fixed

    def _worker(self) -> int:
        worker = get_worker_info()
        processes = 1 if worker is None else worker.num_workers
        if processes != self.reading.workers:
            raise ValueError(f"workers: the reading is for {self.reading.workers}, {processes} are at work")
        return 0 if worker is None else (worker.id + self._first_worker) % processes

    def _stretch(self, worker: int) -> tuple[int, int]:
        reader = self.reading.rank * self.reading.workers + worker
        readers = self.reading.world * self.reading.workers
        total = sum(row.samples for row in self.rows)
        return total * reader // readers, total * (reader + 1) // readers

    def _order(self, worker: int) -> numpy.ndarray:
        """The numbers of the reader's stream in the order in which they are given out.

        Number i sorts at i + u, u uniform in [0, window): none moves further than the window, so no more than
        a window of samples has been read and waits.
        """
        start, end = self._stretch(worker)
        draws = _uniform(end - start, "samples", self.reading.seed, self.epoch, self.reading.rank, worker)
        return numpy.argsort(numpy.arange(end - start) + draws * self.reading.window, kind="stable")

    def _pieces(self) -> Iterator[_Piece]:
        worker = self._worker()
        start, end = self._stretch(worker)
        order = self._order(worker)
        is_due = numpy.ones(len(order), bool)
        is_due[order[: self.positions[worker]]] = False
        shuffled = numpy.argsort(_uniform(len(self.rows), "shards", self.reading.seed, self.epoch), kind="stable")
        offset = -start
        for row in (self.rows[i] for i in shuffled):
            inside = range(max(offset, 0), min(offset + row.samples, end - start))
            numbers = {number - offset: number for number in inside if is_due[number]}
            if numbers:
                yield _Piece(row, numbers)
            offset += row.samples

    def _read(self, pieces: Iterable[_Piece]) -> Iterator[tuple[int, dict[str, Any] | ShardError]]:
        for piece in pieces:
            for number, sample in self._read_piece(piece):
                if isinstance(sample, ShardError) and self.reading.damaged == "fatal":
                    raise sample
                yield number, sample

    def _read_piece(self, piece: _Piece) -> Iterator[tuple[int, dict[str, Any] | ShardError]]:
        """Every number of the piece, with its sample or with what is wrong."""
        name, due = piece.row.name, dict(piece.numbers)
        where = self.storage.where(name)
        failure = ShardError(where, "", f"holds fewer than its {piece.row.samples} samples")
        try:
            if self.reading.check and self.storage.sha256(name) != piece.row.sha256:
                raise ShardError(where, "", "its sha256 is not the manifest's")
            with self.storage.open_input(name) as file:
                for place, key, fields in read_samples(file, where, piece.numbers.keys()):
                    yield due.pop(place), self._decode_or_error(name, key, fields)
        except ShardError as error:
            failure = error
        except FileNotFoundError:
            failure = ShardError(where, "", "no such shard")
        for number in due.values():
            yield number, failure

    def _decode_or_error(self, name: str, key: str, fields: dict[str, bytes]) -> dict[str, Any] | ShardError:
        try:
            return {"__key__": key, "__shard__": name, **decode_sample(self.storage.where(name), key, fields)}
        except ShardError as error:
            return error

    def _in_order(self, source: Iterator[tuple[int, dict[str, Any] | ShardError]]) -> Iterator[dict[str, Any]]:
        worker = self._worker()
        waiting: dict[int, dict[str, Any] | ShardError] = {}
        for position, number in enumerate(self._order(worker).tolist(), start=1):
            if position <= self.positions[worker]:
                continue
            while number not in waiting:
                read, sample = next(source)
                waiting[read] = sample
            sample = waiting.pop(number)
            self.positions[worker] = position
            if isinstance(sample, ShardError):
                self._leave_out(sample)
                continue
            self.delivered[worker] += 1
            yield sample | {"__worker__": worker, "__position__": position}
        if self.reading.workers == 1:
            self._end_epoch()

    def _leave_out(self, error: ShardError) -> None:
        if error not in self.damage:
            log.warning("left out: %s", error)
            self.damage.append(error)


def _uniform(count: int, *stream: str | int) -> numpy.ndarray:
    """Uniform numbers in [0, 1) of a named stream, from Philox's raw bits, which no version of numpy changes."""
    seed = hashlib.sha256(" ".join(map(str, stream)).encode()).digest()[:16]
    bits = numpy.random.Philox(key=int.from_bytes(seed, "little")).random_raw(count)
    return (bits >> numpy.uint64(11)) * 2.0**-53


# --- Checking and repairing ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Finding:
    """Something that is wrong with a file of a data set."""

    file: str
    problem: str

    def __str__(self) -> str:
        return f"{self.file}: {self.problem}"


@dataclass(frozen=True)
class Repair:
    """What a repair kept in the manifest, and what it could not."""

    rows: list[ManifestRow]
    problems: list[Finding]


def verify(storage: Storage) -> list[Finding]:
    """Read everything: hashes, counts, keys, records, and every sample against `dataset.json`. Empty when sound.

    A shard that left neither a tar nor a row nor a later shard behind cannot be missed here; `pending` can.
    """
    info = read_dataset(storage)
    rows = {row.name: row for row in read_manifest(storage)}
    tars = tar_names(storage)
    problems = [Finding(name, "missing: the manifest lists it") for name in sorted(rows.keys() - tars)]
    problems += [Finding(name, "extra: not in the manifest") for name in sorted(tars - rows.keys())]
    problems += [Finding(name, "missing: no such shard was made") for name in missing_between(rows.keys() | tars)]
    with ThreadPoolExecutor(_SCANNERS) as scanners:
        names = sorted(rows.keys() & tars)
        for found in scanners.map(lambda name: _verify_shard(storage, rows[name], info), names):
            problems += found
    return problems


def repair(storage: Storage, drop: bool = False) -> Repair:
    """Make the manifest anew from the shards that are sound; lists those that are damaged or missing.

    A shard whose bytes are not those of its record, or of its old row, is damaged, even if it can be read. `drop`
    removes the tars of damaged shards: then they are `pending`, and made again to what their records say.
    """
    info, known, tars = read_dataset(storage), _known_rows(storage), tar_names(storage)
    made = known.keys() | recorded_names(storage)
    problems = [Finding(name, "missing: it was made, its tar is gone") for name in sorted(made - tars)]
    problems += [Finding(name, "missing: no such shard was made") for name in missing_between(made | tars)]
    rows = []
    for name in sorted(tars):
        row, damage = _scan(storage, name, info)
        evidence = read_sound_record(storage, name) or known.get(name)
        if evidence and evidence.sha256 != row.sha256:
            damage.append(Finding(name, "damaged: its sha256 is not the one it was made with"))
        elif evidence:
            origin = {"quarantined": evidence.quarantined, "fingerprint": evidence.fingerprint}
            row = row.model_copy(update=origin)
        problems += damage
        rows += [] if damage else [row]
        if damage and drop:
            storage.delete(name)
    write_manifest(storage, rows)
    return Repair(rows, problems)


def _known_rows(storage: Storage) -> dict[str, ManifestRow]:
    """The rows of the manifest that is there; none when it is gone or damaged."""
    try:
        return {row.name: row for row in read_manifest(storage)}
    except (FileNotFoundError, ValueError):
        return {}


def _scan(storage: Storage, name: str, info: DatasetInfo) -> tuple[ManifestRow, list[Finding]]:
    """A shard's row as its bytes tell it, and what is wrong with its samples, in one reading."""
    where, keys, problems = storage.where(name), [""], []
    with storage.open_input(name) as file:
        hashed = HashedInput(file)
        try:
            for _, key, fields in read_samples(hashed, where):
                problems += [Finding(name, reason) for reason in _sample_problems(where, keys[-1], key, fields, info)]
                keys.append(key)
        except ShardError as error:
            problems.append(Finding(name, f"{error.key}: {error.reason}" if error.key else error.reason))
        sha256 = hashed.drain()
    first, last = (keys[1], keys[-1]) if keys[1:] else ("", "")
    row = ManifestRow(
        name=name, samples=len(keys) - 1, bytes=hashed.bytes, sha256=sha256, first_key=first, last_key=last
    )
    return row, problems


def _sample_problems(where: str, previous: str, key: str, fields: dict[str, bytes], info: DatasetInfo) -> Iterator[str]:
    if key <= previous:
        yield f"{key}: comes after {previous}, keys must rise"
    try:
        info.check(decode_sample(where, key, fields))
    except ShardError as error:
        yield f"{key}: {error.reason}"
    except ValueError as error:
        yield f"{key}: {error}"


def _verify_shard(storage: Storage, row: ManifestRow, info: DatasetInfo) -> list[Finding]:
    found, problems = _scan(storage, row.name, info)
    for field in ("samples", "bytes", "sha256", "first_key", "last_key"):
        have, said = found.model_dump()[field], row.model_dump()[field]
        if have != said:
            problems.append(Finding(row.name, f"{field}: is {have}, the manifest says {said}"))
    try:
        record = read_record(storage, row.name)
    except ValueError as error:
        return [*problems, Finding(record_name(row.name), str(error))]
    if record and record.to_row() != row:
        problems.append(Finding(record_name(row.name), "does not agree with the manifest"))
    return problems
