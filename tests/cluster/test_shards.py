"""Shards: their bytes, their writers, the reader's promise of every sample once, checks and repair."""

import hashlib
import io
import json
import multiprocessing
import os
import re
import sys
import tarfile
import tracemalloc
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import webdataset

from reelway.cluster.dataset import DatasetInfo, Quarantined, Sample, ShardError, TensorSpec, create_dataset
from reelway.cluster.manifest import (
    MANIFEST,
    ShardPlan,
    merge_manifest,
    pending,
    plan,
    read_manifest,
    read_record,
    record_name,
    write_manifest,
)
from reelway.cluster.shards import Reading, ShardReader, repair, verify, write_shard
from reelway.cluster.storage import DifferentContent, Storage
from reelway.pipelines.cli import main

INFO = DatasetInfo(
    kind="trajectories",
    fields={
        "latents.safetensors": {"states": TensorSpec(shape=(2, 3), dtype="float16")},
        "prompt.txt": {},
        "meta.json": {},
    },
    made_by={"command": "test"},
    fingerprint="0123",
)
KEYS = [f"k{i:02d}" for i in range(14)]  # shards of 4, 4, 4 and 2
GOLDEN_ORDER = [f"k{i:02d}" for i in (4, 5, 7, 12, 6, 13, 1, 2, 0, 10, 3, 8, 9, 11)]


def _sample(key: str) -> Sample:
    value = int(key[1:])
    return {
        "prompt.txt": f"ein Käfer, {key}",
        "latents.safetensors": {"states": torch.full((2, 3), float(value), dtype=torch.float16)},
        "meta.json": {"seed": value, "b": [1, None]},
    }


def _samples(shard: ShardPlan) -> Iterator[tuple[str, Sample]]:
    return ((key, _sample(key)) for key in shard.keys)


def _unread() -> Iterator[tuple[str, Sample]]:
    raise AssertionError("nothing was to be made again")
    yield


def _make(storage: Storage, keys: list[str] = KEYS, per_shard: int = 4) -> list[ShardPlan]:
    create_dataset(storage, INFO)
    shards = plan(keys, per_shard, INFO.fingerprint)
    for shard in shards:
        write_shard(storage, shard, _samples(shard))
    merge_manifest(storage)
    return shards


@pytest.fixture
def storage(tmp_path: Path) -> Storage:
    storage = Storage.open(tmp_path / "set")
    _make(storage)
    return storage


def _content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


# --- Bytes -------------------------------------------------------------------------------------------------


def test_the_same_samples_give_the_same_bytes(tmp_path: Path, storage: Storage) -> None:
    other = Storage.open(tmp_path / "other")
    create_dataset(other, INFO)
    old_mask = os.umask(0o077)
    for shard in reversed(plan(KEYS, 4, INFO.fingerprint)):
        turned = ((key, dict(reversed(sample.items()))) for key, sample in _samples(shard))
        write_shard(other, shard, turned)
    os.umask(old_mask)
    merge_manifest(other)
    assert _content(tmp_path / "other") == _content(tmp_path / "set")
    # The format itself: a change here makes every data set that was ever written a different one.
    digest = hashlib.sha256((tmp_path / "set" / "shard-000000.tar").read_bytes()).hexdigest()
    assert digest == "13b30398b34b8dbe510bea9fb99d361184be1f87275cd1a2bd6e188b72ccbdb8"


def test_a_shard_is_what_the_standard_library_writes(tmp_path: Path, storage: Storage) -> None:
    written = (tmp_path / "set" / "shard-000003.tar").read_bytes()
    copy = io.BytesIO()
    with (
        tarfile.open(fileobj=io.BytesIO(written)) as source,
        tarfile.open(fileobj=copy, mode="w", format=tarfile.USTAR_FORMAT) as target,
    ):
        names = source.getnames()
        for name in names:
            header = tarfile.TarInfo(name)
            header.size, header.mode = source.getmember(name).size, 0o644
            target.addfile(header, source.extractfile(name))
    assert copy.getvalue()[: len(written)] == written
    assert names == sorted(names)
    assert names[:3] == ["k12.latents.safetensors", "k12.meta.json", "k12.prompt.txt"]


def test_webdataset_reads_a_shard(tmp_path: Path, storage: Storage) -> None:
    shard = str(tmp_path / "set" / "shard-000001.tar")
    theirs = list(webdataset.WebDataset(shard, shardshuffle=False))
    assert [sample["__key__"] for sample in theirs] == ["k04", "k05", "k06", "k07"]
    assert theirs[0]["prompt.txt"].decode() == "ein Käfer, k04"
    assert json.loads(theirs[0]["meta.json"]) == {"seed": 4, "b": [1, None]}


# --- Writing -----------------------------------------------------------------------------------------------


def test_a_shard_that_is_there_costs_nothing(storage: Storage) -> None:
    (shard, *_) = plan(KEYS, 4, INFO.fingerprint)
    assert write_shard(storage, shard, _unread()) == read_manifest(storage)[0]


@pytest.mark.parametrize("with_record", [True, False])
@pytest.mark.parametrize("length", [0, 100, 512, 2048, -1024])
def test_a_torn_shard_is_made_anew(tmp_path: Path, storage: Storage, with_record: bool, length: int) -> None:
    (shard, *_) = plan(KEYS, 4, INFO.fingerprint)
    path = tmp_path / "set" / shard.name
    whole = path.read_bytes()
    path.write_bytes(whole[:length])
    if not with_record:
        storage.delete(record_name(shard.name))
    assert write_shard(storage, shard, _samples(shard)) == read_manifest(storage)[0]
    assert path.read_bytes() == whole
    assert verify(storage) == []


def test_other_content_under_a_shards_name_is_refused(storage: Storage) -> None:
    (shard, *_) = plan(KEYS, 4, INFO.fingerprint)
    before = storage.read(shard.name)
    other = [(key, {**_sample(key), "prompt.txt": "other"}) for key in shard.keys]
    (planned_otherwise, *_) = plan(KEYS, 4, "another set")
    with pytest.raises(DifferentContent, match=r"shard-000000\.tar: was planned otherwise"):
        write_shard(storage, planned_otherwise, _unread())
    storage.publish(shard.name, before[:-1024], replace=True)
    with pytest.raises(DifferentContent, match=r"shard-000000\.tar: made again, its content is another"):
        write_shard(storage, shard, other)
    storage.publish(shard.name, before, replace=True)
    storage.delete(record_name(shard.name))
    with pytest.raises(DifferentContent, match=r"shard-000000\.tar: exists already with other content"):
        write_shard(storage, shard, other)
    assert storage.read(shard.name) == before


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda pairs: pairs[:-1], r"shard-000000\.tar: k03: no sample came for it"),
        (lambda pairs: [*pairs, ("k99", _sample("k99"))], r"k99: came where the end is due"),
        (lambda pairs: pairs[::-1], r"k03: came where k00 is due"),
        (lambda pairs: [(k, {**s, "extra.txt": ""}) for k, s in pairs], r"k00: fields must be \['latents"),
        (lambda pairs: [(k, {**s, "prompt.txt": 3}) for k, s in pairs], r"k00: prompt.txt: cannot keep a int"),
        (lambda pairs: [(k, {**s, "meta.json": {1}}) for k, s in pairs], r"k00: meta.json: cannot keep a set"),
        (
            lambda pairs: [(k, {**s, "latents.safetensors": {"states": torch.zeros(2, 4)}}) for k, s in pairs],
            r"k00: latents.safetensors: states must be float16 \[2, 3\], got float32 \[2, 4\]",
        ),
    ],
)
def test_a_writer_refuses(tmp_path: Path, change: Callable[[Any], Any], message: str) -> None:
    storage = Storage.open(tmp_path)
    create_dataset(storage, INFO)
    (shard, *_) = plan(KEYS, 4, INFO.fingerprint)
    with pytest.raises(ShardError, match=message):
        write_shard(storage, shard, change(list(_samples(shard))))
    assert [path.name for path in tmp_path.iterdir()] == ["dataset.json"]


def test_poison_is_quarantined_with_its_reason(tmp_path: Path) -> None:
    storage = Storage.open(tmp_path)
    create_dataset(storage, INFO)
    (shard, *_) = shards = plan(KEYS[:4], 4, INFO.fingerprint)
    pairs = [(key, Quarantined("no frames") if key == "k00" else _sample(key)) for key in shard.keys]
    row = write_shard(storage, shard, pairs)
    assert (row.samples, row.quarantined, row.first_key) == (3, 1, "k01")
    record = read_record(storage, shard.name)
    assert record is not None
    assert record.reasons == {"k00": "no frames"}
    assert pending(storage, shards) == []
    assert merge_manifest(storage) == [row]
    assert verify(storage) == []


def _write_all(folder: Path, failures: "multiprocessing.Queue[str]") -> None:
    try:
        _make(Storage.open(folder))
        failures.put("")
    except BaseException as error:
        failures.put(repr(error))
        raise


def test_writers_of_the_same_shards_at_once_agree(tmp_path: Path, storage: Storage) -> None:
    forking = multiprocessing.get_context("fork")
    failures = forking.Queue()
    jobs = [forking.Process(target=_write_all, args=(tmp_path / "many", failures)) for _ in range(4)]
    for job in jobs:
        job.start()
    assert [failures.get(timeout=120) for _ in jobs] == [""] * 4
    for job in jobs:
        job.join(60)
        assert job.exitcode == 0
    assert _content(tmp_path / "many") == _content(tmp_path / "set")


# --- Reading -----------------------------------------------------------------------------------------------


def _keys(reader: ShardReader) -> list[str]:
    return [sample["__key__"] for sample in reader]


def test_a_sample_comes_back_as_it_was_written(storage: Storage) -> None:
    for sample in ShardReader(storage):
        expected = _sample(sample["__key__"])
        assert torch.equal(sample["latents.safetensors"]["states"], expected["latents.safetensors"]["states"])
        assert sample["prompt.txt"] == expected["prompt.txt"]
        assert sample["meta.json"] == expected["meta.json"]
        assert sample["__shard__"] == f"shard-{int(sample['__key__'][1:]) // 4:06d}.tar"


@pytest.mark.parametrize("window", [1, 3, 100])
@pytest.mark.parametrize("world", [1, 2, 3, 4, 20])
def test_every_sample_is_read_once_in_every_epoch(storage: Storage, world: int, window: int) -> None:
    readers = [ShardReader(storage, None, Reading(rank=r, world=world, window=window)) for r in range(world)]
    epochs = [[_keys(reader) for reader in readers] for _ in range(2)]
    for parts in epochs:
        assert sorted(key for part in parts for key in part) == KEYS
        lengths = [len(part) for part in parts]
        assert max(lengths) - min(lengths) <= 1
        assert lengths == [len(reader) for reader in readers]
    assert epochs[0] != epochs[1]


def test_the_order_belongs_to_seed_and_epoch(storage: Storage) -> None:
    orders = [_keys(ShardReader(storage, None, Reading(seed=seed, window=5))) for seed in (0, 0, 1)]
    assert orders[0] == orders[1]
    assert orders[0] != orders[2]
    assert orders[0] == GOLDEN_ORDER


def test_samples_move_no_further_than_the_window(storage: Storage) -> None:
    in_shards = _keys(ShardReader(storage, None, Reading(window=1)))
    shards = [key for start in range(0, 14, 4) for key in KEYS[start : start + 4]]
    assert in_shards != shards
    assert [key for key in in_shards if key in KEYS[:4]] == KEYS[:4]
    mixed = _keys(ShardReader(storage, None, Reading(window=3)))
    assert mixed != in_shards
    assert max(abs(mixed.index(key) - in_shards.index(key)) for key in KEYS) <= 3


@pytest.mark.parametrize("reading", [Reading(window=1), Reading(window=5), Reading(rank=1, world=2, window=20)])
def test_a_restart_at_any_position_goes_on_in_the_same_order(storage: Storage, reading: Reading) -> None:
    reader = ShardReader(storage, None, reading)
    states, order = [reader.state()], []
    for sample in reader:
        order.append(sample["__key__"])
        states.append(reader.state())
    following = _keys(reader)
    assert len(states) == len(reader) + 1
    for position, state in enumerate(states):
        again = ShardReader.from_state(storage, None, reading, json.loads(json.dumps(state)))
        assert _keys(again) == order[position:]
        assert _keys(again) == following


def test_a_restart_reads_nothing_that_was_given_out(tmp_path: Path, storage: Storage) -> None:
    reader = ShardReader(storage, None, Reading(window=1))
    stream = iter(reader)
    first = [next(stream) for _ in range(5)]
    (tmp_path / "set" / first[0]["__shard__"]).unlink()
    again = ShardReader.from_state(storage, None, reader.reading, reader.state())
    assert _keys(again) == [sample["__key__"] for sample in stream]


@pytest.mark.parametrize("change", [{"seed": 1}, {"world": 2}, {"window": 2}, {"workers": 2}])
def test_a_restart_with_another_reading_is_refused(storage: Storage, change: dict[str, int]) -> None:
    state = ShardReader(storage, None, Reading()).state()
    (name,) = change
    with pytest.raises(ValueError, match=rf"cannot go on reading: {name} was \d+, is now {change[name]}"):
        ShardReader.from_state(storage, None, Reading(**change), state)
    with pytest.raises(ValueError, match="cannot go on reading: manifest was"):
        ShardReader.from_state(storage, read_manifest(storage)[:2], Reading(), state)


def test_worker_processes_share_a_ranks_part(storage: Storage) -> None:
    ranks = [Reading(rank=rank, world=2, workers=2, window=3) for rank in range(2)]
    orders = []
    for reading in ranks:
        reader = ShardReader(storage, None, reading)
        stream = reader.through_workers()
        order = [next(stream)["__key__"] for _ in range(3)]
        middle = reader.state()
        rest = [sample["__key__"] for sample in stream]
        again = ShardReader.from_state(storage, None, reading, middle)
        assert [sample["__key__"] for sample in again.through_workers()] == rest
        assert again.epoch == 1
        orders += order + rest
    assert sorted(orders) == KEYS
    with pytest.raises(ValueError, match="workers: the reading is for 2, 1 are at work"):
        list(ShardReader(storage, None, ranks[0]))


def test_a_sample_is_copied_no_more_than_twice(tmp_path: Path) -> None:
    shape = (1, 4, 512, 512)
    payload = 4 * 4 * 512 * 512
    info = INFO.model_copy(update={"fields": {"latents.safetensors": {"x": TensorSpec(shape=shape, dtype="float32")}}})
    storage = Storage.open(tmp_path)
    create_dataset(storage, info)
    (shard,) = plan(["a", "b"], 2, "f")
    write_shard(storage, shard, ((key, {"latents.safetensors": {"x": torch.zeros(shape)}}) for key in shard.keys))
    merge_manifest(storage)
    reader = ShardReader(storage, None, Reading(window=1))
    stream = iter(reader)
    tracemalloc.start()
    sample = next(stream)
    held, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert sample["latents.safetensors"]["x"].shape == shape
    assert peak < 2.4 * payload + (1 << 20)
    assert held < 1.2 * payload + (1 << 20)


# --- Damage ------------------------------------------------------------------------------------------------


def _change(path: Path, change: Callable[[bytes], bytes]) -> None:
    path.write_bytes(change(path.read_bytes()))


def _flip(data: bytes, at: int) -> bytes:
    return data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :]


def _break_header(data: bytes) -> bytes:
    """Damage the safetensors header of k05, the second sample, and leave the tar's own as they are."""
    at = data.index(b"k05.latents.safetensors") + 512
    return data[:at] + b"\xff" * 8 + data[at + 8 :]


DAMAGES: dict[str, tuple[Callable[[Path], object], str, int]] = {
    # What is done, what a reader says of it (None: nothing, without a check), and how many samples are lost.
    "undecodable": (lambda path: _change(path, _break_header), r"k05: latents.safetensors: cannot be decoded", 1),
    "truncated": (lambda path: _change(path, lambda data: data[:4608]), r"breaks off", 3),
    "missing": (lambda path: path.unlink(), r"no such shard", 4),
    "header": (lambda path: _change(path, lambda data: _flip(data, 3)), r"damaged at the beginning: bad checksum", 4),
}


@pytest.mark.parametrize("damage", list(DAMAGES))
def test_a_damaged_shard_ends_the_job_or_is_counted(tmp_path: Path, storage: Storage, damage: str) -> None:
    harm, words, lost = DAMAGES[damage]
    harm(tmp_path / "set" / "shard-000001.tar")
    with pytest.raises(ShardError, match=rf"set/shard-000001\.tar: .*{words}"):
        list(ShardReader(storage))
    reader = ShardReader(storage, None, Reading(damaged="skip", window=3))
    states, order = [], []
    for sample in reader:
        order.append(sample["__key__"])
        states.append(reader.state())
        skipped = reader.skipped
    assert len(set(order)) == len(KEYS) - lost
    assert set(KEYS) - set(order) <= set(KEYS[4:8])
    assert reader.damage
    assert skipped <= lost
    again = ShardReader.from_state(storage, None, reader.reading, states[6])
    assert _keys(again) == order[7:]


def test_skipped_samples_are_counted_by_the_epochs_end(tmp_path: Path, storage: Storage) -> None:
    (tmp_path / "set" / "shard-000001.tar").unlink()
    reader = ShardReader(storage, None, Reading(rank=0, world=1, damaged="skip", window=1))
    for epoch in (1, 2):
        assert len(_keys(reader)) == 10
        assert reader.skipped == 4 * epoch
    again = ShardReader.from_state(storage, None, reader.reading, reader.state())
    assert again.skipped == 8
    assert len(_keys(again)) == 10


def test_a_flipped_byte_is_seen_when_hashes_are_checked(tmp_path: Path, storage: Storage) -> None:
    _change(tmp_path / "set" / "shard-000001.tar", lambda data: _flip(data, data.index(b"K\xc3\xa4fer") + 3))
    assert len(_keys(ShardReader(storage))) == 14
    with pytest.raises(ShardError, match=r"shard-000001\.tar: its sha256 is not the manifest's"):
        list(ShardReader(storage, None, Reading(check=True)))
    assert len(_keys(ShardReader(storage, None, Reading(check=True, damaged="skip")))) == 10


def _wrong_row(folder: Path, **values: object) -> None:
    storage = Storage.open(folder)
    first, *others = read_manifest(storage)
    write_manifest(storage, [first.model_copy(update=values), *others])


def _refill(folder: Path, fields: Callable[[Sample], Sample]) -> None:
    """Write shard 0 with another content and a manifest that agrees with it."""
    storage = Storage.open(folder / "elsewhere")
    wide = INFO.model_copy(update={"fields": {name: {} for name in fields(_sample("k00"))}})
    create_dataset(storage, wide)
    (shard, *_) = plan(KEYS, 4, INFO.fingerprint)
    row = write_shard(storage, shard, ((key, fields(_sample(key))) for key in shard.keys))
    for name in (shard.name, record_name(shard.name)):
        Storage.open(folder).publish(name, storage.read(name), replace=True)
    _wrong_row(folder, **row.model_dump())


FINDINGS: dict[str, tuple[Callable[[Path], object], list[str]]] = {
    "flipped byte": (
        lambda f: _change(f / "shard-000000.tar", lambda data: _flip(data, data.index(b"fer, k01"))),
        [r"shard-000000\.tar: sha256: is \w{64}, the manifest says \w{64}"],
    ),
    "truncated": (
        lambda f: _change(f / "shard-000002.tar", lambda data: data[:4608]),
        [
            r"shard-000002\.tar: .*breaks off",
            "samples: is 1, the manifest says 4",
            "bytes: is 4608",
            "sha256",
            "last_key",
        ],
    ),
    "missing shard": (
        lambda f: (f / "shard-000001.tar").unlink(),
        [r"shard-000001\.tar: missing: the manifest lists it"],
    ),
    "extra shard": (
        lambda f: (f / "shard-000004.tar").write_bytes((f / "shard-000000.tar").read_bytes()),
        [r"shard-000004\.tar: extra: not in the manifest"],
    ),
    "gap": (
        lambda f: (f / "shard-000006.tar").write_bytes(b""),
        ["000006.tar: extra", "000004.tar: missing: no such shard", "000005.tar: missing: no such shard"],
    ),
    "wrong count": (
        lambda f: _wrong_row(f, samples=5),
        [r"shard-000000\.tar: samples: is 4, the manifest says 5", r"shard-000000\.json: does not agree"],
    ),
    "wrong keys": (
        lambda f: _wrong_row(f, last_key="k02"),
        ["last_key: is k03, the manifest says k02", r"shard-000000\.json: does not agree"],
    ),
    "undecodable": (
        lambda f: _change(f / "shard-000001.tar", _break_header),
        [r"shard-000001\.tar: k05: latents.safetensors: cannot be decoded", "sha256"],
    ),
    "field missing": (
        lambda f: _refill(f, lambda sample: {"prompt.txt": sample["prompt.txt"]}),
        [rf"shard-000000\.tar: {key}: fields must be" for key in KEYS[:4]],
    ),
    "record torn": (
        lambda f: (f / "shard-000003.json").write_text("{"),
        [r"shard-000003\.json: .*Invalid JSON"],
    ),
}


@pytest.mark.parametrize("case", list(FINDINGS))
def test_verify_finds(tmp_path: Path, storage: Storage, case: str) -> None:
    assert verify(storage) == []
    harm, expected = FINDINGS[case]
    harm(tmp_path / "set")
    lines = list(map(str, verify(storage)))
    assert len(lines) == len(expected), lines
    for words, line in zip(expected, lines, strict=True):
        assert re.search(words, line)


def test_verify_sees_keys_out_of_order(tmp_path: Path, storage: Storage) -> None:
    path = tmp_path / "set" / "shard-000003.tar"
    data = path.read_bytes()[:-1024]
    path.write_bytes(data[len(data) // 2 :] + data[: len(data) // 2] + bytes(1024))
    assert any("k12: comes after k13, keys must rise" in str(finding) for finding in verify(storage))


def test_repair_lists_what_is_sound_and_names_the_rest(tmp_path: Path, storage: Storage) -> None:
    folder, rows = tmp_path / "set", read_manifest(storage)
    storage.delete(MANIFEST)
    assert repair(storage).rows == rows
    assert repair(storage).problems == []
    (folder / MANIFEST).write_bytes(b"torn")
    (folder / "shard-000000.tar").unlink()
    _change(folder / "shard-000001.tar", lambda data: _flip(data, data.index(b"fer, k05")))
    (folder / "shard-000002.json").unlink()
    result = repair(storage)
    orphan = rows[2].model_copy(update={"fingerprint": None})
    assert result.rows == [orphan, rows[3]]
    assert list(map(str, result.problems)) == [
        "shard-000000.tar: missing: it was made, its tar is gone",
        "shard-000001.tar: damaged: its sha256 is not the one it was made with",
    ]
    assert read_manifest(storage) == result.rows
    shards = plan(KEYS, 4, INFO.fingerprint)
    assert [shard.index for shard in pending(storage, shards)] == [0, 2]


def test_a_repaired_set_is_completed_by_its_job(tmp_path: Path, storage: Storage) -> None:
    before = _content(tmp_path / "set")
    for lost in ("shard-000000.tar", "shard-000002.json", MANIFEST):
        storage.delete(lost)
    repair(storage)
    _make(storage)
    assert {name: data for name, data in _content(tmp_path / "set").items() if name != "claims"} == before


def test_a_damaged_shard_that_was_dropped_is_made_again(tmp_path: Path, storage: Storage) -> None:
    """One that can still be read, but has other bytes; and one that is cut short."""
    folder, before = tmp_path / "set", _content(tmp_path / "set")
    _change(folder / "shard-000001.tar", lambda data: _flip(data, data.index(b"fer, k05")))
    _change(folder / "shard-000003.tar", lambda data: data[:600])
    found = repair(storage).problems
    assert {finding.file for finding in found} == {"shard-000001.tar", "shard-000003.tar"}
    assert (folder / "shard-000001.tar").exists()
    shards = plan(KEYS, 4, INFO.fingerprint)
    assert [shard.index for shard in pending(storage, shards)] == [3]
    assert repair(storage, drop=True).problems == found
    assert [shard.index for shard in pending(storage, shards)] == [1, 3]
    _make(storage)
    assert {name: data for name, data in _content(folder).items() if name != "claims"} == before


# --- Command line ------------------------------------------------------------------------------------------


@pytest.fixture
def reelway(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    def run(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["reelway", *map(str, arguments)])
        monkeypatch.setenv("COLUMNS", "160")
        with pytest.raises(SystemExit) as ended:
            main()
        captured = capsys.readouterr()
        return int(ended.value.code or 0), captured.out, captured.err

    return run


def test_the_command_line(tmp_path: Path, storage: Storage, reelway: Callable[..., tuple[int, str, str]]) -> None:
    folder = tmp_path / "set"
    code, out, _ = reelway("shards", "inspect", folder)
    assert code == 0
    for words in ("trajectories", "states: float16 [2, 3]", "0123", "made by: command", "14"):
        assert words in out
    assert reelway("shards", "verify", folder)[:2] == (0, f"{folder}: sound: 4 shards, 14 samples\n")
    (folder / "shard-000002.tar").unlink()
    missing = "shard-000002.tar: missing: the manifest lists it\n1 problem\n"
    assert reelway("shards", "verify", folder)[:2] == (1, missing)
    code, out, _ = reelway("shards", "repair", folder)
    assert code == 1
    assert out.startswith(f"{folder}: the manifest lists 3 sound shards\nshard-000002.tar: missing: it was made")
    assert out.endswith("makes again what is missing (repair --drop removes damaged ones first)\n")
    assert reelway("shards", "verify", tmp_path / "none") == (
        2,
        "",
        f"reelway: {tmp_path}/none/dataset.json: no such file or folder\n",
    )
    assert not (tmp_path / "none").exists()
