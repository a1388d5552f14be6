"""Prompts: from a text file, a table (CSV, JSONL, Parquet), or a folder of such files."""

import csv
import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import pyarrow as pa
import pyarrow.parquet as pq

from .captions import CAPTION_COLUMNS

COLUMNS: Final = ("prompt", *(name for name in CAPTION_COLUMNS if name != "prompt"))
PART: Final = 4096  # prompts that are in memory a second time, as JSON


@dataclass(frozen=True)
class Prompts:
    """texts: in the order of the source, each once. duplicates: how many were left out for standing there already.

    problems: a line for each prompt that cannot be used, with its place.
    """

    texts: tuple[str, ...]
    duplicates: int = 0
    problems: tuple[str, ...] = ()


@dataclass(frozen=True)
class _Problem:
    text: str


_Record = tuple[str, Any] | _Problem  # place and prompt: str, bytes, or a stray value


def read_prompts(source: Path) -> Prompts:
    """Read every prompt of a source.

    source: `.txt` (one prompt per line), `.csv`, `.tsv`, `.jsonl` or `.parquet` (a column `prompt`, `caption` or
    `text`, the first of these that is there), or a folder: all such files in it, in the order of their names.
    Prompts are stripped of white space at both ends; empty lines of a text file mean nothing.

    One bad prompt is a line in `problems`, never an exception. FileNotFoundError: nothing is there. ValueError: the
    source as a whole holds no prompts; the line names the file.
    """
    if not source.exists():
        raise FileNotFoundError(
            f"{source}: no such prompts; a {', '.join(_READERS)} file or a folder of them is needed"
        )
    files = _files_of(source) if source.is_dir() else [source]
    found = unique(record for file in files for record in _records(file))
    if not found.texts:
        first = f"; the first problem: {found.problems[0]}" if found.problems else ""
        raise ValueError(f"{source}: no prompt in it{first}")
    return found


def unique(records: Iterable[_Record]) -> Prompts:
    """Each usable prompt once, the first of equal ones."""
    texts: dict[str, None] = {}
    problems, duplicates = [], 0
    for record in records:
        checked = record if isinstance(record, _Problem) else _checked(*record)
        if isinstance(checked, _Problem):
            problems.append(checked.text)
        elif checked in texts:
            duplicates += 1
        else:
            texts[checked] = None
    return Prompts(tuple(texts), duplicates, tuple(problems))


def packed(texts: Sequence[str] | pa.Array) -> pa.Array:
    """Prompts as an Arrow array; one that is such an array already is not copied."""
    return pa.array(texts, pa.large_string())


def identity(texts: Sequence[str] | pa.Array) -> str:
    """Sixteen hexadecimal digits that differ when any prompt does: `recipe.fingerprint` of {"prompts": texts}, for a
    million of them without the whole JSON in memory.
    """
    content, array = hashlib.sha256(b'{"prompts": ['), packed(texts)
    for start in range(0, len(array), PART):
        part = json.dumps(array.slice(start, PART).to_pylist())[1:-1]
        content.update(f"{', ' if start else ''}{part}".encode())
    content.update(b"]}")
    return content.hexdigest()[:16]


def _checked(place: str, prompt: Any) -> str | _Problem:
    if prompt is None:
        return _Problem(f"{place}: no prompt")
    if not isinstance(prompt, str | bytes):
        return _Problem(f"{place}: the prompt is {type(prompt).__name__}, not text")
    try:
        raw = prompt if isinstance(prompt, bytes) else prompt.encode("utf-8", "surrogateescape")
        text = raw.decode("utf-8-sig").strip()
    except (UnicodeDecodeError, UnicodeEncodeError) as error:
        return _Problem(f"{place}: the prompt is not UTF-8 ({error.reason})")
    return text or _Problem(f"{place}: the prompt is empty")


def _files_of(folder: Path) -> list[Path]:
    files = sorted(file for file in folder.iterdir() if file.suffix.lower() in _READERS and file.is_file())
    if not files:
        raise ValueError(f"{folder}: no {', '.join(_READERS)} file in it")
    return files


def _records(file: Path) -> Iterator[_Record]:
    reader = _READERS.get(file.suffix.lower())
    if reader is None:
        raise ValueError(f"{file}: prompts are read from {', '.join(_READERS)}, not '{file.suffix}'")
    return reader(file)


def _text(file: Path) -> Iterator[_Record]:
    with file.open("rb") as lines:
        for number, line in enumerate(lines, 1):
            if line.removeprefix(b"\xef\xbb\xbf").strip():
                yield f"{file.name}:{number}", line


def _csv(file: Path) -> Iterator[_Record]:
    delimiter = "\t" if file.suffix.lower() == ".tsv" else ","
    with file.open(encoding="utf-8-sig", errors="surrogateescape", newline="") as lines:
        rows = csv.DictReader(lines, delimiter=delimiter)
        try:
            rows.fieldnames = [name.strip() for name in rows.fieldnames or []]
        except csv.Error as error:
            raise ValueError(f"{file}: no header line can be read ({error})") from error
        column = _column(file, list(rows.fieldnames))
        while True:
            place = f"{file.name}:{rows.line_num + 1}"
            try:
                yield place, next(rows)[column]
            except StopIteration:
                return
            except csv.Error as error:
                yield _Problem(f"{place}: {error}")


def _jsonl(file: Path) -> Iterator[_Record]:
    # Read twice, to know all columns and yet hold one line at a time.
    names: dict[str, None] = {}
    is_table = False
    for _, row in _lines(file):
        if isinstance(row, dict):
            is_table = True
            names.update(dict.fromkeys(row))
    column = _column(file, list(names)) if is_table else ""
    for place, row in _lines(file):
        # A line may also be the prompt itself, as a JSON text.
        yield row if isinstance(row, _Problem) else (place, row.get(column) if isinstance(row, dict) else row)


def _lines(file: Path) -> Iterator[tuple[str, Any]]:
    """Place and value of each line of JSON; a `_Problem` for one that is none."""
    with file.open("rb") as lines:
        for number, line in enumerate(lines, 1):
            place = f"{file.name}:{number}"
            if not line.strip():
                continue
            try:
                # Undecodable bytes pass as escapes: then the prompt that they stand in is at fault, not the line.
                yield place, json.loads(line.decode("utf-8-sig", "surrogateescape"))
            except (ValueError, RecursionError) as error:
                yield place, _Problem(f"{place}: not JSON ({error})")


def _parquet(file: Path) -> Iterator[_Record]:
    try:
        with pq.ParquetFile(file) as table:
            column = _column(file, table.schema_arrow.names)
            kind = table.schema_arrow.field(column).type
            if not (pa.types.is_string(kind) or pa.types.is_large_string(kind)):
                raise ValueError(f"{file}: column '{column}' must hold strings, not {kind}")
            number = 0
            for batch in table.iter_batches(columns=[column]):
                # As bytes: Arrow does not check UTF-8 when it reads, and would raise for the whole column.
                for prompt in batch.column(0).cast(pa.large_binary()).to_pylist():
                    number += 1
                    yield f"{file.name}, row {number}", prompt
    except (pa.ArrowException, OSError) as error:
        raise ValueError(f"{file}: not a readable Parquet file ({str(error).splitlines()[0]})") from error


def _column(file: Path, found: list[str]) -> str:
    column = next((name for name in COLUMNS if name in found), None)
    if column is None:
        names = ", ".join(map(repr, found)) or "none"
        raise ValueError(f"{file}: a column of {', '.join(COLUMNS)} is needed; found: {names}")
    return column


_READERS: Final[dict[str, Callable[[Path], Iterator[_Record]]]] = {
    ".txt": _text,
    ".csv": _csv,
    ".tsv": _csv,
    ".jsonl": _jsonl,
    ".parquet": _parquet,
}
