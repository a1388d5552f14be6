"""Folders of videos: of this machine, or a prefix of a bucket, whose files are fetched one at a time."""

import os
import tempfile
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Final

from pyarrow import fs

from ..cluster.storage import BLOCK, Storage, clear_errors
from .clips import BadVideo

VIDEO_SUFFIXES: Final = (".mp4", ".webm", ".mov", ".mkv", ".gif")


@dataclass(frozen=True)
class VideoFile:
    """A file below the folder: its relative path, with slashes, and its bytes."""

    path: str
    size: int


@dataclass
class Listing:
    """What a folder holds. texts: names of `.txt` files. others: files that are neither.

    problems: path, reason and text of what cannot be used.
    """

    videos: list[VideoFile] = field(default_factory=list)
    texts: set[str] = field(default_factory=set)
    others: int = 0
    problems: list[tuple[str, str, str]] = field(default_factory=list)

    def add(self, name: str, size: int) -> None:
        suffix = PurePosixPath(name).suffix.lower()
        if suffix in VIDEO_SUFFIXES:
            if _is_utf8(name):
                self.videos.append(VideoFile(name, size))
            else:
                self.problems.append((name, "unusable-name", "its name is not UTF-8"))
        elif suffix == ".txt":
            self.texts.add(name)
        else:
            self.others += 1


class VideoFolder(ABC):
    """Videos below one address. Instances may be pickled."""

    def __init__(self, address: str) -> None:
        self.address = address

    @staticmethod
    def open(address: str) -> "VideoFolder":
        """A local path, s3:// or gs:// address. FileNotFoundError or ValueError in one line."""
        if "://" in address and not address.startswith("file://"):
            return BucketFolder(address)
        return LocalFolder(address.removeprefix("file://"))

    @abstractmethod
    def listing(self) -> Listing:
        """All files below, sorted by path. Raises FileNotFoundError where there is no such folder."""

    @abstractmethod
    def read(self, name: str) -> bytes:
        """All bytes of a small file."""

    @abstractmethod
    def local(self, name: str) -> AbstractContextManager[Path]:
        """A context in which a file stands on this machine: `with folder.local(name) as path`.

        Raises `BadVideo` (unreadable) where a bucket's file is gone or may not be read, and StorageError where the
        store fails, which another attempt may not.
        """


class LocalFolder(VideoFolder):
    """A folder of this machine, or one that a network file system shows as such. Links to folders are followed."""

    def __init__(self, address: str) -> None:
        self._root = Path(address).expanduser().absolute()
        super().__init__(str(self._root))

    def __reduce__(self) -> tuple[object, ...]:
        return LocalFolder, (self.address,)

    def listing(self) -> Listing:
        if not self._root.is_dir():
            raise FileNotFoundError(f"{self._root}: no such folder of videos")
        found, seen = Listing(), {os.path.realpath(self._root)}
        refused: list[OSError] = []
        for folder, below, names in os.walk(self._root, onerror=refused.append, followlinks=True):
            below[:] = [name for name in sorted(below) if _is_new(os.path.join(folder, name), seen)]
            for name in names:
                path = Path(folder, name)
                found.add(path.relative_to(self._root).as_posix(), _size(path))
        for error in refused:
            below_root = os.path.relpath(error.filename, self._root)
            found.problems.append((f"{below_root}/", "unreadable", f"it cannot be listed ({error.strerror})"))
        return _sorted(found)

    def read(self, name: str) -> bytes:
        return (self._root / name).read_bytes()

    @contextmanager
    def local(self, name: str) -> Iterator[Path]:
        yield self._root / name


class BucketFolder(VideoFolder):
    """A prefix of a bucket. Options go in the address's query, as for data sets (`cluster.storage`)."""

    def __init__(self, address: str) -> None:
        super().__init__(address)
        self._storage = Storage.open(address)

    def __reduce__(self) -> tuple[object, ...]:
        return BucketFolder, (self.address,)

    def listing(self) -> Listing:
        filesystem, root = fs.FileSystem.from_uri(self.address)
        found = Listing()
        with clear_errors(self._storage.uri):
            for info in filesystem.get_file_info(fs.FileSelector(root.rstrip("/"), recursive=True)):
                if info.type == fs.FileType.File:
                    found.add(PurePosixPath(info.path).relative_to(root.rstrip("/")).as_posix(), int(info.size))
        return _sorted(found)

    def read(self, name: str) -> bytes:
        return self._storage.read(name)

    @contextmanager
    def local(self, name: str) -> Iterator[Path]:
        with tempfile.TemporaryDirectory(prefix="reelway-video-") as folder:
            path = Path(folder, "video")  # its format is told by its content
            try:
                self._fetch(name, path)
            except (FileNotFoundError, PermissionError) as error:
                words = str(error).removeprefix(f"{self._storage.where(name)}: ")
                raise BadVideo(path, "unreadable", f"cannot be fetched ({words})") from error
            yield path

    def _fetch(self, name: str, path: Path) -> None:
        where = self._storage.where(name)
        with self._storage.open_input(name) as source, clear_errors(where), open(path, "wb") as target:
            while block := source.read(BLOCK):
                target.write(block)


def _is_new(folder: str, seen: set[str]) -> bool:
    """Whether a folder was not listed before, by another link: links may run in circles."""
    real = os.path.realpath(folder)
    if real in seen:
        return False
    seen.add(real)
    return True


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:  # a link to nowhere: the decoder will say so
        return 0


def _is_utf8(name: str) -> bool:
    try:
        name.encode()
    except UnicodeEncodeError:
        return False
    return True


def _sorted(found: Listing) -> Listing:
    found.videos.sort(key=lambda video: video.path)
    found.problems.sort()
    return found
