"""The commands as an operator gives them: a server on this machine, and one on a cluster that is deployed again and
upgraded while somebody watches.
"""

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner

from reelway.cluster.session import Session
from reelway.pipelines.serve.commands import app
from reelway.pipelines.serve.keys import make_key

from .serving import SIZE, LocalServer, Viewer

pytestmark = [pytest.mark.slow, pytest.mark.ray]  # processes that import everything, one after the other
LONG = 600.0  # seconds
BLUE = "two blue circles on white"


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as free:
        return int(free.getsockname()[1])


def client_of(port: int) -> LocalServer:
    """The client's side of a server that runs elsewhere."""
    remote = LocalServer.__new__(LocalServer)
    remote.port = port
    return remote


def fetched(port: int, path: str, key: str | None = None) -> bytes:
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    request = urllib.request.Request(f"http://127.0.0.1:{port}{path}", headers=headers)
    with urllib.request.urlopen(request, timeout=LONG) as answer:
        return bytes(answer.read())


def check_no_gap(viewer: Viewer) -> None:
    assert list(viewer.pictures) == list(range(len(viewer.pictures)))


@contextlib.contextmanager
def command(*arguments: str) -> "Iterator[subprocess.Popen[str]]":
    """`reelway` in a process of its own."""
    environment = os.environ | {"RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0", "RAY_USAGE_STATS_ENABLED": "0"}
    line = [sys.executable, "-m", "reelway.pipelines.cli", *arguments]
    with subprocess.Popen(line, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment) as process:
        try:
            yield process
        finally:
            process.kill()


def test_one_command_serves_until_it_is_interrupted(small_student: Path, tmp_path: Path) -> None:
    """The README's line; then the same again, which goes on with the first one's streams."""
    port, state = free_port(), tmp_path / "state"
    line = ("serve", "--model", f"small={small_student}", "--port", str(port), "--state", str(state))
    stream, had = "", 0
    for again in (False, True):
        with command(*line) as server:
            assert server.stdout is not None
            told = server.stdout.readline()
            assert told == f"http://127.0.0.1:{port}  (no API keys: this machine only; Ctrl-C ends it)\n"
            assert b"<!doctype html>" in fetched(port, "/").lower()
            [row] = json.loads(fetched(port, "/v1/models"))["data"]
            assert (row["id"], row["ready"]) == ("small", 1)
            with client_of(port).viewer() as viewer:
                if again:
                    viewer.say(type="reconnect", version=1, stream=stream, frame=had, media="jpeg")
                    assert viewer.until("ready")["first"] == had
                else:
                    ready = viewer.start(width=SIZE[1], height=SIZE[0], frame_rate=4.0)
                    stream = ready["stream"]
                viewer.chunks(1)
                had = max(viewer.pictures) + 1
            server.send_signal(signal.SIGINT)
            _, words = server.communicate(timeout=LONG)
        assert server.returncode == 130, words
        assert f"are kept in {state}. The same command goes on with them." in words
        assert "Traceback" not in words
        with pytest.raises(OSError, match="refused"):
            socket.create_connection(("127.0.0.1", port), 10).close()


@pytest.fixture
def cluster(ray_session: Session) -> Iterator[str]:
    """The address of a Ray that a server may be deployed on."""
    from ray import serve

    yield ray_session.address
    serve.shutdown()


def run(*arguments: str) -> str:
    done = CliRunner().invoke(app, list(arguments))
    assert done.exit_code == 0, (done.output, done.exception)
    return str(done.stdout)


def await_ready(port: int) -> None:
    until = time.monotonic() + LONG
    while time.monotonic() < until:
        with contextlib.suppress(OSError):
            if json.loads(fetched(port, "/readyz"))["ready"]:
                return
        time.sleep(0.2)
    pytest.fail("the server does not become ready")


def test_a_cluster_is_deployed_to_upgraded_and_given_other_keys_under_a_stream(
    cluster: str, small_student: Path, tmp_path: Path
) -> None:
    port, (key, hashed), (other, other_hash) = free_port(), make_key(), make_key()
    keys, config = tmp_path / "keys", tmp_path / "serve.yaml"
    keys.write_text(hashed)
    model: dict[str, Any] = {"path": str(small_student), "size": list(SIZE), "threads": 1, "max_workers": 2}
    content = {"models": {"small": model}, "state": str(tmp_path / "state"), "port": port, "keys": str(keys)}
    content["lead_seconds"] = 1e6  # media goes out when it is made
    config.write_text(yaml.safe_dump(content))
    server = client_of(port)
    assert f"http://127.0.0.1:{port}: small, 1 API key(s)" in run("deploy", str(config), "--address", cluster)
    await_ready(port)
    with server.viewer(key=key) as viewer, ThreadPoolExecutor() as threads:
        viewer.start()
        viewer.chunks(1)
        upgrade = threads.submit(run, "upgrade", "small", "--address", cluster)
        moved = viewer.until("moved")
        assert "drained" in moved["reason"]
        viewer.chunks(2)
        assert upgrade.result(LONG) == "model small: 1 worker(s) replaced\n"
        with server.viewer(key=other) as stranger:
            assert [record["code"] for record in stranger.rest()] == ["wrong_key"]
        keys.write_text(f"{hashed}\n{other_hash}")
        assert "2 API key(s)" in run("deploy", str(config), "--address", cluster)
        with server.viewer(key=other) as second:
            second.start(prompt=BLUE)
            second.chunks(1)
        viewer.chunks(2)  # on the same socket: a new key touches no stream
        check_no_gap(viewer)
        viewer.say(type="stop")
        viewer.rest()
    [worker] = json.loads(fetched(port, "/v1/status", key))["small"]["workers"]
    assert worker["generation"] == 1
