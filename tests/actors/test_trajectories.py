"""The trajectory worker in this process: its states against an Euler loop of the test's own, and what it refuses."""

import json
import shutil
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pyarrow
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from reelway.actors import model_files
from reelway.actors.model_files import check_model, latents_shape, loading_bytes, velocity_digest, weights_bytes
from reelway.actors.teacher import Teacher
from reelway.actors.trajectories import (
    META,
    PROMPT,
    TEXT,
    TRAJECTORY,
    TrajectorySettings,
    TrajectoryWorker,
    batches,
    device_kind,
    equal_ends,
    sample_problems,
    shard_bytes,
)
from reelway.cluster.dataset import DatasetInfo, Quarantined, create_dataset
from reelway.cluster.manifest import ShardPlan, plan
from reelway.cluster.storage import Storage
from reelway.kernels.diffusion.noise import SampleKey, draw_noise
from reelway.kernels.diffusion.sampler import recording_grid
from reelway.kernels.diffusion.schedule import warp
from reelway.kernels.wan.text import TextEncoder

PROMPTS = ["a small red star drifts left over a navy background", "a large blue circle", "two shapes on white"]
RECORD = (*warp([1000, 750, 500, 250], shift=3.0), 0.0)
GUIDANCE = 60.0  # the small teacher hears its prompts only faintly


def settings_of(teacher: Path, changes: dict[str, Any]) -> TrajectorySettings:
    settings = TrajectorySettings(
        seed=5,
        grid=tuple(recording_grid(RECORD, 8, 3.0)),
        record=RECORD,
        shape=(3, 16, 4, 4),
        guidance=GUIDANCE,
        negative_prompt="a large red square",
        batch=2,
        dtype="float32",
        autocast=False,
        text_dim=None,
        device="cpu",
        threads=1,
        device_kind=device_kind("cpu"),
        torch_version=torch.__version__,
        teacher=velocity_digest(teacher),
    )
    return replace(settings, **changes)


def planned(prompts: list[str] = PROMPTS) -> ShardPlan:
    keys = [f"{index:08d}-0000" for index in range(len(prompts))]
    (shard,) = plan(_table(keys, prompts), len(prompts), "test")
    return shard


def _table(keys: list[str], prompts: list[str]) -> Any:
    return pyarrow.table({"key": keys, "prompt": prompts, "sample": list(range(len(prompts)))})


def worker_of(folder: Path, out: Path, **changes: Any) -> TrajectoryWorker:
    storage, settings = Storage.open(out), settings_of(folder, changes)
    create_dataset(storage, DatasetInfo(kind="trajectories", fields=settings.fields(), made_by={}, fingerprint="test"))
    return TrajectoryWorker(folder, storage, settings)


@pytest.fixture(scope="module")
def worker(small_teacher: Path, tmp_path_factory: pytest.TempPathFactory) -> TrajectoryWorker:
    return worker_of(small_teacher, tmp_path_factory.mktemp("set"))


@pytest.fixture(scope="module")
def samples(worker: TrajectoryWorker) -> list[dict[str, Any]]:
    return [dict(sample) for _, sample in worker.samples(planned()) if not isinstance(sample, Quarantined)]


def euler_in_float64(teacher: Teacher, prompt: str, negative: str, noise: Tensor, steps: int) -> dict[float, Tensor]:
    """The guided flow from 1000 to 0 on the shifted grid: two passes apart, each for one clip; the states by t."""
    keys = [teacher.transformer.text_keys(teacher.encoder([text])) for text in (prompt, negative)]
    state, states = noise.double(), {1000.0: noise.double()}
    sigmas = [3 * s / (1 + 2 * s) for s in ((steps - i) / steps for i in range(steps + 1))]
    for sigma, following in pairwise(sigmas):
        levels = torch.full((1, noise.shape[1]), 1000 * sigma)
        with torch.no_grad():
            wanted, unwanted = (teacher.transformer(state.float(), levels, key).double() for key in keys)
        state = state + (following - sigma) * (unwanted + GUIDANCE * (wanted - unwanted))
        states[round(1000 * following, 6)] = state
    return states


# --- What is made ------------------------------------------------------------------------------------------------


def test_states_are_those_of_an_independent_euler_loop_at_the_students_timesteps(
    worker: TrajectoryWorker, samples: list[dict[str, Any]], small_teacher: Path
) -> None:
    teacher = Teacher.from_pretrained(small_teacher, autocast=False)
    for index, (prompt, sample) in enumerate(zip(PROMPTS, samples, strict=True)):
        noise = draw_noise([SampleKey(5, prompt, index)], range(3), (16, 4, 4))
        states = euler_in_float64(teacher, prompt, "a large red square", noise, steps=8)
        assert sample[META]["timesteps"] == pytest.approx([1000, 900, 750, 500, 0], abs=1e-9)
        expected = torch.cat([states[round(t, 6)] for t in sample[META]["timesteps"]])
        found = sample[TRAJECTORY]["latents"]
        assert found.shape == (5, 3, 16, 4, 4)
        torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=1e-4)
        assert torch.equal(found[0], noise[0])
        assert sample[PROMPT] == prompt
        assert (sample[META]["seed"], sample[META]["sample"], sample[META]["steps"]) == (5, index, 8)
    ends = [sample[TRAJECTORY]["latents"][-1] for sample in samples]
    assert float((ends[0] - ends[1]).norm() / ends[0].norm()) > 0.1


def test_a_shard_is_made_in_its_own_batches_the_last_one_shorter(
    worker: TrajectoryWorker, samples: list[dict[str, Any]]
) -> None:
    items = planned().items.to_pylist()
    assert [[item["prompt"] for item in batch] for batch in batches(planned(), 2)] == [PROMPTS[:2], PROMPTS[2:]]
    again = [*worker.make(items[:2]), *worker.make(items[2:])]
    for made, sample in zip(again, samples, strict=True):
        assert not isinstance(made, Quarantined)
        assert torch.equal(made[TRAJECTORY]["latents"], sample[TRAJECTORY]["latents"])


def test_the_negative_prompt_steers(small_teacher: Path, samples: list[dict[str, Any]], tmp_path: Path) -> None:
    other = worker_of(small_teacher, tmp_path, negative_prompt="").make(planned().items.to_pylist()[:1])[0]
    assert not isinstance(other, Quarantined)
    path = samples[0][TRAJECTORY]["latents"]
    assert torch.equal(other[TRAJECTORY]["latents"][0], path[0])
    assert float((other[TRAJECTORY]["latents"][-1] - path[-1]).abs().max()) > 1e-3


def test_both_passes_are_one_batch_and_the_negative_prompt_is_encoded_once(
    small_teacher: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    encoded: list[list[str]] = []
    forward = TextEncoder.forward

    def noted(self: TextEncoder, prompts: Sequence[str]) -> Any:
        encoded.append(list(prompts))
        return forward(self, prompts)

    monkeypatch.setattr(TextEncoder, "forward", noted)
    worker, passes = worker_of(small_teacher, tmp_path), list[int]()
    worker.teacher.transformer.register_forward_pre_hook(lambda _, given: passes.append(len(given[0])))
    list(worker.samples(planned()))
    assert [text for batch in encoded for text in batch].count("a large red square") == 1
    assert encoded[-2:] == [PROMPTS[:2], PROMPTS[2:]]
    assert passes == [4] * 8 + [2] * 8  # of a batch of two prompts, then of one: eight steps each


def test_text_embeddings_are_the_encoders_rows_without_padding(small_teacher: Path, tmp_path: Path) -> None:
    worker = worker_of(small_teacher, tmp_path, text_dim=128, dtype="float16")
    encoder = worker.teacher.encoder
    for made, prompt in zip(worker.make(planned().items.to_pylist()), PROMPTS, strict=True):
        assert not isinstance(made, Quarantined)
        rows, length = made[TEXT]["rows"], len(encoder.tokenizer(prompt).input_ids)
        assert rows.shape == (length, 128)
        torch.testing.assert_close(rows.float(), encoder([prompt]).rows[0, :length], rtol=1e-3, atol=1e-3)
    assert worker.text_rows(PROMPTS) == [len(encoder.tokenizer(prompt).input_ids) for prompt in PROMPTS]


@pytest.mark.parametrize("text_dim", [None, 128])
def test_the_size_of_a_shard_is_known_to_the_byte(small_teacher: Path, tmp_path: Path, text_dim: int | None) -> None:
    worker, shard = worker_of(small_teacher, tmp_path, text_dim=text_dim, dtype="bfloat16"), planned()
    rows = dict(zip(PROMPTS, worker.text_rows(PROMPTS), strict=True))
    row = worker.process(shard)
    assert row["bytes"] == (tmp_path / "shard-000000.tar").stat().st_size == shard_bytes(worker.settings, shard, rows)
    assert (row["samples"], row["quarantined"], row["shard"]) == (3, 0, "shard-000000.tar")
    assert row["began"] <= row["ended"]
    assert shard_bytes(worker.settings, shard, {}) >= row["bytes"]


def test_one_poisoned_prompt_is_quarantined_and_the_others_do_not_suffer(
    small_teacher: Path, samples: list[dict[str, Any]], tmp_path: Path
) -> None:
    """The word 'circle' has no embedding any more; it stands in the second prompt alone."""
    folder = tmp_path / "teacher"
    shutil.copytree(small_teacher, folder)
    file = folder / "text_encoder" / "model.safetensors"
    weights = load_file(file)
    (name,) = (name for name in weights if name in ("shared.weight", "encoder.embed_tokens.weight"))
    word = Teacher.from_pretrained(small_teacher).encoder.tokenizer.convert_tokens_to_ids("circle")
    weights[name][word] = torch.nan
    save_file(weights, file, metadata={"format": "pt"})
    made = dict(worker_of(folder, tmp_path / "set").samples(planned()))
    first, poisoned, third = made.values()
    # The first state is noise, so the first that a network had a hand in is the one that is not finite.
    assert poisoned == Quarantined("the latents are not finite in float32 from timestep 900 on")
    for found, expected in ((first, samples[0]), (third, samples[2])):
        assert not isinstance(found, Quarantined)
        assert torch.equal(found[TRAJECTORY]["latents"], expected[TRAJECTORY]["latents"])


def test_what_the_stored_dtype_cannot_hold_is_quarantined(small_teacher: Path, tmp_path: Path) -> None:
    items = planned().items.to_pylist()[:1]
    (wide,) = worker_of(small_teacher, tmp_path / "wide", guidance=1e12).make(items)
    (half,) = worker_of(small_teacher, tmp_path / "half", guidance=1e12, dtype="float16").make(items)
    assert not isinstance(wide, Quarantined)
    assert isinstance(half, Quarantined)
    assert half.reason == "the latents are not finite in float16 from timestep 900 on"


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({"device_kind": "an abacus"}, r"^device: this worker has cpu .*, the data set is made with an abacus$"),
        ({"torch_version": "0.1"}, r"^torch: this worker has .*, the data set is made with 0\.1$"),
        ({"teacher": "00"}, r"^teacher .*: this worker has [0-9a-f]{64}, the data set is made with 00$"),
    ],
)
def test_a_worker_that_would_make_other_bytes_refuses(
    small_teacher: Path, tmp_path: Path, changes: dict[str, str], line: str
) -> None:
    with pytest.raises(ValueError, match=line):
        worker_of(small_teacher, tmp_path, **changes)


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_a_device_that_is_not_there_is_named() -> None:
    with pytest.raises(ValueError, match=r"^device: this process sees no CUDA device, cuda was asked for$"):
        device_kind("cuda")


# --- What is checked afterwards ----------------------------------------------------------------------------------


def with_path(sample: dict[str, Any], change: Callable[[Tensor], None]) -> dict[str, Any]:
    path = sample[TRAJECTORY]["latents"].clone()
    change(path)
    return {**sample, TRAJECTORY: {"latents": path}}


POISONS: dict[str, Callable[[Tensor], Any]] = {
    "values that are not finite": lambda path: path[3, 0, 0, 0].fill_(torch.nan),
    "the first state's standard deviation is 1.5": lambda path: path[0].mul_(1.5 / path[0].std()),
    "the first state is not this sample's noise": lambda path: path[0].copy_(path[0].flip(0)),
    "two states of the path are equal": lambda path: path[2].copy_(path[1]),
    "the end is constant": lambda path: path[-1].fill_(0.5),
}


@pytest.mark.parametrize("problem", POISONS)
def test_a_poisoned_sample_is_found(worker: TrajectoryWorker, samples: list[dict[str, Any]], problem: str) -> None:
    item = planned().items.to_pylist()[0]
    assert sample_problems(worker.settings, item, samples[0]) == []
    (found,) = sample_problems(worker.settings, item, with_path(samples[0], POISONS[problem]))
    assert found.startswith(problem)


def test_a_sample_under_anothers_label_is_found(worker: TrajectoryWorker, samples: list[dict[str, Any]]) -> None:
    item = planned().items.to_pylist()[1]
    found = " | ".join(sample_problems(worker.settings, item, samples[0]))
    assert "its prompt is 'a small red star" in found
    assert "meta.json says" in found
    assert "not this sample's noise" in found


def test_ends_that_do_not_depend_on_the_prompt_are_found(samples: list[dict[str, Any]]) -> None:
    ends = [(str(i), PROMPTS[i], sample[TRAJECTORY]["latents"][-1]) for i, sample in enumerate(samples)]
    assert equal_ends(ends) == []
    same = ends[0][2] * (1 + 1e-5)
    assert equal_ends([*ends, ("3", "another", same)]) == ["3: ends in the same video as 0, which has another prompt"]
    assert equal_ends([*ends, ("3", PROMPTS[0], same)]) == []


# --- What the files say ------------------------------------------------------------------------------------------


def test_sizes_of_latents_are_those_of_the_vae_and_the_patch(small_teacher: Path) -> None:
    assert latents_shape(small_teacher, 64, 96, 81) == (21, 16, 8, 12)
    with pytest.raises(ValueError, match=r"^clip\.width: must be a multiple of 16 \(the VAE's 8 times .* 2\), got 40$"):
        latents_shape(small_teacher, 32, 40, 81)
    with pytest.raises(ValueError, match=r"^clip\.frames: must be 1 \+ a multiple of 4, got 80$"):
        latents_shape(small_teacher, 32, 32, 80)


def test_a_vae_whose_config_leaves_its_factors_out_has_those_of_wan(small_teacher: Path, tmp_path: Path) -> None:
    shutil.copytree(small_teacher, tmp_path / "teacher")
    path = tmp_path / "teacher/vae/config.json"
    config = json.loads(path.read_text())
    del config["scale_factor_temporal"], config["scale_factor_spatial"]
    path.write_text(json.dumps(config))
    assert latents_shape(tmp_path / "teacher", 480, 832, 81) == (21, 16, 60, 104)


def test_the_digest_follows_the_velocity_and_nothing_else(small_teacher: Path, tmp_path: Path) -> None:
    folder = tmp_path / "copy"
    shutil.copytree(small_teacher, folder)
    assert velocity_digest(folder) == velocity_digest(small_teacher)
    (folder / "vae/config.json").write_text("{}")
    assert velocity_digest(folder) == velocity_digest(small_teacher)
    file = folder / "transformer/diffusion_pytorch_model.safetensors"
    weights = load_file(file)
    weights["proj_out.bias"][0] += 1
    save_file(weights, file)
    assert velocity_digest(folder) != velocity_digest(small_teacher)


def test_hashes_of_large_files_are_remembered_until_they_change(
    small_teacher: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(small_teacher, tmp_path / "copy")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(model_files, "WORTH_CACHING", 0)
    monkeypatch.setattr(model_files, "SETTLED_SECONDS", -1.0)
    first, hashed = velocity_digest(tmp_path / "copy"), []
    counted = model_files._hash
    monkeypatch.setattr(model_files, "_hash", lambda file: hashed.append(file.name) or counted(file))
    assert velocity_digest(tmp_path / "copy") == first
    assert hashed == []
    config = tmp_path / "copy/transformer/config.json"
    config.write_text(config.read_text() + " ")
    assert velocity_digest(tmp_path / "copy") != first
    assert hashed == ["config.json"]


def test_a_young_file_is_not_remembered(small_teacher: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(model_files, "WORTH_CACHING", 0)
    monkeypatch.setattr(model_files, "SETTLED_SECONDS", 1e9)
    velocity_digest(small_teacher)
    assert not (tmp_path / "cache").exists()


def test_memory_is_that_of_the_parameters(small_teacher: Path) -> None:
    teacher = Teacher.from_pretrained(small_teacher)
    networks = (teacher.transformer, teacher.encoder, teacher.vae)
    sizes = [4 * sum(p.numel() for p in network.parameters()) for network in networks]
    assert loading_bytes(small_teacher) == pytest.approx(max(2 * sizes[0], sum(sizes)), rel=0.01)
    assert weights_bytes(small_teacher) == pytest.approx(sum(sizes), rel=0.01)


@pytest.mark.parametrize("missing", ["scheduler/scheduler_config.json", "vae/config.json", "transformer"])
def test_a_model_that_is_not_whole_is_named(small_teacher: Path, tmp_path: Path, missing: str) -> None:
    check_model(small_teacher)
    folder = tmp_path / "teacher"
    shutil.copytree(small_teacher, folder)
    if (folder / missing).is_dir():
        for file in (folder / missing).glob("*.safetensors"):
            file.unlink()
    else:
        (folder / missing).unlink()
    with pytest.raises(FileNotFoundError, match=rf"^{folder / missing}: no "):
        check_model(folder)
