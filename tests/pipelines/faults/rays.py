"""A Ray cluster of two nodes on this machine, and the command as a process of its own."""

import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from faults.kills import marked, wait_until
from ray.cluster_utils import Cluster

CONTROL = {"health_check_initial_delay_ms": 1000, "health_check_period_ms": 500, "health_check_failure_threshold": 4}

SMALL_NODE = {"num_cpus": 1, "num_gpus": 0, "object_store_memory": 80 << 20}


def remove(folder: str) -> None:
    """Remove a Ray's folder, against the last lines of its dying processes."""

    def is_gone() -> bool:
        shutil.rmtree(folder, ignore_errors=True)
        return not Path(folder).exists()

    assert wait_until(is_gone, 30)


@contextmanager
def two_nodes(*changes: dict[str, Any]) -> Iterator[Cluster]:
    """A head without CPUs for the driver, and two nodes with one CPU each, all on this machine. changes: of the two."""
    folder = tempfile.mkdtemp(prefix="rw-", dir="/tmp")
    head = {"num_cpus": 0, "num_gpus": 0, "include_dashboard": False, "temp_dir": folder, "_system_config": CONTROL}
    cluster = Cluster()
    with pytest.MonkeyPatch.context() as patch:
        # Nobody else shall find this cluster.
        patch.setattr("ray._private.utils.write_ray_address", lambda address: None)
        try:
            for node in (head, *(SMALL_NODE | more for more in changes or ({}, {}))):
                cluster.add_node(**node)
            yield cluster
        finally:
            cluster.shutdown()
            remove(folder)


@contextmanager
def driver(command: list[str], log: Path, **environment: str) -> "Iterator[subprocess.Popen[bytes]]":
    """The command as a process; ended with the block."""
    line = [sys.executable, "-m", "reelway.pipelines.cli", *command]
    with (
        log.open("a") as file,
        subprocess.Popen(line, env=os.environ | environment, stdout=file, stderr=file) as process,
    ):
        try:
            yield process
        finally:
            process.kill()


def session_folders(mark: str) -> set[str]:
    """Ray's folders in /tmp of processes with a mark."""
    words = [word for pid in marked(mark) for word in arguments(pid)]
    found = [word.partition("/tmp/reelway-")[2].partition("/")[0] for word in words]
    return {f"/tmp/reelway-{name}" for name in found if name}


def arguments(pid: int) -> list[str]:
    try:
        return Path(f"/proc/{pid}/cmdline").read_text().split("\0")
    except OSError:
        return []
