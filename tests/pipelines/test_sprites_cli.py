"""`reelway sprites` and the video writer, as a user meets them."""

from pathlib import Path

import av
import numpy as np
import pytest
from PIL import Image

from reelway.pipelines.cli import main
from reelway.pipelines.video import VideoWriter


def run(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> int:
    monkeypatch.setattr("sys.argv", ["reelway", *map(str, arguments)])
    with pytest.raises(SystemExit) as stopped:
        main()
    return int(stopped.value.code or 0)


def test_render_then_grade(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    prompt, video = "a large red star moves right fast on a black background", tmp_path / "star.mp4"
    assert run(monkeypatch, "sprites", "render", prompt, "--out", video, "--seconds", 5.1) == 0
    with av.open(str(video)) as container:
        assert sum(1 for _ in container.decode(video=0)) == 82
    assert run(monkeypatch, "sprites", "grade", video, prompt) == 0
    right = float(capsys.readouterr().out.split("total ")[-1].split(":")[0])
    assert run(monkeypatch, "sprites", "grade", video, "a small blue circle moves up slowly on white") == 0
    wrong = float(capsys.readouterr().out.split("total ")[-1].split(":")[0])
    assert right > 0.95
    assert wrong < right - 0.1


def test_unknown_words_are_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "video.mp4"
    assert run(monkeypatch, "sprites", "render", "a red zebra on white", "--out", out, "--seconds", 0.5) == 0
    assert "does not know: zebra" in capsys.readouterr().err


def test_sheet_is_a_picture_of_every_caption(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "sheet.png"
    assert run(monkeypatch, "sprites", "sheet", "--out", out, "--count", 2, "--level", 0) == 0
    picture = np.asarray(Image.open(out))
    assert picture.shape[0] > 2 * 128
    assert picture.std() > 10


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["grade", "none.mp4", "a red star"], "none.mp4: no such file"),
        (["grade", __file__, "a red star"], "cannot be read as a video"),
        (["sheet", "--split", "test"], "--split: must be one of train, validation, heldout, got 'test'"),
        (["score", "--model", "none"], "none"),
    ],
)
def test_mistakes_are_one_line(
    arguments: list[str], message: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(monkeypatch, "sprites", *arguments) == 2
    error = capsys.readouterr().err.strip()
    assert message in error
    assert "\n" not in error


def test_broken_off_video_leaves_nothing_behind(tmp_path: Path) -> None:
    def write() -> None:
        with VideoWriter(tmp_path / "video.mp4", 16) as writer:
            writer.write(np.zeros((2, 16, 16, 3), np.uint8))
            writer.write(np.zeros((2, 18, 16, 3), np.uint8))

    with pytest.raises(ValueError, match="frames of 16x18 in a video of 16x16"):
        write()
    assert list(tmp_path.iterdir()) == []


def test_video_plays_what_was_written(tmp_path: Path) -> None:
    frames = np.full((8, 32, 48, 3), (200, 40, 90), np.uint8)
    with VideoWriter(tmp_path / "video.mp4", 16) as writer:
        writer.write(frames[:3])
        writer.write(frames[3:])
    with av.open(str(tmp_path / "video.mp4")) as container:
        stream = container.streams.video[0]
        assert (stream.codec_context.name, stream.codec_context.pix_fmt) == ("h264", "yuv420p")
        assert stream.average_rate == 16
        read = np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])
    assert read.shape == frames.shape
    assert np.abs(read.astype(int) - frames).max() <= 4
