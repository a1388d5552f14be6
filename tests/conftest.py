"""One Ray for the whole suite: started when the first test asks for it, ended with the suite."""

import faulthandler
import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from reelway.cluster.session import Session

# Before anything imports ray: it reads the first of these once.
os.environ["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = "0"  # listen on the loopback address only
os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
os.environ["RAY_metrics_report_interval_ms"] = "1000"  # noqa: SIM112 -- spelt so by Ray; ten seconds otherwise
# Before anything imports torch or numpy, for this process and all that it starts: what is computed here is so small
# that threads mostly wait for each other, on a busy machine for the most part of the time.
for _name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
    os.environ.setdefault(_name, "1")

RAY_CPUS = 4
SLOW_SECONDS = 1800  # for a slow test; the others' limit is in pyproject.toml
END_SECONDS = 60  # for what still runs after the last test


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests that ask for the shared Ray run last: the ones before them may start one of their own."""
    for item in items:
        if item.get_closest_marker("slow") and not item.get_closest_marker("timeout"):
            item.add_marker(pytest.mark.timeout(SLOW_SECONDS))
    shared = {item: "ray_session" in getattr(item, "fixturenames", ()) for item in items}
    for item, uses_ray in shared.items():
        if uses_ray:
            item.add_marker(pytest.mark.ray)
    items.sort(key=shared.__getitem__)


@pytest.hookimpl(trylast=True)
def pytest_unconfigure() -> None:
    """Threads that a test has left keep the process alive: their stacks are shown then, and the run has failed."""
    faulthandler.dump_traceback_later(END_SECONDS, exit=True)


@pytest.fixture(autouse=True, scope="session")
def _threads() -> int:
    """torch's threads at the start."""
    import torch

    return torch.get_num_threads()


@pytest.fixture(autouse=True, scope="module")
def _same_threads_for_every_module(_threads: int) -> Iterator[None]:
    """Workers that are built in this process set torch's threads, which decide the last bits of later tests."""
    import torch

    torch.set_num_threads(_threads)
    yield
    torch.set_num_threads(_threads)


@pytest.fixture(scope="session")
def ray_session() -> "Iterator[Session]":
    """A local Ray with 4 CPUs by its own count, no GPU, and the dashboard, which Ray Train needs."""
    from reelway.cluster.session import start_or_join

    with start_or_join("local", cpus=RAY_CPUS, gpus=0, object_store_bytes=256 << 20, dashboard=True) as session:
        yield session


@pytest.fixture(scope="module")
def s3_query() -> Iterator[str]:
    """The query of an address that reaches an S3 server on loopback, with a bucket named `bucket`.

    This process has its credentials, others need them in the address: `s3://testing:testing@bucket/set?...`.
    """
    import logging

    import pyarrow.fs

    server_module = pytest.importorskip("moto.server")
    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    server = server_module.ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    server.start()
    with pytest.MonkeyPatch.context() as environment:
        for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
            environment.setenv(name, "testing")
        environment.setenv("AWS_EC2_METADATA_DISABLED", "true")
        host, port = server.get_host_and_port()
        query = f"endpoint_override={host}:{port}&scheme=http&region=us-east-1"
        maker, _ = pyarrow.fs.FileSystem.from_uri(f"s3://bucket?{query}&allow_bucket_creation=true")
        maker.create_dir("bucket")
        yield query
    server.stop()


@pytest.fixture(scope="session")
def small_teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A teacher's folder for tests that need one: the tiny model cut to one block, random weights, the shipped VAE."""
    return _small_model(tmp_path_factory.mktemp("small") / "teacher", is_student=False)


@pytest.fixture(scope="session")
def small_student(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A student's folder, like `small_teacher`: blocks of 3, window 6, sink 3, steps at 1000 and 750."""
    return _small_model(tmp_path_factory.mktemp("small") / "student", is_student=True)


def _small_model(folder: Path, is_student: bool) -> Path:
    import shutil
    from dataclasses import replace

    import torch

    from reelway.kernels.causal.student import StudentSettings
    from reelway.kernels.sprites.captions import VOCABULARY
    from reelway.kernels.wan.config import CONFIGS
    from reelway.kernels.wan.text import tiny_text_encoder
    from reelway.kernels.wan.transformer import VideoTransformer
    from reelway.pipelines.models import write_model

    torch.manual_seed(0)
    config = replace(CONFIGS["tiny"], num_layers=1, ffn_dim=128)
    settings = StudentSettings(timesteps=(1000, 750), shift=3.0, window=6, sink=3) if is_student else None
    shutil.copytree(Path(__file__).parents[1] / "assets" / "tiny" / "vae", folder / "vae")
    encoder = tiny_text_encoder(VOCABULARY, config.text_dim)
    write_model(folder, VideoTransformer(config), encoder, shift=3.0, student=settings)
    return folder
