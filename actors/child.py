"""A Python process of our own, reached by a socket, that may crash or be killed without harm to this one."""

import os
import subprocess
import sys
import weakref
from collections.abc import Mapping
from multiprocessing.connection import Connection, Pipe


class Child:
    """A process that runs `code`, where `sys.argv[1]` is the number of the socket's file descriptor.

    It ends when this object is closed or collected. Signals of the terminal do not reach it; when this process dies,
    its end of the socket closes and the code there should return.
    """

    def __init__(self, code: str, environment: Mapping[str, str] | None = None) -> None:
        self.link, theirs = Pipe()
        path = os.pathsep.join(place or os.getcwd() for place in sys.path)
        self.process = subprocess.Popen(
            [sys.executable, "-c", code, str(theirs.fileno())],
            pass_fds=[theirs.fileno()],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            env={**os.environ, "PYTHONPATH": path, **(environment or {})},
            start_new_session=True,
        )
        theirs.close()
        self.close = weakref.finalize(self, _end, self.process, self.link)


def _end(process: "subprocess.Popen[bytes]", link: Connection) -> None:
    link.close()
    process.kill()
    process.wait()
