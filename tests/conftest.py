"""Limits for every test, and one Ray for all: started when the first test asks for it, ended with the last."""

import faulthandler
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from reelway.cluster.session import Session

# Before anything imports ray: it reads the first of these once.
os.environ["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = "0"  # listen on the loopback address only
os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
os.environ["RAY_metrics_report_interval_ms"] = "1000"  # noqa: SIM112 -- spelt so by Ray; ten seconds otherwise
os.environ["RAY_worker_niceness"] = "0"  # noqa: SIM112 -- 15 otherwise: beside other tests its workers would starve
# Before anything imports torch or numpy, for this process and all that it starts: what is computed here is so small
# that threads mostly wait for each other, on a busy machine for the most part of the time.
for _name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
    os.environ.setdefault(_name, "1")

RAY_CPUS = 4
SLOW_SECONDS = 1800  # for a slow test; the others' limit is in pyproject.toml
END_SECONDS = 60  # for what still runs after the last test
SHIPPED_VAE = Path(__file__).parents[1] / "assets" / "tiny" / "vae"
STDERR = pytest.StashKey[IO[str]]()


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Limits of slow tests, and an order: what asks for the shared Ray comes after what starts one of its own."""
    for item in items:
        if item.get_closest_marker("slow") and not item.get_closest_marker("timeout"):
            item.add_marker(pytest.mark.timeout(SLOW_SECONDS))
        if _shares_ray(item):
            item.add_marker(pytest.mark.ray)
    items.sort(key=_shares_ray)


def _shares_ray(item: pytest.Item) -> bool:
    return "ray_session" in getattr(item, "fixturenames", ())


# --- Limits ----------------------------------------------------------------------------------------------------------

# A test that hangs ends the run with the stack of every thread. Its main thread may never come back from C, from Ray or
# from a lock, and what it shares with later tests cannot be trusted; so nothing is raised in it. The watchdog is the
# interpreter's own, in C: it also ends a test that never gives the interpreter's lock away.


def pytest_configure(config: pytest.Config) -> None:
    """Keep the true stderr, before pytest captures what tests write to it."""
    config.stash[STDERR] = os.fdopen(os.dup(2), "w")


@pytest.hookimpl(optionalhook=True)
def pytest_timeout_set_timer(item: pytest.Item, settings: Any) -> bool:
    """The limit of a test with its fixtures: the marker's, or pyproject.toml's."""
    faulthandler.dump_traceback_later(settings.timeout, file=item.config.stash[STDERR], exit=True)
    return True


@pytest.hookimpl(optionalhook=True)
def pytest_timeout_cancel_timer() -> bool:
    """The test has ended in time."""
    faulthandler.cancel_dump_traceback_later()
    return True


@pytest.hookimpl(trylast=True)
def pytest_unconfigure(config: pytest.Config) -> None:
    """Threads that a test has left keep the process alive: their stacks are shown then, and the run has failed."""
    if not hasattr(config, "workerinput"):  # one of several processes waits for the others, and is ended with them
        faulthandler.dump_traceback_later(END_SECONDS, file=config.stash[STDERR], exit=True)


@pytest.fixture(autouse=True, scope="module")
def _same_threads_for_every_module() -> Iterator[None]:
    """Workers that are built in this process set torch's threads, which decide the last bits of later tests."""
    yield
    if "torch" in sys.modules:
        sys.modules["torch"].set_num_threads(int(os.environ["OMP_NUM_THREADS"]))


# --- What many tests need --------------------------------------------------------------------------------------------


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
    """A teacher's folder for tests that need one: the tiny model cut to one block, a thin VAE, random weights."""
    return _small_model(tmp_path_factory.mktemp("small") / "teacher", is_student=False)


@pytest.fixture(scope="session")
def small_student(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A student's folder, like `small_teacher`: blocks of 3, window 6, sink 3, steps at 1000 and 750."""
    return _small_model(tmp_path_factory.mktemp("small") / "student", is_student=True)


@pytest.fixture(scope="session")
def thin_vae(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A VAE's folder for tests that do not look at pictures: the shipped one's layout, a quarter of its cost."""
    import torch

    torch.manual_seed(0)
    return _thin_vae(tmp_path_factory.mktemp("thin") / "vae")


@pytest.fixture(scope="session")
def sharp_teacher(small_teacher: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`small_teacher` with the shipped VAE, which costs four times as much: its videos show something."""
    return _sharp(small_teacher, tmp_path_factory.mktemp("sharp") / "teacher")


@pytest.fixture(scope="session")
def sharp_student(small_student: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`small_student` with the shipped VAE: it gives back the pictures it is given."""
    return _sharp(small_student, tmp_path_factory.mktemp("sharp") / "student")


def _sharp(model: Path, folder: Path) -> Path:
    import shutil

    shutil.copytree(model, folder)
    shutil.copytree(SHIPPED_VAE, folder / "vae", dirs_exist_ok=True)
    return folder


def _small_model(folder: Path, is_student: bool) -> Path:
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
    encoder = tiny_text_encoder(VOCABULARY, config.text_dim)
    write_model(folder, VideoTransformer(config), encoder, shift=3.0, student=settings)
    _thin_vae(folder / "vae")
    return folder


def _thin_vae(folder: Path) -> Path:
    import json

    from reelway.kernels.wan.vae import StreamingVAE

    shipped = json.loads((SHIPPED_VAE / "config.json").read_text())
    thin = {name: value for name, value in shipped.items() if not name.startswith("_")} | {"base_dim": 8}
    StreamingVAE.from_config(thin).vae.save_pretrained(folder)
    return folder
