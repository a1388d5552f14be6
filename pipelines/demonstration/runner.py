"""Runs stages one after the other: skips what is done, goes on where it stopped, and notes what ran where."""

import fcntl
import json
import os
import shutil
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, redirect_stdout
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TextIO

import ray
from ray.util.state import list_actors
from ray.util.state.exception import RayStateApiException
from rich.console import Console

from ...cluster.session import RayNotStarted, start_or_join
from ..recipe import fingerprint
from ..training import write_json
from .settings import LOG, WORK, Demo

RECORD = "stage.json"
FORMAT = 1  # raised when a stage's files change their meaning
MOST_ACTORS = 1000
# Ray's and the pool's own classes, as people call what they do. Other actors only look after these.
ROLES = {"Host": "pool worker", "RayTrainWorker": "training worker", "TrainController": "training controller"}
Record = dict[str, Any]


class StageFailed(RuntimeError):
    """A stage ended without its result; the message says why in one line."""


@dataclass(frozen=True)
class Done:
    """What a stage has made: in a line, the files that must be there, and figures for the page."""

    summary: str
    files: Sequence[Path]
    figures: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Stage:
    """A step of the demo. work: makes it in its folder, going on where it was interrupted (KeyboardInterrupt).

    inputs: all that decides the result, besides the stages named in `after`. on_ray: whether it needs a Ray session.
    """

    name: str
    title: str
    work: Callable[[Demo, Path, "Screen"], Done]
    inputs: Callable[[Demo], dict[str, Any]]
    after: tuple[str, ...] = ()
    on_ray: bool = False


class Screen(Console):
    """The terminal while a stage works: its bars are drawn, its lines go to the log."""

    def __init__(self, log: TextIO) -> None:
        super().__init__(stderr=True, highlight=False, markup=False, soft_wrap=True)
        self._log = log

    def print(self, *objects: Any, **options: Any) -> None:
        if objects and all(isinstance(each, str) for each in objects):
            self._log.write(" ".join(objects) + "\n")
            self._log.flush()
        else:
            super().print(*objects, **options)

    def say(self, line: str) -> None:
        """A line of the demo itself."""
        super().print(line)


def run_stages(demo: Demo, stages: Sequence[Stage]) -> dict[str, Record]:
    """Carry out what is missing; the record of every stage, by name.

    KeyboardInterrupt after Ctrl-C or SIGTERM, StageFailed or what a stage raises otherwise. What is done stays done.
    """
    demo.out.mkdir(parents=True, exist_ok=True)
    with ExitStack() as held:
        held.enter_context(_only_one(demo.out))
        log = held.enter_context((demo.out / LOG).open("a"))
        session = held.enter_context(_Session())
        return _Run(demo, stages, Screen(log), log, session).run()


def read_record(folder: Path) -> Record:
    """What is known of a stage; nothing where it never began."""
    path = folder / RECORD
    content: Record = json.loads(path.read_text()) if path.is_file() else {}
    return content


@dataclass
class _Run:
    demo: Demo
    stages: Sequence[Stage]
    screen: Screen
    log: TextIO
    session: "_Session"
    records: dict[str, Record] = field(default_factory=dict)

    def run(self) -> dict[str, Record]:
        for number, stage in enumerate(self.stages, 1):
            head = f"[{number}/{len(self.stages)}] {stage.name:<13}"
            identity = self._identity(stage)
            record = read_record(self.demo.work(stage.name))
            if self._is_done(record, identity):
                self.screen.say(f"{head} done before: {record['summary']}")
            else:
                record = self._carry_out(stage, identity, record, head)
            self.records[stage.name] = record
        return self.records

    def _identity(self, stage: Stage) -> str:
        before = {name: self.records[name]["fingerprint"] for name in stage.after}
        return fingerprint({"stage": stage.name, "format": FORMAT, "inputs": stage.inputs(self.demo), "after": before})

    def _is_done(self, record: Record, identity: str) -> bool:
        if record.get("fingerprint") != identity or record["status"] != "done":
            return False
        return all((self.demo.out / name).is_file() for name in record["files"])

    def _carry_out(self, stage: Stage, identity: str, before: Record, head: str) -> Record:
        folder = self.demo.work(stage.name)
        again = ""
        if before and (before["fingerprint"] != identity or before["status"] == "done"):
            _clear(folder)
            before, again = {}, "; what was there had another recipe, or was not whole"
        elif before:
            again = "; going on where it stopped"
        self.screen.say(f"{head} {stage.title}{again}")
        folder.mkdir(parents=True, exist_ok=True)
        record: Record = {"stage": stage.name, "title": stage.title, "fingerprint": identity, "status": "running"}
        record |= {"seconds": before.get("seconds", 0.0), "workers": before.get("workers", [])}
        write_json(folder / RECORD, record)
        done = self._work(stage, folder, record)
        record |= {"status": "done", "summary": done.summary, "figures": done.figures}
        record["files"] = [str(path.relative_to(self.demo.out)) for path in done.files]
        write_json(folder / RECORD, record)
        self.screen.say(f"{' ' * len(head)} {done.summary} ({record['seconds']:.0f} s)")
        return record

    def _work(self, stage: Stage, folder: Path, record: Record) -> Done:
        """The stage's work with its log, Ray and clock; time and processes are noted however it ends."""
        began = time.monotonic()
        try:
            with redirect_stdout(self.log), _sigterm_as_ctrl_c():
                if not stage.on_ray:
                    self.session.close()
                    record["workers"] = [*record["workers"], {"role": "this process", "pid": os.getpid(), "node": ""}]
                    return stage.work(self.demo, folder, self.screen)
                with self.screen.status("starting Ray"):
                    self.session.open()
                with self.session.noting(record):
                    return stage.work(self.demo, folder, self.screen)
        finally:
            record["seconds"] += time.monotonic() - began
            write_json(folder / RECORD, record | {"status": "interrupted"})


class _Session:
    """One Ray on this machine for all stages in a row that need it, started when the first one does."""

    def __init__(self) -> None:
        self._stack = ExitStack()

    def __enter__(self) -> "_Session":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def open(self) -> None:
        if not ray.is_initialized():
            self._stack.enter_context(_started())
            if threading.current_thread() is threading.main_thread():
                signal.signal(signal.SIGTERM, signal.default_int_handler)  # Ray has put its own there

    def close(self) -> None:
        self._stack.close()

    @contextmanager
    def noting(self, record: Record) -> Iterator[None]:
        """Put the processes that Ray starts inside the block into the record."""
        known = {actor["id"] for actor in _actors()}
        try:
            yield
        finally:
            fresh = [actor for actor in _actors() if actor["id"] not in known]
            record["workers"] = [*record["workers"], *({**actor, "id": actor["id"][:8]} for actor in fresh)]


@contextmanager
def _started() -> Iterator[None]:
    """A Ray of our own with the dashboard, which Ray Train and the list of actors need."""
    with ExitStack() as stack:
        try:
            stack.enter_context(start_or_join("local", dashboard=True))
        except RayNotStarted as error:
            raise StageFailed(str(error)) from error
        yield


def _actors() -> list[dict[str, Any]]:
    """Every actor of the session that does work: role, process, node; also of those that have ended."""
    try:
        found = list_actors(limit=MOST_ACTORS)
    except (RayStateApiException, RuntimeError, OSError):
        return []  # Ray is going down, or its books are closed: the page says less, and no stage is lost for that
    nodes = {node["NodeID"]: node["NodeManagerAddress"] for node in ray.nodes()}
    return [
        {"id": each.actor_id, "role": ROLES[each.class_name], "pid": each.pid, "node": nodes.get(each.node_id, "")}
        for each in found
        if each.class_name in ROLES
    ]


@contextmanager
def _sigterm_as_ctrl_c() -> Iterator[None]:
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


@contextmanager
def _only_one(out: Path) -> Iterator[None]:
    """ValueError where another demo works in the folder."""
    with (out / ".lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(f"--out: another `reelway demo` is at work in {out}") from None
        yield


def _clear(folder: Path) -> None:
    """Remove a stage's folder, whole for whoever looks: what is cut short in this goes the next time."""
    away = folder.with_name(f".{folder.name}.old")
    shutil.rmtree(away, ignore_errors=True)
    assert folder.parent.name == WORK
    folder.rename(away)
    shutil.rmtree(away)
