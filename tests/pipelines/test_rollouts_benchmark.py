"""`benchmarks/rollouts.py`: rows are made once, stopped streams go on with the same pictures, tables tell the truth."""

import importlib
import json
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from reelway.kernels.sprites.captions import parse

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture(scope="module")
def parts() -> Iterator[Any]:
    """The script's modules, by name."""
    sys.path.insert(0, str(BENCHMARKS))

    def load(name: str) -> ModuleType:
        return importlib.import_module(name)

    yield load
    sys.path.remove(str(BENCHMARKS))
    for name in [name for name in sys.modules if name.startswith("rollout_parts") or name == "rollouts"]:
        del sys.modules[name]


@pytest.fixture
def bench(parts: Any, small_teacher: Path, small_student: Path, tmp_path: Path) -> Any:
    common = parts("rollout_parts.common")
    return common.Bench(small_teacher, small_student, tmp_path, cases=2, threads=1, minutes=0.05, streams=2)


def test_a_row_is_made_once_and_again_for_another_model(parts: Any, bench: Any, small_teacher: Path) -> None:
    made: list[str] = []

    def make() -> dict[str, Any]:
        made.append("row")
        return {"value": len(made)}

    assert [bench.ledger("section").row("case", make) for _ in range(2)] == [{"value": 1}, {"value": 1}]
    assert bench.ledger("section", noise=0.5).row("case", make) == {"value": 2}
    other = replace(bench, student=small_teacher)
    assert other.ledger("section").row("case", make) == {"value": 3}


def test_a_changed_scene_differs_in_what_was_asked_for_alone(parts: Any, bench: Any) -> None:
    common, switches = parts("rollout_parts.common"), parts("rollout_parts.switches")
    for at, shown in enumerate(common.singles(bench, 10)):
        kinds = switches.KINDS[at % len(switches.KINDS)]
        other = common.changed(shown, kinds)
        assert parse(other.caption)[0] == other.scene
        values = [
            {"ground": scene.ground, **{name: getattr(scene.sprites[0], name) for name in ("color", "shape", "motion")}}
            for scene in (shown.scene, other.scene)
        ]
        assert {name for name in values[0] if values[0][name] != values[1][name]} == set(kinds)


def test_what_the_switches_say(parts: Any) -> None:
    """Four cases by hand: seen at once, in the second block, too late, never; one flash among three kept grounds."""
    switches = parts("rollout_parts.switches")

    def case(kind: str, seen: list[bool], flicker: float | None) -> dict[str, Any]:
        edges = [1.0] * 99 + [3.0]
        row = {"kinds": [kind], "seen_before": True, "seen": seen, "flicker_at_switch": flicker}
        return {**row, "flicker_at_edges": edges}

    rows = [
        case("color", [True, True, True], 0.5),
        case("color", [False, True, True], 1.0),
        case("shape", [False, False, True], 9.0),
        case("ground", [False, False, False], 50.0),
    ]
    result = switches._switch_figures(rows)
    assert result.details["all"]["first_block"] == [1, 2, 3, None]
    assert result.details["all"]["within"] == 0.5
    assert result.details["by_kind"]["color"]["within"] == 1
    assert result.details["flash"]["switches"] == 3
    assert result.details["flash"]["share_below"] == pytest.approx(2 / 3)
    assert [figure.met for figure in result.figures] == [False, None, None, False]
    restless = switches._switch_figures([case("color", [True], None)])
    assert (restless.figures[-1].met, restless.details["flash"]) == (None, None)


def test_a_stopped_stream_goes_on_with_the_same_pictures(
    parts: Any, bench: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first run is cut off after its second snapshot, with frames after it that do not count."""
    streams = parts("rollout_parts.streams")
    monkeypatch.setattr(streams, "KEPT", 1)
    monkeypatch.setattr(streams, "NOTED", 1)
    monkeypatch.setattr(streams.signal, "signal", lambda *_: None)
    work = streams.Work(bench.student, tmp_path / "whole", ("a red star", "a blue circle"), 0, 32, 57, 1)
    for folder in ("whole", "parts"):
        (tmp_path / folder).mkdir()
    streams.make_streams(work)
    step, left = streams.Student.step, [4]

    def step_and_stop(student: Any, opened: Any) -> Any:
        left[0] -= 1
        if left[0] < 0:
            raise KeyboardInterrupt
        return step(student, opened)

    monkeypatch.setattr(streams.Student, "step", step_and_stop)
    cut = replace(work, folder=tmp_path / "parts")
    with pytest.raises(KeyboardInterrupt):
        streams.make_streams(cut)
    assert json.loads((cut.folder / streams.STATE).read_text())["frames"] == 33
    left[0] = 100
    streams.make_streams(cut)
    assert left[0] == 98  # two blocks were missing
    for at in (0, 1):
        whole, parted = (np.fromfile(each.folder / f"{at}.rgb", np.uint8) for each in (work, cut))
        assert len(whole) == 57 * 32 * 32 * 3
        assert np.array_equal(whole, parted)
    notes = [json.loads(line) for line in (cut.folder / streams.MEMORY).read_text().splitlines()]
    assert [note["run"] for note in notes] == [0, 0, 1]
    assert sum(note["frames"] for note in notes) == 57


def test_memory_is_steady_or_it_is_not(parts: Any) -> None:
    streams = parts("rollout_parts.streams")
    warm = [{"run": 0, "resident": 500e6 + 50e6 * (at == 0)} for at in range(60)]
    assert streams._growth(warm)[0] == 0
    leaking = [{"run": 0, "resident": 500e6 + 1e6 * at} for at in range(60)]
    assert streams._growth(leaking)[0] == pytest.approx(48e6, rel=0.05)


@pytest.mark.slow
def test_every_section_of_the_command(parts: Any, bench: Any, capsys: pytest.CaptureFixture[str]) -> None:
    script = parts("rollouts")
    options = {"teacher": bench.teacher, "student": bench.student, "out": bench.out, "seed": 0, "level": 1}
    sections = ["switches", "image", "video", "seams", "stream"]
    script.main(**options, section=sections, cases=2, minutes=0.05, streams=2, threads=1)
    report = json.loads((bench.out / "rollouts.json").read_text())
    assert list(report["sections"]) == sections
    assert all(figure["value"] for section in report["sections"].values() for figure in section["figures"])
    table = (bench.out / "rollouts.md").read_text()
    assert "subject consistency, image-to-video over text-to-video, 2 prompts" in table
    before = {path: path.stat().st_mtime_ns for path in bench.out.rglob("*.mp4")}
    assert len(before) == 2 + 4 + 8 + 2 + 2
    script.main(**options, section=["image"], cases=2, minutes=0.05, streams=2, threads=1)
    assert {path: path.stat().st_mtime_ns for path in bench.out.rglob("*.mp4")} == before
    assert "rollouts.json" in capsys.readouterr().out
