"""`reelway trajectories`: prompts in, shards out, whatever happens in between."""

import json
import random
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import ray
import torch
import typer
from safetensors.torch import load_file, save_file

from reelway.actors.model_files import weights_bytes
from reelway.actors.trajectories import TRAJECTORY, TrajectoryWorker
from reelway.cluster.dataset import claim, decode_sample, read_dataset, read_samples
from reelway.cluster.manifest import read_manifest
from reelway.cluster.pool import PoolReport, Quarantined
from reelway.cluster.pool_host import Failure
from reelway.cluster.preflight import Node, Requirements
from reelway.cluster.session import Session
from reelway.cluster.shards import verify
from reelway.cluster.storage import Storage
from reelway.pipelines import trajectories
from reelway.pipelines.making import PoolOptions, known_kind

ROOT = Path(__file__).parents[2]
PROMPTS = ["a small red star", "a large blue circle", "two shapes on white", "a small red star", "", "a green square"]
SMALL = ["clip.height=32", "clip.width=32", "clip.frames=9", "trajectories.minimum_steps=4"]
SMALL += ["trajectories.batch=2", "trajectories.per_shard=3", "student.window=6"]
SHARDS = ["shard-000000.tar", "shard-000001.tar", "shard-000002.tar"]  # of 4 prompts with 2 samples each


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    path = tmp_path / "prompts.txt"
    path.write_text("\n".join(PROMPTS))
    return path


Call = Callable[..., int]


def call(teacher: Path, out: Path, *arguments: object, changes: tuple[str, ...] = ()) -> int:
    """The command in this process; its exit code."""
    return run("--teacher", teacher, "--out", out, "--samples", 2, *arguments, changes=(*SMALL, *changes))


def run(*arguments: object, changes: tuple[str, ...] = ()) -> int:
    command = [*arguments, *(part for change in changes for part in ("--set", change))]
    try:
        status = trajectories.app([str(part) for part in command], standalone_mode=False)
    except typer.Exit as end:
        return end.exit_code
    return int(status or 0)


@pytest.fixture
def no_ray(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    return without_ray(monkeypatch)


def without_ray(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The pool replaced by one worker in this process; the names of the shards that were asked of it."""
    asked: list[str] = []

    def run_here(worker: Any, items: Any, pool: Any, on_result: Any, *, on_quarantine: Any) -> PoolReport[Any]:
        report, built = PoolReport[Any](workers_started=1, most_workers=1), worker()
        for index, shard in enumerate(items):
            asked.append(shard.name)
            try:
                on_result(shard, built.process(shard))
                report.done += 1
            except ValueError as error:
                failure = Failure(type(error).__name__, str(error))
                on_quarantine(Quarantined(index, shard, failure, 1, "here"))
                report.failed += 1
        return report

    @contextmanager
    def session(address: str | None, **_: Any) -> Iterator[Session]:
        yield Session("nowhere", True, ())

    monkeypatch.setattr(trajectories, "run_pool", run_here)
    monkeypatch.setattr(trajectories, "start_or_join", session)
    return asked


@pytest.fixture(scope="module")
def made(small_teacher: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished set of 4 prompts with 2 samples each; not to be changed."""
    folder = tmp_path_factory.mktemp("made")
    source = folder / "prompts.txt"
    source.write_text("\n".join(PROMPTS))
    with pytest.MonkeyPatch.context() as patch:
        without_ray(patch)
        assert call(small_teacher, folder / "set", "--prompts", source) == 0
    return folder / "set"


def content(out: Path, names: tuple[str, ...] = ("*.tar", "shard-*.json", "manifest.parquet")) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for pattern in names for path in sorted(out.glob(pattern)) if path.is_file()}


def samples_of(out: Path, name: str) -> dict[str, dict[str, Any]]:
    with (out / name).open("rb") as file:
        return {key: decode_sample(name, key, fields) for _, key, fields in read_samples(file, name)}


# --- What is made ------------------------------------------------------------------------------------------------


def test_a_set_holds_every_prompt_and_sample_once(made: Path) -> None:
    samples = {key: sample for name in SHARDS for key, sample in samples_of(made, name).items()}
    texts = ["a small red star", "a large blue circle", "two shapes on white", "a green square"]
    expected = [(f"{index:08d}-{sample:04d}", text, sample) for index, text in enumerate(texts) for sample in (0, 1)]
    assert [(key, sample["prompt.txt"], sample["meta.json"]["sample"]) for key, sample in samples.items()] == expected
    for sample in samples.values():
        assert sample[TRAJECTORY]["latents"].shape == (5, 3, 16, 4, 4)
        assert sample[TRAJECTORY]["latents"].dtype == torch.float16
        assert sample["meta.json"]["timesteps"] == pytest.approx([1000, 900, 750, 500, 0], abs=1e-9)
    first, second = (samples[f"00000000-000{index}"][TRAJECTORY]["latents"] for index in (0, 1))
    assert not torch.equal(first[0], second[0])
    assert verify(Storage.open(made)) == []
    info = read_dataset(Storage.open(made))
    assert (info.kind, info.made_by["threads"], info.made_by["torch"]) == ("trajectories", 1, torch.__version__)
    assert [row.samples for row in read_manifest(Storage.open(made))] == [3, 3, 2]


def test_a_finished_set_is_left_alone_at_once(
    made: Path, small_teacher: Path, prompts: Path, no_ray: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    before = {path.name: path.stat().st_mtime_ns for path in made.iterdir()}
    assert call(small_teacher, made, "--prompts", prompts) == 0
    assert no_ray == []
    assert {path.name: path.stat().st_mtime_ns for path in made.iterdir()} == before
    output = capsys.readouterr()
    assert f"{made}: all shards are there already" in output.out
    assert "3 shards, 8 samples, 0 quarantined" in output.out
    assert "prompts: 1 dropped" in output.err


def test_what_is_missing_is_made_again_with_the_same_bytes(
    made: Path, small_teacher: Path, prompts: Path, no_ray: list[str], tmp_path: Path
) -> None:
    """A tar that is gone, a shard that was killed before its record, a torn tar, a manifest that was never written."""
    out, expected = tmp_path / "set", content(made)
    shutil.copytree(made, out)
    (out / SHARDS[0]).unlink()
    (out / "shard-000001.json").unlink()
    (out / SHARDS[2]).write_bytes((out / SHARDS[2]).read_bytes()[:-2048])
    (out / "manifest.parquet").unlink()
    assert call(small_teacher, out, "--prompts", prompts) == 0
    assert no_ray == SHARDS
    assert content(out) == expected
    (out / "manifest.parquet").unlink()
    assert call(small_teacher, out, "--prompts", prompts) == 0
    assert no_ray == SHARDS  # nothing more was made
    assert content(out) == expected


def test_a_shard_that_cannot_be_made_is_no_success(
    made: Path,
    small_teacher: Path,
    prompts: Path,
    no_ray: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    make = TrajectoryWorker.make

    def fail_sometimes(self: TrajectoryWorker, items: Any) -> Any:
        if any(item["prompt"] == "two shapes on white" for item in items):
            raise ValueError("the sky fell")
        return make(self, items)

    monkeypatch.setattr(TrajectoryWorker, "make", fail_sometimes)
    assert call(small_teacher, tmp_path / "set", "--prompts", prompts) == 1
    output = capsys.readouterr().out
    assert "1 of 3 shards could not be made" in output
    assert "shard-000001.tar: ValueError: the sky fell (attempts: 1, here)" in output
    assert not (tmp_path / "set/manifest.parquet").exists()
    monkeypatch.setattr(TrajectoryWorker, "make", make)
    assert call(small_teacher, tmp_path / "set", "--prompts", prompts) == 0
    assert no_ray == [*SHARDS, SHARDS[1]]
    assert content(tmp_path / "set") == content(made)


def test_poisoned_samples_are_counted_and_named(
    small_teacher: Path, prompts: Path, no_ray: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A teacher to whom the word 'circle' means NaN; then one that has nothing but NaN."""
    folder, out = tmp_path / "teacher", tmp_path / "set"
    shutil.copytree(small_teacher, folder)
    file = folder / "text_encoder/model.safetensors"
    weights = load_file(file)
    (name,) = (name for name in weights if name in ("shared.weight", "encoder.embed_tokens.weight"))
    words = json.loads((folder / "tokenizer/tokenizer.json").read_text())["model"]["vocab"]
    weights[name][words["circle"]] = torch.nan
    save_file(weights, file, metadata={"format": "pt"})
    assert call(folder, out, "--prompts", prompts, "--validate") == 0
    output = capsys.readouterr()
    assert "3 shards, 6 samples, 2 quarantined" in output.out
    assert "6 samples sound, 0 problems" in output.out
    assert "warning: 2 samples could not be made:" in output.err
    assert "  00000001-0000: the latents are not finite in float16 from timestep 900 on" in output.err
    assert sum(row.quarantined for row in read_manifest(Storage.open(out))) == 2
    weights[name].fill_(torch.nan)
    save_file(weights, file, metadata={"format": "pt"})
    assert call(folder, tmp_path / "none", "--prompts", prompts) == 1
    assert "not one sample could be made" in capsys.readouterr().err


def test_two_jobs_do_not_share_a_folder(small_teacher: Path, prompts: Path, no_ray: list[str], tmp_path: Path) -> None:
    held = claim(Storage.open(tmp_path / "set"), "another job")
    with held, pytest.raises(ValueError, match=r"another job is writing here: another job on .*, pid"):
        call(small_teacher, tmp_path / "set", "--prompts", prompts)
    assert no_ray == []


def test_ctrl_c_says_what_is_kept(
    small_teacher: Path,
    prompts: Path,
    no_ray: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    run_here = trajectories.run_pool

    def interrupted(worker: Any, items: Any, *rest: Any, **more: Any) -> PoolReport[Any]:
        report = run_here(worker, items[:1], *rest, **more)
        report.interrupted = True
        return report

    monkeypatch.setattr(trajectories, "run_pool", interrupted)
    assert call(small_teacher, tmp_path / "set", "--prompts", prompts) == 130
    assert f"Whole shards are kept in {tmp_path / 'set'}; the same command goes on" in capsys.readouterr().err
    assert not (tmp_path / "set/manifest.parquet").exists()

    def at_once(*_: Any, **__: Any) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr(trajectories, "run_pool", at_once)
    assert call(small_teacher, tmp_path / "set", "--prompts", prompts) == 130
    assert "the same command goes on" in capsys.readouterr().err
    monkeypatch.setattr(trajectories, "run_pool", run_here)
    assert call(small_teacher, tmp_path / "set", "--prompts", prompts) == 0
    assert no_ray == SHARDS


# --- The shipped teacher -------------------------------------------------------------------------------------------


def test_the_documented_command_runs_on_the_shipped_teacher(
    no_ray: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """As `docs/trajectories.md` has it, with two prompts and short paths."""
    monkeypatch.chdir(ROOT)
    text = (ROOT / "docs/trajectories.md").read_text()
    line = re.search(
        r"^ +reelway trajectories (--teacher assets/tiny --sprites )\d+( --out )runs/trajectories$", text, re.M
    )
    assert line is not None
    words = f"{line[1]}2{line[2]}{tmp_path / 'set'}".split()
    assert run(*words, "--validate", changes=("clip.frames=9", "student.window=6", "trajectories.minimum_steps=4")) == 0
    output = capsys.readouterr().out
    assert "1 shard, 2 samples, 0 quarantined" in output
    assert "2 samples sound, 0 problems" in output
    assert (tmp_path / "set/validate.png").exists()


# --- Options -----------------------------------------------------------------------------------------------------


def test_limit_and_sprites_choose_prompts(
    small_teacher: Path, prompts: Path, no_ray: list[str], tmp_path: Path
) -> None:
    assert call(small_teacher, tmp_path / "limited", "--prompts", prompts, "--limit", 1) == 0
    (row,) = read_manifest(Storage.open(tmp_path / "limited"))
    assert (row.samples, row.first_key, row.last_key) == (2, "00000000-0000", "00000000-0001")
    assert (
        call(small_teacher, tmp_path / "sprites", "--sprites", 2, changes=("trajectories.text_embeddings=true",)) == 0
    )
    samples = samples_of(tmp_path / "sprites", SHARDS[0])
    assert len({sample["prompt.txt"] for sample in samples.values()}) == 2
    assert all(sample["text.safetensors"]["rows"].shape[1] == 128 for sample in samples.values())


def test_a_share_of_a_gpu_that_is_too_small_for_the_teacher_is_refused_before_anything_starts(
    small_teacher: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On this machine, as if it had a GPU; the pool asks for whatever the teacher's files need."""
    size = weights_bytes(small_teacher)
    machine = Node("here", cpus=2, gpus=1, memory=64 << 30, gpu_memory=3 * size)
    monkeypatch.setattr("reelway.cluster.session.this_machine", lambda *_: machine)
    monkeypatch.setattr(trajectories, "known_kind", lambda *_: "a GPU")
    arguments = ("--sprites", 2, "--device", "cuda", "--gpus-per-worker", 0.25)
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    refused = r"^1 worker with 0\.25 GPUs: the weights take 0\.0 GiB of GPU memory, there are 0\.0 GiB$"
    with pytest.raises(ValueError, match=refused):
        call(small_teacher, tmp_path / "set", *arguments)
    assert not (tmp_path / "set").exists()


@pytest.mark.parametrize("embeddings", ["false", "true"])
def test_a_dry_run_says_what_the_real_one_makes_and_writes_nothing(
    small_teacher: Path,
    prompts: Path,
    no_ray: list[str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    embeddings: str,
) -> None:
    out, changes = tmp_path / "set", (f"trajectories.text_embeddings={embeddings}",)
    arguments = ["--prompts", prompts, "--dry-run", "--cost-per-hour", 3600, "--workers", "1:2"]
    assert call(small_teacher, out, *arguments, changes=changes) == 0
    before = capsys.readouterr().out
    assert not out.exists()
    assert call(small_teacher, out, "--prompts", prompts, changes=changes) == 0
    capsys.readouterr()
    written = sum(path.stat().st_size for path in out.glob("*.tar"))
    assert "prompts: 4; samples: 8" in before
    assert "shards: 3; done already: 0" in before
    assert f"bytes: {written:,} (0.0 GiB); still to write: {written:,}" in before
    hours, cost = (float(re.search(pattern, before)[1]) for pattern in (r"time: ([\d.e-]+) dev", r"cost: ([\d.]+) at"))
    assert 0 < hours < 0.1
    assert cost == pytest.approx(hours * 3600, abs=0.01, rel=0.01)
    size = (out / SHARDS[1]).stat().st_size
    (out / SHARDS[1]).unlink()
    files = content(out, ("*",))
    assert call(small_teacher, out, *arguments, changes=changes) == 0
    after = capsys.readouterr().out
    assert "done already: 2" in after
    assert f"still to write: {size:,}" in after
    assert content(out, ("*",)) == files


def test_validate_draws_a_sheet_and_finds_what_was_tampered_with(
    made: Path,
    small_teacher: Path,
    prompts: Path,
    no_ray: list[str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    from PIL import Image

    out = tmp_path / "set"
    shutil.copytree(made, out)
    assert call(small_teacher, out, "--prompts", prompts, "--validate") == 0
    assert "8 samples sound, 0 problems" in capsys.readouterr().out
    with Image.open(out / "validate.png") as sheet:
        assert sheet.height > 6 * 64
    tar = bytearray((out / SHARDS[1]).read_bytes())
    end = samples_of(out, SHARDS[1])["00000002-0000"][TRAJECTORY]["latents"][-1].numpy().tobytes()
    start = tar.index(end)
    tar[start : start + 2] = b"\x00\x7e"  # NaN in float16
    (out / SHARDS[1]).write_bytes(tar)
    assert call(small_teacher, out, "--prompts", prompts, "--validate") == 1
    output = capsys.readouterr().out
    assert "shard-000001.tar: 00000002-0000: values that are not finite" in output
    assert "7 samples sound, 1 problem" in output


# --- A million prompts ---------------------------------------------------------------------------------------------

LEAN = """
import sys
from reelway.pipelines import trajectories
print([name for name in ("transformers", "diffusers") if name in sys.modules])
"""
PLAN = """
import sys
from pathlib import Path
from rich.console import Console
from reelway.cluster.storage import Storage
from reelway.pipelines.recipe import TINY, load_recipe
from reelway.pipelines.trajectories import choose_prompts
from reelway.pipelines.trajectory_job import Order, plan_job

source, teacher, out = map(Path, sys.argv[1:])
recipe = load_recipe(TINY)
order = Order(recipe, teacher, choose_prompts(recipe, source, None, None, Console()), Storage.open(out))
job = plan_job(order, "cpu")
left = job.pending()
peak = next(line.split()[1] for line in Path("/proc/self/status").read_text().splitlines() if "VmHWM" in line)
print(job.samples, len(left), job.bytes(left), peak)
"""


def python(script: str, *arguments: object) -> list[str]:
    """The words that a script prints, in a process of its own."""
    command = [sys.executable, "-c", script, *map(str, arguments)]
    return subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout.split()


def test_the_driver_does_without_the_networks_libraries() -> None:
    """0.3 GB and seconds; it plans, and workers make."""
    assert python(LEAN) == ["[]"]


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("suffix", [".txt", ".jsonl"])
def test_a_million_prompts_are_planned_in_a_gigabyte(suffix: str, small_teacher: Path, tmp_path: Path) -> None:
    words = "a small red star drifts slowly to the left over a navy background while a large green ring waits, take"
    lines = (f"{words} {index}" for index in range(1_000_000))
    with (tmp_path / f"prompts{suffix}").open("w") as file:
        file.writelines(f"{line}\n" if suffix == ".txt" else f'{{"prompt": "{line}"}}\n' for line in lines)
    samples, shards, size, peak = map(int, python(PLAN, file.name, small_teacher, tmp_path / "set"))
    assert (samples, shards) == (1_000_000, 15_625)
    assert size > samples * 5 * 21 * 16 * 8 * 8 * 2
    assert peak < 1_000_000  # kB


# --- Mistakes ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "changes", "line"),
    [
        (["--prompts", "none.txt"], (), r"^none\.txt: no such prompts"),
        ([], (), r"^--prompts, --sprites: exactly one of them is needed$"),
        (["--sprites", "2"], ("clip.width=40",), r"^clip\.width: must be a multiple of 16 .*, got 40$"),
        (["--sprites", "2"], ("clip.frames=10",), r"^clip\.frames: must be 1 \+ a multiple of 4, got 10$"),
        (["--sprites", "2"], ("clip.frames=13",), r"^clip\.frames: 13 frames are 4 latent frames: "),
        (["--sprites", "2"], ("student.timesteps=[1000, 777.7]",), r"^record: no grid of 4 to 8 steps with shift 3"),
        (["--sprites", "2"], ("trajectories.nope=1",), r"trajectories\.nope: "),
        (["--sprites", "2", "--workers", "two"], (), r"^--workers: must be N or MIN:MAX, got 'two'$"),
        (
            ["--sprites", "2", "--workers", "3:2"],
            (),
            r"^--workers: must be at least 1, and MAX at least MIN, got '3:2'$",
        ),
        (["--sprites", "2", "--workers", "0"], (), r"^--workers: must be at least 1, and MAX at least MIN, got '0'$"),
        (
            ["--sprites", "2", "--cpus-per-worker", "-1"],
            (),
            r"^--cpus-per-worker: must be a number of at least 0, got -1$",
        ),
        (
            ["--sprites", "2", "--gpus-per-worker", "nan"],
            (),
            r"^--gpus-per-worker: must be a number of at .*, got nan$",
        ),
        (
            ["--sprites", "2", "--accelerator-type", "A100"],
            (),
            r"^--accelerator-type: .* for --device cuda, got 'A100'$",
        ),
        (["--sprites", "2", "--device", "tpu"], (), r"^--device: must be cpu or cuda, got 'tpu'$"),
    ],
)
def test_a_mistake_is_one_clear_line(
    small_teacher: Path, no_ray: list[str], tmp_path: Path, arguments: list[str], changes: tuple[str, ...], line: str
) -> None:
    with pytest.raises((ValueError, FileNotFoundError), match=line) as caught:
        call(small_teacher, tmp_path / "set", *arguments, changes=changes)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "set").exists()


def test_a_file_is_no_place_for_a_set(small_teacher: Path, no_ray: list[str], tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(NotADirectoryError, match=rf"^{tmp_path}/file: is a file; a data set's folder is needed$"):
        call(small_teacher, tmp_path / "file", "--sprites", 1)


def test_a_teacher_that_is_not_there_is_named(no_ray: list[str], tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=rf"^{tmp_path}/none/transformer/config\.json: no such file"):
        call(tmp_path / "none", tmp_path / "set", "--sprites", 1)


@pytest.mark.parametrize(
    ("arguments", "changes", "line"),
    [
        ([], ("trajectories.guidance=2.5",), r"trajectories\.guidance is 4\.0 there and 2\.5 here"),
        ([], ("student.timesteps=[1000, 500]",), r"timesteps is \[.* there and \[.* here"),
        (["--threads", "2"], (), r"threads is 1 there and 2 here"),
        (["--limit", "1"], (), r"prompts\.count is 4 there and 1 here"),
    ],
)
def test_a_folder_with_another_set_is_refused_and_not_touched(
    made: Path,
    small_teacher: Path,
    prompts: Path,
    no_ray: list[str],
    arguments: list[str],
    changes: tuple[str, ...],
    line: str,
) -> None:
    before = content(made, ("*",))
    with pytest.raises(ValueError, match=rf"^{made}: was made otherwise: {line}; choose another --out$"):
        call(small_teacher, made, "--prompts", prompts, *arguments, changes=changes)
    assert content(made, ("*",)) == before


# --- On Ray ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("workers", [2, *(pytest.param(count, marks=pytest.mark.slow) for count in (1, 3, 4))])
def test_any_number_of_workers_in_any_order_gives_the_same_bytes(
    ray_session: Session,
    made: Path,
    small_teacher: Path,
    prompts: Path,
    tmp_path: Path,
    workers: int,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """With two of them the driver does not know the device, as on a head without a GPU, and has to ask."""
    out, pool, order = tmp_path / "set", trajectories.run_pool, random.Random(workers)
    monkeypatch.setattr(
        trajectories,
        "run_pool",
        lambda worker, items, *rest, **more: pool(worker, order.sample(items, len(items)), *rest, **more),
    )
    if workers == 2:
        monkeypatch.setattr(trajectories, "known_kind", lambda *_: None)
    assert call(small_teacher, out, "--prompts", prompts, "--workers", workers) == 0
    assert content(out) == content(made)
    output = capsys.readouterr()
    assert re.search(rf"made now: 3 shards, 8 samples, .* with up to {min(workers, 3)} worker", output.out)
    assert "trajectories: 3/3 done" in output.err
    assert ray.is_initialized()


def test_a_chosen_type_of_gpu_is_not_taken_from_the_drivers_machine(
    made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "the head's own")
    new, begun = Storage.open(tmp_path / "set"), Storage.open(made)
    assert known_kind(new, "cuda") == "the head's own"
    assert known_kind(new, "cuda", "A100") is None
    assert known_kind(begun, "cuda", "A100") == read_dataset(begun).made_by["device"]
    options = PoolOptions.parse(None, "cuda", None, 1, False, "A100")
    assert (options.requirements(0, 4).accelerator, options.requirements(0, 4).one_kind) == ("A100", True)


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_workers_without_the_device_are_one_line(ray_session: Session) -> None:
    with pytest.raises(ValueError, match=r"^device: this process sees no CUDA device, cuda was asked for$"):
        trajectories.kind_of_workers("cuda", Requirements(cpus=0.5))
