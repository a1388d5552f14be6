"""CausVid's LMDB sets (arXiv 2412.07772, its public code) as data sets of shards, without Ray: the disk is the limit.

`latents_shape` is a text, "N K F C H W" for trajectories (K states, from noise to clean) or "N F C H W" for latents.
Row i is `latents_{i}_data`, raw float16 in C order, and `prompts_{i}_data`, UTF-8. Timesteps are not kept there.
"""

import hashlib
import math
from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from types import TracebackType
from typing import Any, Literal

import numpy as np
import pyarrow
import torch
from torch import Tensor

from ..cluster.dataset import DatasetInfo, Quarantined, Sample, TensorSpec, claim, create_dataset
from ..cluster.manifest import ManifestRow, ShardPlan, pending, plan, seal
from ..cluster.shards import verify, write_shard
from ..cluster.storage import Storage
from .recipe import fingerprint

COMMAND = "reelway shards import-lmdb"
TRAJECTORY_SIZES, LATENTS_SIZES = 6, 5  # numbers in `latents_shape`
KEY_DIGITS = 8

Damaged = Literal["fatal", "skip"]
Progress = Callable[[int, int], None]  # shards done, shards in all


class LmdbSet:
    """An LMDB of CausVid's layout, open for reading; a context manager.

    count: rows. shape: of one row, [K, F, C, H, W] or [F, C, H, W]. ValueError or FileNotFoundError, in one line,
    when it is no such set; what is wrong with single rows is for `fault` to say.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._environment = _open(path)
        try:
            _refuse_cut_file(path, self._environment)
            self._rows = self._environment.begin(buffers=True)
            self.count, *sizes = _parse_shape(path, self._rows.get(b"latents_shape"))
        except BaseException:
            self._environment.close()
            raise
        self.shape = tuple(sizes)

    def __enter__(self) -> "LmdbSet":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._rows.abort()
        self._environment.close()

    @property
    def holds_trajectories(self) -> bool:
        return len(self.shape) == TRAJECTORY_SIZES - 1

    def fault(self, row: int) -> str | None:
        """Why a row cannot be used, as far as its keys, its bytes' number and its prompt tell; None if it can."""
        latents, prompt = self._rows.get(_latents_key(row)), self._rows.get(_prompt_key(row))
        if latents is None or prompt is None:
            key = _latents_key(row) if latents is None else _prompt_key(row)
            return f"{key.decode()}: no such key"
        expected = 2 * math.prod(self.shape)
        if len(latents) != expected:
            return f"latents_{row}_data: must be {expected} bytes, {list(self.shape)} of float16, got {len(latents)}"
        try:
            bytes(prompt).decode()
        except UnicodeDecodeError:
            return f"prompts_{row}_data: is not UTF-8"
        return None

    def prompt(self, row: int) -> str:
        """The prompt of a row; "" where there is none that can be read."""
        return bytes(self._rows.get(_prompt_key(row)) or b"").decode(errors="ignore")

    def latents(self, row: int) -> Tensor:
        """float16, of `shape`, copied out of the map."""
        values = np.frombuffer(self._rows.get(_latents_key(row)), dtype="<f2")
        return torch.from_numpy(values.reshape(self.shape).copy())

    def digest(self) -> str:
        """Of the shape, of every row's size, and of the first, the middle and the last row: tells two sets apart."""
        sizes = [len(self._rows.get(_latents_key(row), b"")) for row in range(self.count)]
        seen = hashlib.sha256(f"{self.shape} {sizes}".encode())
        for row in sorted({0, self.count // 2, self.count - 1}):
            seen.update(self._rows.get(_latents_key(row), b""))
        return seen.hexdigest()[:16]


def import_lmdb(
    source: LmdbSet,
    storage: Storage,
    timesteps: Sequence[float],
    *,
    per_shard: int = 64,
    damaged: Damaged = "fatal",
    progress: Progress = lambda done, total: None,
) -> list[ManifestRow]:
    """Write the set as shards, going on where an earlier call stopped, and verify every byte; returns the manifest.

    timesteps: of a trajectory's states, falling and ending with 0; none for a set of latents. They are written into
    `dataset.json`, where a trainer compares them with its student's. damaged: whether a row that cannot be used ends
    the import before anything is written, or is left out and counted as quarantined.
    """
    _check_timesteps(source, timesteps)
    faults = _faults(source)
    if faults and damaged == "fatal":
        raise ValueError(f"{source.path}: {next(iter(faults.values()))} ({len(faults)} of {source.count} rows damaged)")
    info = describe(source, timesteps)
    create_dataset(storage, info)
    with claim(storage, COMMAND) as held:
        shards = plan(_items(source), per_shard, info.fingerprint)
        missing = pending(storage, shards)
        progress(len(shards) - len(missing), len(shards))
        for done, shard in enumerate(missing, start=len(shards) - len(missing) + 1):
            held.check()
            write_shard(storage, shard, _samples(source, shard, faults, damaged))
            progress(done, len(shards))
        rows = seal(storage)
    problems = verify(storage)
    if problems:
        raise ValueError(f"{storage.uri}: {problems[0]} ({len(problems)} problems after the import)")
    return rows


def describe(source: LmdbSet, timesteps: Sequence[float]) -> DatasetInfo:
    """`dataset.json` of the imported set; the same for the same content wherever the LMDB stands."""
    latents = {"latents": TensorSpec(shape=source.shape, dtype="float16")}
    made_by: dict[str, Any] = {"command": COMMAND, "layout": "CausVid LMDB", "source": source.digest()}
    if source.holds_trajectories:
        kind, fields = "trajectories", {"trajectory.safetensors": latents, "prompt.txt": {}}
        made_by["timesteps"] = list(map(float, timesteps))
    else:
        kind, fields = "latents", {"latents.safetensors": latents, "caption.txt": {}}
    decides = {"kind": kind, "shape": source.shape, **made_by}
    return DatasetInfo(kind=kind, fields=fields, made_by=made_by, fingerprint=fingerprint(decides))


def parse_timesteps(text: str) -> list[float]:
    """ "1000,757,522,0" as numbers; ValueError for what is none."""
    try:
        return [float(part) for part in text.split(",")] if text.strip() else []
    except ValueError:
        raise ValueError(f"--timesteps: must be numbers with commas between them, got {text!r}") from None


def _check_timesteps(source: LmdbSet, timesteps: Sequence[float]) -> None:
    if not source.holds_trajectories:
        if timesteps:
            raise ValueError(f"--timesteps: {source.path} holds clean latents {list(source.shape)}, which have none")
        return
    states = source.shape[0]
    if len(timesteps) != states:
        raise ValueError(
            f"--timesteps: {source.path} holds {states} states, so it takes {states}, got {len(timesteps)}"
        )
    falling = all(later < earlier for earlier, later in pairwise(timesteps))
    if not falling or timesteps[0] > 1000 or timesteps[-1] != 0:
        raise ValueError(f"--timesteps: must fall from at most 1000 to 0, got {[*timesteps]}")


def _faults(source: LmdbSet) -> dict[int, str]:
    found = ((row, source.fault(row)) for row in range(source.count))
    return {row: reason for row, reason in found if reason is not None}


def _items(source: LmdbSet) -> pyarrow.Table:
    prompts = pyarrow.array([source.prompt(row) for row in range(source.count)], pyarrow.string())
    return pyarrow.table({"key": [f"{row:0{KEY_DIGITS}d}" for row in range(source.count)], "prompt": prompts})


def _samples(
    source: LmdbSet, shard: ShardPlan, faults: dict[int, str], damaged: Damaged
) -> Iterator[tuple[str, Sample | Quarantined]]:
    tensors, text = (
        ("trajectory.safetensors", "prompt.txt")
        if source.holds_trajectories
        else ("latents.safetensors", "caption.txt")
    )
    for key in shard.keys:
        row = int(key)
        latents = None if row in faults else source.latents(row)
        if latents is not None and not bool(latents.isfinite().all()):
            faults[row] = f"latents_{row}_data: holds values that are not finite"
            if damaged == "fatal":
                raise ValueError(f"{source.path}: {faults[row]}")
        if row in faults:
            yield key, Quarantined(faults[row])
        else:
            yield key, {tensors: {"latents": latents}, text: source.prompt(row)}


def _latents_key(row: int) -> bytes:
    return f"latents_{row}_data".encode()


def _prompt_key(row: int) -> bytes:
    return f"prompts_{row}_data".encode()


def _open(path: Path) -> Any:
    try:
        import lmdb
    except ImportError:
        raise ValueError("import-lmdb needs the package lmdb, which is not here: pip install 'reelway[lmdb]'") from None
    if not _file(path).is_file():
        raise FileNotFoundError(f"{path}: no such LMDB; a folder with a data.mdb, or the file itself, is needed")
    try:
        return lmdb.open(str(path), readonly=True, lock=False, readahead=False, subdir=path.is_dir())
    except lmdb.Error as error:
        raise ValueError(f"{path}: not an LMDB: {str(error).splitlines()[0]}") from None


def _file(path: Path) -> Path:
    return path / "data.mdb" if path.is_dir() else path


def _refuse_cut_file(path: Path, environment: Any) -> None:
    """Reading behind the end of a mapped file kills the process: a copy that was cut short is refused before."""
    needed = (environment.info()["last_pgno"] + 1) * environment.stat()["psize"]
    found = _file(path).stat().st_size
    if found < needed:
        raise ValueError(f"{_file(path)}: is cut short: {found} bytes, its own index speaks of {needed}")


def _parse_shape(path: Path, text: memoryview | None) -> list[int]:
    if text is None:
        raise ValueError(f"{path}: latents_shape: no such key; not an LMDB of CausVid's layout")
    words = bytes(text).decode(errors="replace").split()
    is_shape = len(words) in (TRAJECTORY_SIZES, LATENTS_SIZES) and all(
        word.isascii() and word.isdigit() for word in words
    )
    if not is_shape or 0 in map(int, words):
        raise ValueError(f"{path}: latents_shape: must be 'N K F C H W' or 'N F C H W', got {' '.join(words)!r}")
    return list(map(int, words))
