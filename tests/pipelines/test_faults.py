"""`reelway trajectories` under fire: whatever is killed or fails, a re-run ends with the undisturbed set's bytes.

A reader looks at the data set all through every test (`faults/watch.py`): nothing half made ever shows.
"""

import os
import random
import re
import resource
import signal
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import ray

from reelway.cluster.manifest import tar_names
from reelway.cluster.session import Session
from reelway.cluster.storage import Storage

sys.path.insert(0, str(Path(__file__).parent))
from faults.crashes import Crash, Crashes, serve
from faults.kills import (
    Strike,
    in_mid_shard,
    in_turn,
    is_agent,
    is_worker_of_ours,
    kill_workers,
    marked,
    wait_until,
    when,
)
from faults.rays import driver, remove, session_folders, two_nodes
from faults.steps import FAULTS, Order, Outcome, at_every_step, call, steps_of, worker_here
from faults.watch import Files, check_whole, files_of, watched

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")

KILLED = -signal.SIGKILL
AT_WORK = "another job is writing here: reelway trajectories on"


def slow(values: Iterable[int]) -> list[Any]:
    return [pytest.param(value, marks=pytest.mark.slow) for value in values]


# --- The undisturbed sets ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def order(small_teacher: Path, tmp_path_factory: pytest.TempPathFactory) -> Order:
    """Three shards, each made in a moment."""
    return Order(small_teacher, tmp_path_factory.mktemp("faults") / "prompts.txt")


@pytest.fixture(scope="module")
def long_order(order: Order) -> Order:
    """Four shards that take long enough to be hit in the middle."""
    return replace(order, prompts=8, samples=3, per_shard=6, steps=60)


@pytest.fixture(scope="module")
def expected(order: Order, tmp_path_factory: pytest.TempPathFactory) -> Files:
    return undisturbed(order, tmp_path_factory.mktemp("undisturbed"))


@pytest.fixture(scope="module")
def long_expected(long_order: Order, tmp_path_factory: pytest.TempPathFactory) -> Files:
    return undisturbed(long_order, tmp_path_factory.mktemp("undisturbed"))


def undisturbed(order: Order, folder: Path) -> Files:
    with worker_here():
        assert call(order.command(folder)).code == 0
    return check_whole(files_of(Storage.open(folder)), order.shards)


@pytest.fixture(scope="module")
def steps(order: Order, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    return steps_of(order.command(tmp_path_factory.mktemp("steps")))


@pytest.fixture(scope="module")
def crashes(order: Order, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Crashes]:
    with serve(order.command(tmp_path_factory.mktemp("first")), tmp_path_factory.mktemp("temporary")) as server:
        yield server


def temporaries(folder: Path) -> list[str]:
    """What is half written. Not in `claims/`: who is killed in the middle of its claim leaves it for an hour."""
    return [path.name for path in folder.glob(".partial-*")]


def complete_here(order: Order, out: object) -> None:
    with worker_here():
        outcome = call(order.command(str(out)))
    assert outcome.code == 0, outcome.text


# --- Death at a step ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", [*range(2), *slow(range(2, 50))])
def test_a_job_that_dies_at_any_step_goes_on(
    seed: int, order: Order, expected: Files, steps: list[str], crashes: Crashes, tmp_path: Path
) -> None:
    """Killed at a random one of its writes, syncs, appearances and removals, and once more while it goes on."""
    out, rng = tmp_path / "set", random.Random(seed)
    job = Crash(order.command(out), str(tmp_path / "log"))
    with watched(Storage.open(out), expected):
        assert crashes.run([replace(job, at=rng.randrange(len(steps)))]) == [KILLED]
        crashes.run([replace(job, at=rng.randrange(len(steps)))])
        complete_here(order, out)
    assert temporaries(out) == []


@pytest.fixture
def bucket(s3_query: str, tmp_path: Path) -> str:
    """A place on the test's S3 server."""
    return f"s3://testing:testing@bucket/{tmp_path.name}?{s3_query}"


@pytest.mark.parametrize("seed", [0, *slow(range(1, 12))])
def test_a_job_on_s3_that_dies_at_any_step_goes_on(
    seed: int, order: Order, expected: Files, steps: list[str], crashes: Crashes, bucket: str, tmp_path: Path
) -> None:
    job = Crash(order.command(bucket), str(tmp_path / "log"), at=random.Random(seed).randrange(len(steps)))
    with watched(Storage.open(bucket), expected):
        assert crashes.run([job]) == [KILLED]
        complete_here(order, bucket)


# --- Two jobs at once --------------------------------------------------------------------------------------------


def check_pair(codes: list[int], said: list[str], shards: int) -> None:
    """Both did well, or one was told plainly that the other is at work; either way each shard was made once."""
    assert set(codes) <= {0, 2}, said
    assert 0 in codes, said
    for code, text in zip(codes, said, strict=True):
        assert (AT_WORK in text) == (code == 2), text
        assert "Traceback" not in text
    assert sum(int(count) for text in said for count in re.findall(r"made now: (\d+) shard", text)) == shards, said


@pytest.mark.parametrize("store", ["local", "s3"])
@pytest.mark.parametrize("seed", [0, *slow(range(1, 10))])
def test_two_jobs_at_once_never_mix(
    seed: int,
    store: str,
    order: Order,
    expected: Files,
    crashes: Crashes,
    request: pytest.FixtureRequest,
    tmp_path: Path,
) -> None:
    out = request.getfixturevalue("bucket") if store == "s3" else str(tmp_path / "set")
    logs = [tmp_path / "first", tmp_path / "second"]
    delays = (0.0, random.Random(seed).uniform(0, 0.3) if seed else 0.0)
    jobs = [Crash(order.command(out), str(log), delay=delay) for log, delay in zip(logs, delays, strict=True)]
    with watched(Storage.open(out), expected):
        check_pair(crashes.run(jobs), [log.read_text() for log in logs], order.shards)


@pytest.mark.parametrize("seed", [0, *slow(range(1, 20))])
def test_a_job_that_begins_while_another_dies(
    seed: int, order: Order, expected: Files, steps: list[str], crashes: Crashes, tmp_path: Path
) -> None:
    """The second one is refused, or takes over; what the dead one left does not stand in its way."""
    out, rng = tmp_path / "set", random.Random(seed)
    first = Crash(order.command(out), str(tmp_path / "first"), at=rng.randrange(len(steps)))
    second = Crash(order.command(out), str(tmp_path / "second"), delay=rng.uniform(0.0, 0.5))
    with watched(Storage.open(out), expected):
        codes = crashes.run([first, second])
        said = (tmp_path / "second").read_text()
        assert codes[1] == 0 or AT_WORK in said, said
        complete_here(order, out)


# --- Storage that fails ------------------------------------------------------------------------------------------


def check_failure(outcome: Outcome, words: str) -> None:
    """A clear line: of the command when it cannot go on, else of each shard that could not be made."""
    assert words in outcome.text
    assert "Traceback" not in outcome.text
    told = [line for line in outcome.text.splitlines() if words in line]
    if outcome.code == 2:
        assert len(told) == 1
        assert told[0].startswith("reelway: ")
    else:
        assert outcome.code == 1
        assert all(line.startswith(("shard-", "trajectories: item ")) for line in told)
        assert "no manifest is written; the same command tries again" in outcome.out


def run_with(name: str, seed: int, order: Order, out: str, steps: list[str]) -> Outcome:
    """The command, with a fault at a random one of the steps that it can hit; seed 0: at the first, the claim's."""
    fault = FAULTS[name]
    hits = [number for number, step in enumerate(steps) if step in fault.where]
    at = random.Random(f"{seed} {name}").choice(hits) if seed else hits[0]
    with worker_here(), at_every_step(fault.act(at)):
        return call(order.command(out))


@pytest.mark.parametrize("name", FAULTS)
@pytest.mark.parametrize("seed", [*range(2), *slow(range(2, 16))])
def test_a_fault_at_any_step_is_one_line_and_a_re_run_completes(
    seed: int, name: str, order: Order, expected: Files, steps: list[str], tmp_path: Path
) -> None:
    out, fault = tmp_path / "set", FAULTS[name]
    with watched(Storage.open(out), expected):
        outcome = run_with(name, seed, order, str(out), steps)
        if outcome.code or not fault.once:  # one that passes is healed by a worker's next attempt
            check_failure(outcome, fault.words)
        assert temporaries(out) == []
        complete_here(order, out)


@pytest.mark.parametrize("name", ["time-out", "answer lost", "answer lost once"])
@pytest.mark.parametrize("seed", [1, *slow(range(2, 5))])
def test_an_object_store_that_fails_is_one_line_and_a_re_run_completes(
    seed: int, name: str, order: Order, expected: Files, steps: list[str], bucket: str
) -> None:
    fault = FAULTS[name]
    with watched(Storage.open(bucket), expected):
        outcome = run_with(name, seed, order, bucket, steps)
        if outcome.code or not fault.once:
            check_failure(outcome, fault.words)
        complete_here(order, bucket)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Callable[[str], Path]]:
    """A file system of the size that is asked for; asked again, it grows."""
    folder, mounted = tmp_path / "disk", []
    folder.mkdir()

    def resize(size: str) -> Path:
        options = f"remount,size={size}" if mounted else f"size={size}"
        made = subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", folder], capture_output=True)
        if made.returncode:
            pytest.skip("needs the right to mount a file system")
        mounted.append(size)
        return folder

    yield resize
    if mounted:
        subprocess.run(["umount", "--lazy", folder], check=True)


@pytest.mark.parametrize("size", ["8k", "60k", "100k"])
def test_a_disk_that_is_really_full(
    size: str, order: Order, expected: Files, small_disk: Callable[[str], Path]
) -> None:
    out = small_disk(size) / "set"
    with watched(Storage.open(out), expected):
        with worker_here():
            outcome = call(order.command(out))
        check_failure(outcome, "the disk is full, or its quota used up")
        assert temporaries(out) == []
        small_disk("1m")
        complete_here(order, out)


@contextmanager
def largest_file(size: int) -> Iterator[None]:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("size", [1000, 30_000])
def test_a_file_that_may_not_grow(size: int, order: Order, expected: Files, tmp_path: Path) -> None:
    """Of 1000 bytes not even `dataset.json` can be written, of 30000 only the last shard."""
    out = tmp_path / "set"
    with watched(Storage.open(out), expected):
        with largest_file(size), worker_here():
            outcome = call(order.command(out))
        check_failure(outcome, "File too large")
        assert len(tar_names(Storage.open(out))) == (size == 30_000)
        assert temporaries(out) == []
        complete_here(order, out)


# --- Any order, any number ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", [0, *slow(range(1, 3))])
def test_any_order_of_the_shards_gives_the_same_bytes(seed: int, order: Order, expected: Files, tmp_path: Path) -> None:
    with watched(Storage.open(tmp_path / "set"), expected), worker_here(random.Random(seed)):
        assert call(order.command(tmp_path / "set")).code == 0


# --- Ray: a node that goes, a Ray that dies with its driver ------------------------------------------------------

# These start a Ray of their own, before the shared one.


@pytest.mark.slow
@pytest.mark.ray
@pytest.mark.parametrize("seed", range(3))
def test_a_node_that_is_removed(seed: int, long_order: Order, tmp_path: Path) -> None:
    """Killed with everything on it while both nodes work; the other one makes the rest, in the same run."""
    many = replace(long_order, per_shard=3)
    expected = undisturbed(many, tmp_path / "undisturbed")
    out, log, rng = tmp_path / "set", tmp_path / "log", random.Random(seed)
    assert not ray.is_initialized()
    strike = Strike(standing=rng.randrange(2), busy=2, pause=rng.uniform(0, 0.3))
    with two_nodes() as cluster:
        victim = rng.choice(sorted(cluster.worker_nodes, key=lambda node: node.unique_id))
        command = many.command(out, "--workers", 2, "--address", cluster.address)

        def remove(_: list[int]) -> None:
            cluster.remove_node(victim, allow_graceful=False)

        with (
            watched(Storage.open(out), expected),
            driver(command, log) as process,
            when(strike, Storage.open(out), out, remove) as struck,
        ):
            assert process.wait(300) == 0, log.read_text()
        assert struck, log.read_text()
    assert "retried" in log.read_text()


@pytest.mark.slow
@pytest.mark.ray
@pytest.mark.parametrize("seed", range(3))
def test_a_ray_of_its_own_dies_with_the_driver(
    seed: int, long_order: Order, long_expected: Files, tmp_path: Path
) -> None:
    out, log, rng, mark = tmp_path / "set", tmp_path / "log", random.Random(seed), uuid.uuid4().hex
    strike = Strike(standing=rng.randrange(long_order.shards - 1), busy=1, pause=rng.uniform(0, 0.2))
    leftovers: set[str] = set()
    with watched(Storage.open(out), long_expected):
        with driver(long_order.command(out, "--workers", 2), log, REELWAY_MARK=mark) as process:

            def kill(_: list[int]) -> None:
                leftovers.update(session_folders(mark))
                process.kill()

            with when(strike, Storage.open(out), out, kill) as struck:
                assert process.wait(300) == KILLED, log.read_text()
            assert struck
        complete_here(long_order, out)
        assert wait_until(lambda: all(map(is_agent, marked(mark))), 60), marked(mark)
        for pid in marked(mark):
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        assert leftovers
        for folder in leftovers:
            remove(folder)
    assert temporaries(out) == []


# --- The shared Ray ----------------------------------------------------------------------------------------------


def test_workers_then_the_driver_are_killed_and_its_re_run(
    ray_session: Session, long_order: Order, long_expected: Files, tmp_path: Path
) -> None:
    """On a Ray that stays: two workers at once, which the run replaces; then the driver, with which its workers end.
    The same command goes on at once.
    """
    out, log = tmp_path / "set", tmp_path / "log"
    command = long_order.command(out, "--workers", 2, "--address", ray_session.address)
    with watched(Storage.open(out), long_expected):
        with driver(command, log) as process:
            strikes = [(Strike(busy=2), kill_workers(2)), (Strike(standing=1, busy=1), lambda _: process.kill())]
            with in_turn(strikes, Storage.open(out), out) as (killed, orphaned):
                assert process.wait(300) == KILLED, log.read_text()
        assert len(killed) == 2
        assert orphaned
        assert not set(killed) & set(orphaned), "the dead were not replaced"
        outcome = call(long_order.command(out, "--workers", 2))
        assert outcome.code == 0, outcome.text
        assert wait_until(lambda: not any(map(is_worker_of_ours, orphaned)), 30)
    assert temporaries(out) == []


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(11))
def test_workers_that_are_killed(
    ray_session: Session, seed: int, long_order: Order, long_expected: Files, tmp_path: Path
) -> None:
    """One, or both at once; the run itself replaces them and completes."""
    out, rng, count = tmp_path / "set", random.Random(seed), 1 + (seed + 1) % 2
    strike = Strike(standing=rng.randrange(long_order.shards - 1), busy=count, pause=rng.uniform(0, 0.2))
    with watched(Storage.open(out), long_expected):
        with when(strike, Storage.open(out), out, kill_workers(count)) as struck:
            outcome = call(long_order.command(out, "--workers", 2))
        assert len(struck) >= count
        assert outcome.code == 0, outcome.text
    assert temporaries(out) == []


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(5))
def test_a_driver_that_is_killed_and_its_re_run(
    ray_session: Session, seed: int, long_order: Order, long_expected: Files, tmp_path: Path
) -> None:
    """On a Ray that stays. Its workers end with it, and the same command goes on at once."""
    out, log, rng = tmp_path / "set", tmp_path / "log", random.Random(seed)
    strike = Strike(standing=rng.randrange(long_order.shards - 1), busy=1, pause=rng.uniform(0, 0.2))
    command = long_order.command(out, "--workers", 2, "--address", ray_session.address)
    with watched(Storage.open(out), long_expected):
        with (
            driver(command, log) as process,
            when(strike, Storage.open(out), out, lambda _: process.kill()) as struck,
        ):
            assert process.wait(300) == KILLED, log.read_text()
        assert struck
        outcome = call(long_order.command(out, "--workers", 2))
        assert outcome.code == 0, outcome.text
        assert wait_until(lambda: not any(map(is_worker_of_ours, struck)), 30)
    assert temporaries(out) == []


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(2))
def test_two_commands_at_once_on_one_ray(
    ray_session: Session, seed: int, long_order: Order, long_expected: Files, tmp_path: Path
) -> None:
    out, logs = tmp_path / "set", [tmp_path / "first", tmp_path / "second"]
    command = long_order.command(out, "--workers", 1, "--address", ray_session.address)
    with watched(Storage.open(out), long_expected), driver(command, logs[0]) as first:
        time.sleep(random.Random(seed).uniform(0, 1))
        with driver(command, logs[1]) as second:
            codes = [first.wait(300), second.wait(300)]
        check_pair(codes, [log.read_text() for log in logs], long_order.shards)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(4))
def test_s3_with_killed_workers_and_drivers(
    ray_session: Session, seed: int, long_order: Order, long_expected: Files, bucket: str, tmp_path: Path
) -> None:
    out, staging, rng = Storage.open(bucket), Path(tempfile.gettempdir()), random.Random(seed)
    strike, log = Strike(rng.randrange(long_order.shards - 1), 1, rng.uniform(0, 0.3)), tmp_path / "log"
    with watched(out, long_expected):
        if seed % 2:
            command = long_order.command(bucket, "--workers", 2, "--address", ray_session.address)
            with driver(command, log) as process, when(strike, out, staging, lambda _: process.kill()) as struck:
                assert process.wait(300) == KILLED, log.read_text()
        else:
            with when(strike, out, staging, kill_workers(1)) as struck:
                assert call(long_order.command(bucket, "--workers", 2)).code == 0
        assert struck
        outcome = call(long_order.command(bucket, "--workers", 2))
        assert outcome.code == 0, outcome.text
    for path in (path for pid in struck for path in staging.glob(f".partial-{pid}-*")):
        path.unlink()


@pytest.mark.slow
def test_a_disk_that_fills_up_under_a_pool(
    ray_session: Session, long_order: Order, long_expected: Files, small_disk: Callable[[str], Path]
) -> None:
    """There is room when the run begins; then somebody else takes it."""
    disk = small_disk("2m")
    out, ballast = disk / "set", disk / "ballast"

    def fill(_: list[int]) -> None:
        with ballast.open("wb", buffering=0) as file, suppress(OSError):
            while True:
                file.write(b"x" * 4096)

    with watched(Storage.open(out), long_expected):
        with when(Strike(standing=1, busy=1), Storage.open(out), out, fill) as struck:
            outcome = call(long_order.command(out, "--workers", 2))
        assert struck
        check_failure(outcome, "the disk is full, or its quota used up")
        assert in_mid_shard(out) == []
        ballast.unlink()
        outcome = call(long_order.command(out, "--workers", 2))
        assert outcome.code == 0, outcome.text
