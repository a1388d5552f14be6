"""Folders of videos are listed whole and in order, whatever lies in them. (Buckets: tests/pipelines/test_ingest.py.)"""

import os
import pickle
from pathlib import Path

import pytest

from reelway.actors.sources import LocalFolder, VideoFile, VideoFolder


def test_a_listing_is_sorted_and_leaves_nothing_out(tmp_path: Path) -> None:
    root, elsewhere = tmp_path / "videos", tmp_path / "elsewhere"
    for folder in (root / "b" / "c", elsewhere):
        folder.mkdir(parents=True)
    for name, size in (("z.mp4", 3), ("b/a.WebM", 2), ("b/c/d.gif", 1), ("b.mkv", 4), ("a.txt", 1), ("notes.md", 1)):
        (root / name).write_bytes(bytes(size))
    (elsewhere / "linked.mov").write_bytes(b"12345")
    (root / "link").symlink_to(elsewhere)
    (root / "b" / "circle").symlink_to(root)
    (root / "dangling.mp4").symlink_to(root / "nowhere")
    (root / "folder.mp4").mkdir()
    (root / os.fsdecode(b"caf\xe9.mp4")).write_bytes(b"")
    found = VideoFolder.open(str(root)).listing()
    assert found.videos == [
        VideoFile("b.mkv", 4),
        VideoFile("b/a.WebM", 2),
        VideoFile("b/c/d.gif", 1),
        VideoFile("dangling.mp4", 0),
        VideoFile("link/linked.mov", 5),
        VideoFile("z.mp4", 3),
    ]
    assert found.texts == {"a.txt"}
    assert found.others == 1
    assert found.problems == [(os.fsdecode(b"caf\xe9.mp4"), "unusable-name", "its name is not UTF-8")]


def test_a_folder_that_may_not_be_listed_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "closed").mkdir()
    (tmp_path / "open").mkdir()
    (tmp_path / "open" / "a.mp4").write_bytes(b"1")
    scan = os.scandir

    def refusing(path: str) -> object:
        if str(path).endswith("closed"):
            raise PermissionError(13, "Permission denied", str(path))
        return scan(path)

    monkeypatch.setattr(os, "scandir", refusing)
    found = LocalFolder(str(tmp_path)).listing()
    assert found.videos == [VideoFile("open/a.mp4", 1)]
    assert found.problems == [("closed/", "unreadable", "it cannot be listed (Permission denied)")]


def test_a_local_file_is_used_where_it_lies(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "a.txt").write_bytes(b"one")
    folder = pickle.loads(pickle.dumps(VideoFolder.open(".")))
    monkeypatch.chdir("/")
    with folder.local("sub/a.txt") as path:
        assert path == tmp_path / "sub" / "a.txt"
    assert folder.read("sub/a.txt") == b"one"
    with pytest.raises(FileNotFoundError, match="absent: no such folder of videos"):
        VideoFolder.open("absent").listing()
    with pytest.raises(ValueError, match="ftp"):
        VideoFolder.open("ftp://host/videos")
