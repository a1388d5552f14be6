"""`reelway serve` in a process of its own, for the benchmarks beside this file."""

import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from pathlib import Path
from typing import Any, Final, Self

START_SECONDS: Final = 300.0
END_SECONDS: Final = 60.0


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as free:
        return int(free.getsockname()[1])


class Server:
    """A context manager: the server is there when it is entered, and ended with its Ray when it is left.

    content: the server's configuration, as in its YAML file, without host, port and state. starting: seconds that the
    start took.
    """

    def __init__(self, content: dict[str, Any]) -> None:
        self._content, self.port, self.starting = content, free_port(), 0.0

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def __enter__(self) -> Self:
        import yaml

        self._folder = tempfile.TemporaryDirectory(prefix="reelway-serving-")
        config = Path(self._folder.name) / "serve.yaml"
        state = str(Path(self._folder.name) / "state")
        config.write_text(yaml.safe_dump({**self._content, "port": self.port, "state": state}))
        began = time.monotonic()
        environment = os.environ | {"RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0", "RAY_USAGE_STATS_ENABLED": "0"}
        command = [sys.executable, "-m", "reelway.pipelines.cli", "serve", "--config", str(config)]
        self._process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)
        try:
            self._await_address()
        except BaseException:
            self.__exit__()
            raise
        self.starting = time.monotonic() - began
        return self

    def _await_address(self) -> None:
        """The server prints its address once it has a worker."""
        assert self._process.stdout is not None
        told = threading.Event()
        threading.Thread(target=lambda: (self._process.stdout.readline(), told.set()), daemon=True).start()
        if not told.wait(START_SECONDS) or self._process.poll() is not None:
            raise RuntimeError("the server did not start; its words are above")

    def __exit__(self, *_: object) -> None:
        self._process.send_signal(signal.SIGINT)
        try:
            self._process.wait(END_SECONDS)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._folder.cleanup()

    def status(self) -> dict[str, Any]:
        """The pool's figures."""
        with urllib.request.urlopen(f"{self.url}/v1/status", timeout=60) as answer:
            found: dict[str, Any] = json.load(answer)
        return found
