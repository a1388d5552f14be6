"""Prompts from every format, and what is said of those that cannot be used."""

import json
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest

from reelway.pipelines.prompts import PART, identity, packed, read_prompts
from reelway.pipelines.recipe import fingerprint


def write_table(path: Path, rows: list[Any]) -> None:
    match path.suffix:
        case ".csv":
            path.write_text("id,caption\n" + "".join(f'{i},"{row}"\n' for i, row in enumerate(rows)))
        case ".jsonl":
            path.write_text("".join(json.dumps({"id": i, "text": row}) + "\n" for i, row in enumerate(rows)))
        case ".parquet":
            pyarrow.parquet.write_table(pyarrow.table({"id": list(range(len(rows))), "prompt": rows}), path)
        case ".txt":
            path.write_text("\ufeff" + "\n".join(rows))


@pytest.mark.parametrize("kind", ["txt", "csv", "jsonl", "parquet"])
def test_prompts_are_read_from_any_of_the_formats(tmp_path: Path, kind: str) -> None:
    path = tmp_path / f"prompts.{kind}"
    write_table(path, ["a red star, twice", "  été  ", "a red star, twice", "last"])
    found = read_prompts(path)
    assert found.texts == ("a red star, twice", "été", "last")
    assert (found.duplicates, found.problems) == (1, ())


def test_a_folder_is_all_its_files_in_order(tmp_path: Path) -> None:
    write_table(tmp_path / "b.txt", ["second", "first"])
    write_table(tmp_path / "a.csv", ["first"])
    (tmp_path / "notes.md").write_text("not a prompt")
    found = read_prompts(tmp_path)
    assert (found.texts, found.duplicates) == (("first", "second"), 1)


def test_bad_prompts_are_named_and_left_out(tmp_path: Path) -> None:
    lines = ['{"prompt": "good"}', '{"prompt": 7}', '{"prompt": " "}', "{", '{"other": 1}', '"bare"', '"\\ud800"']
    (tmp_path / "prompts.jsonl").write_text("\n".join(lines))
    (tmp_path / "prompts.txt").write_bytes(b"fine\n\xff\xfe\n")
    found = read_prompts(tmp_path)
    assert found.texts == ("good", "bare", "fine")
    kinds = ["int, not text", "is empty", "not JSON", "no prompt", "not UTF-8 (surrogates", "not UTF-8 (invalid start"]
    assert len(found.problems) == len(kinds)
    for problem, kind in zip(found.problems, kinds, strict=True):
        assert kind in problem
    assert "prompts.jsonl:4: not JSON" in found.problems[2]


@pytest.mark.parametrize(
    ("name", "text", "line"),
    [
        ("empty.txt", "\n \n", r"empty\.txt: no prompt in it$"),
        ("table.csv", "id,words\n1,x\n", r"a column of prompt, caption, text is needed; found: 'id', 'words'$"),
        ("table.xml", "<a/>", r"table\.xml: prompts are read from \.txt, .* not '\.xml'$"),
        ("table.parquet", "PAR", r"table\.parquet: not a readable Parquet file"),
        ("bad.jsonl", "{", r"bad\.jsonl: no prompt in it; the first problem: bad\.jsonl:1: not JSON"),
    ],
)
def test_a_source_without_prompts_is_refused(tmp_path: Path, name: str, text: str, line: str) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(ValueError, match=line):
        read_prompts(tmp_path / name)


@pytest.mark.parametrize("count", [0, 1, 2, PART, PART + 1])
def test_the_identity_is_that_of_the_whole_list(count: int) -> None:
    """Data sets that stand already bear it."""
    texts = [f'[été] "{index}"]' for index in range(count)]
    assert identity(texts) == identity(packed(texts)) == fingerprint({"prompts": texts})
    assert identity([*texts, "more"]) != identity(texts)
