"""`reelway rollout` as a user meets it: files that play, figures, mistakes, interruptions, many prompts."""

import json
import signal
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import pyarrow.parquet
import pytest
import torch
from PIL import Image

from reelway.actors.generator import Student
from reelway.actors.streams import Stream
from reelway.cluster.manifest import read_manifest, read_record
from reelway.cluster.session import Session
from reelway.cluster.shards import verify
from reelway.cluster.storage import Storage
from reelway.kernels.causal.student import StudentSettings
from reelway.pipelines import rollout_batch
from reelway.pipelines.cli import main
from reelway.pipelines.prompts import read_prompts
from reelway.pipelines.rollout_batch import BatchOrder, RolloutWorker
from reelway.pipelines.rollout_order import Plan
from reelway.pipelines.schedule import length_of, read_schedule
from reelway.pipelines.video import VideoFile, VideoWriter

PROMPT = "a small red star drifts left"
SMALL = ("--height", 32, "--width", 32)


@pytest.fixture
def rollout(sharp_student: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Runs the command with the small student; its exit code."""

    def run(*arguments: object) -> int:
        command = ["reelway", "rollout", "--student", sharp_student, *arguments]
        monkeypatch.setattr("sys.argv", [str(argument) for argument in command])
        with pytest.raises(SystemExit) as stopped:
            main()
        return int(stopped.value.code or 0)

    return run


@pytest.fixture(scope="module")
def student(sharp_student: Path) -> Student:
    return Student.from_pretrained(sharp_student)


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """25 frames at 16 per second, 32x32, losslessly enough: a bar that moves."""
    path = tmp_path_factory.mktemp("clip") / "clip.mp4"
    with VideoWriter(path, 16) as writer:
        writer.write(moving_bar(25))
    return path


def moving_bar(frames: int) -> np.ndarray:
    video = np.full((frames, 32, 32, 3), 60, np.uint8)
    for index, frame in enumerate(video):
        frame[:, index % 24 : index % 24 + 8] = (200, 180, 40)
    return video


def played(path: Path) -> tuple[np.ndarray, Fraction]:
    """All frames, as a player decodes them, and the rate."""
    with av.open(str(path)) as container:
        rate = container.streams.video[0].average_rate
        assert rate is not None
        return np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]), rate


def frames_of(student: Student, chunks: int, **options: Any) -> np.ndarray:
    with student.open(PROMPT, height=32, width=32, **options) as stream:
        return np.concatenate([stream.next_chunk() for _ in range(chunks)])


def close_to(found: np.ndarray, expected: np.ndarray) -> bool:
    """Up to what H.264 loses on noise, which is what a random model makes."""
    return found.shape == expected.shape and np.abs(found.astype(int) - expected).mean() < 6


# --- Files -------------------------------------------------------------------------------------------------------


def test_an_mp4_plays_and_holds_the_stream(
    rollout: Any, student: Student, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, figures = tmp_path / "new" / "video.mp4", tmp_path / "figures.json"
    assert rollout("--prompt", PROMPT, "--seconds", 1.5, "--out", out, "--json", figures, *SMALL) == 0
    video, rate = played(out)
    assert (len(video), rate) == (24, 16)
    assert close_to(video, frames_of(student, 3)[:24])
    content = out.read_bytes()
    assert content.index(b"moov") < content.index(b"mdat")  # faststart
    printed = capsys.readouterr()
    assert f"{out}: 24 frames (1.50 s) of 32x32, " in printed.out
    assert printed.out.count("\n") == 1
    assert "24/24 frames, " in printed.err
    told = json.loads(figures.read_text())
    assert {"frames": 24, "steps": 2, "window": 6, "sink": 3, "precision": "float32"}.items() <= told.items()
    assert told["resolution"] == {"width": 32, "height": 32}
    assert 0 < told["time_to_first_frame"] < told["seconds"]
    assert told["frames_per_second"] == pytest.approx(24 / told["seconds"])
    assert told["chunk_gap"]["count"] == 1


def test_a_gif_a_webp_and_png_frames_hold_the_same_video(rollout: Any, student: Student, tmp_path: Path) -> None:
    expected = frames_of(student, 2)
    for name in ("video.gif", "video.webp", "frames"):
        assert rollout("--prompt", PROMPT, "--blocks", 2, "--out", tmp_path / name, *SMALL) == 0
    files = sorted((tmp_path / "frames").iterdir())
    assert [file.name for file in files[:2]] == ["frame-000000.png", "frame-000001.png"]
    assert np.array_equal(np.stack([np.asarray(Image.open(file)) for file in files]), expected)
    for name, tolerance in (("video.gif", 12), ("video.webp", 25)):
        with Image.open(tmp_path / name) as image:
            assert image.n_frames == 21
            assert image.info["loop"] == 0
            found, duration = [], 0
            for index in range(image.n_frames):
                image.seek(index)
                found.append(np.asarray(image.convert("RGB")).astype(int))
                duration += image.info["duration"]
        assert np.abs(np.stack(found) - expected).mean() < tolerance
        assert duration == pytest.approx(1000 * 21 / 16, abs=40)


def test_samples_are_numbered_files(rollout: Any, student: Student, tmp_path: Path) -> None:
    assert rollout("--prompt", PROMPT, "--blocks", 2, "--samples", 2, "--out", tmp_path / "v.mp4", *SMALL) == 0
    for sample in (0, 1):
        assert close_to(played(tmp_path / f"v-{sample}.mp4")[0], frames_of(student, 2, sample=sample))


def test_overrides_reach_the_student(rollout: Any, student: Student, tmp_path: Path) -> None:
    figures = tmp_path / "figures.json"
    options = ("--window", 9, "--sink", 0, "--steps", 3, "--seed", 4, "--dtype", "bf16", "--json", figures)
    assert rollout("--prompt", PROMPT, "--blocks", 1, "--out", tmp_path / "v.mp4", *options, *SMALL) == 0
    told = json.loads(figures.read_text())
    assert (told["window"], told["sink"], told["steps"], told["seed"], told["precision"]) == (9, 0, 3, 4, "bfloat16")
    assert told["timesteps"] == pytest.approx([1000, 1000 * 3 * (2 / 3) / (1 + 2 * (2 / 3)), 1000 * 3 / 5])


def test_overlapping_segments_make_as_many_frames(rollout: Any, student: Student, tmp_path: Path) -> None:
    out = tmp_path / "v.mp4"
    options = ("--mode", "overlap", "--segment", 6, "--blocks", 4)
    assert rollout("--prompt", PROMPT, "--out", out, *options, *SMALL) == 0
    assert close_to(played(out)[0], frames_of(student, 4, mode="overlap", segment=6))


# --- What a video begins with ------------------------------------------------------------------------------------


def test_prompts_switch_where_the_schedule_says(rollout: Any, student: Student, tmp_path: Path) -> None:
    """From the first block that begins at the time or after it: 0.6 s is frame 9.6, the next block is at 21."""
    out, file = tmp_path / "v.mp4", tmp_path / "schedule.txt"
    file.write_text(f"# two prompts\n0s: {PROMPT}\n\n0.6s: two blue circles\n")
    assert rollout("--schedule", file, "--blocks", 3, "--out", out, "--json", tmp_path / "f.json", *SMALL) == 0
    told = json.loads((tmp_path / "f.json").read_text())
    assert [entry["latent_frame"] for entry in told["prompts"]] == [0, 6]
    with student.open(PROMPT, height=32, width=32) as stream:
        expected = [stream.next_chunk(), stream.next_chunk()]
        stream.switch_prompt("two blue circles")
        expected.append(stream.next_chunk())
    assert close_to(played(out)[0], np.concatenate(expected))


def test_an_image_is_what_the_video_begins_with(rollout: Any, tmp_path: Path) -> None:
    image = Image.fromarray(moving_bar(1)[0]).resize((80, 64))
    image.save(tmp_path / "image.png")
    out = tmp_path / "v.mp4"
    assert rollout("--prompt", PROMPT, "--image", tmp_path / "image.png", "--blocks", 2, "--out", out, *SMALL) == 0
    video, _ = played(out)
    shown = np.asarray(image.resize((40, 32)))[:, 4:36]
    assert len(video) == 21
    assert np.abs(video[:5].astype(int) - shown).mean() < 12
    assert np.abs(video[-1].astype(int) - shown).mean() > 20


def test_a_video_is_redrawn_to_its_end(rollout: Any, clip: Path, student: Student, tmp_path: Path) -> None:
    """25 frames are 9 and 12 and a third of a chunk."""
    out = tmp_path / "v.mp4"
    assert rollout("--prompt", PROMPT, "--video", clip, "--noise", 0.02, "--out", out, *SMALL) == 0
    video, _ = played(out)
    assert len(video) == 25
    assert np.abs(video.astype(int) - moving_bar(25)).mean() < 12
    assert rollout("--prompt", PROMPT, "--video", clip, "--noise", 1, "--seconds", 1, "--out", out, *SMALL) == 0
    assert close_to(played(out)[0], frames_of(student, 2, redraw=None)[:16])


def test_a_video_is_extended(rollout: Any, clip: Path, student: Student, tmp_path: Path) -> None:
    out = tmp_path / "v.mp4"
    assert rollout("--prompt", PROMPT, "--extend", clip, "--blocks", 2, "--out", out, *SMALL) == 0
    video, _ = played(out)
    source = np.stack(list(VideoFile(clip, 16).read(32, 32)))
    with student.open(PROMPT, clip=source) as stream:
        added = np.concatenate([stream.next_chunk() for _ in range(2)])
    assert len(video) == 25 + 24
    assert close_to(video, np.concatenate((source, added)))


def test_a_source_is_resampled_and_cut_to_size(tmp_path: Path) -> None:
    """8 frames per second shown at 16: each frame twice."""
    with VideoWriter(tmp_path / "slow.mp4", 8) as writer:
        writer.write(np.repeat(np.repeat(moving_bar(6), 2, axis=1), 2, axis=2))
    video = VideoFile(tmp_path / "slow.mp4", 16)
    frames = np.stack(list(video.read(32, 32)))
    assert video.frames == len(frames) == 12
    assert np.array_equal(frames[0::2], frames[1::2])
    assert np.abs(frames[0::2].astype(int) - moving_bar(6)).mean() < 8
    assert np.array_equal(np.stack(list(video.read(32, 32, 5, 9))), frames[5:9])


# --- Interruption ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_rollout_leaves_a_file_that_plays(
    rollout: Any,
    student: Student,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    number: signal.Signals,
) -> None:
    """An hour is asked for; the signal comes while the second block is decoded."""
    show = Stream._show

    def show_and_signal(stream: Stream, block: torch.Tensor) -> np.ndarray:
        if stream.frames_out == 9:
            signal.raise_signal(number)
        return show(stream, block)

    monkeypatch.setattr(Stream, "_show", show_and_signal)
    out = tmp_path / "v.mp4"
    assert rollout("--prompt", PROMPT, "--seconds", 3600, "--out", out, *SMALL) == 130
    video, rate = played(out)
    assert (len(video), rate) == (13, 16)
    assert "Stopped. What was made so far is a whole video" in capsys.readouterr().err
    assert [file.name for file in tmp_path.iterdir()] == ["v.mp4"]


def test_an_interrupted_extension_keeps_what_was_copied(
    rollout: Any, clip: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write = VideoWriter.write

    def write_and_signal(writer: VideoWriter, frames: np.ndarray) -> None:
        write(writer, frames)
        signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(VideoWriter, "write", write_and_signal)
    out = tmp_path / "v.mp4"
    assert rollout("--prompt", PROMPT, "--extend", clip, "--seconds", 3600, "--out", out, *SMALL) == 130
    assert len(played(out)[0]) == 16
    assert "Stopped. What was made so far is a whole video" in capsys.readouterr().err


def test_an_error_leaves_no_file(rollout: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    show = Stream._show

    def fail_later(stream: Stream, block: torch.Tensor) -> np.ndarray:
        return show(stream, block * torch.nan if stream.frames_out == 9 else block)

    monkeypatch.setattr(Stream, "_show", fail_later)
    assert rollout("--prompt", PROMPT, "--out", tmp_path / "v.mp4", *SMALL) == 2
    assert "not finite after 9 frames" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


# --- Schedules ---------------------------------------------------------------------------------------------------


def test_schedules_are_parsed() -> None:
    schedule = read_schedule("0s: a red star; 4.5: then: a sky; with clouds; 1m30s:  an\n empty  sky")
    assert schedule.entries == ((0, "a red star"), (4.5, "then: a sky; with clouds"), (90, "an empty sky"))
    assert [schedule.at(time) for time in (0, 4.49, 4.5, 1e9)] == [
        "a red star",
        "a red star",
        "then: a sky; with clouds",
        "an empty sky",
    ]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("1s: late", "the first prompt must begin at 0s, got 1s"),
        ("0s: a; 3s: b; 2s: c", "times must rise, got 2s after 3s"),
        ("0s: a; 0m0s: b", "times must rise, got 0s after 0s"),
        ("0s: ", "no prompt in '0s:'"),
        ("a: b", "must be a file, or SECONDS: prompt"),
        ("-1s: a", "must be a file, or SECONDS: prompt"),
        ("0s: a; 4s b", "'4s b' stands inside a prompt and looks like an entry"),
        ("0s: a, 4s: b", "'4s: b' stands inside a prompt and looks like an entry"),
        ("0s: a; -4s: b", "'-4s: b' stands inside a prompt and looks like an entry"),
    ],
)
def test_wrong_schedules_are_one_line(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        read_schedule(text)


def test_wrong_schedule_files_are_named(tmp_path: Path) -> None:
    file = tmp_path / "schedule.txt"
    with pytest.raises(FileNotFoundError, match=f"{file}: no such file"):
        read_schedule(str(file))
    file.write_text("0s: a\nlater: b\n")
    with pytest.raises(ValueError, match=f"{file}:2: must be SECONDS: prompt"):
        read_schedule(str(file))
    file.write_bytes(b"0s: \xff\xfe")
    with pytest.raises(ValueError, match=f"{file}: not a text file in UTF-8"):
        read_schedule(str(file))
    file.write_text("# nothing\n")
    with pytest.raises(ValueError, match="no entry in it"):
        read_schedule(str(file))


def test_lengths() -> None:
    settings = StudentSettings()
    assert length_of(settings, None, None) == 81
    assert length_of(settings, None, None, continues=True) == 84
    assert length_of(settings, None, 2) == 21
    assert length_of(settings, 3600, None) == 57_600
    assert length_of(StudentSettings(block=4, first_block=1), None, 2) == 17


# --- Mistakes ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "--prompt, --schedule, --prompts: exactly one of them is needed"),
        (["--prompt", "a", "--schedule", "0s: b"], "exactly one of them is needed"),
        (["--prompt", " "], "--prompt: must not be empty"),
        (["--prompt", "a", "--image", "x.png", "--video", "y.mp4"], "--image, --video, --extend: give at most one"),
        (["--prompt", "a", "--seconds", 1, "--blocks", 1], "--seconds, --blocks: give at most one"),
        (["--prompt", "a", "--seconds", 0], "--seconds: must be above 0, got 0"),
        (["--prompt", "a", "--seconds", "inf"], "--seconds: must be above 0, got inf"),
        (["--prompt", "a", "--noise", 0.5], "--noise: goes with --video"),
        (["--prompt", "a", "--limit", 1], "--limit: goes with --prompts"),
        (["--prompts", "p.txt", "--image", "x.png"], "--image: goes with --prompt or --schedule"),
        (["--prompt", "a", "--mode", "fast"], "--mode: must be one of rolling, overlap, got 'fast'"),
        (["--prompt", "a", "--device", "tpu"], "--device: must be cpu, cuda or cuda:N, got tpu"),
        (["--prompt", "a", "--dtype", "fp8"], "--dtype: must be fp32 or bf16, got fp8"),
        (["--prompt", "a", "--window", 5], "window: must hold the sink (3) and a block (3), got 5"),
        (["--prompt", "a", "--image", "none.png"], "none.png: no such image"),
        (["--prompt", "a", "--video", "none.mp4"], "none.mp4: no such video"),
        (["--prompts", "none.txt", "--out", "set"], "none.txt: no such prompts"),
        (["--prompt", "a", "--json", "no/where.json"], "--json: no such folder"),
        (["--prompt", "a", "--json", "."], "--json: must be a file, . is a folder"),
        (["--prompt", "a", "--out", "/dev/null/v.mp4"], "/dev/null/v.mp4: /dev/null is no folder"),
        (["--prompt", "a", "--video", "none.mp4", "--noise", 2], "none.mp4: no such video"),
        (["--prompts", "p.txt"], "--out: with --prompts it is the folder of a data set, got v.mp4"),
        (["--prompt", "a", "--out", "v.avi"], "v.avi: a video is written to .mp4, .gif, .webp, or to a folder"),
        (["--prompt", "a", "--student", "nowhere"], "--student: no such folder: nowhere"),
        (["--prompt", "a", "--student", "."], ".: not a student (no student.json)"),
        (["--prompt", "a", "--height", 0], "Invalid value for '--height'"),
        (["--prompt", "a", "--sink", -1], "Invalid value for '--sink'"),
        (["--prompt", "a", "--height", 33], "height: must be a multiple of 16 pixels, got 33"),
    ],
)
def test_mistakes_are_one_line(
    rollout: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: list[Any],
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    assert rollout("--out", "v.mp4", *arguments) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("reelway: ")]
    assert len(lines) == 1
    assert message in lines[0]
    assert list(tmp_path.iterdir()) == []


def test_mistakes_are_told_before_a_model_is_loaded(
    rollout: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.setattr(Student, "from_pretrained", lambda *_, **__: pytest.fail("the model was loaded"))
    (tmp_path / "text.png").write_text("no picture")
    clip, blocked = tmp_path / "text.png", tmp_path / "text.png" / "v.mp4"
    assert rollout("--prompt", "a", "--image", clip, "--out", tmp_path / "v.mp4") == 2
    assert "not a readable image" in capsys.readouterr().err
    assert rollout("--prompt", "a", "--out", blocked) == 2
    assert f"{blocked}: {clip} is no folder" in capsys.readouterr().err


def test_a_video_too_large_for_the_machine_is_refused(rollout: Any, tmp_path: Path, capsys: Any) -> None:
    """A square of 32,768 pixels: more than any machine that runs tests has, and nothing is allocated for it."""
    assert rollout("--prompt", "a", "--out", tmp_path / "v.mp4", "--height", 1 << 15, "--width", 1 << 15) == 2
    assert "student: a stream of 32768x32768 needs " in capsys.readouterr().err
    assert rollout("--prompt", "a", "--out", tmp_path / "frames", "--height", 1 << 15, "--width", 1 << 15) == 2
    assert list(tmp_path.iterdir()) == []


def test_a_prompt_after_the_end_is_told(rollout: Any, tmp_path: Path, capsys: Any) -> None:
    arguments = ("--schedule", f"0s: {PROMPT}; 0.5s: a sky; 1m: two blue circles", "--blocks", 1)
    assert rollout(*arguments, "--out", tmp_path / "v.mp4", *SMALL) == 0
    told = capsys.readouterr().err
    assert "the video ends before the prompt at 60s" in told
    assert "at 0.5s" not in told


def test_files_that_are_no_pictures_are_named(rollout: Any, tmp_path: Path, capsys: Any) -> None:
    (tmp_path / "text.png").write_text("no picture")
    (tmp_path / "text.mp4").write_text("no video")
    for option, name, message in (
        ("--image", "text.png", "text.png: not a readable image"),
        ("--extend", "text.mp4", "text.mp4: neither mp4, mov, mkv, webm nor gif"),
    ):
        assert rollout("--prompt", "a", option, tmp_path / name, "--out", tmp_path / "v.mp4", *SMALL) == 2
        assert message in capsys.readouterr().err
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    assert rollout("--prompt", "a", "--out", tmp_path / "full", *SMALL) == 2
    assert "frames are written to a new or empty folder" in capsys.readouterr().err


# --- Many prompts ------------------------------------------------------------------------------------------------


def batch_order(student: Path, prompts: Path, out: Path, **changes: Any) -> BatchOrder:
    settings = StudentSettings.read(student)
    plan = Plan(student, settings, None, 1, 0, 2, 32, 32, "rolling", 21, "cpu", torch.float32)
    return BatchOrder(plan, prompts, str(out), **({"batch": 2, "per_shard": 3, "workers": 1} | changes))


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    path = tmp_path / "prompts.txt"
    path.write_text(f"{PROMPT}\ntwo blue circles on white\n{PROMPT}\n\n")
    return path


def test_a_worker_makes_the_same_bytes_again(sharp_student: Path, prompts: Path, tmp_path: Path) -> None:
    order = batch_order(sharp_student, prompts, tmp_path / "set")
    console: Any = Quiet()
    job = rollout_batch._plan(order, None, console)
    assert [shard.items.num_rows for shard in job.shards] == [3, 1]
    worker = RolloutWorker(job.out, order)
    first, again = (dict(worker.samples(job.shards[0])) for _ in range(2))
    assert first == again
    assert list(first) == [
        "000000-000-a-small-red-star-drifts-left",
        "000000-001-a-small-red-star-drifts-left",
        "000001-000-two-blue-circles-on-white",
    ]
    sample = first["000000-001-a-small-red-star-drifts-left"]
    assert sample["meta.json"] == {"seed": 0, "sample": 1, "frames": 9, "frame_rate": 16}
    file = tmp_path / "video.mp4"
    file.write_bytes(sample["video.mp4"])
    assert close_to(played(file)[0], frames_of(worker._student, 1, sample=1))
    assert worker._student.streams == []


def test_a_poisoned_prompt_is_quarantined_beside_its_batch(sharp_student: Path, prompts: Path, tmp_path: Path) -> None:
    order = batch_order(sharp_student, prompts, tmp_path / "set")
    console: Any = Quiet()
    job = rollout_batch._plan(order, None, console)
    worker = RolloutWorker(job.out, order)
    context = worker._student.context

    def poisoned(prompt: str) -> Any:
        found = context(prompt)
        if prompt == PROMPT:
            return type(found)(found.rows * torch.nan, found.score_bias)
        return found

    worker._student.context = poisoned
    rollout_batch.create_dataset(job.out, job.info)
    rows = [worker.process(shard) for shard in job.shards]
    assert [(row["samples"], row["quarantined"]) for row in rows] == [(1, 2), (1, 0)]
    record = read_record(job.out, "shard-000000.tar")
    assert record is not None
    assert set(record.reasons.values()) == {"the stream's pictures are not finite after 0 frames"}


class Quiet:
    """A console that keeps its lines."""

    def print(self, *lines: object) -> None:
        self.lines = lines


def test_a_dry_run_says_what_there_is_to_do(rollout: Any, prompts: Path, tmp_path: Path, capsys: Any) -> None:
    out = tmp_path / "set"
    arguments = ("--prompts", prompts, "--out", out, "--samples", 3, "--per-shard", 2, "--blocks", 1, "--dry-run")
    assert rollout(*arguments, *SMALL) == 0
    assert f"{out}: 6 videos of 9 frames in 3 shards; 3 to be made" in capsys.readouterr().out
    assert rollout(*arguments, "--limit", 1, *SMALL) == 0
    assert "3 videos of 9 frames in 2 shards" in capsys.readouterr().out
    assert not out.exists()


def test_many_prompts_on_ray_become_a_sound_set_and_files(
    ray_session: Session, rollout: Any, prompts: Path, tmp_path: Path, capsys: Any
) -> None:
    out, files = tmp_path / "set", tmp_path / "files"
    arguments = ["--prompts", prompts, "--out", out, "--samples", 2, "--per-shard", 2, "--blocks", 1, "--workers", 2]
    assert rollout(*arguments, "--files", files, *SMALL) == 0
    assert "1 left out" in capsys.readouterr().err
    storage = Storage.open(out)
    assert verify(storage) == []
    rows = read_manifest(storage)
    assert [row.samples for row in rows] == [2, 2]
    table = pyarrow.parquet.read_table(files / "videos.parquet").to_pylist()
    assert [row["sample"] for row in table] == [0, 1, 0, 1]
    assert read_prompts(files / "videos.parquet").texts == (PROMPT, "two blue circles on white")
    for row in table:
        assert len(played(files / row["file"])[0]) == 9
    hashes = [row.sha256 for row in rows]
    (out / rows[0].name).unlink()
    assert rollout(*arguments, *SMALL) == 0
    assert "1 to be made" in capsys.readouterr().out
    assert [row.sha256 for row in read_manifest(storage)] == hashes
    assert rollout(*arguments, "--seed", 1, *SMALL) == 2
    assert "the folder holds another data set" in capsys.readouterr().err
