"""Where data sets are kept: one small interface over local folders, s3:// and gs://.

A name appears whole or not at all. Local files are written under a temporary name, synced, and renamed;
objects are sent from a complete local file in one upload, which a store shows only when it has ended.
"""

import contextlib
import errno
import hashlib
import io
import os
import re
import secrets
import tempfile
import time
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import BinaryIO
from urllib.parse import urlsplit, urlunsplit

import pyarrow
from pyarrow import fs

TEMPORARY = ".partial-"
_STAGED = re.compile(re.escape(TEMPORARY) + r"\d+-[0-9a-f]{12}-")  # the names that `stage` gives
ABANDONED_SECONDS = 86400.0  # since the last write to a temporary that no claim protects
BLOCK = 1 << 20  # bytes that one read asks for
OBJECT_STORES = ("s3", "gs", "gcs")


class StorageError(OSError):
    """The store failed for a reason that is not the caller's: disk full, network, quota."""


class DifferentContent(ValueError):
    """A name is taken by other content."""


@dataclass(frozen=True)
class Entry:
    """A stored file: its name, its bytes, and when it was written, in seconds of the store's own clock."""

    name: str
    size: int
    modified: float


class Staged:
    """A local file that is being written: counts and hashes what goes in. Errors name `where`."""

    def __init__(self, path: Path, file: BinaryIO, where: str) -> None:
        self.path, self._file, self._where = path, file, where
        self.bytes, self._hash = 0, hashlib.sha256()

    def write(self, data: bytes | bytearray | memoryview) -> None:
        with clear_errors(self._where):
            self._file.write(data)
        self._hash.update(data)
        self.bytes += len(data)

    @property
    def sha256(self) -> str:
        return self._hash.hexdigest()

    def close(self) -> None:
        """Bring every byte to the disk. Only then may the file be published."""
        with clear_errors(self._where):
            self._file.flush()
            os.fsync(self._file.fileno())
            self._file.close()

    def abandon(self) -> None:
        """Remove the file, if it has not been published, whatever state it is in."""
        with contextlib.suppress(OSError):  # a full disk refuses the last flush again
            self._file.close()
        self.path.unlink(missing_ok=True)


class HashedInput:
    """A file that is read from beginning to end, and hashed on the way."""

    def __init__(self, file: io.BufferedReader) -> None:
        self._file, self._hash, self.bytes = file, hashlib.sha256(), 0

    def read(self, size: int, /) -> bytes:
        data = self._file.read(size)
        self._hash.update(data)
        self.bytes += len(data)
        return data

    def seek(self, offset: int, whence: int, /) -> int:
        raise AssertionError("what is hashed is read without gaps")

    def drain(self) -> str:
        """Read what is left; returns the hash of the whole file."""
        while self.read(BLOCK):
            pass
        return self._hash.hexdigest()


class Storage(ABC):
    """A folder of named files. `uri` is for messages and bears no credentials; instances may be pickled.

    Raises FileNotFoundError, PermissionError or StorageError, each in one line with the URI.
    """

    def __init__(self, address: str, uri: str, filesystem: fs.FileSystem, root: str) -> None:
        self._address, self.uri = address, uri
        self._filesystem, self._root = filesystem, root

    @staticmethod
    def open(address: str | Path) -> "Storage":
        """The folder at a local path, file://, s3:// or gs:// address; it need not exist yet.

        Options of a store go in the address's query (`s3://bucket/set?endpoint_override=host:9000&scheme=http`)
        or in the store's usual environment variables (AWS_ENDPOINT_URL, AWS_REGION, AWS_ACCESS_KEY_ID, ...).
        """
        address = str(address)
        scheme = urlsplit(address).scheme if "://" in address else "file"
        if scheme == "file":
            local = LocalStorage(address)
            if Path(local.uri).is_file():
                raise NotADirectoryError(f"{local.uri}: is a file; a data set's folder is needed")
            return local
        if scheme in OBJECT_STORES:
            return ObjectStorage(address)
        raise ValueError(f"{address}: stores are local paths, file://, s3:// and gs://, got {scheme}://")

    def __reduce__(self) -> tuple[object, ...]:
        return type(self), (self._address,)

    def where(self, name: str) -> str:
        """The full URI of a name, for messages."""
        return f"{self.uri}/{name}" if name else self.uri

    def read(self, name: str) -> bytes:
        """All bytes of a file."""
        with self.open_input(name) as file, clear_errors(self.where(name)):
            return file.read()

    def open_input(self, name: str) -> io.BufferedReader:
        """A seekable file for reading; reads of over `BLOCK` bytes go straight to the caller's memory."""
        with clear_errors(self.where(name)):
            raw = self._filesystem.open_input_file(self._path(name))
            return io.BufferedReader(raw, BLOCK)

    def entries(self, folder: str = "") -> list[Entry]:
        """The files directly in a folder, sorted by name, less temporaries; none when there is no folder."""
        return [entry for entry in self._all_entries(folder) if not _is_temporary(entry.name)]

    def exists(self, name: str) -> bool:
        return bool(self._info(name).type == fs.FileType.File)

    def size(self, name: str) -> int:
        """Bytes of a file."""
        info = self._info(name)
        if info.type != fs.FileType.File:
            raise FileNotFoundError(f"{self.where(name)}: no such file")
        return int(info.size)

    def sha256(self, name: str) -> str:
        """The hash of a file's bytes, in hexadecimal digits."""
        with self.open_input(name) as file, clear_errors(self.where(name)):
            return hashlib.file_digest(file, "sha256").hexdigest()

    def delete(self, name: str) -> None:
        """Remove a file; one that is gone already is no error."""
        with clear_errors(self.where(name)):
            try:
                self._filesystem.delete_file(self._path(name))
            except FileNotFoundError:
                return

    def publish(self, name: str, content: bytes | Path, replace: bool = False) -> bool:
        """Store bytes or a complete local file under a name. False when the same content was there before.

        Raises DifferentContent when the name is taken by other content, unless `replace` is asked for. Two
        writers of one name at the same moment: on a local folder exactly one of them writes and the other
        compares; on an object store the later one wins unseen (see `claim`).
        """
        if not replace and self.exists(name):
            return self._keep(name, content)
        with clear_errors(self.where(name)):
            if isinstance(content, bytes):
                with self.stage(name) as staged:
                    staged.write(content)
                    staged.close()
                    written = self._put(name, staged.path, replace)
            else:
                written = self._put(name, content, replace)
        return written or self._keep(name, content)

    @contextmanager
    def stage(self, name: str) -> Iterator[Staged]:
        """A temporary local file, to be written, closed and published under `name`; removed at the end."""
        token = f"{TEMPORARY}{os.getpid()}-{secrets.token_hex(6)}-"
        with clear_errors(self.where(name)):
            path = self._staging_folder(name) / (token + name.rpartition("/")[2])
            staged = Staged(path, self._create(path), self.where(name))
        try:
            yield staged
        finally:
            staged.abandon()

    def remove_stale(self, older_than: float = 3600.0, folder: str = "") -> list[str]:
        """Remove temporaries directly in a folder that nobody has written to for some seconds; returns their names.

        Who alone may write there (see `claim`) need not wait: what is there then was left by a writer that died.
        Unfinished uploads of an object store are invisible here: give the bucket a lifecycle rule that aborts
        them.
        """
        written_before = time.time() - older_than
        temporaries = [entry for entry in self._all_entries(folder) if _is_temporary(entry.name)]
        stale = [entry for entry in temporaries if entry.modified < written_before]
        for entry in stale:
            self.delete(f"{folder}/{entry.name}" if folder else entry.name)
        return [entry.name for entry in stale]

    @abstractmethod
    def _staging_folder(self, name: str) -> Path:
        """An existing local folder where a temporary for `name` may be written."""

    @abstractmethod
    def _put(self, name: str, path: Path, replace: bool) -> bool:
        """Make a complete local file appear under `name`; False when the name is taken."""

    def _create(self, path: Path) -> BinaryIO:
        return open(path, "xb")

    def _keep(self, name: str, content: bytes | Path) -> bool:
        size = len(content) if isinstance(content, bytes) else content.stat().st_size
        if size != self.size(name) or _digest(content) != self.sha256(name):
            raise DifferentContent(f"{self.where(name)}: exists already with other content")
        return False

    def _path(self, name: str) -> str:
        parts = name.split("/")
        assert not {"", ".", ".."} & set(parts), f"not a name inside a folder: {name!r}"
        return f"{self._root}/{name}"

    def _info(self, name: str) -> fs.FileInfo:
        with clear_errors(self.where(name)):
            return self._filesystem.get_file_info(self._path(name))

    def _all_entries(self, folder: str) -> list[Entry]:
        # Not `allow_not_found`: with it a bucket that does not exist looks empty.
        selector = fs.FileSelector(self._path(folder) if folder else self._root)
        with clear_errors(self.where(folder)):
            try:
                infos = self._filesystem.get_file_info(selector)
            except FileNotFoundError:
                return []
        files = [info for info in infos if info.type == fs.FileType.File]
        entries = [Entry(info.base_name, info.size, info.mtime_ns / 1e9) for info in files]
        return sorted(entries, key=lambda entry: entry.name)


class LocalStorage(Storage):
    """A folder of this machine, or one that a network file system shows as such."""

    def __init__(self, address: str) -> None:
        path = Path(address.removeprefix("file://")).expanduser().absolute()
        super().__init__(str(path), str(path), fs.LocalFileSystem(), str(path))

    def _staging_folder(self, name: str) -> Path:
        folder = Path(self._path(name)).parent
        folder.mkdir(parents=True, exist_ok=True)
        return folder

    def _put(self, name: str, path: Path, replace: bool) -> bool:
        target = Path(self._path(name))
        if path.parent != target.parent or not _is_temporary(path.name):
            return self._put_copy(name, path, replace)
        if replace:
            os.replace(path, target)
        elif not _rename_to_free_name(path, target):
            return False
        _sync_folder(target.parent)
        return True

    def _put_copy(self, name: str, path: Path, replace: bool) -> bool:
        with self.stage(name) as staged, open(path, "rb") as source:
            while block := source.read(BLOCK):
                staged.write(block)
            staged.close()
            return self._put(name, staged.path, replace)


class ObjectStorage(Storage):
    """A prefix of a bucket of S3 (or what speaks its protocol) or Google Cloud Storage."""

    def __init__(self, address: str) -> None:
        parts = urlsplit(address)
        uri = urlunsplit((parts.scheme, parts.netloc.rpartition("@")[2], parts.path.rstrip("/"), "", ""))
        try:
            filesystem, root = fs.FileSystem.from_uri(_with_single_put(address))
        except (ValueError, OSError) as error:
            raise ValueError(f"{uri}: {_first_sentence(error)}") from error
        super().__init__(address, uri, filesystem, root.rstrip("/"))

    def _staging_folder(self, name: str) -> Path:
        return _swept_temporary_folder()

    def _put(self, name: str, path: Path, replace: bool) -> bool:
        size = path.stat().st_size
        content = pyarrow.memory_map(str(path)).read_buffer() if size else pyarrow.py_buffer(b"")
        # One write call: a stream that is left early is closed, and closing completes a torn upload.
        with self._filesystem.open_output_stream(self._path(name), compression=None) as stream:
            stream.write(content)
        if self.size(name) != size:
            raise StorageError(f"{self.where(name)}: sent {size} bytes, the store has {self.size(name)}")
        return True


@cache
def _swept_temporary_folder() -> Path:
    """This machine's folder for temporaries. Those that killed writers left there are removed, once in a process."""
    folder = Path(tempfile.gettempdir())
    written_before = time.time() - ABANDONED_SECONDS
    for path in filter(lambda path: _STAGED.match(path.name), folder.glob(f"{TEMPORARY}*")):
        with contextlib.suppress(OSError):  # another process was quicker, or it is another user's
            if path.stat().st_mtime < written_before:
                path.unlink()
    return folder


def _with_single_put(address: str) -> str:
    """S3 opens an upload in parts at once unless told to wait; waiting makes a small object one request."""
    if not address.startswith("s3:") or "allow_delayed_open" in address:
        return address
    return f"{address}{'&' if urlsplit(address).query else '?'}allow_delayed_open=true"


def _is_temporary(name: str) -> bool:
    return name.startswith(TEMPORARY)


def _digest(content: bytes | Path) -> str:
    if isinstance(content, bytes):
        return hashlib.sha256(content).hexdigest()
    with open(content, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _rename_to_free_name(path: Path, target: Path) -> bool:
    """Atomic on every file system with hard links; on the others a second writer may slip in between."""
    try:
        os.link(path, target)
    except FileExistsError:
        return False
    except OSError as error:
        if error.errno not in (errno.EPERM, errno.ENOTSUP, errno.ENOSYS, errno.EMLINK) or target.exists():
            raise
        os.replace(path, target)
    return True


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


# What a store's message contains, the exception that says it, and its words.
_KNOWN_FAILURES: tuple[tuple[str, type[OSError], str], ...] = (
    ("no_such_bucket", FileNotFoundError, "no such bucket"),
    ("bucket does not exist", FileNotFoundError, "no such bucket"),
    ("access_denied", PermissionError, "the store denies access to these credentials"),
    ("invalid_access_key_id", PermissionError, "the store does not know this access key"),
    ("signature_does_not_match", PermissionError, "the store refuses the secret key"),
    ("network_connection", StorageError, "the store cannot be reached"),
)


@contextmanager
def clear_errors(where: str) -> Iterator[None]:
    """Turn the errors of files and stores into one line that names `where`."""
    try:
        yield
    except OSError as error:
        raise _one_line(error, where) from error


def _one_line(error: OSError, where: str) -> OSError:
    if isinstance(error, StorageError) or (error.errno is None and str(error).startswith(where)):
        return error
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return StorageError(f"{where}: the disk is full, or its quota used up")
    if isinstance(error, FileNotFoundError):
        return FileNotFoundError(f"{where}: no such file or folder")
    if error.errno in (errno.ENOTDIR, errno.EEXIST):
        return NotADirectoryError(f"{where}: a part of this path is a file, not a folder")
    if isinstance(error, PermissionError):
        return PermissionError(f"{where}: no permission")
    text = str(error).lower()
    for mark, kind, words in _KNOWN_FAILURES:
        if mark in text:
            return kind(f"{where}: {words}")
    return StorageError(f"{where}: {_first_sentence(error)}")


def _first_sentence(error: Exception) -> str:
    return re.split(r"\s*\(Request ID|; Details", " ".join(str(error).split()))[0]
