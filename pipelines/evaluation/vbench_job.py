"""VBench in a sweep: a folder of videos under its names for each model and setting, its runs, and its totals."""

import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from ...actors import vbench
from ...cluster.storage import LocalStorage, Storage
from .examiner import VIDEOS
from .plan import Cell, Plan
from .report import VBENCH_JUDGE, Report
from .sweep import VBENCH
from .tables import Group, Row, group_of

Tell = Callable[[str], None]
FOLDER = "vbench"


def grade_with_vbench(plan: Plan, rows: Mapping[str, Row], out: Storage, info: Path, tell: Tell) -> list[Report]:
    """Run VBench on each group of its prompts, and read what it found; each video's values go into `rows`.

    Where it is not installed, or a dimension fails, says so and goes on with what is there. ValueError when the
    sweep is not on a local disk.
    """
    if not isinstance(out, LocalStorage):
        raise ValueError(f"--out {out.uri}: VBench reads videos from a local disk")
    prompts = vbench.read_info(info)
    entries = []
    for group, cells in _groups(plan, rows).items():
        names = {_video_name(plan, cell): cell for cell in cells}
        folder = _folder(Path(out.where("")), group, names, info)
        for dimension in vbench.expected(prompts):
            _try_to_run(folder, info, dimension, tell)
        found = vbench.read_results(folder / "results")
        for dimension, result in found.items():
            for name in result.videos.keys() & names.keys():
                scores = rows[names[name].key]["scores"].setdefault(VBENCH_JUDGE, {})
                scores[dimension] = result.videos[name]
        entries.append(_entry(group, folder, found, prompts))
    if entries and vbench.installed() is None:
        tell(_how_to_run_it(entries))
    return entries


def _groups(plan: Plan, rows: Mapping[str, Row]) -> dict[Group, list[Cell]]:
    """The groups that VBench can grade: its prompts, one prompt per video."""
    found: dict[Group, list[Cell]] = {}
    for cell in plan.cells:
        if cell.prompt_set == VBENCH and len(cell.graded) == 1 and cell.key in rows:
            found.setdefault(group_of(cell), []).append(cell)
    return found


def _video_name(plan: Plan, cell: Cell) -> str:
    return vbench.video_name(cell.prompt.text, plan.sweep.seeds.index(cell.seed))


def _folder(out: Path, group: Group, names: Mapping[str, Cell], info: Path) -> Path:
    """The group's folder with its videos in it. Other videos make another folder, so results are never of others."""
    content = json.dumps({name: cell.key for name, cell in sorted(names.items())})
    digest = hashlib.sha256(content.encode()).hexdigest()[:8]
    slug = re.sub(r"[^\w.+]+", "-", group.label).strip("-")
    folder = out / FOLDER / f"{slug}-{digest}"
    (folder / "videos").mkdir(parents=True, exist_ok=True)
    (folder / "results").mkdir(exist_ok=True)
    shutil.copyfile(info, folder / "info.json")
    for name, cell in names.items():
        target, source = folder / "videos" / name, out / VIDEOS / f"{cell.key}.mp4"
        if not target.exists():
            _link(source, target)
    return folder


def _link(source: Path, target: Path) -> None:
    try:
        os.link(source, target)
    except OSError:  # another disk, or a file system without links
        shutil.copyfile(source, target)


def _try_to_run(folder: Path, info: Path, dimension: str, tell: Tell) -> None:
    if vbench.installed() is None or vbench.is_graded(folder, dimension):
        return
    tell(f"vbench: {folder.name}: {dimension}")
    try:
        vbench.run(folder, info, dimension)
    except ValueError as error:
        tell(str(error))


def _entry(group: Group, folder: Path, found: Mapping[str, vbench.Result], prompts: list[vbench.Prompt]) -> Report:
    scores = vbench.scores({name: result.score for name, result in found.items()})
    entry: dict[str, Any] = {
        "model": group.model,
        "setting": group.setting,
        "folder": str(folder),
        "total": scores.total,
        "quality": scores.quality,
        "semantic": scores.semantic,
        "raw": {name: result.score for name, result in found.items()},
        "missing": vbench.shortfalls(found, vbench.expected(prompts)),
    }
    return entry


def _how_to_run_it(entries: list[Report]) -> str:
    where = Path(entries[0]["folder"]).parent
    return (
        f"vbench is not installed here, so {len(entries)} folders of videos wait under {where}. "
        "In each of them, where it is installed: vbench evaluate --videos_path videos --full_json_dir info.json "
        "--dimension D --output_path results/D, for every dimension D; then run this command again."
    )
