"""Streams against offline computations from the kernels, against each other, and against their own snapshots."""

import copy
import gc
import subprocess
import sys
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from reelway.actors.generator import NoRoom, Student
from reelway.actors.pretraining import to_pixels, to_video
from reelway.actors.streams import Redraw, Snapshot, Stream, adapted_noise, overlapped
from reelway.kernels.causal.generator import ChunkGenerator
from reelway.kernels.causal.student import StudentSettings
from reelway.kernels.diffusion.noise import SampleKey, draw_noise
from reelway.kernels.sprites.render import render
from reelway.kernels.sprites.splits import sample_scene
from reelway.kernels.wan import rotary

SIZE = {"height": 32, "width": 32}
RED, BLUE = "a small red star drifts left", "two blue circles on white"
LEVEL = 2  # of grey: what float32 and the order of sums may cost


@pytest.fixture(scope="module")
def student(small_student: Path) -> Student:
    return Student.from_pretrained(small_student)


@pytest.fixture(scope="module")
def sharp(sharp_student: Path) -> Student:
    return Student.from_pretrained(sharp_student)


@pytest.fixture
def opened(student: Student) -> Iterator[Any]:
    """Opens small streams, and closes them after the test."""
    with opening(student) as open_stream:
        yield open_stream


@pytest.fixture
def opened_sharp(sharp: Student) -> Iterator[Any]:
    with opening(sharp) as open_stream:
        yield open_stream


@contextmanager
def opening(student: Student) -> Iterator[Any]:
    streams: list[Stream] = []

    def open_stream(prompt: str = RED, seed: int = 0, sample: int = 0, **options: Any) -> Stream:
        size = {} if {"image", "clip"} & options.keys() else SIZE
        streams.append(student.open(prompt, seed, sample, **size, **options))
        return streams[-1]

    yield open_stream
    for stream in streams:
        stream.close()


def with_settings(student: Student, **changes: Any) -> Student:
    return Student(student.transformer, student.encoder, student.vae, replace(student.settings, **changes))


def video(stream: Stream, chunks: int) -> np.ndarray:
    return np.concatenate([stream.next_chunk() for _ in range(chunks)])


def offline(student: Student, latents: Tensor) -> np.ndarray:
    with torch.no_grad():
        return to_video(student.vae.decode(latents)[0][0]).numpy()


def distance(a: np.ndarray, b: np.ndarray) -> int:
    assert a.shape == b.shape
    return int(np.abs(a.astype(int) - b.astype(int)).max())


def sprites(frames: int) -> np.ndarray:
    """A rendered clip of the embedded world, 64x64."""
    return render(sample_scene("validation", 6), 0, frames)  # a scene that moves


# --- Text to video ---------------------------------------------------------------------------------------------------


def test_streaming_equals_the_offline_computation(student: Student, opened: Any) -> None:
    """All latents first, by the generator; then one decode of the whole clip."""
    text = student.encoder([RED])
    generator = ChunkGenerator(student.transformer, student.settings, text, [SampleKey(5, RED, 1)], (4, 4))
    latents = torch.cat([generator.next_block() for _ in range(4)], dim=1)
    stream = opened(RED, 5, 1)
    chunks = [stream.next_chunk() for _ in range(4)]
    assert [len(chunk) for chunk in chunks] == [9, 12, 12, 12]
    assert distance(np.concatenate(chunks), offline(student, latents)) <= LEVEL
    assert stream.frames_out == 45
    assert stream.latents_done == 12


def test_seed_sample_and_prompt_decide_the_video(opened: Any) -> None:
    first = opened(RED, 0, 0).next_chunk()
    assert np.array_equal(opened(RED, 0, 0).next_chunk(), first)
    for other in (opened(RED, 1, 0), opened(RED, 0, 1), opened(BLUE, 0, 0)):
        assert distance(other.next_chunk(), first) > 10


def test_the_first_picture_comes_after_the_first_latent(student: Student, opened: Any) -> None:
    """Before the clean pass and before the other latents of the block are decoded."""
    stream = opened()
    groups = stream.frames()
    first = next(groups)
    assert first.shape == (1, 32, 32, 3)
    assert len(stream.generator.cache) == 0
    assert [len(group) for group in groups] == [4, 4]
    assert np.array_equal(first, opened().next_chunk()[:1])


def test_frames_that_were_not_taken_come_first_the_next_time(opened: Any) -> None:
    whole, stream = video(opened(), 2), opened()
    taken = [next(stream.frames()), stream.next_chunk(), stream.next_chunk()]
    assert [len(part) for part in taken] == [1, 8, 12]
    assert np.array_equal(np.concatenate(taken), whole)


def test_a_stream_made_ahead_gives_the_same_frames(opened: Any) -> None:
    plain, switched = opened(), opened()
    expected = [plain.next_chunk(), plain.next_chunk()]
    plain.switch_prompt(BLUE)
    expected += [plain.next_chunk(), plain.next_chunk()]

    def prepare(stream: Stream) -> None:
        if stream.latents_done == 6:
            stream.switch_prompt(BLUE)

    groups = list(overlapped(switched, 4, prepare))
    assert [len(group) for group in groups] == [1] + [4] * 11
    assert np.array_equal(np.concatenate(groups), np.concatenate(expected))
    assert switched.prompts == [(0, RED), (6, BLUE)]


def test_giving_up_a_stream_made_ahead_loses_nothing(opened: Any) -> None:
    whole, stream = video(opened(), 3), opened()
    groups = overlapped(stream)
    taken = list(islice(groups, 2))
    groups.close()
    rest = video(stream, 3)
    assert np.array_equal(np.concatenate([*taken, rest]), whole)


def test_a_picture_that_is_not_finite_is_an_error(student: Student, opened: Any) -> None:
    stream = opened()
    stream.make()
    stream._unshown[0][:, 1, 0, 0, 0] = torch.nan
    with pytest.raises(ArithmeticError, match="not finite after 1 frames"):
        stream.next_chunk()


# --- Snapshots -------------------------------------------------------------------------------------------------------


def test_snapshot_after_a_prompt_switch_goes_on_bit_for_bit(small_student: Path, opened: Any, tmp_path: Path) -> None:
    """In another student, and in a new process; taken from a file, in the middle of a chunk, with the window full."""
    stream, file = opened(), tmp_path / "stream.safetensors"
    video(stream, 3)
    stream.switch_prompt(BLUE)
    next(stream.frames())
    stream.snapshot().write(file)
    restored = Student.from_pretrained(small_student).restore(Snapshot.read(file))
    assert restored.prompts == [(0, RED), (9, BLUE)]
    script = (
        "import sys, numpy as np; from pathlib import Path\n"
        "from reelway.actors.generator import Student; from reelway.actors.streams import Snapshot\n"
        "stream = Student.from_pretrained(Path(sys.argv[1])).restore(Snapshot.read(Path(sys.argv[2])))\n"
        "np.save(sys.argv[3], np.concatenate([stream.next_chunk() for _ in range(3)]))\n"
    )
    command = [sys.executable, "-c", script, str(small_student), str(file), str(tmp_path / "video.npy")]
    subprocess.run(command, check=True, timeout=240)
    expected = video(stream, 3)
    assert len(expected) == 8 + 12 + 12
    assert np.array_equal(video(restored, 3), expected)
    assert np.array_equal(np.load(tmp_path / "video.npy"), expected)
    assert restored.frames_out == stream.frames_out == 9 + 12 * 5


def test_a_snapshot_shares_no_memory_with_its_stream(opened: Any) -> None:
    stream = opened()
    next(stream.frames())
    snapshot, cache = stream.snapshot(), stream.generator.cache
    held = [cache.keys, cache.values, cache.sink_keys, *stream._decoder.contexts, *stream._blocks_left()]
    storages = [{tensor.untyped_storage().data_ptr() for tensor in part} for part in (held, snapshot.tensors.values())]
    assert storages[0].isdisjoint(storages[1])


def test_a_redrawn_stream_goes_on_from_its_snapshot(student: Student, opened: Any) -> None:
    source = sprites(21)[:, :32, :32]
    stream = opened(redraw=Redraw(0.6, adaptive=True))
    stream.redraw(source[:9])
    restored = student.restore(stream.snapshot())
    assert np.array_equal(restored.redraw(source[9:]), stream.redraw(source[9:]))
    restored.close()


def test_snapshots_of_other_students_are_refused(student: Student, opened: Any, tmp_path: Path) -> None:
    snapshot = opened().snapshot()
    with pytest.raises(ValueError, match="snapshot: student is"):
        with_settings(student, window=9).restore(snapshot)
    (tmp_path / "no.safetensors").write_bytes(b"nothing")
    with pytest.raises(ValueError, match="not a snapshot of a stream"):
        Snapshot.read(tmp_path / "no.safetensors")
    with pytest.raises(FileNotFoundError, match="no such snapshot"):
        Snapshot.read(tmp_path / "none.safetensors")


# --- Many streams ----------------------------------------------------------------------------------------------------


def attentive(student: Student) -> Student:
    """The student with sharp attention: random weights attend to everything alike, wherever and whatever it is."""
    transformer = copy.deepcopy(student.transformer)
    for block in transformer.blocks:
        block.attn1.norm_q.weight *= 8
        block.attn2.norm_q.weight *= 8
    return Student(transformer, student.encoder, student.vae, student.settings)


def test_streams_of_any_age_and_prompt_share_a_batch(student: Student) -> None:
    """Each gets what it gets alone: an old one past its window, one in mid-window, a new one, one that was switched."""
    student = attentive(student)
    prompts = [(RED, 0), (BLUE, 1), ("a star", 2), (RED, 3)]
    together, alone = ([student.open(prompt, seed, **SIZE) for prompt, seed in prompts] for _ in range(2))
    for streams in (together, alone):
        video(streams[0], 4)
        video(streams[1], 1)
        video(streams[3], 2)
        streams[3].switch_prompt(BLUE)
    batches: list[int] = []
    hook = student.transformer.register_forward_pre_hook(lambda _, inputs: batches.append(len(inputs[0])))
    rounds = [student.step(together) for _ in range(3)]
    hook.remove()
    assert batches.count(4) == 2 * 3 + 2  # two steps of three rounds, and the clean pass of two of them
    for chunks in rounds:
        for chunk, stream in zip(chunks, alone, strict=True):
            assert distance(chunk, stream.next_chunk()) <= LEVEL
    for one, other in zip(together, alone, strict=True):
        torch.testing.assert_close(one._owed, other._owed, rtol=1e-4, atol=1e-4)


def test_streams_that_cannot_share_are_made_in_groups(student: Student, opened: Any) -> None:
    wide = student.open(RED, height=32, width=64)
    chunks = student.step([opened(RED, 1), wide, opened(BLUE, 2)])
    assert [chunk.shape for chunk in chunks] == [(9, 32, 32, 3), (9, 32, 64, 3), (9, 32, 32, 3)]
    wide.close()
    assert distance(chunks[2], opened(BLUE, 2).next_chunk()) <= LEVEL


# --- From images and videos ------------------------------------------------------------------------------------------


def test_the_first_block_shows_the_image(sharp: Student, opened_sharp: Any) -> None:
    image = sprites(1)[0]
    stream = opened_sharp(image=image)
    first = stream.next_chunk()
    assert len(first) == 9
    with torch.no_grad():
        latent, _ = sharp.vae.encode(to_pixels(torch.from_numpy(image)[None, None]))
    copy = offline(sharp, latent)[0]
    assert distance(first[0], copy) <= LEVEL
    assert np.abs(first.astype(float) - image).mean() < 5
    plain = sharp.open(RED, height=64, width=64)
    assert np.abs(plain.next_chunk().astype(float) - image).mean() > 20
    assert distance(stream.next_chunk(), plain.next_chunk()) > 10
    plain.close()


def test_an_independent_first_frame_is_the_image(student: Student) -> None:
    framewise = with_settings(student, first_block=1)
    stream = framewise.open(RED, image=sprites(1)[0])
    assert [len(stream.next_chunk()), len(stream.next_chunk())] == [1, 12]


def test_an_extension_goes_on_from_the_end_of_the_clip(student: Student, opened: Any) -> None:
    """Its last whole blocks, encoded as a clip of their own; the pictures join on in the decoder too."""
    clip = sprites(30)
    stream = opened(clip=clip)
    with torch.no_grad():
        end, _ = student.vae.encode(to_pixels(torch.from_numpy(clip[-9:])[None]))
    assert torch.allclose(torch.cat(stream.generator.history, dim=1), end, atol=1e-5)
    chunk = stream.next_chunk()
    text = student.encoder([RED])
    generator = ChunkGenerator(student.transformer, student.settings, text, [SampleKey(0, RED, 0)], (8, 8))
    generator.append(end)
    expected = offline(student, torch.cat((end, generator.next_block()), dim=1))[9:]
    assert len(chunk) == 12
    assert distance(chunk, expected) <= LEVEL
    with pytest.raises(ValueError, match="clip: at least 9 frames are needed, got 8"):
        opened(clip=clip[:8])


def test_a_little_noise_leaves_the_source_and_pure_noise_ignores_it(student: Student, opened: Any) -> None:
    source = sprites(33)[:, :32, :32]
    with torch.no_grad():
        copy = offline(student, student.vae.encode(to_pixels(torch.from_numpy(source)[None]))[0])
    for noise in (0.001, 1.0):
        stream = student.open(RED, **SIZE, redraw=Redraw(noise))
        parts = [source[:9], source[9:21], source[21:]]
        assert [stream.frames_due] == [9]
        redrawn = np.concatenate([stream.redraw(part) for part in parts])
        stream.close()
        if noise < 1:
            assert np.abs(redrawn.astype(int) - copy).mean() < 1
        else:
            plain = student.open(RED, **SIZE)
            assert np.array_equal(redrawn, video(plain, 3))
            plain.close()


def test_more_noise_moves_further_from_the_source(opened_sharp: Any) -> None:
    source = sprites(9)[:, :32, :32]
    moved = []
    for noise in (0.05, 0.3, 0.9):
        redrawn = opened_sharp(redraw=Redraw(noise)).redraw(source)
        moved.append(np.abs(redrawn.astype(int) - source).mean())
    assert moved == sorted(moved)
    assert moved[2] > 2 * moved[0]


def test_noise_follows_motion() -> None:
    """Hand-computed: half of full motion takes half of 0.1 off, and a tenth of the level before stays."""
    still = torch.zeros(3, 3, 4, 4)
    moving = torch.stack((still[0], still[0] + 0.1, still[0] + 0.1))
    fast = torch.stack((still[0], still[0] + 1.5))
    assert adapted_noise(0.7, 0.7, still) == pytest.approx(0.7)
    assert adapted_noise(0.7, 0.7, moving) == pytest.approx(0.9 * (0.7 - 0.05) + 0.07)
    assert adapted_noise(0.7, 0.5, fast) == pytest.approx(0.9 * 0.6 + 0.05)
    assert adapted_noise(0.7, 0.7, still[:1]) == pytest.approx(0.7)


def test_adaptive_noise_sees_the_change_between_chunks(opened: Any) -> None:
    black = np.zeros((12, 32, 32, 3), np.uint8)
    stream = opened(redraw=Redraw(0.6, adaptive=True))
    stream.redraw(black[:9])
    still = stream._noise
    stream.redraw(255 - black)
    assert still == pytest.approx(0.6)
    assert stream._noise == pytest.approx(0.9 * 0.5 + 0.06)


# --- Overlapping segments --------------------------------------------------------------------------------------------


class LaterNoise(ChunkGenerator):
    """A generator whose frame 0 has the noise of a later frame of the video."""

    later = 0

    def _noise(self, frames: int, step: int) -> Tensor:
        start = self.frames_done + self.later
        return draw_noise(self.keys, range(start, start + frames), self.frame_shape, step)


def test_overlapping_segments_equal_their_definition(student: Student, opened: Any) -> None:
    """CausVid's long video, computed segment by segment, each decoded as a whole; 9 frames of each are made again."""
    settings = replace(student.settings, window=9, sink=0)
    text, made, start = student.encoder([RED]), [], None
    for index in range(3):
        generator = LaterNoise(student.transformer, settings, text, [SampleKey(0, RED, 0)], (4, 4))
        generator.later = 6 * index
        if start is not None:
            generator.append(start)
        blocks = [generator.next_block() for _ in range(3 if start is None else 2)]
        latents = torch.cat([*([] if start is None else [start]), *blocks], dim=1)
        with torch.no_grad():
            pixels, _ = student.vae.decode(latents)
            image, _ = student.vae.encode(pixels[:, -9:-8])
        made.append(to_video(pixels[0]).numpy())
        start = torch.cat((image, latents[:, -2:]), dim=1)
    expected = np.concatenate([segment[:-9] for segment in made])
    stream = opened(mode="overlap", segment=9)
    chunks = [stream.next_chunk() for _ in range(6)]
    assert [len(chunk) for chunk in chunks] == [9, 12, 12, 12, 12, 12]
    assert distance(np.concatenate(chunks), expected[:69]) <= LEVEL
    assert stream.latents_done == 18


def test_overlapping_segments_stop_and_go_on(student: Student, opened: Any) -> None:
    whole, stream = video(opened(mode="overlap", segment=6), 5), opened(mode="overlap", segment=6)
    groups = overlapped(stream, 2)
    first = [next(groups) for _ in range(5)]
    restored = student.restore(stream.snapshot())
    rest = video(restored, 4)
    restored.close()
    assert np.array_equal(np.concatenate([*first, rest]), whole)


# --- Memory ----------------------------------------------------------------------------------------------------------


def test_memory_is_flat_over_twenty_blocks(opened: Any) -> None:
    """The window is full after three."""
    stream, held = opened(), []
    for block in range(20):
        stream.next_chunk()
        if block in (5, 12, 19):
            rotary._table.cache_clear()  # a bounded cache of the process, not the stream's
            held.append((stream.held_bytes, live_tensor_bytes()))
    assert held[0] == held[1] == held[2]


def live_tensor_bytes() -> int:
    """Of every tensor in the process, each storage once."""
    storages = {}
    for thing in gc.get_objects():
        if type(thing) in (Tensor, torch.nn.Parameter):
            storages[thing.untyped_storage().data_ptr()] = thing.untyped_storage().nbytes()
    return sum(storages.values())


def test_bytes_are_known_before_a_stream_is_opened(student: Student, opened: Any) -> None:
    planned = student.bytes_per_stream(**SIZE)
    stream = opened()
    cache = stream.generator.cache
    video(stream, 3)
    assert planned.kv_cache == sum(tensor.nbytes for tensor in (cache.keys, cache.values, cache.sink_keys))
    assert planned.vae_states == stream._decoder.bytes()
    text = stream.generator._text
    rows = text.score_bias.shape[1]
    assert planned.text == sum(keys.nbytes + values.nbytes for keys, values in text.layers) * 512 // rows
    latents = sum(tensor.nbytes for tensor in stream.generator.history) * (6 + 2 * 3) // 6
    assert planned.history == latents
    assert stream.held_bytes <= planned.total == stream.bytes
    redrawn = opened(redraw=Redraw(0.5))
    redrawn.redraw(np.zeros((9, 32, 32, 3), np.uint8))
    assert redrawn.bytes - stream.bytes == redrawn._encoder.bytes()


class Peak(TorchDispatchMode):
    """Most bytes of tensors that were made inside and alive at once."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.most = 0
        self.seen: set[int] = set()

    def __torch_dispatch__(self, function: Any, types: Any, arguments: Any = (), options: Any = None) -> Any:
        result = function(*arguments, **(options or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor) and tensor.untyped_storage()._cdata not in self.seen:
                self._count(tensor)
        return result

    def _count(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        self.seen.add(key)
        self.now += size
        self.most = max(self.most, self.now)
        weakref.finalize(tensor, self._free, key, size)

    def _free(self, key: int, size: int) -> None:
        self.seen.discard(key)
        self.now -= size


@pytest.mark.parametrize("size", [32, 96])
def test_the_estimate_of_activations_is_of_the_right_size(sharp: Student, size: int) -> None:
    stream = sharp.open(RED, height=size, width=size)
    video(stream, 2)
    with Peak() as peak:
        stream.next_chunk()
    estimate = sharp.bytes_per_stream(size, size).activations
    stream.close()
    assert 0.7 < estimate / peak.most < 1.5


def test_a_budget_admits_what_fits(small_student: Path) -> None:
    one = Student.from_pretrained(small_student).bytes_per_stream(32, 32).total
    student = Student.from_pretrained(small_student, budget=2 * one)
    first, _second = student.open(RED, **SIZE), student.open(BLUE, **SIZE)
    with pytest.raises(NoRoom, match=r"a stream of 32x32 needs .* MB; 2 open streams hold .* of .* MB"):
        student.open("a star", **SIZE)
    first.close()
    assert student.bytes_open == one
    student.open("a star", **SIZE).next_chunk()
    with pytest.raises(ValueError, match="stream: it is closed"):
        first.next_chunk()


def test_a_stream_that_fails_to_open_gives_its_memory_back(student: Student) -> None:
    before = student.bytes_open
    with pytest.raises(ValueError, match="clip: at least"):
        student.open(RED, clip=sprites(3))
    assert student.bytes_open == before


# --- Settings and mistakes -------------------------------------------------------------------------------------------


def test_bfloat16_streams(small_student: Path, opened: Any) -> None:
    half = Student.from_pretrained(small_student, dtype=torch.bfloat16)
    stream = half.open(RED, **SIZE)
    assert stream.generator.cache.keys.dtype == torch.bfloat16
    chunk = stream.next_chunk()
    assert np.abs(chunk.astype(int) - opened().next_chunk()).mean() < 4
    assert half.bytes_per_stream(**SIZE).kv_cache * 2 == opened().student.bytes_per_stream(**SIZE).kv_cache


def test_settings_may_be_overridden(small_student: Path) -> None:
    settings = replace(StudentSettings.read(small_student), window=12, timesteps=(1000.0,))
    student = Student.from_pretrained(small_student, settings=settings)
    stream = student.open(RED, **SIZE)
    video(stream, 4)
    stream.snapshot()
    assert len(stream.generator.cache) == 12


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"height": 40}, "height: must be a multiple of 16 pixels, got 40"),
        ({"width": 8}, "width: must be a multiple of 16 pixels, got 8"),
        ({"mode": "rollin"}, "mode: must be one of rolling, overlap, got 'rollin'"),
        ({"mode": "overlap", "segment": 10}, "segment: must be two or more whole blocks of 3, got 10"),
        ({"mode": "overlap", "segment": 3}, "segment: must be two or more whole blocks of 3, got 3"),
        ({"image": np.zeros((32, 32, 3), np.float32)}, "image, clip: must be uint8"),
        ({"image": np.zeros((2, 32, 32, 3), np.uint8)}, r"image: must be \[H, W, 3\]"),
        ({"image": np.zeros((32, 48, 3), np.uint8), "height": 64}, "the given frames are 32x48"),
        ({"image": np.zeros((32, 32, 3), np.uint8), "redraw": Redraw(0.5)}, "at most one of them"),
    ],
)
def test_mistakes_are_one_line(student: Student, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        student.open(RED, **options)


def test_mistakes_in_redrawing_are_one_line(opened: Any) -> None:
    frames = np.zeros((9, 32, 32, 3), np.uint8)
    with pytest.raises(ValueError, match="the stream was not opened for it"):
        opened().redraw(frames)
    stream = opened(redraw=Redraw(0.5))
    with pytest.raises(ValueError, match=r"uint8 frames \(9, 32, 32, 3\) are due, got uint8 \(12, 32, 32, 3\)"):
        stream.redraw(np.zeros((12, 32, 32, 3), np.uint8))
    stream.next_chunk()
    with pytest.raises(ValueError, match="has made frames without a source"):
        stream.redraw(frames)
    with pytest.raises(ValueError, match=r"noise: must lie in \(0, 1\], got 0"):
        Redraw(0)


def test_a_folder_that_is_no_student_is_named(small_teacher: Path) -> None:
    with pytest.raises(FileNotFoundError, match="not a student"):
        Student.from_pretrained(small_teacher)
