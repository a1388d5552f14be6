"""The ablation on small models: every row trained and graded once, its table, and the card of its best student."""

import json
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from rich.console import Console
from typer.testing import CliRunner

from reelway.actors.model_files import velocity_digest
from reelway.cluster.dataset import DatasetInfo, TensorSpec, create_dataset
from reelway.cluster.manifest import merge_manifest, plan
from reelway.cluster.shards import write_shard
from reelway.cluster.storage import Storage
from reelway.kernels.causal.student import StudentSettings
from reelway.kernels.sprites.scores import mean_scores, total
from reelway.pipelines import ablation, card, distill, students
from reelway.pipelines.ablation import Examination, Hosts, run_ablation
from reelway.pipelines.ablation_rows import ROWS, Ablation, Job, carry_out_here, train_rows, with_needs
from reelway.pipelines.ablation_table import COLUMNS, markdown, targets
from reelway.pipelines.recipe import TINY, load_recipe
from reelway.pipelines.sheet import GAP, LINE_HEIGHT

CONSOLE = Console(stderr=True, quiet=True)
SHAPE = (6, 16, 4, 4)  # latents of 21 frames of 32x32
EXAMINATION = Examination(prompts=2, seeds=(0, 1), steps=1, long_prompts=1, long_seconds=10)
TRAINED = [row.name for row in ROWS if row.name != "teacher"]
STUDENTS = [name for name in TRAINED if name != "causal-teacher"]
SETTINGS = [
    *(
        "clip.height=32",
        "clip.width=32",
        "clip.frames=21",
        "trajectories.guidance=2.0",
        "distill.long.rollout_frames=12",
    ),
    *("student.timesteps=[1000, 500]", "student.window=6"),
    *(
        f"{section}.{value}"
        for section in ("causal_teacher", "initialize", "distill.causvid", "distill.self_forcing", "distill.long")
        for value in ("steps=2", "batch=2", "lanes=1", "sheet_every=99")
    ),
    *(f"distill.{method}.critic_updates=1" for method in ("causvid", "self_forcing", "long")),
]


def write_trajectories(folder: Path) -> str:
    """A data set as `reelway trajectories` leaves it; the tiny recipe's shift warps 500 to 750."""
    spec = TensorSpec(shape=(3, *SHAPE), dtype="float16")
    fields = {"trajectory.safetensors": {"latents": spec}, "prompt.txt": {}}
    made_by = {"timesteps": [1000.0, 750.0, 0.0]}
    info = DatasetInfo(kind="trajectories", fields=fields, made_by=made_by, fingerprint="set")
    storage = Storage.open(folder)
    create_dataset(storage, info)
    for shard in plan([f"s{index}" for index in range(4)], 4, "set"):
        generator = torch.Generator().manual_seed(0)
        states = (torch.randn(3, *SHAPE, generator=generator).half() for _ in shard.keys)
        samples = (
            {"trajectory.safetensors": {"latents": one}, "prompt.txt": "a red star drifts left"} for one in states
        )
        write_shard(storage, shard, zip(shard.keys, samples, strict=True))
    merge_manifest(storage)
    return str(folder)


@dataclass(frozen=True)
class Done:
    ablation: Ablation
    figures: dict[str, Any]

    def row(self, name: str) -> dict[str, Any]:
        return next(row for row in self.figures["rows"] if row["name"] == name)

    def origin(self, name: str) -> dict[str, Any]:
        return StudentSettings.read(self.ablation.model(name)).origin

    def cells(self, kind: str) -> list[dict[str, Any]]:
        return [json.loads(path.read_text()) for path in sorted((self.ablation.run / kind / "cells").iterdir())]


@pytest.fixture(scope="module")
def order(sharp_teacher: Path, tmp_path_factory: pytest.TempPathFactory) -> Ablation:
    folder = tmp_path_factory.mktemp("ablation")
    data = write_trajectories(folder / "trajectories")
    recipe = load_recipe(TINY, SETTINGS).model_dump(mode="json")
    return Ablation(recipe, sharp_teacher, data, data, "sprites:train", folder / "run")


@pytest.fixture(scope="module")
def done(order: Ablation) -> Iterator[Done]:
    """All rows, trained for two steps each and graded."""
    before, students.SAMPLES = students.SAMPLES, 1
    carry_out = partial(carry_out_here, device="cpu")
    names = [row.name for row in ROWS]
    yield Done(order, run_ablation(order, EXAMINATION, names, carry_out, Hosts(), CONSOLE))
    students.SAMPLES = before


# --- The table --------------------------------------------------------------------------------------------------------


def lines_of_labels(sheet: Image.Image, strips: int) -> int:
    """How many lines of text stand above so many strips of 32 pixels; whole if that is how many there are."""
    lines, rest = divmod(sheet.height - strips * (32 + 2 * GAP), LINE_HEIGHT)
    assert rest == 0, f"{sheet.height} pixels are no {strips} strips"
    return lines


def test_every_row_has_every_figure(done: Done) -> None:
    for row in done.figures["rows"]:
        assert row["missing"] is None, row["name"]
        table = [json.dumps(row)]
        for head, path in COLUMNS:
            value: Any = row
            for name in path:
                value = value[name]
            has_drift = row["name"] in STUDENTS
            assert (value is not None) == (head != "last / first 5 s" or has_drift), (row["name"], head, table)
    assert json.loads((done.ablation.run / "ablation.json").read_text()) == json.loads(json.dumps(done.figures))
    assert (done.ablation.run / "ablation.md").read_text() == markdown(done.figures)
    sheet = Image.open(done.ablation.run / "ablation.png")
    assert lines_of_labels(sheet, 2 * len(ROWS)) >= 2 * len(ROWS)  # two prompts, a strip per row


def test_the_passes_are_those_of_each_kind(done: Done) -> None:
    """One Euler step with guidance; block by block the clean pass of each block is guided, too."""
    passes = {row["name"]: row["speed"]["forwards_per_block"]["mean"] for row in done.figures["rows"]}
    assert passes.pop("teacher") == 2
    assert passes.pop("causal-teacher") == 2 * 2
    assert set(passes) == set(STUDENTS)
    assert set(passes.values()) == {2.5}  # two blocks of two steps, and a clean pass after the first
    for row in done.figures["rows"]:
        speed = row["speed"]
        assert speed["denoise_frames_per_second"]["mean"] > speed["frames_per_second"]["mean"] > 0


def test_each_row_begins_with_what_it_should(done: Done) -> None:
    digests = {name: velocity_digest(done.ablation.model(name)) for name in ("teacher", *TRAINED)}
    assert len(set(digests.values())) == len(ROWS)
    parents = {
        "ode": "teacher",
        "causal-teacher": "teacher",
        "dmd-without-ode": "teacher",
        "dmd-causal-teacher": "ode",
        "causvid": "ode",
        "self-forcing": "causvid",
        "long": "self-forcing",
    }
    for name, parent in parents.items():
        assert done.origin(name)["parent"]["digest"] == digests[parent], name
    for name in STUDENTS[1:]:
        teacher = "causal-teacher" if name == "dmd-causal-teacher" else "teacher"
        assert done.origin(name)["teacher"] == digests[teacher], name
    assert json.loads((done.ablation.run / "dmd-causal-teacher/recipe.json").read_text())["teacher_is"] == "causal"


def test_models_say_their_size_and_kind(done: Done) -> None:
    for name in TRAINED:
        settings = StudentSettings.read(done.ablation.model(name))
        assert (settings.height, settings.width) == (32, 32)
        assert settings.sampling == ("many-step" if name == "causal-teacher" else "few-step")


def test_a_student_cannot_teach(done: Done, sharp_teacher: Path, tmp_path: Path) -> None:
    job = done.ablation.job("causvid")
    assert isinstance(job, distill.DistillJob)
    wrong = replace(job, teacher=str(done.ablation.model("ode")), run=str(tmp_path))
    with pytest.raises(ValueError, match="a student of few steps cannot teach"):
        carry_out_here(wrong, "cpu")
    nothing = replace(job, student=str(sharp_teacher), teacher=str(done.ablation.model("causal-teacher")))
    with pytest.raises(FileNotFoundError, match="not a student"):
        nothing.student_settings()


def test_total_diversity_and_drift_by_hand(done: Done) -> None:
    clips = {name: [] for name in ("teacher", *TRAINED)}
    report = json.loads((done.ablation.run / "clips/report.json").read_text())
    names = {model["fingerprint"]: name for name, model in report["protocol"]["models"].items()}
    cells = {cell["key"]: cell for cell in done.cells("clips")}
    sweep = ablation.sweep_of(done.ablation, EXAMINATION, list(clips), "clips")
    planned = ablation.make_plan(sweep, "cpu").cells
    for cell in planned:
        clips[names[cell.model.fingerprint]].append(cells[cell.key])
    assert {len(found) for found in clips.values()} == {4}
    for row in done.figures["rows"]:
        scores = [
            {name: value for name, value in cell["scores"]["sprites"].items() if name not in ("total", "quality")}
            for cell in clips[row["name"]]
        ]
        assert row["scores"]["total"]["mean"] == pytest.approx(total(mean_scores(scores)))
    spread = {entry["model"]: entry["diversity_by_prompt"] for entry in report["sets"]}
    for name, prompts in spread.items():
        assert len(prompts) == 2
        share = np.mean(list(prompts.values())) / np.mean(list(spread["teacher"].values()))
        assert done.row(name)["diversity"]["of_teacher"]["mean"] == pytest.approx(share)
    for cell, name in zip(done.cells("rollouts"), range(99), strict=False):
        assert set(cell["ends"]) == {"first", "last"}, name
    ratios = sorted(total(cell["ends"]["last"]) / total(cell["ends"]["first"]) for cell in done.cells("rollouts"))
    assert sorted(done.row(name)["drift"]["mean"] for name in STUDENTS) == pytest.approx(ratios)


def test_targets_say_what_is_met(done: Done) -> None:
    rows = json.loads(json.dumps(done.figures["rows"]))
    for row, value in zip(rows, (0.8, 0.5, 0.6, 0.7, 0.7, 0.75, 0.77, 0.82), strict=True):
        row["scores"]["total"]["mean"] = value
    rows[-1]["total_less_teachers"]["mean"], rows[-1]["drift"]["mean"] = 0.02, 0.96
    rows[-1]["diversity"]["of_teacher"]["mean"] = 0.8
    found = targets(rows)
    assert [target["met"] for target in found] == [True, True, False, True, True, True]
    assert "best student (long)" in found[0]["rule"]
    assert [target["measured"] for target in found[3:]] == pytest.approx([0.15, 0.05, 0.05])
    rows[2]["missing"] = rows[-1]["missing"] = "not trained"
    assert [target["met"] for target in targets(rows)][2:] == [None, None, True, True]


# --- Again, and in parts ----------------------------------------------------------------------------------------------


def test_what_is_finished_is_not_made_again(done: Done) -> None:
    run = done.ablation.run
    kept = [path for path in run.rglob("*") if path.is_file() and path.parent.name in (*TRAINED, "cells", "videos")]
    before = {path: path.stat().st_mtime_ns for path in kept}
    assert len([path for path in kept if path.parent.name == "cells"]) == 4 * len(ROWS) + len(STUDENTS)
    carry_out = partial(carry_out_here, device="cpu")
    again = run_ablation(done.ablation, EXAMINATION, ["teacher", "ode"], carry_out, Hosts(), CONSOLE)
    assert {path: path.stat().st_mtime_ns for path in kept} == before
    assert again == done.figures  # the rows that were not asked for show what they have


def test_a_stage_that_breaks_down_takes_only_what_begins_with_it(order: Ablation, tmp_path: Path) -> None:
    tried = []

    def carry_out(job: Job) -> bool:
        tried.append(Path(job.run).name)
        if tried[-1] == "ode":
            raise FloatingPointError("loss nan")
        return True

    reasons = train_rows(replace(order, run=tmp_path), [row.name for row in ROWS], carry_out, CONSOLE)
    assert tried == ["causal-teacher", "ode", "dmd-without-ode"]
    assert reasons["ode"] == "its training stopped: loss nan"
    assert reasons["causvid"] == reasons["dmd-causal-teacher"] == "needs ode, which is not there"
    assert reasons["long"] == "needs self-forcing, which is not there"
    assert "causal-teacher" not in reasons


def test_only_what_is_needed_is_trained() -> None:
    assert with_needs(["long"]) == ["ode", "causvid", "self-forcing", "long"]
    assert with_needs(["teacher", "dmd-without-ode"]) == ["dmd-without-ode"]
    assert with_needs(["long"], given=["causvid"]) == ["self-forcing", "long"]


def test_rows_that_are_not_there_are_named_with_the_reason(order: Ablation, tmp_path: Path) -> None:
    elsewhere = replace(order, run=tmp_path)
    (tmp_path / "ode").mkdir()
    (tmp_path / "ode/run.json").write_text(json.dumps({"status": "interrupted", "step": 7}))
    figures = run_ablation(elsewhere, EXAMINATION, [], carry_out_nothing, Hosts(), CONSOLE)
    missing = {row["name"]: row["missing"] for row in figures["rows"]}
    assert missing["ode"] == "its training is not finished (interrupted, step 7)"
    assert missing["long"] == "not trained"
    assert missing["teacher"].startswith("not evaluated")
    assert "missing: not trained" in (tmp_path / "ablation.md").read_text()


def carry_out_nothing(job: Job) -> bool:
    raise AssertionError(job)


# --- The command line -------------------------------------------------------------------------------------------------


def arguments(order: Ablation, *more: str) -> list[str]:
    sets = [word for value in SETTINGS for word in ("--set", value)]
    return ["--teacher", str(order.teacher), "--data", order.data, "--run", str(order.run), *sets, *more]


def test_a_dry_run_says_every_command(done: Done) -> None:
    sizes = ["--count", "2", "--steps", "1", "--long-count", "1", "--long-seconds", "10"]
    result = CliRunner().invoke(
        ablation.app, arguments(done.ablation, *sizes, "--dry-run", "--rows", "causvid,teacher")
    )
    assert result.exit_code == 0, result.output
    lines = result.stdout.splitlines()
    assert [line.split(":")[:2] for line in lines[:2]] == [["ode", " finished"], ["causvid", " finished"]]
    assert "reelway distill --method causvid --teacher" in lines[1]
    assert "--set clip.height=32" in lines[1]
    assert lines[2:] == [
        "clips: 8 clips in all; of 2 rows that are there 0 are to make",
        "rollouts: 1 rollouts of 10 s in all; of 1 rows that are there 0 are to make",
    ]


def test_a_users_mistakes(done: Done, small_student: Path) -> None:
    for more, told in (
        (["--rows", "ode,dmd"], "--rows: must be of teacher, causal-teacher, ode"),
        (["--use", "causvid"], "--use: must be ROW=MODEL"),
        (["--use", "teacher=x"], "--use: must be ROW=MODEL"),
        (["--teacher", str(small_student)], "so it is no bidirectional teacher"),
        (["--set", "pretrain=null"], "it needs a section pretrain"),
        (["--set", "causal_teacher.context=clean"], "causal_teacher.context must be noisy"),
    ):
        result = CliRunner().invoke(ablation.app, arguments(done.ablation, *more))
        assert told in str(result.exception), more


# --- The card ---------------------------------------------------------------------------------------------------------


def test_a_card_is_written_beside_a_copy_of_the_best_student(done: Done, tmp_path: Path) -> None:
    out = tmp_path / "student"
    result = CliRunner().invoke(card.app, [str(done.ablation.run), "--row", "long", "--out", str(out)])
    assert result.exit_code == 0, result.output
    assert (out / "student.json").read_bytes() == (done.ablation.model("long") / "student.json").read_bytes()
    text = (out / "README.md").read_text()
    for stage in ("ode", "causvid", "self-forcing", "long"):
        run = json.loads((done.ablation.run / stage / "run.json").read_text())
        assert f"| {stage} | 2 | 2 | " in text
        assert run["fingerprint"] in text
    assert "dmd-without-ode" not in text
    drift, share = done.row("long")["drift"], done.row("long")["diversity"]["of_teacher"]
    assert f"the last 5 s have {drift['mean']:.3f} times the Total of the first" in text
    assert f"spread {share['mean']:.2f} times as far" in text
    scores = json.loads((out / "card/scores.json").read_text())
    assert scores["student"]["scores"] == done.row("long")["scores"]
    assert scores["teacher"]["scores"] == done.row("teacher")["scores"]
    assert str(done.ablation.run) not in json.dumps(scores)
    assert lines_of_labels(Image.open(out / "card/samples.png"), 2 * 2) >= 2 * 2
    assert Image.open(out / "card/curves.png").width > 600


def test_a_card_is_refused_where_there_is_nothing_to_say(done: Done, tmp_path: Path) -> None:
    def refused(*words: str) -> str:
        return str(CliRunner().invoke(card.app, list(words)).exception)

    run = str(done.ablation.run)
    assert "`reelway ablation` writes it" in refused(str(tmp_path))
    assert "--row: must be a student" in refused(run, "--row", "causal-teacher")
    (tmp_path / "notes.txt").write_text("mine")
    assert "holds something that is no student" in refused(run, "--out", str(tmp_path))
    figures = json.loads((Path(run) / "ablation.json").read_text())
    for row in figures["rows"]:
        row["missing"] = "not trained"
    (tmp_path / "ablation.json").write_text(json.dumps(figures))
    assert "no student in it is graded yet" in refused(str(tmp_path))
    assert "--row long: is missing: not trained" in refused(str(tmp_path), "--row", "long")


def test_a_row_trained_elsewhere_is_used(done: Done, tmp_path: Path) -> None:
    given = tmp_path / "model"
    shutil.copytree(done.ablation.model("causvid"), given)
    other = replace(done.ablation, run=tmp_path / "run", given={"causvid": given})
    jobs: list[Job] = []
    train_rows(other, ["self-forcing"], lambda job: jobs.append(job) is None, CONSOLE)
    (job,) = jobs
    assert isinstance(job, distill.DistillJob)
    assert job.student == str(given)
    assert other.is_there("causvid")
    assert not other.is_there("ode")
