"""Clips become the VAE's own latents, batch by batch, whatever else is in the shard."""

import json
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow
import pytest
import torch
from diffusers import AutoencoderKLWan
from safetensors.torch import load_file, save_file

from reelway.actors.clips import Clip, ClipSettings
from reelway.actors.encoder import Encoder, latents_shape, text_digest, text_dim, vae_digest, vae_folder
from reelway.actors.ingest import CAPTION, LATENTS, META, TEXT, IngestSettings, IngestWorker
from reelway.actors.sources import VideoFolder
from reelway.actors.trajectories import device_kind
from reelway.cluster.dataset import Quarantined
from reelway.cluster.manifest import plan
from reelway.cluster.storage import Storage
from reelway.kernels.clips import Pixels
from reelway.kernels.sprites.render import render
from reelway.kernels.sprites.splits import clip_seed, prompts
from reelway.kernels.wan.text import TextEncoder

VAE = Path(__file__).parents[2] / "assets" / "tiny" / "vae"
CLIP = ClipSettings(16, 64, 64, frames=21, stride=21, minimum_width=16, minimum_height=16)


@pytest.fixture(scope="module")
def clips() -> list[Pixels]:
    """Three clips of 21 frames: more than go through the VAE at once."""
    scenes = prompts("validation", 3, 0, 2)
    return [render(scene, clip_seed("validation", i, 0), 21, level=2, size=64) for i, (_, scene) in enumerate(scenes)]


@pytest.fixture(scope="module")
def encoder() -> Encoder:
    return Encoder.from_pretrained(VAE)


def test_latents_are_the_posterior_s_mean_normalised(encoder: Encoder, clips: list[Pixels]) -> None:
    """Against diffusers' own encoder, which walks a clip in another way."""
    latents = encoder.encode(clips)
    assert (latents.shape, latents.dtype, latents.device.type) == ((3, 6, 16, 8, 8), torch.float16, "cpu")
    vae = AutoencoderKLWan.from_pretrained(str(VAE), torch_dtype=torch.float32)
    pixels = torch.from_numpy(np.stack(clips)).permute(0, 4, 1, 2, 3).float() / 127.5 - 1
    with torch.no_grad():
        mean = vae.encode(pixels).latent_dist.mode()
    center = torch.tensor(vae.config.latents_mean).view(1, -1, 1, 1, 1)
    spread = torch.tensor(vae.config.latents_std).view(1, -1, 1, 1, 1)
    expected = ((mean - center) / spread).transpose(1, 2)
    torch.testing.assert_close(latents.float(), expected, rtol=1e-3, atol=4e-3)  # float16 has 11 bits


def test_a_clip_s_latents_decode_to_the_clip(encoder: Encoder, clips: list[Pixels]) -> None:
    with torch.no_grad():
        pixels, _ = encoder.vae.decode(encoder.encode(clips).float())
    decoded = ((pixels + 1) * 127.5).permute(0, 1, 3, 4, 2).numpy()
    error = np.square(decoded - np.stack(clips).astype(np.float32)).mean()
    assert 10 * np.log10(255**2 / error) > 25


def test_a_batch_is_its_clips(encoder: Encoder, clips: list[Pixels]) -> None:
    together = encoder.encode(clips)
    for clip, latents in zip(clips, together, strict=True):
        torch.testing.assert_close(encoder.encode([clip])[0], latents, rtol=0, atol=4e-3)


def test_text_embeddings_are_a_caption_s_own_rows(small_teacher: Path) -> None:
    encoder = Encoder.from_pretrained(small_teacher, with_text=True)
    captions = ["a small red star", "a large blue disc drifts left over a navy background"]
    text = TextEncoder.from_pretrained(small_teacher, dtype=torch.float32)
    for caption, rows in zip(captions, encoder.embed(captions), strict=True):
        ids, mask = text.tokenize([caption])
        with torch.no_grad():
            expected = text.model(input_ids=ids, attention_mask=mask).last_hidden_state[0]
        assert rows.shape == (len(caption.split()) + 1, text_dim(small_teacher))  # the words and the end token
        torch.testing.assert_close(rows, expected.half(), rtol=1e-2, atol=2e-3)


@pytest.fixture(scope="module")
def teacher(small_teacher: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that has the shipped VAE."""
    folder = tmp_path_factory.mktemp("model") / "teacher"
    shutil.copytree(small_teacher, folder)
    shutil.copytree(VAE, folder / "vae", dirs_exist_ok=True)
    return folder


def test_a_vae_is_found_alone_or_in_a_model(teacher: Path, tmp_path: Path) -> None:
    assert vae_folder(VAE) == VAE
    assert vae_folder(teacher) == teacher / "vae"
    assert vae_digest(VAE) == vae_digest(teacher)
    assert latents_shape(VAE, 64, 96, 81) == (21, 16, 8, 12)
    with pytest.raises(FileNotFoundError, match="neither a VAE's folder nor a model's"):
        vae_folder(tmp_path)
    (tmp_path / "config.json").write_bytes((VAE / "config.json").read_bytes())
    with pytest.raises(FileNotFoundError, match=r"no \.safetensors"):
        vae_folder(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ValueError, match="not valid JSON"):
        vae_folder(tmp_path)
    with pytest.raises(FileNotFoundError, match="a whole model, not a VAE alone"):
        text_dim(VAE)
    with pytest.raises(ValueError, match=r"clip\.width: must be a multiple of the VAE's 8, got 60"):
        latents_shape(VAE, 64, 60, 81)
    with pytest.raises(ValueError, match=r"clip\.frames: must be 1 \+ a multiple of 4, got 80"):
        latents_shape(VAE, 64, 64, 80)


def test_a_digest_tells_one_model_from_another(small_teacher: Path, tmp_path: Path) -> None:
    shutil.copytree(small_teacher, tmp_path / "model")
    assert text_digest(tmp_path / "model") == text_digest(small_teacher)
    (weights,) = (tmp_path / "model" / "vae").glob("*.safetensors")
    tensors = load_file(weights)
    name = sorted(tensors)[0]
    tensors[name] = tensors[name] + 1
    save_file(tensors, weights)
    (tmp_path / "model" / "tokenizer" / "extra.json").write_text("{}")
    assert vae_digest(tmp_path / "model") != vae_digest(small_teacher)
    assert text_digest(tmp_path / "model") != text_digest(small_teacher)


# --- The worker ----------------------------------------------------------------------------------------------------

SETTINGS = IngestSettings(
    clip=CLIP,
    batch=2,
    shape=(6, 16, 8, 8),
    text_dim=None,
    device="cpu",
    threads=1,
    device_kind=device_kind("cpu"),
    torch=torch.__version__,
    vae=vae_digest(VAE),
    text=None,
)
OUTCOMES = "cqccqqcc"  # of a shard's items: a clip, or quarantined


class Ahead:
    """In the place of the processes that decode."""

    def __init__(self, clips: Sequence[Pixels]) -> None:
        self.clips = clips

    def outcomes(self, jobs: object) -> Iterator[Clip | Quarantined]:
        for index, outcome in enumerate(OUTCOMES):
            frames = self.clips[index % len(self.clips)]
            is_clip = outcome == "c"
            yield Clip(frames, Path("a.mp4"), 0.0, index, "pyav") if is_clip else Quarantined("decode: damaged: it is")


@pytest.fixture
def worker(tmp_path: Path, clips: list[Pixels]) -> IngestWorker:
    made = IngestWorker(VideoFolder.open(str(tmp_path)), VAE, Storage.open(tmp_path / "out"), SETTINGS)
    made.ahead = Ahead(clips)  # type: ignore[assignment]
    return made


def items() -> pyarrow.Table:
    numbers = range(len(OUTCOMES))
    return pyarrow.table(
        {
            "key": [f"a-{number:06d}" for number in numbers],
            "path": ["a.mp4"] * len(OUTCOMES),
            "clip": list(numbers),
            "caption": [f"caption {number}" for number in numbers],
        }
    )


def test_batches_are_of_the_clips_that_give_samples(worker: IngestWorker, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = []
    encode = worker.encoder.encode

    def counted(batch: Sequence[Pixels]) -> torch.Tensor:
        sizes.append(len(batch))
        return encode(batch)

    monkeypatch.setattr(worker.encoder, "encode", counted)
    (shard,) = plan(items(), 8, "f")
    samples = list(worker.samples(shard))
    assert sizes == [2, 2, 1]
    assert [key for key, _ in samples] == shard.keys
    assert ["q" if isinstance(sample, Quarantined) else "c" for _, sample in samples] == list(OUTCOMES)
    third = samples[3][1]
    assert not isinstance(third, Quarantined)
    assert third[CAPTION] == "caption 3"
    assert third[META] == {
        "source": "a.mp4",
        "clip": 3,
        "start_seconds": 3 * 21 / 16,
        "frame_rate": 16,
        "frames": 21,
        "height": 64,
        "width": 64,
    }
    json.dumps(third[META])
    torch.testing.assert_close(third[LATENTS]["latents"], encode([worker.ahead.clips[0]])[0], rtol=0, atol=4e-3)  # type: ignore[attr-defined]


def test_what_is_not_finite_is_quarantined_alone(worker: IngestWorker, monkeypatch: pytest.MonkeyPatch) -> None:
    encode = worker.encoder.encode

    def poisoned(batch: Sequence[Pixels]) -> torch.Tensor:
        latents = encode(batch)
        latents[0, 0, 0, 0, 0] = torch.inf
        return latents

    monkeypatch.setattr(worker.encoder, "encode", poisoned)
    (shard,) = plan(items(), 8, "f")
    reasons = [sample.reason if isinstance(sample, Quarantined) else "" for _, sample in worker.samples(shard)]
    words = ["".join(reason.split(": ")[1:2]) for reason in reasons]
    assert words == ["not-finite", "damaged", "", "not-finite", "damaged", "damaged", "", "not-finite"]


def test_fields_are_what_the_worker_makes(worker: IngestWorker, teacher: Path, tmp_path: Path) -> None:
    assert SETTINGS.fields().keys() == {LATENTS, CAPTION, META}
    wide = replace(SETTINGS, text_dim=text_dim(teacher), text=text_digest(teacher))
    assert wide.fields().keys() == {LATENTS, CAPTION, META, TEXT}
    other = IngestWorker(VideoFolder.open(str(tmp_path)), teacher, Storage.open(tmp_path / "out"), wide)
    other.ahead = worker.ahead
    (shard,) = plan(items(), 8, "f")
    sample = next(sample for _, sample in other.samples(shard))
    assert not isinstance(sample, Quarantined)
    assert sample[TEXT]["rows"].shape == (3, wide.text_dim)  # two words and the end token


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"vae": "0" * 64}, "VAE of"),
        ({"device_kind": "NVIDIA H100"}, "device: this worker has cpu"),
        ({"torch": "1.0"}, "torch: this worker has"),
    ],
)
def test_a_worker_refuses_to_make_other_bytes(tmp_path: Path, changed: dict[str, str], message: str) -> None:
    settings = replace(SETTINGS, **changed)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=message):
        IngestWorker(VideoFolder.open(str(tmp_path)), VAE, Storage.open(tmp_path / "out"), settings)
