"""`reelway evaluate`: every cell once, figures that can be computed again, and a page that stands by itself."""

import json
import os
import re
import shutil
import signal
import threading
import time
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import av
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from rich.console import Console

from reelway.actors.judge import scene_of
from reelway.cluster.session import Session
from reelway.cluster.storage import Storage
from reelway.kernels.causal.student import StudentSettings
from reelway.kernels.sprites import fidelity
from reelway.kernels.sprites.render import render
from reelway.kernels.sprites.scores import mean_scores, total
from reelway.pipelines import evaluate
from reelway.pipelines.cli import main
from reelway.pipelines.evaluation import report as reports
from reelway.pipelines.evaluation.charts import Axis, nice_ticks
from reelway.pipelines.evaluation.examiner import Examiner
from reelway.pipelines.evaluation.makers import load_maker
from reelway.pipelines.evaluation.page import verdict_of
from reelway.pipelines.evaluation.plan import Plan, few_steps, make_plan, model_fingerprint
from reelway.pipelines.evaluation.sets import rendering_seed
from reelway.pipelines.evaluation.sweep import Sweep
from reelway.pipelines.evaluation.tables import RESULT_SCHEMA, GroupScores, group_of

CONSOLE = Console(stderr=True, quiet=True)
ONE = GroupScores(("prompt",), ("exposure",), np.array([[0.5]]), 1)
SMALL = {
    "prompts": [{"source": "sprites:heldout", "count": 2}],
    "clip": {"height": 64, "width": 64},
    "seconds": 0.5,
    "teacher": {"steps": [1]},
}


def sweep_of(models: dict[str, Path], /, **changes: Any) -> Sweep:
    return Sweep.model_validate({**SMALL, "models": models, **changes})


def run_here(plan: Plan, out: Path) -> list[str]:
    """Make what is missing in this process; the keys that were made."""
    storage = Storage.open(out)
    examiner = Examiner(storage, threads=1, workers=1)
    rows = [examiner.process(cell) for cell in evaluate.missing_cells(plan, storage)]
    return [row["key"] for row in rows if row["made"]]


def report_on(plan: Plan, out: Path, **more: Any) -> dict[str, Any]:
    return evaluate.write_report(plan, Storage.open(out), [], CONSOLE, **more)


@pytest.fixture(scope="module")
def models(small_teacher: Path, small_student: Path) -> dict[str, Path]:
    return {"teacher": small_teacher, "student": small_student}


@pytest.fixture(scope="module")
def done(models: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> tuple[Plan, Path]:
    """A sweep of two models, two prompts and two seeds, made and reported."""
    out = tmp_path_factory.mktemp("sweep") / "out"
    plan = make_plan(sweep_of(models, seeds=[0, 1]), "cpu")
    assert len(run_here(plan, out)) == 8
    report_on(plan, out)
    return plan, out


# --- cells --------------------------------------------------------------------------------------------


def test_what_is_done_is_not_made_again(done: tuple[Plan, Path]) -> None:
    plan, out = done
    before = {path: path.stat().st_mtime_ns for path in (out / "cells").iterdir()}
    assert run_here(plan, out) == []
    examiner = Examiner(Storage.open(out), threads=1, workers=1)
    assert examiner.process(plan.cells[0]) == {"key": plan.cells[0].key, "made": False}
    assert {path: path.stat().st_mtime_ns for path in (out / "cells").iterdir()} == before


def test_a_new_model_makes_only_its_own_cells(done: tuple[Plan, Path], models: dict[str, Path], tmp_path: Path) -> None:
    plan, out = done
    other = tmp_path / "other"
    shutil.copytree(models["student"], other)
    settings = StudentSettings.read(other)
    StudentSettings(timesteps=(1000.0, 600.0), shift=3.0, window=6, sink=3, origin=settings.origin).write(other)
    wider = make_plan(sweep_of({**models, "other": other}, seeds=[0, 1]), "cpu")
    missing = evaluate.missing_cells(wider, Storage.open(out))
    assert {cell.model.name for cell in missing} == {"other"}
    assert len(missing) == 4
    assert {cell.key for cell in wider.cells} - {cell.key for cell in missing} == {cell.key for cell in plan.cells}


def test_what_decides_a_video_is_in_its_key_and_nothing_else(models: dict[str, Path]) -> None:
    def keys(**changes: Any) -> set[str]:
        return {cell.key for cell in make_plan(sweep_of(models, **changes), "cpu").cells}

    usual = keys()
    renamed = make_plan(sweep_of({"b": models["student"], "a": models["teacher"]}), "cpu")
    assert {cell.key for cell in renamed.cells} == usual
    assert keys(baseline="student") == usual
    assert usual < keys(seeds=[0, 5])
    changes: list[dict[str, Any]] = [
        {"seconds": 1},
        {"seeds": [5]},
        {"precision": "bfloat16"},
        {"clip": {"height": 32, "width": 32}},
        {"prompts": [{"source": "sprites:heldout", "count": 2, "level": 1}]},
    ]
    for change in changes:
        assert not keys(**change) & usual, change
    assert keys(precision="float32") == usual
    assert not {cell.key for cell in make_plan(sweep_of(models, precision="float32"), "cuda").cells} & usual


def test_a_fingerprint_covers_the_vae_and_the_students_settings(small_student: Path, tmp_path: Path) -> None:
    folder = tmp_path / "student"
    shutil.copytree(small_student, folder)
    prints = [model_fingerprint(small_student), model_fingerprint(folder)]
    assert prints[0] == prints[1]
    for name in ("vae/config.json", "student.json", "scheduler/scheduler_config.json", "transformer/config.json"):
        (folder / name).write_text((folder / name).read_text() + " ")
        prints.append(model_fingerprint(folder))
    assert len(set(prints[1:])) == 5


def test_settings_of_students(models: dict[str, Path]) -> None:
    own = StudentSettings(timesteps=(1000.0, 900.0), shift=5.0)
    assert few_steps(own, None) == few_steps(own, 2) == (1000.0, 900.0)
    assert few_steps(own, 4) == pytest.approx((1000, 937.5, 2500 / 3, 625))
    student = {"steps": [1, 2], "window": [6, 9], "sink": [0, 3], "mode": ["rolling", "overlap", "switch"]}
    plan = make_plan(sweep_of({"student": models["student"]}, student=student), "cpu")
    labels = list(dict.fromkeys(cell.setting.label for cell in plan.cells))
    assert len(labels) == 2 * (2 * 2 * 2 + 1)  # overlapping segments have no window and no sink
    assert "1 step, window 6, sink 0" in labels
    assert "2 steps, window 9, sink 3, prompt switch" in labels
    assert "2 steps, overlapping segments" in labels


def test_several_lengths_are_groups_of_their_own(done: tuple[Plan, Path], models: dict[str, Path]) -> None:
    """Each is compared with the baseline's of the same length; the cells of one length are those of it alone."""
    plan, _ = done
    wider = make_plan(sweep_of(models, seeds=[0, 1], seconds=[0.5, 1]), "cpu")
    labels = dict.fromkeys((cell.model.name, cell.label, cell.frames) for cell in wider.cells)
    assert list(labels) == [
        ("teacher", "1 step, guidance 5, 0.5 s", 9),
        ("teacher", "1 step, guidance 5, 1 s", 17),
        ("student", "2 steps, window 6, sink 3, 0.5 s", 9),
        ("student", "2 steps, window 6, sink 3, 1 s", 17),
    ]
    assert {cell.key for cell in plan.cells} < {cell.key for cell in wider.cells}
    order = list(dict.fromkeys(group_of(cell) for cell in wider.cells))
    found = reports.baseline(wider, order, {group: {"pixels": ONE} for group in order})["differences"]
    pairs = [(entry["model"], entry["setting"], entry["than"]["setting"]) for entry in found]
    assert pairs == [
        ("student", "2 steps, window 6, sink 3, 0.5 s", "1 step, guidance 5, 0.5 s"),
        ("student", "2 steps, window 6, sink 3, 1 s", "1 step, guidance 5, 1 s"),
    ]
    shorter = make_plan(sweep_of(models, seconds=[0.5, 1], teacher={"steps": [1], "seconds": 0.5}), "cpu")
    assert {cell.label for cell in shorter.cells if cell.model.name == "teacher"} == {"1 step, guidance 5"}


def test_a_model_says_where_it_came_from(small_student: Path, tmp_path: Path) -> None:
    folder = tmp_path / "student"
    shutil.copytree(small_student, folder)
    origin = {"method": "distill-causvid", "recipe": "35c6485e3ae03b7e"}
    replace(StudentSettings.read(folder), origin=origin).write(folder)
    plan = make_plan(sweep_of({"student": folder}), "cpu", limit=1)
    empty = pa.Table.from_pylist([], RESULT_SCHEMA)
    assert reports._protocol(reports.Sources(plan, {}, empty, empty))["models"]["student"]["origin"] == origin


def test_a_switch_and_overlapping_segments_run(models: dict[str, Path], tmp_path: Path) -> None:
    changes = {"seconds": 1.0, "student": {"steps": [1], "mode": ["overlap", "switch"]}}
    plan = make_plan(sweep_of({"student": models["student"]}, **changes), "cpu", limit=2)
    overlap, _, switch, _ = plan.cells
    assert run_here(Plan(plan.sweep, [overlap, switch], plan.prompts, plan.models), tmp_path) == [
        overlap.key,
        switch.key,
    ]
    row = json.loads((tmp_path / "cells" / f"{switch.key}.json").read_text())
    assert [shot["start"] for shot in row["shots"]] == [0, 9]
    assert [shot["prompt"] for shot in row["shots"]] == list(switch.graded)
    assert switch.graded[0] != switch.graded[1]
    assert row["frames"] == 17


def test_a_cell_is_a_row_a_video_and_a_strip(done: tuple[Plan, Path]) -> None:
    plan, out = done
    for cell in plan.cells:
        row = json.loads((out / "cells" / f"{cell.key}.json").read_text())
        with av.open(str(out / "videos" / f"{cell.key}.mp4")) as container:
            assert sum(1 for _ in container.decode(video=0)) == row["frames"] == cell.frames == 9
        assert (out / "strips" / f"{cell.key}.webp").read_bytes()[8:12] == b"WEBP"
        speed = row["scores"]["speed"]
        # The teacher's one step with guidance; the student's two steps, and no clean pass after the last block.
        assert speed["forwards_per_block"] == 2
        assert speed["forwards_per_latent"] == 2 / 3
        assert speed["frames_per_second"] == pytest.approx(9 / speed["seconds"])
        assert speed["time_to_first_frame"] <= speed["seconds"]


# --- the report ---------------------------------------------------------------------------------------


def test_the_reports_figures_can_be_computed_from_the_table(done: tuple[Plan, Path]) -> None:
    _, out = done
    report = json.loads((out / "report.json").read_text())
    rows = pq.read_table(out / "results.parquet").to_pylist()
    assert len({row["key"] for row in rows}) == 8
    checked = 0
    for entry in report["scores"]:
        values: dict[str, list[float]] = {}
        for row in rows:
            if all(row[name] == entry[name] for name in ("model", "setting", "judge", "dimension")):
                values.setdefault(row["prompt"], []).append(row["value"])
        means = [float(np.mean(found)) for found in values.values()]
        if entry["judge"] == "sprites" and entry["dimension"] in ("total", "quality", "semantic"):
            continue
        assert entry["mean"] == pytest.approx(np.mean(means), rel=1e-12, abs=1e-15)
        assert entry["count"] == len(means)
        if len(means) == 2:  # the interval of two is all that their mean can be
            assert [entry["low"], entry["high"]] == pytest.approx(sorted(means), rel=1e-9, abs=1e-12)
        checked += 1
    assert checked > 40


def test_a_models_total_is_the_total_of_its_means(done: tuple[Plan, Path]) -> None:
    _, out = done
    report = json.loads((out / "report.json").read_text())
    rows = pq.read_table(out / "results.parquet").to_pylist()
    videos: dict[str, dict[str, float]] = {}
    for row in rows:
        if (row["model"], row["judge"]) == ("student", "sprites"):
            videos.setdefault(row["key"], {})[row["dimension"]] = row["value"]
    expected = total(mean_scores(videos.values()))
    (entry,) = [
        e for e in report["scores"] if (e["model"], e["judge"], e["dimension"]) == ("student", "sprites", "total")
    ]
    assert entry["mean"] == pytest.approx(expected)


def test_figures_of_whole_sets_are_those_of_the_videos(done: tuple[Plan, Path]) -> None:
    """Every video made again, and the measures of sets asked of the videos themselves."""
    plan, out = done
    report = json.loads((out / "report.json").read_text())
    assert {entry["model"] for entry in report["sets"]} == {"teacher", "student"}
    for entry in report["sets"]:
        cells = [cell for cell in plan.cells if cell.model.name == entry["model"]]
        maker = load_maker(cells[0])
        videos = {cell.key: maker.make(cell).video for cell in cells}
        scenes = {cell.prompt.identity: scene_of(cell.prompt.text) for cell in cells}
        assert entry["videos"] == len(videos) == 4
        assert entry["drift_ratio"] is None  # they are too short to have two ends
        for identity, spread in entry["diversity_by_prompt"].items():
            of_prompt = [videos[cell.key] for cell in cells if cell.prompt.identity == identity]
            assert spread == pytest.approx(fidelity.diversity(of_prompt, scenes[identity]), abs=0.02)
        assert entry["diversity"]["mean"] == pytest.approx(np.mean(list(entry["diversity_by_prompt"].values())))
        renderings = [
            render(scenes[cell.prompt.identity], rendering_seed(cell.prompt.text, cell.seed), cell.frames, size=64)
            for cell in cells
        ]
        assert entry["frechet"] == pytest.approx(fidelity.frechet(videos.values(), renderings), rel=1e-3)
    assert "Whole sets" in (out / "report.html").read_text()


def test_a_causal_teacher_is_run_as_a_teacher_block_by_block(small_student: Path, tmp_path: Path) -> None:
    folder = tmp_path / "causal"
    shutil.copytree(small_student, folder)
    replace(StudentSettings.read(folder), sampling="many-step").write(folder)
    plan = make_plan(sweep_of({"causal": folder}, teacher={"steps": [2], "guidance": [1.0, 3.0]}), "cpu", limit=1)
    labels = ["2 steps, guidance 1, block by block", "2 steps, guidance 3, block by block"]
    assert [cell.setting.label for cell in plan.cells] == labels
    made = evaluate.make_here(plan, Storage.open(tmp_path / "out"), 1, CONSOLE)
    assert made.failed == []
    rows = [json.loads((tmp_path / "out/cells" / f"{cell.key}.json").read_text()) for cell in plan.cells]
    assert [row["scores"]["speed"]["forwards_per_block"] for row in rows] == [3, 6]  # two steps and the clean pass


def test_a_video_that_cannot_be_made_here_is_named_and_the_others_are_made(
    models: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan, process = make_plan(sweep_of(models), "cpu", limit=1), Examiner.process

    def broken(self: Examiner, cell: Any) -> Any:
        if cell.model.name == "teacher":
            raise ArithmeticError("no number")
        return process(self, cell)

    monkeypatch.setattr(Examiner, "process", broken)
    made = evaluate.make_here(plan, Storage.open(tmp_path), 1, CONSOLE)
    (line,) = made.failed
    assert line.startswith("teacher, 1 step, guidance 5, seed 0")
    assert line.endswith(": no number")
    assert [cell.model.name for cell in evaluate.missing_cells(plan, Storage.open(tmp_path))] == ["teacher"]


def test_drift_has_a_row_per_second(models: dict[str, Path], tmp_path: Path) -> None:
    plan = make_plan(sweep_of({"student": models["student"]}, seconds=2.0), "cpu", limit=1)
    run_here(plan, tmp_path)
    report = report_on(plan, tmp_path)
    rows = pq.read_table(tmp_path / "drift.parquet").to_pylist()
    exposure = {row["second"]: row["value"] for row in rows if row["dimension"] == "exposure"}
    (curve,) = [entry for entry in report["curves"] if entry["dimension"] == "exposure"]
    assert curve["seconds"] == [0, 1]
    assert curve["mean"] == [exposure[0], exposure[1]]
    assert curve["low"] == [None, None]  # one prompt has no interval
    assert {row["dimension"] for row in rows if row["judge"] == "sprites"} == {"total", "quality", "semantic"}


def test_the_protocol_is_recorded(done: tuple[Plan, Path]) -> None:
    plan, out = done
    protocol = json.loads((out / "report.json").read_text())["protocol"]
    assert protocol["seeds"] == [0, 1]
    assert protocol["models"]["student"]["fingerprint"] == plan.models[1].fingerprint
    assert protocol["models"]["student"]["kind"] == "student"
    assert protocol["prompts"]["sprites:heldout"]["count"] == 2
    assert set(protocol["versions"]) == {"reelway", "torch", "python"}
    assert protocol["sweep"]["clip"]["frame_rate"] == 16


def test_the_worst_videos_come_first(done: tuple[Plan, Path]) -> None:
    plan, out = done
    report = json.loads((out / "report.json").read_text())
    rows = {cell.key: json.loads((out / "cells" / f"{cell.key}.json").read_text()) for cell in plan.cells}
    totals = [rows[entry["key"]]["scores"]["sprites"]["total"] for entry in report["worst"]]
    assert totals == sorted(row["scores"]["sprites"]["total"] for row in rows.values())
    assert all((out / entry["video"]).is_file() for entry in report["worst"])


def test_without_an_oracle_the_odd_one_out_is_the_worst(done: tuple[Plan, Path]) -> None:
    plan, _ = done
    rows = {
        cell.key: {"scores": {"pixels": {"exposure": 0.5 + 0.01 * index}}, "seen": ""}
        for index, cell in enumerate(plan.cells)
    }
    odd = plan.cells[3].key
    rows[odd]["scores"]["pixels"]["exposure"] = 0.95
    empty = pa.Table.from_pylist([], RESULT_SCHEMA)
    found = reports.worst(reports.Sources(plan, rows, empty, empty))
    assert found[0]["key"] == odd
    assert "exposure" in found[0]["why"]


# --- comparisons --------------------------------------------------------------------------------------


def table_of(values: np.ndarray, model: str = "student") -> pa.Table:
    """A results table of one figure: values [prompts, seeds]."""
    nothing = dict.fromkeys(RESULT_SCHEMA.names)
    whose = {"model": model, "setting": "4 steps", "prompt_set": "set", "judge": "pixels", "dimension": "flicker"}
    records = [
        {**nothing, **whose, "key": f"{prompt}-{seed}", "prompt_id": str(prompt), "seed": seed, "value": value}
        for prompt, seeds in enumerate(values)
        for seed, value in enumerate(seeds)
    ]
    return pa.Table.from_pylist(records, RESULT_SCHEMA)


def test_a_real_difference_is_seen_and_noise_is_not() -> None:
    generator = np.random.default_rng(0)
    old = generator.normal(5, 2, (16, 2))
    noise = generator.normal(0, 0.3, (16, 2))
    (quiet,) = reports.against(table_of(old), table_of(old + noise - noise.mean()), "old")["differences"]
    assert not quiet["seen"]
    assert verdict_of(quiet) == ("inside the noise", "noise")
    (real,) = reports.against(table_of(old), table_of(old + noise + 0.5), "old")["differences"]
    assert real["seen"]
    assert real["mean"] == pytest.approx(0.5 + noise.mean())
    assert verdict_of(real) == ("worse", "worse")  # more flicker
    (gain,) = reports.against(table_of(old), table_of(old + noise - 0.5), "old")["differences"]
    assert verdict_of(gain) == ("better", "better")


def test_against_takes_the_prompts_that_both_have() -> None:
    values = np.arange(20.0)[:, None]
    (found,) = reports.against(table_of(values[:12]), table_of(values + 1), "old")["differences"]
    assert (found["count"], found["mean"]) == (12, 1)


def test_against_nothing_in_common_is_one_line() -> None:
    one = np.ones((3, 1))
    with pytest.raises(
        ValueError, match=r"^--against old: no model, setting and prompts in common .* it has other, 4 st"
    ):
        reports.against(table_of(one, "other"), table_of(one), "old")


def test_against_itself_on_the_command_line(
    done: tuple[Plan, Path], models: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _, out = done
    assert command(write_sweep(tmp_path, models, seeds=[0, 1]), "--out", out, "--against", out / "report.json") == 0
    captured = capsys.readouterr()
    assert "8 videos planned, 0 to make" in captured.err
    assert re.search(r"\n0 of \d+ differences from the earlier report lie outside the noise\n", captured.out)


def test_the_baseline_is_compared_on_the_same_prompts(done: tuple[Plan, Path]) -> None:
    _, out = done
    baseline = json.loads((out / "report.json").read_text())["baseline"]
    assert baseline["model"] == "teacher"
    assert {entry["model"] for entry in baseline["differences"]} == {"student"}
    assert not any(entry["seen"] for entry in baseline["differences"])  # of two prompts nothing can be seen
    scores = json.loads((out / "report.json").read_text())["scores"]
    means = {(e["model"], e["dimension"]): e["mean"] for e in scores if e["judge"] == "pixels"}
    for entry in (entry for entry in baseline["differences"] if entry["judge"] == "pixels"):
        name = entry["dimension"]
        assert entry["mean"] == pytest.approx(means["student", name] - means["teacher", name])


# --- the page -----------------------------------------------------------------------------------------


class Page(HTMLParser):
    """Checks that tags are closed in order; collects links and sources."""

    VOID = ("meta", "img", "line", "circle", "polyline", "polygon", "br")

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.links: list[str] = []
        self.pictures: list[str] = []
        self.headings: list[str] = []

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        values = dict(attributes)
        self.links += [values["href"] or ""] if "href" in values else []
        self.pictures += [values["src"] or ""] if "src" in values else []
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag not in self.VOID:
            assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] == "h2":
            self.headings.append(data)


def test_the_page_stands_by_itself(done: tuple[Plan, Path]) -> None:
    _, out = done
    text, page = (out / "report.html").read_text(), Page()
    page.feed(text)
    assert page.open == []
    assert page.links
    assert all((out / link).is_file() for link in page.links)
    assert page.pictures
    assert all(source.startswith("data:image/webp;base64,") for source in page.pictures)
    assert not re.search(r"<script|<link|url\(|@import", text)
    assert {"Scores", "Speed against quality", "Against teacher", "Pictures", "The worst videos", "Protocol"} <= set(
        page.headings
    )
    assert "nan" not in re.sub(r"<[^>]*>", " ", text).lower().split()


def test_prompts_are_text_and_not_markup(models: dict[str, Path], tmp_path: Path) -> None:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text('a <b>bold</b> "cat" & dog\n')
    plan = make_plan(sweep_of({"student": models["student"]}, prompts=[str(prompts)]), "cpu")
    run_here(plan, tmp_path / "out")
    report = report_on(plan, tmp_path / "out")
    assert {entry["judge"] for entry in report["scores"]} == {"pixels", "speed"}
    text = (tmp_path / "out" / "report.html").read_text()
    assert "<b>bold</b>" not in text
    assert "a &lt;b&gt;bold&lt;/b&gt;" in text


def test_axes() -> None:
    assert nice_ticks(0.0, 1.0) == pytest.approx([0, 0.2, 0.4, 0.6, 0.8, 1.0])
    assert nice_ticks(613, 948) == [700, 800, 900]
    axis = Axis(1, 100, 0, 200, logarithmic=True)
    assert axis.place(10) == pytest.approx(100)
    assert axis.ticks() == [1, 2, 5, 10, 20, 50, 100]


# --- VBench -------------------------------------------------------------------------------------------

VBENCH = """#!/bin/sh
while [ $# -gt 0 ]; do
  case $1 in --dimension) dimension=$2 ;; --output_path) out=$2 ;; esac
  shift
done
first='{"video_path": "videos/a bird-0.mp4", "video_results": 0.5}'
second='{"video_path": "videos/a bird-1.mp4", "video_results": 1}'
echo "{\\"$dimension\\": [0.75, [$first, $second]]}" > "$out/results_1_eval_results.json"
"""


def test_vbench_gets_its_folders_and_its_results_are_read(
    models: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    info, out = tmp_path / "VBench_full_info.json", tmp_path / "out"
    info.write_text(json.dumps([{"prompt_en": "a bird", "dimension": ["object_class", "imaging_quality"]}]))
    changes = {"prompts": ["vbench"], "seeds": [3, 9]}
    with pytest.raises(ValueError, match="needs --vbench-info"):
        make_plan(sweep_of({"student": models["student"]}, **changes), "cpu")
    plan = make_plan(sweep_of({"student": models["student"]}, **changes), "cpu", vbench_info=info)
    run_here(plan, out)
    monkeypatch.setenv("PATH", str(tmp_path))
    (without,) = report_on(plan, out, vbench_info=info)["vbench"]
    assert "object_class: not graded" in without["missing"]
    folder = Path(without["folder"])
    assert sorted(path.name for path in (folder / "videos").iterdir()) == ["a bird-0.mp4", "a bird-1.mp4"]
    second = next(cell for cell in plan.cells if cell.seed == 9)
    assert (folder / "videos" / "a bird-1.mp4").samefile(out / "videos" / f"{second.key}.mp4")
    (tmp_path / "vbench").write_text(VBENCH)
    (tmp_path / "vbench").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    (graded,) = report_on(plan, out, vbench_info=info)["vbench"]
    assert graded["raw"] == {"object_class": 0.75, "imaging_quality": 0.75}
    assert (graded["total"], graded["quality"], graded["semantic"]) == (None, None, None)
    assert graded["missing"][:2] == ["imaging_quality: 2 of 5 videos", "object_class: 2 of 5 videos"]
    rows = [row for row in pq.read_table(out / "results.parquet").to_pylist() if row["judge"] == "vbench"]
    assert {(row["seed"], row["dimension"]): row["value"] for row in rows} == {
        (3, "object_class"): 0.5,
        (9, "object_class"): 1.0,
        (3, "imaging_quality"): 0.5,
        (9, "imaging_quality"): 1.0,
    }


def test_extended_prompts_are_given_and_plain_ones_named(models: dict[str, Path], tmp_path: Path) -> None:
    prompts, extended = tmp_path / "prompts.txt", tmp_path / "extended.txt"
    prompts.write_text("a bird\na car\n")
    extended.write_text("a small bird on a branch\na red car in the rain\n")
    entry = {"source": str(prompts), "extended": str(extended)}
    plan = make_plan(sweep_of({"student": models["student"]}, prompts=[entry]), "cpu")
    assert [(cell.prompts[0], cell.graded[0]) for cell in plan.cells] == [
        ("a small bird on a branch", "a bird"),
        ("a red car in the rain", "a car"),
    ]
    extended.write_text("only one\n")
    with pytest.raises(ValueError, match="needs a line for each of 2 prompts, has 1"):
        make_plan(sweep_of({"student": models["student"]}, prompts=[entry]), "cpu")


# --- the command --------------------------------------------------------------------------------------


def command(*arguments: object) -> int:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.argv", ["reelway", "evaluate", *map(str, arguments)])
        with pytest.raises(SystemExit) as stopped:
            main()
    return int(stopped.value.code or 0)


def write_sweep(folder: Path, models: dict[str, Path], /, **changes: Any) -> Path:
    path = folder / "sweep.yaml"
    content = {**SMALL, "models": {name: str(place) for name, place in models.items()}, **changes}
    path.write_text(yaml.safe_dump(content, sort_keys=False))
    return path


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"seed": 3}, "sweep.yaml: seed: Extra inputs are not permitted, got 3"),
        ({"seconds": 0}, "seconds.0: Input should be greater than 0, got 0"),
        ({"models": {}}, "models: Dictionary should have at least 1 item"),
        ({"models": {"a": "nowhere"}}, "models.a: no such folder"),
        ({"models": {"../a": "x"}}, "models.../a"),
        (
            {"prompts": ["sprites:test"]},
            "source: must be one of sprites:heldout, sprites:val, sprites:train, vbench or a",
        ),
        ({"prompts": ["none.txt"]}, "none.txt: no such prompts"),
        ({"prompts": ["sprites:val", "sprites:val"]}, "prompts: each set must have a name of its own, sprites:val"),
        ({"seeds": [1, 1]}, "seeds: each must stand there once"),
        ({"seconds": [1, 1.0]}, "seconds: each must stand there once"),
        ({"seconds": []}, "seconds: Tuple should have at least 1 item"),
        ({"baseline": "nobody"}, "baseline: must be one of teacher, student, got 'nobody'"),
        ({"clip": {"height": 60, "width": 64}}, "clip.height: must be a multiple of"),
        ({"student": {"window": [3], "sink": [3]}}, "student student: window"),
        (
            {"student": {"mode": ["fast"]}},
            "student.mode.0: Input should be 'rolling', 'overlap' or 'switch', got 'fast'",
        ),
    ],
)
def test_wrong_sweeps_are_one_line(
    changes: dict[str, Any], message: str, models: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write_sweep(tmp_path, models, **changes)
    assert command(path, "--out", tmp_path / "out") == 2
    error = capsys.readouterr().err
    assert message in error
    assert len(error.splitlines()) == 1
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [("models: [", "not valid YAML"), ("- a\n", "must be a table of sections, got list"), (None, "no such file")],
)
def test_files_that_are_no_sweep(
    content: str | None, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "sweep.yaml"
    if content is not None:
        path.write_text(content)
    assert command(path, "--out", tmp_path / "out") == 2
    assert message in capsys.readouterr().err


def test_against_needs_the_table_beside_the_report(
    models: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write_sweep(tmp_path, models)
    (tmp_path / "report.json").write_text("{}")
    assert command(path, "--out", tmp_path / "out", "--against", tmp_path / "report.json") == 2
    assert "results.parquet must stand beside the report" in capsys.readouterr().err


def test_a_missing_list_of_vbench_is_told_at_once(
    models: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write_sweep(tmp_path, models)
    assert command(path, "--out", tmp_path / "out", "--vbench-info", tmp_path / "none.json") == 2
    assert "--vbench-info: no such file: " in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_dry_run_counts_and_writes_nothing(
    models: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write_sweep(tmp_path, models, seeds=[0, 1, 2])
    assert command(path, "--out", tmp_path / "out", "--dry-run", "--limit", 1) == 0
    told = capsys.readouterr().out
    assert "6 videos planned, 6 to make" in told
    assert "teacher, 1 step, guidance 5 on sprites:heldout: 3 of 3 to make" in told
    assert not (tmp_path / "out").exists()


def test_an_interrupted_sweep_goes_on_and_makes_each_cell_once(
    ray_session: Session, models: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path, out = write_sweep(tmp_path, models), tmp_path / "out"
    stopper = threading.Thread(target=interrupt_after_first_cell, args=(out / "cells",))
    stopper.start()
    assert command(path, "--out", out) == 130
    stopper.join(120)
    assert "The same command goes on from there." in capsys.readouterr().err
    before = {cell.name: cell.stat().st_mtime_ns for cell in (out / "cells").iterdir()}
    assert 1 <= len(before) < 4
    assert not (out / "report.json").exists()
    assert command(path, "--out", out) == 0
    captured = capsys.readouterr()
    assert f"4 videos planned, {4 - len(before)} to make" in captured.err
    assert "report.html" in captured.out
    after = {cell.name: cell.stat().st_mtime_ns for cell in (out / "cells").iterdir()}
    assert len(after) == 4
    assert {name: after[name] for name in before} == before
    assert json.loads((out / "report.json").read_text())["cells"] == {"planned": 4, "done": 4, "failed": []}


def interrupt_after_first_cell(folder: Path) -> None:
    deadline = time.monotonic() + 300
    while time.monotonic() < deadline and not (folder.is_dir() and any(folder.glob("*.json"))):
        time.sleep(0.02)
    os.kill(os.getpid(), signal.SIGINT)
