"""Captions of videos, read from a table (CSV, JSONL, Parquet) or from text files beside the videos."""

import csv
import itertools
import json
import os
from collections.abc import Callable, Collection, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, Final

import pyarrow as pa
import pyarrow.parquet as pq

from ..actors.sources import VIDEO_SUFFIXES

NAME_COLUMNS: Final = ("file", "path", "video")
CAPTION_COLUMNS: Final = ("caption", "text", "prompt")
READERS: Final = 16  # captions beside videos that are read at once: enough to hide an object store's latency


@dataclass(frozen=True)
class CaptionProblem:
    """One caption that cannot be used. code: missing, empty, duplicate, not-utf-8, not-text or unreadable."""

    name: str  # the video's name as the source gives it, or the place in the source where it has none
    code: str
    text: str


Record = tuple[str, Any, Any]  # place, name, caption; a str (undecodable bytes escaped), bytes, None or a stray value
Reading = tuple[dict[str, str], list[CaptionProblem]]


def read_captions(source: Path) -> Reading:
    """Read the caption of every video: {name: caption}, and what is wrong with the rest.

    source: a `.csv`, `.tsv`, `.jsonl` or `.parquet` table with a column `file`, `path` or `video` and a column
    `caption`, `text` or `prompt` (the first of each that is there), or a folder of videos, each with a `.txt` of the
    same stem beside it. A name is what the table says, or the path below the folder. Captions are stripped of white
    space at both ends; of two captions for one name the first holds.

    One bad row is a `CaptionProblem`, never an exception. FileNotFoundError: nothing is there. ValueError: the source
    as a whole is no such table; the line names the file and the columns found.
    """
    if source.is_dir():
        return read_beside(*_found_in(source), lambda name: (source / name).read_bytes())
    if not source.exists():
        raise FileNotFoundError(f"{source}: no such captions; a table or a folder of videos is needed")
    readers: dict[str, Callable[[Path], Iterator[Record | CaptionProblem]]] = {
        ".csv": _csv,
        ".tsv": _csv,
        ".jsonl": _jsonl,
        ".parquet": _parquet,
    }
    if source.suffix.lower() not in readers:
        raise ValueError(f"{source}: captions are read from {', '.join(readers)} or a folder, not '{source.suffix}'")
    return _collect(readers[source.suffix.lower()](source))


def read_beside(videos: Sequence[str], texts: Collection[str], read: Callable[[str], bytes]) -> Reading:
    """Read the captions of videos from the text files beside them: {name: caption}, and what is wrong with the rest.

    videos, texts: names of what is there. read: gives a text file's bytes.
    """
    return _collect(_beside(videos, texts, read))


def _collect(records: Iterator[Record | CaptionProblem]) -> Reading:
    captions: dict[str, str] = {}
    problems: list[CaptionProblem] = []
    for record in records:
        checked = record if isinstance(record, CaptionProblem) else _checked(*record, captions)
        if isinstance(checked, CaptionProblem):
            problems.append(checked)
        else:
            captions[checked[0]] = checked[1]
    return captions, problems


def _checked(place: str, name: Any, caption: Any, taken: dict[str, str]) -> tuple[str, str] | CaptionProblem:
    """One record's name and caption, or what is wrong with it."""
    fault = _fault(place, "name", name)
    if fault:
        return fault
    # File systems know bytes: a name that is not UTF-8 stays one that opens the file.
    named = os.fsdecode(name)
    if named in taken:
        return CaptionProblem(named, "duplicate", f"{place}: a second caption for this video; the first holds")
    fault = _fault(place, "caption", caption)
    if fault:
        return CaptionProblem(named, fault.code, fault.text)
    try:
        raw = caption if isinstance(caption, bytes) else caption.encode("utf-8", "surrogateescape")
        return named, raw.decode("utf-8-sig").strip()
    except (UnicodeDecodeError, UnicodeEncodeError) as error:
        return CaptionProblem(named, "not-utf-8", f"{place}: the caption is not UTF-8 ({error.reason})")


def _fault(place: str, what: str, value: Any) -> CaptionProblem | None:
    """What keeps a field from being text with something in it."""
    if value is None:
        return CaptionProblem(place, "missing", f"{place}: no {what}")
    if not isinstance(value, str | bytes):
        return CaptionProblem(place, "not-text", f"{place}: the {what} is {type(value).__name__}, not text")
    return None if value.strip() else CaptionProblem(place, "empty", f"{place}: the {what} is empty")


def _columns(source: Path, found: list[str]) -> tuple[str, str]:
    """The columns that hold the name and the caption."""
    names = [column for column in NAME_COLUMNS if column in found]
    captions = [column for column in CAPTION_COLUMNS if column in found]
    if not names or not captions:
        rule = f"a column of {', '.join(NAME_COLUMNS)} and one of {', '.join(CAPTION_COLUMNS)} are needed"
        raise ValueError(f"{source}: {rule}; found: {', '.join(map(repr, found)) or 'none'}")
    return names[0], captions[0]


def _csv(source: Path) -> Iterator[Record | CaptionProblem]:
    delimiter = "\t" if source.suffix.lower() == ".tsv" else ","
    with source.open(encoding="utf-8-sig", errors="surrogateescape", newline="") as file:
        rows = csv.DictReader(file, delimiter=delimiter)
        try:
            name, caption = _columns(source, [column.strip() for column in rows.fieldnames or []])
            rows.fieldnames = [column.strip() for column in rows.fieldnames or []]
        except csv.Error as error:
            raise ValueError(f"{source}: no header line can be read ({error})") from error
        while True:
            place = f"{source.name}:{rows.line_num + 1}"
            try:
                row = next(rows)
            except StopIteration:
                return
            except csv.Error as error:
                yield CaptionProblem(place, "unreadable", f"{place}: {error}")
                continue
            yield place, row[name], row[caption]


def _jsonl(source: Path) -> Iterator[Record | CaptionProblem]:
    rows: list[tuple[str, dict[str, Any]]] = []
    with source.open("rb") as file:
        for number, line in enumerate(file, 1):
            place = f"{source.name}:{number}"
            if not line.strip():
                continue
            row = _json_object(place, line.strip())
            if isinstance(row, CaptionProblem):
                yield row
            else:
                rows.append((place, row))
    name, caption = _columns(source, list(dict.fromkeys(key for _, row in rows for key in row)))
    yield from ((place, row.get(name), row.get(caption)) for place, row in rows)


def _json_object(place: str, line: bytes) -> dict[str, Any] | CaptionProblem:
    try:
        # Undecodable bytes pass through as escapes: then the one field they stand in is at fault, and has a name.
        row = json.loads(line.removeprefix(b"\xef\xbb\xbf").decode("utf-8", "surrogateescape"))
    except (ValueError, RecursionError) as error:
        return CaptionProblem(place, "unreadable", f"{place}: not JSON ({error})")
    if not isinstance(row, dict):
        return CaptionProblem(place, "unreadable", f"{place}: a JSON object is needed, not {type(row).__name__}")
    return row


def _parquet(source: Path) -> Iterator[Record]:
    try:
        with pq.ParquetFile(source) as table:
            columns = _columns(source, table.schema_arrow.names)
            for column in columns:
                _check_strings(source, table.schema_arrow.field(column))
            rows = itertools.count(1)
            for batch in table.iter_batches(columns=list(columns)):
                names, captions = (_raw(batch.column(column)) for column in columns)
                for name, caption in zip(names, captions, strict=True):
                    yield f"{source.name}, row {next(rows)}", name, caption
    except (pa.ArrowException, OSError) as error:
        raise ValueError(f"{source}: not a readable Parquet file ({str(error).splitlines()[0]})") from error


def _check_strings(source: Path, field: pa.Field) -> None:
    kind = field.type.value_type if pa.types.is_dictionary(field.type) else field.type
    if not (pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind)):
        raise ValueError(f"{source}: column '{field.name}' must hold strings, not {field.type}")


def _raw(column: pa.Array) -> list[bytes | None]:
    # As bytes: Arrow does not check UTF-8 when it reads, and would raise for the whole column.
    plain = column.dictionary_decode() if pa.types.is_dictionary(column.type) else column
    return plain.cast(pa.binary_view() if pa.types.is_string_view(plain.type) else pa.large_binary()).to_pylist()


def _found_in(folder: Path) -> tuple[list[str], set[str]]:
    """Names of the videos in a folder, sorted, and of its text files."""
    files = [path for path in sorted(folder.rglob("*")) if not path.is_dir()]
    names = {path: path.relative_to(folder).as_posix() for path in files}
    videos = [name for path, name in names.items() if path.suffix.lower() in VIDEO_SUFFIXES]
    if not videos:
        raise ValueError(f"{folder}: no video in it ({', '.join(VIDEO_SUFFIXES)})")
    return videos, {name for path, name in names.items() if path.suffix == ".txt"}


def _beside(
    videos: Sequence[str], texts: Collection[str], read: Callable[[str], bytes]
) -> Iterator[Record | CaptionProblem]:
    def content(name: str) -> bytes | OSError | None:
        beside = PurePosixPath(name).with_suffix(".txt").as_posix()
        if beside not in texts:
            return None
        try:
            return read(beside)
        except (FileNotFoundError, PermissionError) as error:
            return error

    with ThreadPoolExecutor(READERS) as readers:
        for name, found in zip(videos, readers.map(content, videos), strict=True):
            if isinstance(found, OSError):
                yield CaptionProblem(
                    name, "unreadable", f"{name}: its text file cannot be read ({type(found).__name__})"
                )
            else:
                yield name, name, found
