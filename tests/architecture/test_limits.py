"""What hangs ends: a test with the stack of its threads, a process after its tests, a whole run with all it started."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
CONFIG = ROOT / "pyproject.toml"
HANGING = {
    "a lock": """
import threading
def test_it():
    def wait_for_nobody():
        threading.Lock().acquire() and threading.Event().wait()
    wait_for_nobody()
""",
    "asyncio": """
import asyncio
def test_it():
    async def wait_for_nobody():
        while True:
            try:
                await asyncio.sleep(0.05)
            except asyncio.CancelledError:
                pass
    asyncio.run(wait_for_nobody())
""",
    "a teardown": """
import pytest, threading
@pytest.fixture
def thing():
    def wait_for_nobody():
        threading.Event().wait()
    yield
    wait_for_nobody()
def test_it(thing):
    pass
""",
    "the interpreter's lock": """
import re
def test_it():
    def wait_for_nobody():
        re.match("(a+)+$", "a" * 60 + "b")  # one call into C, which never lets another thread run
    wait_for_nobody()
""",
    "a thread that is left": """
import conftest, threading
conftest.END_SECONDS = 1
def wait_for_nobody():
    threading.Event().wait()
def test_it():
    threading.Thread(target=wait_for_nobody).start()
""",
}


def run_tests(what: str, folder: Path, *options: str) -> subprocess.CompletedProcess[str]:
    """One that hangs and one after it, under this project's settings."""
    (folder / "test_hangs.py").write_text(HANGING[what] + "\ndef test_later():\n    pass\n")
    command = [sys.executable, "-m", "pytest", "-c", str(CONFIG), "-p", "pytest_timeout", "-p", "conftest", *options]
    environment = os.environ | {"PYTHONPATH": str(ROOT / "tests"), "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
    return subprocess.run([*command, str(folder)], env=environment, capture_output=True, text=True, timeout=120)


@pytest.mark.parametrize("what", HANGING)
def test_what_hangs_ends_the_run_and_says_where(what: str, tmp_path: Path) -> None:
    done = run_tests(what, tmp_path, "-o", "timeout=1")
    assert done.returncode == 1, done.stdout
    assert 'test_hangs.py", line' in done.stderr
    assert ("2 passed" in done.stdout) == (what == "a thread that is left")


def test_one_of_two_processes_that_hangs_says_where(tmp_path: Path) -> None:
    done = run_tests("a lock", tmp_path, "-o", "timeout=1", "-p", "xdist", "-n", "2", "--max-worker-restart=0")
    assert done.returncode == 1, done.stdout
    assert 'test_hangs.py", line' in done.stderr
    assert "crashed while running 'test_hangs.py::test_it'" in done.stdout


MAKE = """#!/usr/bin/env bash
setsid sleep 3600 &
echo $! > "$LEFT"
[ "$1" = test ] && [ "$HOW" != hang ] && exit "$HOW"
sleep 3600
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize(("how", "status"), [("0", 0), ("2", 2), ("hang", 124)])
def test_a_run_ends_in_time_with_all_that_it_started(how: str, status: int, tmp_path: Path) -> None:
    make, left = tmp_path / "make", tmp_path / "left"
    make.write_text(MAKE)
    make.chmod(0o755)
    path = f"{tmp_path}:{os.environ['PATH']}"
    environment = os.environ | {"PATH": path, "LEFT": str(left), "HOW": how, "CI_SECONDS": "2"}
    began = time.monotonic()
    done = subprocess.run([str(ROOT / ".ci/run")], env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == status, done.stderr
    assert ("not done within 2 s" in done.stderr) == (how == "hang")
    assert how != "hang" or time.monotonic() - began >= 2
    assert not runs(int(left.read_text()))


def runs(pid: int) -> bool:
    """Whether a process is there, and not one that has ended and that nobody has asked about yet."""
    try:
        return Path(f"/proc/{pid}/environ").read_bytes() != b""
    except OSError:
        return False
