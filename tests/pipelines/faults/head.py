"""A Ray cluster of one node, and jobs that are submitted to it."""

import ctypes
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import ray

STARTS, START_SECONDS, JOB_SECONDS, END_SECONDS = 3, 600, 600, 180
PR_SET_PDEATHSIG = 1  # of Linux' prctl
STARTED = "Ray runtime started."


class Head:
    """A running cluster. environment: of its users. folder: of its logs."""

    def __init__(self, environment: dict[str, str], folder: Path) -> None:
        self.environment, self._folder = environment, folder

    def submit(self, *command: object) -> str:
        """`ray job submit -- reelway ...`: what it said, when it has ended well."""
        job = [sys.executable, "-m", "reelway.pipelines.cli", *map(str, command), "--address", "auto"]
        done = subprocess.run(
            [_ray(), "job", "submit", "--", *job],
            env=self.environment,
            capture_output=True,
            text=True,
            timeout=JOB_SECONDS,
        )
        assert done.returncode == 0, "\n".join([done.stdout, done.stderr, *self._logs()])
        return done.stdout

    def _logs(self) -> Iterator[str]:
        for path in (*self._folder.glob("log"), *sorted(self._folder.glob("session_2*/logs/*"))):
            if path.name in ("log", "raylet.out", "raylet.err", "gcs_server.out", "dashboard.log", "dashboard.err"):
                yield f"{path.name}: {path.read_text(errors='replace')[-3000:]}"


def connected_head() -> Head:
    """The Ray that this process has started and is connected to, if it has a dashboard."""
    node = ray._private.worker._global_node
    environment = os.environ | {"RAY_AUTH_MODE": "token", "RAY_API_SERVER_ADDRESS": f"http://{node.webui_url}"}
    return Head(environment, Path(node.get_session_dir_path()).parent)


@contextmanager
def ray_head() -> Iterator[Head]:
    """A cluster as a platform team has it, on the loopback address, with two CPUs; ended with the block."""
    # Ray gives its node half a minute to start and then gives up: on a very busy machine that may be too little.
    for attempt in range(1, STARTS + 1):
        folder = Path(tempfile.mkdtemp(prefix="rw-", dir="/tmp"))
        try:
            with _started(folder, is_last=attempt == STARTS) as head:
                if head:
                    yield head
                    return
        finally:
            shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def _started(folder: Path, is_last: bool) -> Iterator[Head | None]:
    """None where it did not start and may be tried again."""
    ports = {name: _free_port() for name in ("port", "dashboard-port", "ray-client-server-port")}
    ports["dashboard-agent-listen-port"] = _free_port()
    environment = os.environ | {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "0123456789abcdef" * 4}
    environment |= {"RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0", "RAY_USAGE_STATS_ENABLED": "0", "HOME": str(folder)}
    environment.pop("RAY_ADDRESS", None)
    command = [_ray(), "start", "--head", "--block", "--num-cpus=2", "--num-gpus=0"]
    command += [f"--{name}={port}" for name, port in ports.items()]
    command += ["--dashboard-host=127.0.0.1", f"--temp-dir={folder}", "--object-store-memory=104857600"]
    with (folder / "log").open("w") as log:
        head = subprocess.Popen(command, env=environment, stdout=log, stderr=log, preexec_fn=_die_with_parent)
        try:
            started = _wait_for(head, folder / "log")
            assert started or not is_last, (folder / "log").read_text()
            address = f"http://127.0.0.1:{ports['dashboard-port']}"
            yield Head(environment | {"RAY_API_SERVER_ADDRESS": address}, folder) if started else None
        finally:
            head.terminate()
            try:
                head.wait(END_SECONDS)
            finally:
                head.kill()


def _die_with_parent() -> None:
    """Also when the tests are ended in a way that runs no `finally`."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)


def _ray() -> str:
    return str(Path(sys.executable).with_name("ray"))


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _wait_for(process: "subprocess.Popen[bytes]", log: Path) -> bool:
    """Whether Ray says that it runs; False when it ends instead."""
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline and process.poll() is None:
        if STARTED in log.read_text():
            return True
        time.sleep(0.2)
    return False
