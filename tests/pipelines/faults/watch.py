"""A reader that looks at a data set all the while it is made, and knows what the finished one shall be."""

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

from reelway.cluster.dataset import INFO
from reelway.cluster.manifest import MANIFEST, record_name, shard_name, tar_name
from reelway.cluster.shards import verify
from reelway.cluster.storage import Entry, Storage

Files = dict[str, bytes]
PAUSE = 0.02


def files_of(out: Storage) -> Files:
    """Everything that a reader can see in a folder."""
    return {entry.name: out.read(entry.name) for entry in out.entries()}


def check_whole(files: Files, shards: int) -> Files:
    """The files of an undisturbed set, seen to be all that should be there."""
    tars = [shard_name(index) for index in range(shards)]
    assert files.keys() == {INFO, MANIFEST, *tars, *map(record_name, tars)}
    return files


class Reader:
    """Notes whatever it sees that is not of the undisturbed set, or came before its time, or went away again."""

    def __init__(self, out: Storage, expected: Files) -> None:
        self.problems: list[str] = []
        self.looks = 0
        self._out, self._expected = out, expected
        self._sound: set[Entry] = set()
        self._seen: set[str] = set()

    def look(self) -> None:
        # Two listings: one alone may miss a name that was there before another one that it shows.
        earlier = {entry.name for entry in self._out.entries()}
        entries = self._out.entries()
        now = {entry.name for entry in entries}
        for entry in entries:
            self._compare(entry)
        for name in earlier:
            self._need(name, now)
        self._note("went away", self._seen - now)
        self._seen |= now
        self.looks += 1

    def _compare(self, entry: Entry) -> None:
        if entry in self._sound:
            return
        if entry.name not in self._expected:
            self._note("is a stranger", {entry.name})
        elif self._out.read(entry.name) != self._expected[entry.name]:
            self._note("has other bytes than in the undisturbed set", {entry.name})
        else:
            self._sound.add(entry)

    def _need(self, name: str, now: set[str]) -> None:
        """A record stands for a whole shard, the manifest for a whole set."""
        if name == MANIFEST:
            self._note("is missing, the manifest is there", self._expected.keys() - now)
        elif name.startswith("shard-") and name.endswith(".json"):
            self._note("is missing, its record is there", {tar_name(name)} - now)

    def _note(self, what: str, names: set[str]) -> None:
        self.problems += [f"look {self.looks}: {name} {what}" for name in sorted(names)]

    def watch(self, over: threading.Event) -> None:
        while not over.wait(PAUSE):
            self.look()
        self.look()


@contextmanager
def watched(out: Storage, expected: Files) -> Iterator[None]:
    """Read all through the block; at its end the set must be the expected one, and never have been another."""
    reader, over = Reader(out, expected), threading.Event()
    with ThreadPoolExecutor(1) as thread:
        watching = thread.submit(reader.watch, over)
        try:
            yield
        finally:
            over.set()
    watching.result()
    assert reader.problems == []
    assert reader.looks > 1
    assert files_of(out) == expected
    assert verify(out) == []
