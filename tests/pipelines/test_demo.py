"""`reelway demo`: every stage once, a clean stop anywhere, and a page that stands by itself."""

import importlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import av
import pytest
import yaml
from PIL import Image
from typer.testing import CliRunner

from reelway.actors.engine import OneRank
from reelway.cluster.pool import PoolReport
from reelway.cluster.session import RayNotStarted, Session
from reelway.kernels.sprites.captions import parse
from reelway.kernels.sprites.splits import is_held_out
from reelway.pipelines import demo, evaluate, hosting, students, trajectories
from reelway.pipelines.cli import main
from reelway.pipelines.commands import plain_engines
from reelway.pipelines.demonstration import rollouts, runner, scenes, stages
from reelway.pipelines.demonstration.runner import Done, Stage, StageFailed, read_record, run_stages
from reelway.pipelines.demonstration.settings import Demo, DemoRecipe, read_demo_recipe
from reelway.pipelines.demonstration.stages import STAGES

CHROMIUM = Path("/usr/bin/chromium")
NAMES = [stage.name for stage in STAGES] + ["page"]
TRAINING = {"steps": 2, "batch": 2, "lanes": 2, "checkpoint_every": 1}
CHANGES = [
    "clip.height=32",
    "clip.width=32",
    "clip.frames=21",
    "student.timesteps=[1000, 500]",
    "student.window=6",
    "trajectories.minimum_steps=4",
    "trajectories.batch=2",
    "trajectories.per_shard=2",
    *(f"{section}.{name}={value}" for section in ("initialize", "distill.causvid") for name, value in TRAINING.items()),
    "distill.causvid.critic_updates=1",
]
SIZES = {"train_prompts": 4, "heldout_prompts": 2, "teacher_steps": 2, "minute": 3.0, "blocks": 3, "changes": CHANGES}


@pytest.fixture(scope="module")
def monkey() -> Iterator[pytest.MonkeyPatch]:
    with pytest.MonkeyPatch.context() as patch:
        yield patch


def pool_here(worker: Any, items: Any, pool: Any, on_result: Any, **_: Any) -> PoolReport[Any]:
    """`run_pool` in this process."""
    built, report = worker(), PoolReport[Any](most_workers=1, seconds=1.0)
    for item in items:
        on_result(item, built.process(item))
        report.done += 1
    return report


def train_here(module: str, job: Any, *_: Any) -> bool:
    """`train_on_ray` in this process, on the plain engine."""
    train = importlib.import_module(f"reelway.pipelines.{module}").train
    passed: bool = train(job, plain_engines("cpu"), OneRank())
    return passed


@contextmanager
def without_ray(patch: pytest.MonkeyPatch) -> Iterator[None]:
    """Everything that would run on Ray runs in this process."""
    with patch.context() as here:
        here.setattr(students, "SAMPLES", 1)
        for module in (trajectories, evaluate):
            here.setattr(module, "run_pool", pool_here)
            here.setattr(module, "start_or_join", lambda *_, **__: nullcontext(Session("here", False, ())))
        here.setattr(hosting, "train_on_ray", train_here)
        here.setattr(runner._Session, "open", lambda self: None)
        here.setattr(runner, "_actors", list)
        yield


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    with without_ray(monkeypatch):
        yield


@pytest.fixture(scope="module")
def models(small_teacher: Path, small_student: Path) -> list[str]:
    return ["--teacher", str(small_teacher), "--student", str(small_student)]


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("demo") / "recipe.yaml"
    path.write_text(yaml.safe_dump(SIZES))
    return path


def run(out: Path, models: list[str], recipe: Path) -> Any:
    return CliRunner().invoke(demo.app, ["--out", str(out), "--recipe", str(recipe), *models])


@pytest.fixture(scope="module")
def made(
    models: list[str], recipe: Path, tmp_path_factory: pytest.TempPathFactory, monkey: pytest.MonkeyPatch
) -> tuple[Path, Any]:
    """A demo's folder, made without Ray, and what the command said."""
    out = tmp_path_factory.mktemp("demo") / "out"
    with without_ray(monkey):
        result = run(out, models, recipe)
    assert result.exit_code == 0, (result.output, result.exception)
    return out, result


def made_again(result: Any) -> list[str]:
    """Stages that a run began, by its own account."""
    begun = [line for line in result.stderr.splitlines() if line.startswith("[") and "done before" not in line]
    return [line.split()[1] for line in begun]


def times(out: Path) -> dict[str, int]:
    files = (path for path in out.rglob("*") if path.is_file() and path.name not in ("log.txt", ".lock"))
    return {str(path.relative_to(out)): path.stat().st_mtime_ns for path in files}


# --- All of it --------------------------------------------------------------------------------------------------------


def test_the_demo_says_what_it_does_and_the_four_lines(made: tuple[Path, Any]) -> None:
    out, result = made
    told = [line for line in result.stderr.splitlines() if line.startswith("[")]
    assert [line.split()[1] for line in told] == NAMES
    assert [line.split()[0] for line in told] == [f"[{number}/8]" for number in range(1, 9)]
    lines = result.stdout.splitlines()
    assert [line.partition(":")[0] for line in lines[:4]] == ["speed-up", "first frame", "quality", "drift"]
    assert lines[4:] == [f"{out / 'index.html'}: open it in a browser"]
    bench = json.loads((out / "work/speed/bench.json").read_text())
    assert f"{bench['student_over_teacher']['frames_per_second']['denoise_only']:.1f}x" in lines[0]
    report = json.loads((out / "work/evaluate/report.json").read_text())
    totals = {entry["model"]: entry["mean"] for entry in report["scores"] if entry["dimension"] == "total"}
    assert set(totals) == {"teacher", "fresh-student", "shipped-student"}
    assert all(f"{value:.3f}" in lines[2] for value in totals.values())


def test_what_is_done_is_skipped(
    made: tuple[Path, Any], models: list[str], recipe: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, first = made
    before = times(out)
    monkeypatch.setattr(runner._Run, "_carry_out", lambda *_: pytest.fail("a stage was carried out again"))
    result = run(out, models, recipe)
    assert result.exit_code == 0
    assert result.stderr.count("done before: ") == len(NAMES)
    assert times(out) == before
    assert result.stdout == first.stdout


@pytest.mark.usefixtures("here")
def test_what_was_removed_is_made_again(
    made: tuple[Path, Any], models: list[str], recipe: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    shutil.copytree(made[0], out)
    (out / "media" / "student-clip.mp4").unlink()
    (out / "work/speed/bench.json").unlink()
    result = run(out, models, recipe)
    assert made_again(result) == ["speed", "page"]
    assert (out / "media" / "student-clip.mp4").is_file()


def test_what_the_stages_leave(made: tuple[Path, Any]) -> None:
    out, _ = made
    records = {name: read_record(out / "work" / name) for name in NAMES}
    assert all(record["status"] == "done" and record["seconds"] > 0 for record in records.values())
    assert len({record["fingerprint"] for record in records.values()}) == len(NAMES)
    assert records["trajectories"]["figures"]["samples"] == 4
    origin = json.loads((out / "work/distill/run/model/student.json").read_text())["origin"]
    assert origin["method"] == "distill-causvid"
    assert origin["parent"]["method"] == "initialize-ode"
    takes = json.loads((out / "work/rollouts/takes.json").read_text())
    assert {name: take["figures"]["frames"] for name, take in takes.items()} == {
        **dict.fromkeys(("clip", "image", "video", "switch", "teacher"), 21),
        "minute": 48,
    }
    assert takes["clip"]["shots"] == takes["teacher"]["shots"]
    assert len(takes["switch"]["shots"]) == 2
    assert takes["switch"]["shots"][1]["second"] > 0
    assert len(takes["minute"]["drift"]["total"]) == 3
    assert not (out / "work/rollouts/partial").exists()


# --- The page ---------------------------------------------------------------------------------------------------------


class Links(HTMLParser):
    """Every address that a page loads or links, and its videos' own."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []
        self.open: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found += [value or "" for name, value in attrs if name in ("src", "href", "poster", "data", "srcset")]
        if tag not in ("meta", "link", "img", "br", "input", "hr"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    @classmethod
    def of(cls, page: str) -> list[str]:
        parser = cls()
        parser.feed(page)
        parser.close()
        assert parser.open == []
        return parser.found


def test_the_page_links_what_stands_beside_it_and_nothing_else(made: tuple[Path, Any]) -> None:
    out, _ = made
    page = (out / "index.html").read_text()
    links = [link for link in Links.of(page) if link != "data:,"]
    assert links
    assert all(re.fullmatch(r"media/[\w.-]+", link) for link in links)
    assert {link.removeprefix("media/") for link in links} == {path.name for path in (out / "media").iterdir()}
    assert not re.search(r"https?:|//cdn|@import|url\(|\$[a-z]", page.replace("http://www.w3.org/2000/svg", ""))
    for link in set(links):
        if link.endswith(".mp4"):
            with av.open(str(out / link)) as container:
                assert sum(1 for _ in container.decode(video=0)) >= 21
        else:
            with Image.open(out / link) as image:
                assert image.size == (32, 32)


def test_the_page_says_what_was_measured(made: tuple[Path, Any]) -> None:
    out, result = made
    page = (out / "index.html").read_text()
    for line in result.stdout.splitlines()[:4]:
        assert line.partition(":")[2].split()[0] in page
    for prompt in (out / "work/prompts/heldout.txt").read_text().splitlines():
        assert prompt in page
    assert "2 steps of 2, shortened from 600 of 24" in page
    for record in (read_record(out / "work" / name) for name in NAMES[:-1]):
        assert record["fingerprint"] in page
        assert f"{record['seconds']:.1f} s" in page


def test_words_of_others_are_escaped(made: tuple[Path, Any], models: list[str]) -> None:
    from reelway.pipelines.demonstration import page
    from reelway.pipelines.demonstration.figures import Figures

    out, _ = made
    wanted = Demo.open(out, Path(models[1]), Path(models[3]), DemoRecipe.model_validate(SIZES))
    figures = Figures.gather(wanted, {name: read_record(out / "work" / name) for name in NAMES[:-1]})
    evil = "<b onclick='x'>\"&"
    for take in figures.takes.values():
        for shot in take["shots"]:
            shot["prompt"] = evil
    for cell in figures.cells:
        cell["prompt"] = evil
    figures.records["speed"]["summary"] = evil
    text = page.render(wanted, figures)
    assert evil not in text
    assert "<b onclick" not in text
    Links.of(text)


@pytest.mark.slow  # needs a browser, which `make test` does not install
@pytest.mark.skipif(not CHROMIUM.exists(), reason=f"no browser at {CHROMIUM}")
@pytest.mark.parametrize("size", [(1280, 900), (390, 844)])
def test_a_browser_shows_the_page_without_a_complaint(made: tuple[Path, Any], size: tuple[int, int]) -> None:
    api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    complaints: list[str] = []
    with api.sync_playwright() as engine:
        browser = engine.chromium.launch(executable_path=str(CHROMIUM), args=["--no-sandbox"], timeout=60_000)
        page = browser.new_page(viewport={"width": size[0], "height": size[1]})
        page.set_default_timeout(60_000)
        page.on("console", lambda message: complaints.append(message.text) if message.type == "error" else None)
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.on("requestfailed", lambda request: complaints.append(f"{request.url}: {request.failure}"))
        page.on("request", lambda request: complaints.append(request.url) if not local(request.url) else None)
        page.goto((made[0] / "index.html").as_uri())
        page.locator("#twice .pair").scroll_into_view_if_needed()
        page.wait_for_function("[...document.querySelectorAll('#twice video')].every((one) => one.currentTime > 0)")
        assert page.evaluate("document.documentElement.scrollWidth") <= size[0]
        page.click("#race")
        page.wait_for_function("[...document.querySelectorAll('#twice .cover')].every((one) => one.hidden)")
        page.locator("#ways").scroll_into_view_if_needed()
        page.wait_for_function("document.querySelector('[data-shots]').textContent.length > 5")
        page.click("#all")
        assert page.evaluate("[...document.querySelectorAll('video')].every((one) => one.paused)")
        browser.close()
    assert complaints == []


def local(address: str) -> bool:
    return address.startswith(("file:", "data:", "blob:"))


# --- Stopping and going on --------------------------------------------------------------------------------------------


@pytest.fixture
def small(models: list[str], tmp_path: Path) -> Demo:
    return Demo.open(tmp_path / "out", Path(models[1]), Path(models[3]), DemoRecipe.model_validate(SIZES))


def counting(calls: list[str], name: str, error: BaseException | None = None, after: tuple[str, ...] = ()) -> Stage:
    def work(_: Demo, folder: Path, screen: Any) -> Done:
        calls.append(name)
        screen.print("a line for the log")
        (folder / "part").touch()
        if error is not None:
            raise error
        (folder / "result").touch()
        return Done(f"made {name}", [folder / "result"])

    return Stage(name, f"makes {name}", work, lambda _: {}, after)


@pytest.mark.parametrize("error", [KeyboardInterrupt(), StageFailed("no room")])
def test_a_stage_that_stops_goes_on_and_what_is_before_it_stays(
    small: Demo, error: BaseException, capsys: pytest.CaptureFixture[str]
) -> None:
    calls: list[str] = []
    with pytest.raises(type(error)):
        run_stages(small, [counting(calls, "one"), counting(calls, "two", error, ("one",)), counting(calls, "three")])
    assert read_record(small.work("two"))["status"] == "interrupted"
    assert calls == ["one", "two"]
    records = run_stages(
        small, [counting(calls, "one"), counting(calls, "two", None, ("one",)), counting(calls, "three")]
    )
    assert calls == ["one", "two", "two", "three"]
    assert (small.work("two") / "part").exists()
    assert records["two"]["status"] == "done"
    told = capsys.readouterr().err
    assert "going on where it stopped" in told
    assert "a line for the log" not in told
    assert "a line for the log" in (small.out / "log.txt").read_text()


def test_what_another_recipe_left_is_removed(small: Demo, capsys: pytest.CaptureFixture[str]) -> None:
    calls: list[str] = []
    run_stages(small, [counting(calls, "one"), counting(calls, "two", None, ("one",))])
    (small.work("one") / "stale").touch()
    changed = replace(counting(calls, "one"), inputs=lambda _: {"seed": 1})
    run_stages(small, [changed, counting(calls, "two", None, ("one",))])
    assert calls == ["one", "two", "one", "two"]
    assert not (small.work("one") / "stale").exists()
    assert "had another recipe" in capsys.readouterr().err
    assert not list((small.out / "work").glob(".*"))


def test_two_demos_do_not_share_a_folder(small: Demo) -> None:
    def again(demo: Demo, folder: Path, screen: Any) -> Done:
        with pytest.raises(ValueError, match="another `reelway demo` is at work"):
            run_stages(demo, [])
        return Done("", [])

    run_stages(small, [Stage("one", "", again, lambda _: {})])


@pytest.mark.usefixtures("here")
def test_a_changed_recipe_makes_again_what_depends_on_it_and_goes_on_after_a_stop(
    made: tuple[Path, Any], models: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stopped in the long stream: the clip before it is kept, no half video is left, and the rest is made then."""
    out, other = tmp_path / "out", tmp_path / "recipe.yaml"
    shutil.copytree(made[0], out)
    other.write_text(yaml.safe_dump({**SIZES, "minute": 2.0}))
    write = rollouts.run

    def interrupted(order: Any, *arguments: Any) -> int:
        return rollouts.INTERRUPTED if order.out.name == "minute.mp4" else write(order, *arguments)

    monkeypatch.setattr(rollouts, "run", interrupted)
    result = run(out, models, other)
    assert result.exit_code == 130
    assert "kept in" in result.stderr.splitlines()[-1]
    assert made_again(result) == ["rollouts"]
    assert sorted(path.name for path in (out / "work/rollouts").glob("*.mp4")) == ["clip.mp4"]
    clip = (out / "work/rollouts/clip.mp4").stat().st_mtime_ns
    monkeypatch.setattr(rollouts, "run", write)
    result = run(out, models, other)
    assert result.exit_code == 0, result.output
    assert made_again(result) == ["rollouts", "page"]
    assert (out / "work/rollouts/clip.mp4").stat().st_mtime_ns == clip
    takes = json.loads((out / "work/rollouts/takes.json").read_text())
    assert takes["minute"]["figures"]["frames"] == 32


@pytest.mark.usefixtures("here")
def test_a_job_that_fails_is_told_in_a_line(
    models: list[str], recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stages, "make_trajectories", lambda *_: 1)
    result = run(tmp_path / "out", models, recipe)
    assert result.exit_code == 1
    assert result.stderr.splitlines()[-1].endswith("The same command goes on.")
    assert "some trajectories could not be made" in result.stderr


def test_a_ray_that_does_not_start_is_told_in_a_line(small: Demo, monkeypatch: pytest.MonkeyPatch) -> None:
    def late(*_: Any, **__: Any) -> Any:
        raise RayNotStarted("Ray could not be started: the dashboard is late")

    monkeypatch.setattr(runner, "start_or_join", late)
    monkeypatch.setattr(runner.ray, "is_initialized", lambda: False)
    calls: list[str] = []
    with pytest.raises(StageFailed, match=r"Ray could not be started: the dashboard is late$"):
        run_stages(small, [replace(counting(calls, "one"), on_ray=True)])
    assert calls == []


# --- Sizes and mistakes -----------------------------------------------------------------------------------------------


def test_the_rollouts_show_what_can_be_told_apart() -> None:
    recipe = DemoRecipe()
    heldout = scenes.distinct("heldout", recipe.heldout_prompts, recipe.seed, recipe.level)
    assert len(set(heldout)) == recipe.heldout_prompts
    chosen = scenes.choose(heldout, recipe.seed, recipe.level)
    assert chosen.clip in heldout
    used = [chosen.clip, chosen.minute, chosen.image.caption, chosen.video.caption, *chosen.switched]
    assert len(set(used)) == len(used)
    assert all(is_held_out(parse(text)[0]) for text in (chosen.clip, chosen.minute, chosen.image.caption))
    before, after = (parse(text)[0].sprites[0] for text in (chosen.video.caption, chosen.redrawn))
    assert before.color != after.color
    assert (before.shape, before.motion) == (after.shape, after.motion)
    before, after = (parse(text)[0].sprites[0] for text in chosen.switched)
    assert before.color != after.color
    assert before.shape != after.shape


def test_a_recipe_for_the_demo_is_checked(tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text("train_prompts: 0")
    with pytest.raises(ValueError, match=r"train_prompts: .*greater than 0, got 0"):
        read_demo_recipe(path)
    path.write_text("prompts: 3")
    with pytest.raises(ValueError, match="prompts: "):
        read_demo_recipe(path)
    path.write_bytes(b"\xff\xfe")
    with pytest.raises(ValueError, match=f"--recipe {path}: not valid YAML"):
        read_demo_recipe(path)
    with pytest.raises(FileNotFoundError, match="--recipe: no such file"):
        read_demo_recipe(tmp_path / "nothing")


def test_a_file_is_no_place_for_a_demo(models: list[str], tmp_path: Path) -> None:
    place = tmp_path / "file"
    place.touch()
    for out in (place, place / "out"):
        with pytest.raises(ValueError, match=f"--out: {place} is no folder"):
            Demo.open(out, Path(models[1]), Path(models[3]), DemoRecipe())


@pytest.mark.parametrize("option", ["--teacher", "--student"])
def test_a_missing_model_is_one_line(
    option: str, models: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = [*models, option, str(tmp_path / "nothing"), "--out", str(tmp_path / "out")]
    monkeypatch.setattr(sys, "argv", ["reelway", "demo", *arguments])
    with pytest.raises(SystemExit) as end:
        main()
    assert end.value.code == 2
    told = capsys.readouterr().err
    assert told.count("\n") == 1
    assert f"{option}: not a model folder: " in told
    assert not (tmp_path / "out").exists()


# --- On Ray -----------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_whole_demo_on_ray(ray_session: Session, models: list[str], recipe: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    result = run(out, models, recipe)
    assert result.exit_code == 0, (result.output, result.exception)
    for name, role in (("trajectories", "pool worker"), ("initialize", "training worker"), ("evaluate", "pool worker")):
        pids = {worker["pid"] for worker in read_record(out / "work" / name)["workers"] if worker["role"] == role}
        assert len(pids) == 2
        assert os.getpid() not in pids
    before = times(out)
    assert run(out, models, recipe).exit_code == 0
    assert times(out) == before


def begun(out: Path, stage: str) -> bool:
    """Whether a stage is at work, and has something to show where it takes long."""
    status = read_record(out / "work" / stage).get("status") if (out / "work" / stage / "stage.json").exists() else None
    return status == "running"


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["trajectories", "initialize", "distill", "evaluate", "speed", "rollouts"])
def test_ctrl_c_in_a_stage(stage: str, demo_until: Callable[[str], Path], models: list[str], recipe: Path) -> None:
    out = demo_until(stage)
    command = [sys.executable, "-m", "reelway.pipelines.cli", "demo", "--out", str(out), "--recipe", str(recipe)]
    process = subprocess.Popen([*command, *models], stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    ending = threading.Timer(900, process.kill)
    ending.start()
    while not begun(out, stage):
        assert process.poll() is None
        time.sleep(0.1)
    time.sleep(1)
    process.send_signal(signal.SIGINT)
    _, told = process.communicate(timeout=300)
    ending.cancel()
    assert process.returncode == 130, told
    assert told.splitlines()[-1].startswith("Stopped; what was done is kept in")
    assert "Traceback" not in told
    again = subprocess.run([*command, *models], capture_output=True, text=True, timeout=900)
    assert again.returncode == 0, again.stderr
    assert again.stderr.count("done before") >= NAMES.index(stage)


@pytest.fixture
def demo_until(made: tuple[Path, Any], tmp_path: Path) -> Callable[[str], Path]:
    """A demo's folder in which the stages before one are done."""

    def until(stage: str) -> Path:
        out = tmp_path / "out"
        for name in NAMES[: NAMES.index(stage)]:
            shutil.copytree(made[0] / "work" / name, out / "work" / name)
        return out

    return until
