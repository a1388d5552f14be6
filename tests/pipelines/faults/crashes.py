"""Commands in processes of their own that are killed, or kill themselves, at a step on the storage.

As a script: runs the command that it is given, then reads lines of jobs, runs each job of a line in a forked process,
all at once, and answers with a line of exit codes. So the libraries are imported once for any number of processes.
"""

import faulthandler
import json
import os
import signal
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

HERE = Path(__file__).parent
PATIENCE = 120.0  # seconds for a job: one that hangs says where, and has failed


@dataclass(frozen=True)
class Crash:
    """A command that begins after `delay` seconds and dies by SIGKILL at the step `at`; `log` takes what it says."""

    command: list[str]
    log: str
    at: int | None = None
    delay: float = 0.0


class Crashes:
    """The other side of this script."""

    def __init__(self, process: "subprocess.Popen[str]") -> None:
        self._process = process

    def run(self, jobs: Sequence[Crash]) -> list[int]:
        """Run commands at once; their exit codes, -9 of those that were killed."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        ending = threading.Timer(len(jobs) * PATIENCE + 20, self._process.kill)
        ending.daemon = True
        ending.start()
        try:
            self._process.stdin.write(json.dumps([asdict(job) for job in jobs]) + "\n")
            self._process.stdin.flush()
            answer = self._process.stdout.readline()
        finally:
            ending.cancel()
        assert answer, "the script has ended, or had to be ended: it did not answer"
        codes: list[int] = json.loads(answer)
        return codes


@contextmanager
def serve(first: Sequence[str], temporary: Path) -> Iterator[Crashes]:
    """The script in a process of its own.

    first: a command on local files that it runs to have everything imported. temporary: takes what its processes
    leave of the files that they send to an object store.
    """
    command = [sys.executable, __file__, *first]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "TMPDIR": str(temporary)}
    pipe = subprocess.PIPE
    with subprocess.Popen(command, env=environment, stdin=pipe, stdout=pipe, text=True) as process:
        try:
            yield Crashes(process)
        finally:
            process.kill()


def _become(job: Crash) -> int:
    from faults.steps import at_every_step, call, job_of, worker_here

    def die(number: int, _: str) -> None:
        if number == job.at:
            os.kill(os.getpid(), signal.SIGKILL)

    time.sleep(job.delay)
    with worker_here(job=job_of(job.command)), at_every_step(die):
        outcome = call(job.command)
    Path(job.log).write_text(outcome.text)
    return outcome.code


def _start(job: Crash) -> int:
    pid = os.fork()
    if pid:
        return pid
    code = 70
    faulthandler.dump_traceback_later(PATIENCE, exit=True)  # the copy of a process with threads may have got no lock
    try:
        code = _become(job)
    except BaseException:  # noqa: BLE001 -- nothing may leave this process but its exit code
        traceback.print_exc()
    os._exit(code)


def _answer(line: str) -> str:
    children = [_start(Crash(**job)) for job in json.loads(line)]
    return json.dumps([os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children])


if __name__ == "__main__":
    sys.path[0] = str(HERE.parent)
    from faults.steps import call, job_of, worker_here

    with worker_here(job=job_of(sys.argv[1:])):
        call(sys.argv[1:])
    for line in sys.stdin:
        print(_answer(line), flush=True)
