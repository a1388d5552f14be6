"""`reelway ingest` under fire: whatever is killed or fails, a re-run ends with the undisturbed set's bytes.

A reader looks at the data set all through every test (`faults/watch.py`): nothing half made ever shows.
"""

import random
import re
import signal
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from reelway.cluster.session import Session
from reelway.cluster.storage import Storage
from reelway.pipelines import ingest

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parents[1] / "actors"))
from faults.crashes import Crash, Crashes, serve
from faults.kills import Strike, is_worker_of_ours, kill_workers, wait_until, when
from faults.rays import driver
from faults.steps import FAULTS, Outcome, at_every_step, call, steps_of, worker_here
from faults.watch import Files, files_of, watched
from media import write_numbered

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")

VAE = Path(__file__).parents[2] / "assets" / "tiny" / "vae"
KILLED = -signal.SIGKILL
AT_WORK = "another job is writing here: reelway ingest on"


def slow(values: Iterable[Any]) -> list[Any]:
    return [pytest.param(value, marks=pytest.mark.slow) for value in values]


# --- The undisturbed sets ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Order:
    """A data set to be made: videos of two clips each, and one file that is no video."""

    folder: Path
    vae: Path
    videos: int
    height: int
    width: int
    per_shard: int

    def write(self) -> None:
        self.folder.mkdir()
        for index in range(self.videos):
            write_numbered(self.folder / f"{index}.mp4", height=self.height, width=self.width)
            (self.folder / f"{index}.txt").write_text(f"video {index}")
        (self.folder / "text.mp4").write_text("no video")
        (self.folder / "text.txt").write_text("nothing")

    @property
    def shards(self) -> int:
        return -(-2 * self.videos // self.per_shard)

    def command(self, out: str | Path, *more: object) -> list[str]:
        """What comes after `reelway`."""
        changes = (
            *("clip.frames=9", "clip.frame_rate=12", f"clip.height={self.height}", f"clip.width={self.width}"),
            *(f"ingest.per_shard={self.per_shard}", "ingest.batch=2", "ingest.smallest_side=32"),
        )
        parts = ("--videos", self.folder, "--vae", self.vae, "--out", out, *more)
        return ["ingest", *map(str, parts), *(part for change in changes for part in ("--set", change))]

    def undisturbed(self, out: Path) -> Files:
        assert make_here(self, out).code == 0
        files = files_of(Storage.open(out))
        assert sum(name.endswith(".tar") for name in files) == self.shards
        assert {"sources.parquet", "quarantine.parquet", "manifest.parquet", "dataset.json"} <= files.keys()
        return files


@pytest.fixture(scope="module")
def order(thin_vae: Path, tmp_path_factory: pytest.TempPathFactory) -> Order:
    """Two shards, each made in a moment."""
    made = Order(tmp_path_factory.mktemp("short") / "videos", thin_vae, 2, 48, 64, 2)
    made.write()
    return made


@pytest.fixture(scope="module")
def long_order(tmp_path_factory: pytest.TempPathFactory) -> Order:
    """Four shards that take long enough to be hit in the middle."""
    made = Order(tmp_path_factory.mktemp("long") / "videos", VAE, 8, 96, 128, 4)
    made.write()
    return made


@pytest.fixture(scope="module")
def expected(order: Order, tmp_path_factory: pytest.TempPathFactory) -> Files:
    return order.undisturbed(tmp_path_factory.mktemp("undisturbed") / "set")


@pytest.fixture(scope="module")
def long_expected(long_order: Order, tmp_path_factory: pytest.TempPathFactory) -> Files:
    return long_order.undisturbed(tmp_path_factory.mktemp("undisturbed") / "set")


@pytest.fixture(scope="module")
def steps(order: Order, expected: Files, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    return steps_of(order.command(tmp_path_factory.mktemp("steps") / "set"))


@pytest.fixture(scope="module")
def crashes(order: Order, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Crashes]:
    first = order.command(tmp_path_factory.mktemp("first") / "set")
    with serve(first, tmp_path_factory.mktemp("temporary")) as server:
        yield server


@pytest.fixture(params=["local", "s3"])
def out(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """Where the set shall be: a folder, or a place on the test's S3 server."""
    if request.param == "local":
        return str(tmp_path / "set")
    query = request.getfixturevalue("s3_query")
    return f"s3://testing:testing@bucket/{tmp_path.name}?{query}"


def make_here(order: Order, out: object) -> Outcome:
    with worker_here(job=ingest):
        return call(order.command(str(out)))


def complete_here(order: Order, out: object) -> None:
    outcome = make_here(order, out)
    assert outcome.code == 0, outcome.text


def nothing_half_written(out: str | Path) -> bool:
    """Not in `claims/`: who is killed in the middle of its claim leaves it for an hour."""
    left = [path for folder in (Path(out), Path(out) / "survey") for path in folder.glob(".partial-*")]
    return "://" in str(out) or left == []


# --- Storage that fails --------------------------------------------------------------------------------------------


def check_failure(outcome: Outcome, words: str) -> None:
    """A clear line: of the command when it cannot go on, else of each chunk or shard that could not be made."""
    told = [line for line in outcome.text.splitlines() if words in line]
    assert told, outcome.text
    assert "Traceback" not in outcome.text
    if outcome.code == 2:
        assert len(told) == 1
        assert told[0].startswith("reelway: ")
    else:
        assert outcome.code == 1
        assert all(line.startswith(("shard-", "survey/")) for line in told)
        assert "no manifest is written; the same command tries again" in outcome.out


@pytest.mark.parametrize("name", FAULTS)
@pytest.mark.parametrize("seed", [*range(2), *slow(range(2, 10))])
def test_a_fault_at_any_step_is_one_line_and_a_re_run_completes(
    seed: int, name: str, order: Order, expected: Files, steps: list[str], tmp_path: Path
) -> None:
    out, fault = tmp_path / "set", FAULTS[name]
    hits = [number for number, step in enumerate(steps) if step in fault.where]
    at = random.Random(f"{seed} {name}").choice(hits) if seed else hits[0]
    with watched(Storage.open(out), expected):
        with at_every_step(fault.act(at)):
            outcome = make_here(order, out)
        if outcome.code or not fault.once:  # one that passes is healed by a worker's next attempt
            check_failure(outcome, fault.words)
        assert nothing_half_written(out)
        complete_here(order, out)


# --- Death at a step, two at once ----------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(20))
def test_a_job_that_dies_at_any_step_goes_on(
    seed: int, out: str, order: Order, expected: Files, steps: list[str], crashes: Crashes, tmp_path: Path
) -> None:
    """Killed at a random one of its writes, syncs, appearances and removals, and once more while it goes on."""
    rng = random.Random(seed)
    jobs = [Crash(order.command(out), str(tmp_path / "log"), at=rng.randrange(len(steps))) for _ in range(2)]
    with watched(Storage.open(out), expected):
        assert crashes.run(jobs[:1]) == [KILLED]
        crashes.run(jobs[1:])
        complete_here(order, out)
    assert nothing_half_written(out)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(5))
def test_two_jobs_at_once_never_mix(
    seed: int, out: str, order: Order, expected: Files, crashes: Crashes, tmp_path: Path
) -> None:
    """Both do well, or one is told plainly that the other is at work; either way each shard is made once."""
    logs = [tmp_path / "first", tmp_path / "second"]
    delays = (0.0, random.Random(seed).uniform(0, 0.5) if seed else 0.0)
    jobs = [Crash(order.command(out), str(log), delay=delay) for log, delay in zip(logs, delays, strict=True)]
    with watched(Storage.open(out), expected):
        codes = crashes.run(jobs)
    said = [log.read_text() for log in logs]
    assert 0 in codes, said
    for code, text in zip(codes, said, strict=True):
        assert code in (0, 2), text
        assert (AT_WORK in text) == (code == 2), text
        assert "Traceback" not in text
    assert sum(int(count) for text in said for count in re.findall(r"made now: (\d+) shard", text)) == order.shards


# --- On Ray --------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(("seed", "count"), [(0, 1), (1, 2), (2, 2)])
def test_workers_that_are_killed(
    ray_session: Session, seed: int, count: int, long_order: Order, long_expected: Files, tmp_path: Path
) -> None:
    """One, or both at once; the run itself replaces them and completes."""
    out, rng = tmp_path / "set", random.Random(seed)
    strike = Strike(standing=rng.randrange(long_order.shards - 1), busy=count, pause=rng.uniform(0, 0.3))
    with watched(Storage.open(out), long_expected):
        with when(strike, Storage.open(out), out, kill_workers(count)) as struck:
            outcome = call(long_order.command(out, "--workers", 2))
        assert len(struck) >= count
        assert outcome.code == 0, outcome.text
    assert nothing_half_written(out)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(3))
def test_a_driver_that_is_killed_and_its_re_run(
    ray_session: Session, seed: int, long_order: Order, long_expected: Files, tmp_path: Path
) -> None:
    """On a Ray that stays. Its workers end with it, and the same command goes on at once."""
    out, log, rng = tmp_path / "set", tmp_path / "log", random.Random(seed)
    strike = Strike(standing=rng.randrange(long_order.shards - 1), busy=1, pause=rng.uniform(0, 0.3))
    line = long_order.command(out, "--workers", 2, "--address", ray_session.address)
    with watched(Storage.open(out), long_expected):
        with (
            driver(line, log) as process,
            when(strike, Storage.open(out), out, lambda _: process.kill()) as struck,
        ):
            assert process.wait(300) == KILLED, log.read_text()
        assert struck
        outcome = call(long_order.command(out, "--workers", 2))
        assert outcome.code == 0, outcome.text
        assert wait_until(lambda: not any(map(is_worker_of_ours, struck)), 60)
    assert nothing_half_written(out)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(3))
def test_a_driver_that_is_killed_during_the_survey(
    ray_session: Session, seed: int, long_order: Order, long_expected: Files, tmp_path: Path
) -> None:
    out, log, rng = tmp_path / "set", tmp_path / "log", random.Random(seed)
    line = long_order.command(out, "--workers", 1, "--address", ray_session.address)
    looked = rng.randrange(1, long_order.videos)

    def is_due() -> bool:
        """Or the moment for it was missed."""
        surveyed = len(list(out.glob("survey/*.json")))
        return surveyed >= looked or (out / "sources.parquet").exists() or process.poll() is not None

    with watched(Storage.open(out), long_expected):
        with driver(line, log) as process:
            assert wait_until(is_due, 240)
            process.kill()
            assert process.wait(60) == KILLED, log.read_text()
        outcome = call(long_order.command(out, "--workers", 2))
        assert outcome.code == 0, outcome.text
    assert nothing_half_written(out)
