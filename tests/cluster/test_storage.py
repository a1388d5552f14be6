"""Storage on a local folder and on a real S3 server (moto, on loopback), and the single writer's claim."""

import errno
import io
import json
import multiprocessing
import os
import pickle
import tempfile
import time
from multiprocessing.synchronize import Barrier
from pathlib import Path

import pytest
import torch

from reelway.cluster.dataset import ClaimHeld, DatasetInfo, TensorSpec, claim, create_dataset
from reelway.cluster.manifest import MANIFEST, merge_manifest, pending, plan
from reelway.cluster.shards import Reading, ShardReader, verify, write_shard
from reelway.cluster.storage import (
    DifferentContent,
    LocalStorage,
    Storage,
    StorageError,
    _swept_temporary_folder,
    clear_errors,
)

forking = multiprocessing.get_context("fork")


@pytest.fixture(params=["local", "s3"])
def storage(request: pytest.FixtureRequest, tmp_path: Path) -> Storage:
    if request.param == "local":
        return Storage.open(tmp_path / "set")
    return Storage.open(f"s3://bucket/{tmp_path.name}?{request.getfixturevalue('s3_query')}")


def test_a_file_comes_back_as_it_was_published(storage: Storage, tmp_path: Path) -> None:
    assert storage.entries() == []
    assert not storage.exists("a.bin")
    large = tmp_path / "large.bin"
    large.write_bytes(os.urandom(12 << 20))  # more than one part of an upload
    began = time.time()
    assert storage.publish("a.bin", b"content")
    assert storage.publish("large.bin", large)
    assert storage.publish("empty", b"")
    assert storage.publish("below/b.bin", b"b")
    assert storage.read("a.bin") == b"content"
    assert storage.read("large.bin") == large.read_bytes()
    assert [(entry.name, entry.size) for entry in storage.entries()] == [
        ("a.bin", 7),
        ("empty", 0),
        ("large.bin", 12 << 20),
    ]
    assert all(abs(entry.modified - began) < 60 for entry in storage.entries())
    assert [entry.name for entry in storage.entries("below")] == ["b.bin"]
    with storage.open_input("large.bin") as file:
        file.seek(5 << 20)
        assert file.read(10) == large.read_bytes()[5 << 20 :][:10]
    storage.delete("a.bin")
    storage.delete("a.bin")
    assert not storage.exists("a.bin")


def test_a_name_is_never_given_other_content_unasked(storage: Storage, tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.write_bytes(b"one")
    assert storage.publish("a", b"one")
    assert not storage.publish("a", b"one")
    assert not storage.publish("a", source)
    source.write_bytes(b"two")
    for content in (b"two", b"longer", source):
        with pytest.raises(DifferentContent, match=r"a: exists already with other content"):
            storage.publish("a", content)
    assert storage.read("a") == b"one"
    assert storage.publish("a", source, replace=True)
    assert storage.read("a") == b"two"
    assert source.read_bytes() == b"two"


def test_of_two_writers_at_once_the_first_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    storage = Storage.open(tmp_path)
    monkeypatch.setattr(LocalStorage, "exists", lambda self, name: False)  # both looked before either wrote
    assert storage.publish("a", b"one")
    assert not storage.publish("a", b"one")
    with pytest.raises(DifferentContent):
        storage.publish("a", b"two")
    assert [path.name for path in tmp_path.iterdir()] == ["a"]
    assert storage.read("a") == b"one"


def test_what_is_missing_is_named_with_its_uri(storage: Storage) -> None:
    for look in (storage.read, storage.size, storage.sha256, storage.open_input):
        with pytest.raises(FileNotFoundError) as error:
            look("missing.tar")
        assert storage.uri in str(error.value)
        assert "missing.tar: no such file" in str(error.value)


def test_an_abandoned_file_never_appears(storage: Storage) -> None:
    with pytest.raises(RuntimeError), storage.stage("a") as staged:  # noqa: PT012
        staged.write(b"half")
        raise RuntimeError
    assert storage.entries() == []
    assert not staged.path.exists()


def test_a_storage_can_be_sent_to_another_process(storage: Storage) -> None:
    storage.publish("a", b"content")
    assert pickle.loads(pickle.dumps(storage)).read("a") == b"content"


def test_a_relative_path_means_the_same_folder_elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    sent = pickle.dumps(Storage.open("set"))
    monkeypatch.chdir("/")
    assert pickle.loads(sent).uri == str(tmp_path / "set")


def test_a_whole_data_set(storage: Storage) -> None:
    info = DatasetInfo(
        kind="latents",
        fields={"latents.safetensors": {"x": TensorSpec(shape=(2,), dtype="float32")}},
        made_by={},
        fingerprint="f",
    )
    create_dataset(storage, info)
    keys = [f"k{i}" for i in range(7)]
    shards = plan(keys, 3, "f")
    samples = {key: {"latents.safetensors": {"x": torch.full((2,), float(i))}} for i, key in enumerate(keys)}
    with claim(storage, "first"):
        for shard in shards[:2]:
            write_shard(storage, shard, ((key, samples[key]) for key in shard.keys))
        with pytest.raises(ClaimHeld, match="first on"):
            claim(storage, "second").__enter__()
    assert [shard.name for shard in pending(storage, shards)] == ["shard-000002.tar"]
    with claim(storage, "second"):
        write_shard(storage, shards[2], ((key, samples[key]) for key in shards[2].keys))
        rows = merge_manifest(storage)
    assert verify(storage) == []
    read = list(ShardReader(storage, rows, Reading(window=2, check=True)))
    assert sorted(sample["__key__"] for sample in read) == keys
    torn = storage.read("shard-000001.tar")[:700]
    storage.publish("shard-000001.tar", torn, replace=True)
    assert [shard.index for shard in pending(storage, shards)] == [1]
    assert write_shard(storage, shards[1], ((key, samples[key]) for key in shards[1].keys)) == rows[1]
    assert verify(storage) == []


def test_a_missing_bucket_is_named(s3_query: str) -> None:
    nowhere = Storage.open(f"s3://nowhere/set?{s3_query}")
    for do in (nowhere.entries, lambda: nowhere.publish("a", b"x")):
        with pytest.raises(FileNotFoundError, match=r"^s3://nowhere/set.*: no such bucket$"):
            do()


def test_addresses() -> None:
    assert Storage.open("s3://key:secret@bucket/set?region=eu-west-1").uri == "s3://bucket/set"
    assert Storage.open("gs://anonymous@bucket/set/").where("a") == "gs://bucket/set/a"
    assert Storage.open("file:///data/set").uri == "/data/set"
    with pytest.raises(ValueError, match=r"^ftp://host/set: stores are .* got ftp://$"):
        Storage.open("ftp://host/set")
    with pytest.raises(ValueError, match=r"^s3://bucket/set: .*nonsense"):
        Storage.open("s3://bucket/set?nonsense=1")


@pytest.mark.parametrize(
    ("raised", "kind", "words"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), StorageError, "the disk is full"),
        (PermissionError(errno.EACCES, "Permission denied"), PermissionError, "no permission"),
        (NotADirectoryError(errno.ENOTDIR, "Not a directory"), NotADirectoryError, "is a file, not a folder"),
        (FileExistsError(errno.EEXIST, "File exists"), NotADirectoryError, "is a file, not a folder"),
        (OSError("AWS Error ACCESS_DENIED during PutObject operation: No"), PermissionError, "denies access"),
        (OSError("AWS Error NETWORK_CONNECTION during HeadObject"), StorageError, "cannot be reached"),
        (OSError("AWS Error SLOW_DOWN\nduring PutObject (Request ID: 7)"), StorageError, "SLOW_DOWN during PutObject"),
    ],
)
def test_failures_are_one_line(raised: OSError, kind: type[OSError], words: str) -> None:
    with pytest.raises(OSError, match=words) as error, clear_errors("s3://bucket/a"):
        raise raised
    assert type(error.value) is kind
    assert str(error.value).startswith("s3://bucket/a: ")
    assert "\n" not in str(error.value)
    assert "Request ID" not in str(error.value)


def test_errors_of_who_makes_the_content_stay_as_they_are(tmp_path: Path) -> None:
    storage = Storage.open(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"^their file$"), storage.stage("a"):
        raise FileNotFoundError("their file")


def test_stale_temporaries_are_removed(tmp_path: Path) -> None:
    storage = Storage.open(tmp_path)
    with storage.stage("old") as old, storage.stage("new") as new:
        os.utime(old.path, (time.time() - 7200,) * 2)
        assert storage.entries() == []
        assert storage.remove_stale() == [old.path.name]
        assert new.path.exists()


def test_the_only_writer_removes_what_is_new_too(tmp_path: Path) -> None:
    storage = Storage.open(tmp_path)
    with storage.stage("new") as root, storage.stage("claims/new") as below:
        assert storage.remove_stale(older_than=-1.0) == [root.path.name]
        assert below.path.exists()
        assert storage.remove_stale(older_than=-1.0, folder="claims") == [below.path.name]
        assert not below.path.exists()


def test_what_killed_uploads_left_on_this_machine_is_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Temporaries for an object store lie where no listing of the store shows them."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    names = [f".partial-7-{'a' * 12}-shard-000000.tar", f".partial-7-{'b' * 12}-shard-000001.tar", ".partial-theirs"]
    for name in names:
        (tmp_path / name).touch()
    for name in (names[0], names[2]):
        os.utime(tmp_path / name, (time.time() - 90_000,) * 2)
    _swept_temporary_folder.cache_clear()
    try:
        assert _swept_temporary_folder() == tmp_path
    finally:
        _swept_temporary_folder.cache_clear()
    assert sorted(path.name for path in tmp_path.iterdir()) == names[1:]


class FullDisk(LocalStorage):
    """A disk that is full from the n-th write on."""

    def __init__(self, address: str, writes: int) -> None:
        super().__init__(address)
        self.left = writes

    def _create(self, path: Path) -> io.FileIO:
        return _FullFile(path, self)


class _FullFile(io.FileIO):
    def __init__(self, path: Path, disk: FullDisk) -> None:
        super().__init__(path, "x")
        self._disk = disk

    def write(self, data: bytes) -> int:
        self._disk.left -= 1
        if self._disk.left < 0:
            raise OSError(errno.ENOSPC, "No space left on device")
        return super().write(data)


def _job(storage: Storage) -> None:
    info = DatasetInfo(kind="prompts", fields={"prompt.txt": {}}, made_by={}, fingerprint="f")
    create_dataset(storage, info)
    shards = plan(["a", "b", "c"], 2, "f")
    for shard in pending(storage, shards):
        write_shard(storage, shard, ((key, {"prompt.txt": key}) for key in shard.keys))
    merge_manifest(storage)


def _failure(storage: Storage) -> str | None:
    try:
        _job(storage)
    except StorageError as error:
        return str(error)
    return None


def test_a_job_survives_a_full_disk_at_every_write(tmp_path: Path) -> None:
    whole = Storage.open(tmp_path / "whole")
    _job(whole)
    failures = 0
    while message := _failure(FullDisk(str(address := tmp_path / f"full-{failures}"), failures)):
        assert message.startswith(str(address))
        assert message.endswith("the disk is full, or its quota used up")
        assert not list(address.glob(".partial-*"))
        again = Storage.open(address)
        _job(again)
        assert verify(again) == []
        assert again.read(MANIFEST) == whole.read(MANIFEST)
        failures += 1
    assert failures > 10


def _claim_in_turn(folder: Path, barrier: Barrier, results: "multiprocessing.Queue[tuple[int, int]]") -> None:
    """Try the claim many times; the file `inside` proves that no two are in at once."""
    won = lost = 0
    storage, inside = Storage.open(folder), folder / "inside"
    barrier.wait()
    for _ in range(8):
        try:
            with claim(storage, f"job {os.getpid()}"):
                inside.touch(exist_ok=False)
                time.sleep(0.002)
                inside.unlink()
                won += 1
        except ClaimHeld:
            lost += 1
            time.sleep(0.003)
    results.put((won, lost))


def test_never_two_holders_of_a_claim(tmp_path: Path) -> None:
    barrier, results = forking.Barrier(3, timeout=60), forking.Queue()
    jobs = [forking.Process(target=_claim_in_turn, args=(tmp_path, barrier, results)) for _ in range(3)]
    for job in jobs:
        job.start()
    counts = [results.get(timeout=120) for _ in jobs]
    for job in jobs:
        job.join(60)
        assert job.exitcode == 0
    assert sum(won for won, _ in counts) > 0
    assert sum(won + lost for won, lost in counts) == 24
    assert list((tmp_path / "claims").iterdir()) == []


def _die_with_a_claim(folder: Path) -> None:
    claim(Storage.open(folder), "dead job").__enter__()
    os._exit(0)


def test_the_claim_of_a_dead_process_is_taken_over(tmp_path: Path) -> None:
    job = forking.Process(target=_die_with_a_claim, args=(tmp_path,))
    job.start()
    job.join(60)
    assert job.exitcode == 0
    assert len(list((tmp_path / "claims").iterdir())) == 1
    with claim(Storage.open(tmp_path), "heir"):
        (left,) = (tmp_path / "claims").iterdir()
        assert json.loads(left.read_bytes())["owner"] == "heir"


def _elsewhere(folder: Path, seconds_ago: float, file: str = "0000.json") -> Path:
    """A claim by a job of another machine, last renewed some seconds ago."""
    holder = {"owner": "far job", "host": "far", "machine": "other", "pid": 7, "started": "1", "since": "noon"}
    path = folder / "claims" / file
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(holder | {"lease": 60.0, "held": True}))
    os.utime(path, (time.time() - seconds_ago,) * 2)
    return path


def test_a_claim_of_another_machine_holds_for_its_lease(tmp_path: Path) -> None:
    fresh = _elsewhere(tmp_path, seconds_ago=30)
    with pytest.raises(ClaimHeld, match="another job is writing here: far job on far, pid 7, since noon"):
        claim(Storage.open(tmp_path), "mine").__enter__()
    assert [path.name for path in (tmp_path / "claims").iterdir()] == [fresh.name]
    _elsewhere(tmp_path, seconds_ago=90)
    with claim(Storage.open(tmp_path), "mine") as held:
        held.check()
        assert not fresh.exists()


def test_a_lost_claim_is_noticed(tmp_path: Path) -> None:
    with claim(Storage.open(tmp_path), "mine", lease=0.2) as held:
        _elsewhere(tmp_path, seconds_ago=0, file="zzzz.json")
        held._heart.join(timeout=30)
        with pytest.raises(ClaimHeld, match="lost to another job: far job"):
            held.check()


def test_a_claim_is_renewed(tmp_path: Path) -> None:
    with claim(Storage.open(tmp_path), "mine", lease=2.0):
        (file,) = (tmp_path / "claims").iterdir()
        first = file.stat().st_mtime_ns
        deadline = time.monotonic() + 30
        while file.stat().st_mtime_ns == first:
            assert time.monotonic() < deadline
            time.sleep(0.02)
