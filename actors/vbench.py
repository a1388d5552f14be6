"""VBench: which videos it wants, under which names; how it is run; what its results add up to.

The dimensions, their ranges and weights are those of its released scoring script (Huang et al., arXiv 2311.17982).
VBench itself, with its networks, is not part of this package: it is run where it is installed.
"""

import json
import math
import shutil
import subprocess
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Literal, TypeGuard

SAMPLES: Final = 5  # videos per prompt; VBench reads no more, whatever the folder holds
SUFFIX: Final = "_eval_results.json"
LONGEST_NAME: Final = 255  # bytes of a file name
QUALITY_SHARE, SEMANTIC_SHARE = 4.0, 1.0
COMMAND: Final = "vbench"
LAST_WORDS: Final = 3  # lines of a failed run that are quoted


@dataclass(frozen=True)
class Dimension:
    """One of VBench's dimensions: the range that is mapped to [0, 1], its part of the total, and its weight in it."""

    low: float
    high: float
    part: Literal["quality", "semantic"]
    weight: float = 1.0

    def normalised(self, raw: float) -> float:
        return (raw - self.low) / (self.high - self.low)


DIMENSIONS: Final[dict[str, Dimension]] = {
    "subject_consistency": Dimension(0.1462, 1, "quality"),
    "background_consistency": Dimension(0.2615, 1, "quality"),
    "temporal_flickering": Dimension(0.6293, 1, "quality"),
    "motion_smoothness": Dimension(0.706, 0.9975, "quality"),
    "dynamic_degree": Dimension(0, 1, "quality", 0.5),
    "aesthetic_quality": Dimension(0, 1, "quality"),
    "imaging_quality": Dimension(0, 1, "quality"),
    "object_class": Dimension(0, 1, "semantic"),
    "multiple_objects": Dimension(0, 1, "semantic"),
    "human_action": Dimension(0, 1, "semantic"),
    "color": Dimension(0, 1, "semantic"),
    "spatial_relationship": Dimension(0, 1, "semantic"),
    "scene": Dimension(0, 0.8222, "semantic"),
    "appearance_style": Dimension(0.0009, 0.2855, "semantic"),
    "temporal_style": Dimension(0, 0.364, "semantic"),
    "overall_consistency": Dimension(0, 0.364, "semantic"),
}


@dataclass(frozen=True)
class Scores:
    """VBench's scores, in [0, 1]. A score is None until every dimension of it is there; `missing` names the rest.

    VBench's own script takes a missing dimension for 0, which looks like a bad model.
    """

    normalised: dict[str, float]
    quality: float | None
    semantic: float | None
    total: float | None
    missing: tuple[str, ...]


def total_score(quality: float, semantic: float) -> float:
    """(4 Q + S) / 5."""
    return (QUALITY_SHARE * quality + SEMANTIC_SHARE * semantic) / (QUALITY_SHARE + SEMANTIC_SHARE)


def scores(raw: Mapping[str, float]) -> Scores:
    """Add up raw dimension scores, as VBench's results files have them. ValueError names a dimension it has not."""
    unknown = sorted(raw.keys() - DIMENSIONS.keys())
    if unknown:
        raise ValueError(f"dimension: VBench has no {unknown[0]!r}; it has {', '.join(DIMENSIONS)}")
    normalised = {name: DIMENSIONS[name].normalised(raw[name]) for name in DIMENSIONS if name in raw}
    quality, semantic = _part(normalised, "quality"), _part(normalised, "semantic")
    whole = None if quality is None or semantic is None else total_score(quality, semantic)
    missing = tuple(name for name in DIMENSIONS if name not in raw)
    return Scores(normalised, quality, semantic, whole, missing)


def _part(normalised: Mapping[str, float], part: str) -> float | None:
    members = {name: dimension.weight for name, dimension in DIMENSIONS.items() if dimension.part == part}
    if members.keys() - normalised.keys():
        return None
    return sum(weight * normalised[name] for name, weight in members.items()) / sum(members.values())


# --- prompts and names --------------------------------------------------------------------------------


@dataclass(frozen=True)
class Prompt:
    """A prompt of VBench's list and the dimensions that its videos are for."""

    text: str
    dimensions: tuple[str, ...]


def read_info(path: Path) -> list[Prompt]:
    """The prompts of `VBench_full_info.json`. FileNotFoundError, or ValueError naming the entry that is wrong."""
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file; VBench_full_info.json is in VBench's repository")
    content = _read_json(path)
    if not isinstance(content, list) or not content:
        raise ValueError(f"{path}: must be a list of prompts, as VBench_full_info.json is")
    return [_prompt(path, index, entry) for index, entry in enumerate(content)]


def _prompt(path: Path, index: int, entry: Any) -> Prompt:
    if not isinstance(entry, dict) or not isinstance(entry.get("prompt_en"), str):
        raise ValueError(f"{path}: entry {index}: needs a prompt_en")
    dimensions = entry.get("dimension")
    if not isinstance(dimensions, list) or not dimensions or not set(dimensions) <= DIMENSIONS.keys():
        raise ValueError(f"{path}: entry {index}: dimension: must list VBench's dimensions, got {dimensions!r}")
    return Prompt(entry["prompt_en"], tuple(dimensions))


def video_name(prompt: str, sample: int) -> str:
    """The file name that VBench looks for. ValueError for a prompt that no file can be named after."""
    name = f"{prompt}-{sample}.mp4"
    if "/" in prompt or "\0" in prompt or not prompt or len(name.encode()) > LONGEST_NAME:
        raise ValueError(f"prompt: no file can be named {name[:60]!r}: no slash, and at most {LONGEST_NAME} bytes")
    return name


def expected(prompts: Iterable[Prompt], samples: int = SAMPLES) -> dict[str, int]:
    """How many videos each dimension wants: {dimension: videos}, dimensions in VBench's order."""
    counts = Counter(dimension for prompt in prompts for dimension in prompt.dimensions)
    return {name: counts[name] * min(samples, SAMPLES) for name in DIMENSIONS if counts[name]}


# --- running it ---------------------------------------------------------------------------------------


def installed() -> str | None:
    """The path of the `vbench` command; None where it is not installed."""
    return shutil.which(COMMAND)


def run(folder: Path, info: Path, dimension: str) -> None:
    """Let VBench grade `folder/videos` on one dimension; results go to `folder/results/<dimension>/`.

    A dimension that has results is left as it is. VBench hands its arguments to a shell and
    hides how its child ended, so it works in `folder` with plain relative names, and only a new results file counts
    as success.

    Raises:
        ValueError: `vbench` is not installed, or made no results; with its last words.
    """
    command = installed()
    if command is None:
        raise ValueError(f"{COMMAND}: not installed here; `pip install vbench` (see VBench's notes on its networks)")
    if is_graded(folder, dimension):
        return
    results = folder / "results" / dimension
    results.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(info, folder / "info.json")
    arguments = ["--dimension", dimension, "--videos_path", "videos", "--full_json_dir", "info.json"]
    done = subprocess.run(
        [command, "evaluate", *arguments, "--output_path", f"results/{dimension}"],
        cwd=folder,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
    )
    (results / "log.txt").write_text(done.stdout)
    if done.returncode or not is_graded(folder, dimension):
        last = " | ".join([line for line in done.stdout.splitlines() if line.strip()][-LAST_WORDS:])
        raise ValueError(
            f"{COMMAND}: {dimension}: no results (exit code {done.returncode}); {last or 'it said nothing'}"
        )


def is_graded(folder: Path, dimension: str) -> bool:
    """Whether a dimension has results in `folder`."""
    return any((folder / "results" / dimension).glob(f"*{SUFFIX}"))


# --- what it found ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Result:
    """A dimension's raw score over all videos, and each video's own value under its file name.

    A video's value is what that dimension's network says (0 to 100 for imaging_quality, 0 or 1 for dynamic_degree);
    only `score` is on one scale for all.
    """

    score: float
    videos: dict[str, float]


def read_results(folder: Path) -> dict[str, Result]:
    """Every dimension in the `*_eval_results.json` files at or below a folder; of two files the later holds.

    A file is {dimension: [score, [{"video_path": …, "video_results": …}, …]]}. ValueError names file and dimension.
    """
    found: dict[str, Result] = {}
    for path in sorted(folder.rglob(f"*{SUFFIX}"), key=lambda path: (path.stat().st_mtime_ns, path.name)):
        content = _read_json(path)
        if not isinstance(content, dict):
            raise ValueError(f"{path}: must be a table of dimensions, as VBench writes it")
        for dimension, entry in content.items():
            found[dimension] = _result(path, dimension, entry)
    return found


def _result(path: Path, dimension: str, entry: Any) -> Result:
    if dimension not in DIMENSIONS:
        raise ValueError(f"{path}: {dimension!r} is no dimension of VBench")
    well_formed = isinstance(entry, list) and len(entry) >= 2 and _is_number(entry[0])
    if not well_formed or not isinstance(entry[1], list):
        raise ValueError(f"{path}: {dimension}: must be [score, [a result per video]], got {str(entry)[:60]}")
    videos = {}
    for row in entry[1]:
        if not isinstance(row, dict) or not isinstance(row.get("video_path"), str):
            raise ValueError(f"{path}: {dimension}: each result needs a video_path, got {str(row)[:60]}")
        value = row.get("video_results")
        if not _is_number(value):
            raise ValueError(f"{path}: {dimension}: {row['video_path']}: no number in video_results, got {value!r}")
        videos[Path(row["video_path"]).name] = float(value)
    return Result(float(entry[0]), videos)


def _is_number(value: Any) -> TypeGuard[float]:
    return isinstance(value, int | float) and math.isfinite(value)  # true and false are numbers here


def shortfalls(found: Mapping[str, Result], wanted: Mapping[str, int]) -> list[str]:
    """A line for each dimension that has no results, or fewer videos than VBench's protocol asks for."""
    lines = []
    for name, count in wanted.items():
        if name not in found:
            lines.append(f"{name}: not graded")
        elif len(found[name].videos) < count:
            lines.append(f"{name}: {len(found[name].videos)} of {count} videos")
    absent = [name for name in DIMENSIONS if name not in wanted]
    return lines + ([f"no prompts for {', '.join(absent)}"] if absent else [])


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, OSError) as error:
        raise ValueError(f"{path}: not readable as JSON ({error})") from None
