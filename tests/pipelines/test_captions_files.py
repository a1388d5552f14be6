"""Captions from tables and from files beside the videos; each bad one is a problem with its reason, never the end."""

import json
import os
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from reelway.pipelines.captions import CaptionProblem, read_captions


def codes(problems: list[CaptionProblem]) -> dict[str, str]:
    assert all("\n" not in problem.text for problem in problems)
    return {problem.name: problem.code for problem in problems}


def test_csv(tmp_path: Path) -> None:
    table = tmp_path / "captions.csv"
    table.write_bytes(
        b"\xef\xbb\xbfid, path , text\n"
        b'0,a.mp4,"a red star, \nthen a blue one"\n'
        b"1,b.mp4,caf\xe9\n"
        b"2,c.mp4,   \n"
        b"3,d.mp4\n"
        b"4,a.mp4,again\n"
        b"5,,nameless\n"
        b"6,folder/\xc3\xa9.mp4, caf\xc3\xa9 \n"
    )
    captions, problems = read_captions(table)
    assert captions == {"a.mp4": "a red star, \nthen a blue one", "folder/é.mp4": "café"}
    assert codes(problems) == {
        "b.mp4": "not-utf-8",
        "c.mp4": "empty",
        "d.mp4": "missing",
        "a.mp4": "duplicate",
        "captions.csv:8": "empty",
    }


def test_csv_row_that_cannot_be_read(tmp_path: Path) -> None:
    table = tmp_path / "captions.csv"
    table.write_text("file,caption\na.mp4,one\nb.mp4," + "x" * 200_000 + "\nc.mp4,three\n")
    captions, problems = read_captions(table)
    assert captions == {"a.mp4": "one", "c.mp4": "three"}
    assert [problem.code for problem in problems] == ["unreadable"]


def test_tsv(tmp_path: Path) -> None:
    (tmp_path / "captions.tsv").write_text("video\tprompt\na.mp4\tone, two\n")
    assert read_captions(tmp_path / "captions.tsv") == ({"a.mp4": "one, two"}, [])


def test_jsonl(tmp_path: Path) -> None:
    table = tmp_path / "captions.jsonl"
    rows = [
        b'{"file": "a.mp4", "caption": "one"}',
        b"",
        b'{"file": "b.mp4", "caption": "caf\xe9"}',
        b'{"file": "c.mp4"}',
        b'{"file": "d.mp4", "caption": null}',
        b'{"file": "e.mp4", "caption": 7}',
        b'{"file": "f.mp4", "caption": ""}',
        b'{"file": "a.mp4", "caption": "two"}',
        b"{broken",
        b'["g.mp4", "three"]',
        b'{"file": "h.mp4", "caption": "half a pair \\ud800"}',
        b'{"file": "i.mp4", "caption": "\\u2603"}',
        b"[" * 100_000,
    ]
    table.write_bytes(b"\n".join(rows))
    captions, problems = read_captions(table)
    assert captions == {"a.mp4": "one", "i.mp4": "☃"}
    assert codes(problems) == {
        "b.mp4": "not-utf-8",
        "c.mp4": "missing",
        "d.mp4": "missing",
        "e.mp4": "not-text",
        "f.mp4": "empty",
        "a.mp4": "duplicate",
        "captions.jsonl:9": "unreadable",
        "captions.jsonl:10": "unreadable",
        "h.mp4": "not-utf-8",
        "captions.jsonl:13": "unreadable",
    }


@pytest.mark.parametrize(
    "kind", [pa.string(), pa.large_string(), pa.string_view(), pa.dictionary(pa.int32(), pa.string())], ids=str
)
def test_parquet(tmp_path: Path, kind: pa.DataType) -> None:
    names = pa.array(["a.mp4", "b.mp4", "c.mp4", "a.mp4"])
    captions = pa.array(["one", None, "", "two"]).cast(kind)
    pq.write_table(pa.table({"video": names, "caption": captions}), tmp_path / "captions.parquet")
    found, problems = read_captions(tmp_path / "captions.parquet")
    assert found == {"a.mp4": "one"}
    assert codes(problems) == {"b.mp4": "missing", "c.mp4": "empty", "a.mp4": "duplicate"}


def test_parquet_with_bytes_that_are_not_utf8(tmp_path: Path) -> None:
    raw = pa.array([b"one", b"caf\xe9", b"three"], pa.binary())
    unchecked = pa.Array.from_buffers(pa.string(), 3, raw.buffers())
    table = pa.table({"file": ["a.mp4", "b.mp4", "c.mp4"], "text": unchecked})
    pq.write_table(table, tmp_path / "captions.parquet", row_group_size=1)
    captions, problems = read_captions(tmp_path / "captions.parquet")
    assert captions == {"a.mp4": "one", "c.mp4": "three"}
    assert codes(problems) == {"b.mp4": "not-utf-8"}
    assert "row 2" in problems[0].text


def test_text_beside_each_video(tmp_path: Path) -> None:
    strange = os.fsdecode(b"caf\xe9.webm")
    (tmp_path / "sub").mkdir()
    for name in ("a.mp4", "sub/b.MKV", "c.mov", "d.gif", "e.mp4", strange):
        (tmp_path / name).write_bytes(b"")
    (tmp_path / "a.txt").write_text(" one\n")
    (tmp_path / "sub/b.txt").write_bytes(b"\xef\xbb\xbftwo")
    (tmp_path / "c.txt").write_bytes(b"caf\xe9")
    (tmp_path / "d.txt").write_text("\n")
    (tmp_path / os.fsdecode(b"caf\xe9.txt")).write_text("three")
    (tmp_path / "notes.txt").write_text("about nothing")
    captions, problems = read_captions(tmp_path)
    assert captions == {"a.mp4": "one", "sub/b.MKV": "two", strange: "three"}
    assert (tmp_path / strange).exists()
    assert codes(problems) == {"c.mov": "not-utf-8", "d.gif": "empty", "e.mp4": "missing"}


@pytest.mark.parametrize("suffix", [".csv", ".jsonl", ".parquet"])
def test_wrong_columns_are_named(tmp_path: Path, suffix: str) -> None:
    source = tmp_path / f"captions{suffix}"
    if suffix == ".csv":
        source.write_text("clip,caption\na.mp4,one\n")
    elif suffix == ".jsonl":
        source.write_text(json.dumps({"clip": "a.mp4", "caption": "one"}))
    else:
        pq.write_table(pa.table({"clip": ["a.mp4"], "caption": ["one"]}), source)
    with pytest.raises(ValueError, match=r"file, path, video.*found: 'clip', 'caption'$") as caught:
        read_captions(source)
    assert "\n" not in str(caught.value)
    assert str(source) in str(caught.value)


def test_sources_that_are_no_captions(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"none\.csv"):
        read_captions(tmp_path / "none.csv")
    (tmp_path / "captions.xlsx").write_bytes(b"")
    with pytest.raises(ValueError, match=r"\.csv, \.tsv, \.jsonl, \.parquet or a folder, not '\.xlsx'"):
        read_captions(tmp_path / "captions.xlsx")
    for name in ("empty.csv", "empty.jsonl", "empty.parquet", "text.parquet"):
        (tmp_path / name).write_text("no table" if name.startswith("text") else "")
        with pytest.raises(ValueError, match=name) as caught:
            read_captions(tmp_path / name)
        assert "\n" not in str(caught.value)
    (tmp_path / "bare").mkdir()
    with pytest.raises(ValueError, match="no video in it"):
        read_captions(tmp_path / "bare")


def test_parquet_columns_must_be_strings(tmp_path: Path) -> None:
    pq.write_table(pa.table({"file": ["a.mp4"], "caption": [1.5]}), tmp_path / "captions.parquet")
    with pytest.raises(ValueError, match="'caption' must hold strings, not double"):
        read_captions(tmp_path / "captions.parquet")
