"""VBench's names, files and totals; and its command, played by a script."""

import json
import os
import time
from pathlib import Path

import pytest

from reelway.actors import vbench

# Wan2.1-1.3B as the Self-Forcing paper (arXiv 2506.08009, table 1) lists it: Quality, Semantic, Total.
PUBLISHED = [(85.30, 80.09, 84.26), (84.05, 69.80, 81.20), (85.07, 81.28, 84.31), (84.70, 74.53, 82.67)]


@pytest.mark.parametrize(("quality", "semantic", "total"), PUBLISHED)
def test_published_totals_add_up(quality: float, semantic: float, total: float) -> None:
    assert vbench.total_score(quality, semantic) == pytest.approx(total, abs=0.006)


def raw_scores() -> dict[str, float]:
    return {
        "subject_consistency": 0.9753,
        "background_consistency": 0.9695,
        "temporal_flickering": 0.9624,
        "motion_smoothness": 0.9805,
        "dynamic_degree": 0.9269,
        "aesthetic_quality": 0.6415,
        "imaging_quality": 0.6888,
        "object_class": 0.9299,
        "multiple_objects": 0.7215,
        "human_action": 0.99,
        "color": 0.8,
        "spatial_relationship": 0.6,
        "scene": 0.5,
        "appearance_style": 0.2,
        "temporal_style": 0.25,
        "overall_consistency": 0.27,
    }


def test_totals_by_hand() -> None:
    quality = (
        (0.9753 - 0.1462) / 0.8538
        + (0.9695 - 0.2615) / 0.7385
        + (0.9624 - 0.6293) / 0.3707
        + (0.9805 - 0.706) / 0.2915
        + 0.5 * 0.9269
        + 0.6415
        + 0.6888
    ) / 6.5
    styles = (0.2 - 0.0009) / 0.2846 + 0.25 / 0.364 + 0.27 / 0.364
    semantic = (0.9299 + 0.7215 + 0.99 + 0.8 + 0.6 + 0.5 / 0.8222 + styles) / 9
    found = vbench.scores(raw_scores())
    assert found.quality == pytest.approx(quality)
    assert found.semantic == pytest.approx(semantic)
    assert found.total == pytest.approx((4 * quality + semantic) / 5)
    assert found.missing == ()


def test_a_missing_dimension_is_no_zero() -> None:
    raw = raw_scores()
    del raw["human_action"]
    found = vbench.scores(raw)
    assert found.quality is not None
    assert found.semantic is None
    assert found.total is None
    assert found.missing == ("human_action",)
    with pytest.raises(ValueError, match="VBench has no 'humour'"):
        vbench.scores({"humour": 1.0})


# --- prompts ------------------------------------------------------------------------------------------


def info_file(path: Path) -> Path:
    entries = [
        {"prompt_en": "a bird", "dimension": ["object_class", "imaging_quality"], "auxiliary_info": {}},
        {"prompt_en": "In a still frame, a stop sign", "dimension": ["temporal_flickering"]},
        {"prompt_en": "a red car", "dimension": ["color", "imaging_quality"]},
    ]
    path.write_text(json.dumps(entries))
    return path


def test_prompts_and_how_many_videos_they_want(tmp_path: Path) -> None:
    prompts = vbench.read_info(info_file(tmp_path / "info.json"))
    assert [prompt.text for prompt in prompts] == ["a bird", "In a still frame, a stop sign", "a red car"]
    assert vbench.expected(prompts) == {"temporal_flickering": 5, "imaging_quality": 10, "object_class": 5, "color": 5}
    assert vbench.expected(prompts, samples=2)["imaging_quality"] == 4
    assert vbench.video_name(prompts[1].text, 4) == "In a still frame, a stop sign-4.mp4"


@pytest.mark.parametrize("prompt", ["", "a/b", "x" * 250])
def test_prompts_that_name_no_file(prompt: str) -> None:
    with pytest.raises(ValueError, match="prompt: no file can be named"):
        vbench.video_name(prompt, 0)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "not readable as JSON"),
        ("{}", "must be a list of prompts"),
        ('[{"prompt": "a"}]', "entry 0: needs a prompt_en"),
        ('[{"prompt_en": "a", "dimension": ["taste"]}]', "entry 0: dimension: must list VBench's dimensions"),
    ],
)
def test_a_wrong_list_of_prompts_is_one_line(tmp_path: Path, content: str, message: str) -> None:
    path = tmp_path / "info.json"
    path.write_text(content)
    with pytest.raises(ValueError, match=message) as raised:
        vbench.read_info(path)
    assert "\n" not in str(raised.value)


# --- results ------------------------------------------------------------------------------------------


def write_results(folder: Path, stamp: str, content: object) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"results_{stamp}_eval_results.json"
    path.write_text(json.dumps(content))
    return path


def test_results_are_read_as_vbench_writes_them(tmp_path: Path) -> None:
    rows = [
        {"video_path": "videos/a bird-0.mp4", "video_results": 0.5, "success_frame_count": 8, "frame_count": 16},
        {"video_path": "videos/a bird-1.mp4", "video_results": 1.0},
    ]
    write_results(tmp_path / "object_class", "2025-01-02-10:00:00", {"object_class": [0.75, rows]})
    moving = [{"video_path": "/data/videos/a bird-0.mp4", "video_results": True}]
    write_results(tmp_path / "dynamic_degree", "2025-01-02-11:00:00", {"dynamic_degree": [1.0, moving]})
    found = vbench.read_results(tmp_path)
    assert found["object_class"] == vbench.Result(0.75, {"a bird-0.mp4": 0.5, "a bird-1.mp4": 1.0})
    assert found["dynamic_degree"].videos == {"a bird-0.mp4": 1.0}
    assert vbench.shortfalls(found, {"object_class": 5, "dynamic_degree": 1, "color": 5})[:2] == [
        "object_class: 2 of 5 videos",
        "color: not graded",
    ]


def test_the_later_of_two_results_holds(tmp_path: Path) -> None:
    first = write_results(tmp_path, "2025-01-02-10:00:00", {"color": [0.1, []]})
    write_results(tmp_path, "2025-01-03-10:00:00", {"color": [0.2, []]})
    os.utime(first, (time.time() - 60, time.time() - 60))
    assert vbench.read_results(tmp_path)["color"].score == 0.2


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([], "must be a table of dimensions"),
        ({"taste": [1.0, []]}, "'taste' is no dimension"),
        ({"color": 0.5}, r"color: must be \[score"),
        ({"color": [float("nan"), []]}, r"color: must be \[score"),
        ({"color": [0.5, [{"video": "a"}]]}, "each result needs a video_path"),
        ({"color": [0.5, [{"video_path": "a", "video_results": "good"}]]}, "no number in video_results"),
    ],
)
def test_wrong_results_are_one_line(tmp_path: Path, content: object, message: str) -> None:
    write_results(tmp_path, "1", content)
    with pytest.raises(ValueError, match=message):
        vbench.read_results(tmp_path)


# --- the command --------------------------------------------------------------------------------------

SCRIPT = """#!/bin/sh
# As VBench's own command: writes what it is told to, and ends with 0 whatever happened to its child.
while [ $# -gt 0 ]; do
  case $1 in
    --dimension) dimension=$2 ;;
    --output_path) out=$2 ;;
    --videos_path) videos=$2 ;;
    --full_json_dir) test -f "$2" || exit 3 ;;
  esac
  shift
done
echo "$dimension" >> calls.txt
if [ "$dimension" = color ]; then echo "No module named 'detectron2'"; exit 0; fi
name=$(ls "$videos" | head -1)
row="[{\\"video_path\\": \\"$videos/$name\\", \\"video_results\\": 0.25}]"
echo "{\\"$dimension\\": [0.25, $row]}" > "$out/results_1_eval_results.json"
"""


def sweep_folder(tmp_path: Path) -> Path:
    folder = tmp_path / "teacher with a space"
    (folder / "videos").mkdir(parents=True)
    (folder / "videos" / "a bird-0.mp4").write_bytes(b"")
    return folder


def test_the_command_is_run_once_per_dimension(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    command = tmp_path / "bin" / "vbench"
    command.parent.mkdir()
    command.write_text(SCRIPT)
    command.chmod(0o755)
    monkeypatch.setenv("PATH", f"{command.parent}:{os.environ['PATH']}")
    folder, info = sweep_folder(tmp_path), info_file(tmp_path / "info.json")
    for _ in range(2):
        vbench.run(folder, info, "object_class")
    assert (folder / "calls.txt").read_text().split() == ["object_class"]
    assert vbench.read_results(folder)["object_class"] == vbench.Result(0.25, {"a bird-0.mp4": 0.25})
    with pytest.raises(ValueError, match=r"^vbench: color: no results \(exit code 0\); No module named 'detectron2'$"):
        vbench.run(folder, info, "color")


def test_without_vbench_it_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ValueError, match=r"^vbench: not installed here"):
        vbench.run(sweep_folder(tmp_path), info_file(tmp_path / "info.json"), "color")
