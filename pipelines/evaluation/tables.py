"""A sweep's results as tables: one row per video and dimension, one per video, dimension and second."""

import io
import json
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from ...cluster.storage import Storage
from ...kernels.sprites import scores as sprites_scores
from .examiner import CELLS
from .plan import Cell, Plan

RESULTS, DRIFT = "results.parquet", "drift.parquet"
Row = dict[str, Any]

WHOSE = [
    ("key", pa.string()),
    ("model", pa.string()),
    ("kind", pa.string()),
    ("setting", pa.string()),
    ("steps", pa.int32()),
    ("guidance", pa.float64()),
    ("window", pa.int32()),
    ("sink", pa.int32()),
    ("mode", pa.string()),
    ("prompt_set", pa.string()),
    ("prompt_id", pa.string()),
    ("prompt", pa.string()),
    ("seed", pa.int64()),
    ("frames", pa.int32()),
]
MEASURED = [("judge", pa.string()), ("dimension", pa.string())]
RESULT_SCHEMA = pa.schema([*WHOSE, *MEASURED, ("value", pa.float64())])
DRIFT_SCHEMA = pa.schema([*WHOSE, *MEASURED, ("second", pa.int32()), ("value", pa.float64())])


@dataclass(frozen=True, order=True)
class Group:
    """Videos that belong together in a report: one model under one setting on one set of prompts."""

    model: str
    setting: str
    prompt_set: str

    @property
    def label(self) -> str:
        return f"{self.model}, {self.setting}"


def group_of(cell: Cell) -> Group:
    return Group(cell.model.name, cell.label, cell.prompt_set)


def stored_keys(out: Storage) -> set[str]:
    """Keys of the cells that are done."""
    return {entry.name.removesuffix(".json") for entry in out.entries(CELLS) if entry.name.endswith(".json")}


def read_rows(out: Storage, plan: Plan) -> dict[str, Row]:
    """The stored rows of a plan's cells, by key. ValueError names a row that cannot be read."""
    rows = {}
    for key in sorted({cell.key for cell in plan.cells} & stored_keys(out)):
        name = f"{CELLS}/{key}.json"
        try:
            rows[key] = json.loads(out.read(name))
        except ValueError as error:
            raise ValueError(f"{out.where(name)}: damaged ({error}); remove it to have the cell made again") from None
    return rows


def results_table(plan: Plan, rows: Mapping[str, Row]) -> pa.Table:
    """One row per video and dimension, in the plan's order."""
    records = []
    for cell in plan.cells:
        for judge, values in rows[cell.key]["scores"].items() if cell.key in rows else ():
            whose = _whose(cell, rows[cell.key])
            records += [{**whose, "judge": judge, "dimension": name, "value": value} for name, value in values.items()]
    return pa.Table.from_pylist(records, RESULT_SCHEMA)


def drift_table(plan: Plan, rows: Mapping[str, Row]) -> pa.Table:
    """One row per video, dimension and second; seconds without a value are left out."""
    records = []
    for cell in plan.cells:
        for judge, curves in rows[cell.key]["drift"].items() if cell.key in rows else ():
            whose = {**_whose(cell, rows[cell.key]), "judge": judge}
            for name, values in curves.items():
                timed = [(second, value) for second, value in enumerate(values) if value is not None]
                records += [{**whose, "dimension": name, "second": at, "value": value} for at, value in timed]
    return pa.Table.from_pylist(records, DRIFT_SCHEMA)


def _whose(cell: Cell, row: Row) -> Row:
    setting = cell.setting
    return {
        "key": cell.key,
        "model": cell.model.name,
        "kind": cell.model.kind,
        "setting": cell.label,
        "steps": setting.steps,
        "guidance": setting.guidance,
        "window": setting.window,
        "sink": setting.sink,
        "mode": setting.mode,
        "prompt_set": cell.prompt_set,
        "prompt_id": cell.prompt.identity,
        "prompt": cell.prompt.text,
        "seed": cell.seed,
        "frames": row["frames"],
    }


def to_parquet(table: pa.Table) -> bytes:
    content = io.BytesIO()
    pq.write_table(table, content, compression="zstd")
    return content.getvalue()


# --- what reports are computed from -------------------------------------------------------------------


@dataclass(frozen=True)
class GroupScores:
    """A group's scores by one judge. values: [prompts, dimensions], means over seeds, NaN where there is none."""

    prompts: tuple[str, ...]
    dimensions: tuple[str, ...]
    values: np.ndarray
    videos: int

    def columns(self, names: Iterable[str]) -> np.ndarray:
        """The values of these dimensions [prompts, names], NaN for one that is not there."""
        nothing = np.full(len(self.prompts), np.nan)
        known = {name: self.values[:, index] for index, name in enumerate(self.dimensions)}
        return np.stack([known.get(name, nothing) for name in names], axis=1)

    def of_prompts(self, prompts: Iterable[str]) -> "GroupScores":
        """The same for some of the prompts only, in the order given."""
        wanted = tuple(prompts)
        rows = [self.prompts.index(prompt) for prompt in wanted]
        return GroupScores(wanted, self.dimensions, self.values[rows], self.videos)


def scores_by_group(table: pa.Table) -> dict[Group, dict[str, GroupScores]]:
    """{group: {judge: scores}} of a results table."""
    collected: dict[tuple[Group, str], dict[str, dict[str, list[float]]]] = {}
    videos: dict[tuple[Group, str], set[str]] = defaultdict(set)
    for row in table.to_pylist():
        place = (Group(row["model"], row["setting"], row["prompt_set"]), row["judge"])
        prompts = collected.setdefault(place, {})
        prompts.setdefault(row["prompt_id"], {}).setdefault(row["dimension"], []).append(row["value"])
        videos[place].add(row["key"])
    found: dict[Group, dict[str, GroupScores]] = {}
    for (group, judge), prompts in collected.items():
        found.setdefault(group, {})[judge] = _matrix(prompts, len(videos[group, judge]))
    return found


def _matrix(prompts: dict[str, dict[str, list[float]]], videos: int) -> GroupScores:
    dimensions = tuple(dict.fromkeys(name for scores in prompts.values() for name in scores))
    rows = [
        [float(np.mean(scores[name])) if name in scores else np.nan for name in dimensions]
        for scores in prompts.values()
    ]
    return GroupScores(tuple(prompts), dimensions, np.array(rows, np.float64), videos)


SPRITES_PARTS = {"quality": sprites_scores.QUALITY_WEIGHTS, "semantic": sprites_scores.SEMANTIC_WEIGHTS}
SPRITES_DIMENSIONS = sprites_scores.DIMENSIONS
SPRITES_TOTALS = ("total", "quality", "semantic")


def sprites_statistic(name: str, means: np.ndarray) -> np.ndarray:
    """total, quality or semantic of dimension means [R, SPRITES_DIMENSIONS], as VBench adds up: [R]."""
    if name == "total":
        quality, semantic = (sprites_statistic(part, means) for part in SPRITES_PARTS)
        shares = (sprites_scores.QUALITY_SHARE, sprites_scores.SEMANTIC_SHARE)
        return (shares[0] * quality + shares[1] * semantic) / sum(shares)
    weights = np.array([SPRITES_PARTS[name].get(dimension, 0.0) for dimension in SPRITES_DIMENSIONS])
    present = np.isfinite(means) * weights
    sums = (np.nan_to_num(means) * weights).sum(axis=1)
    return np.where(present.sum(axis=1) > 0, sums / np.maximum(present.sum(axis=1), 1e-9), np.nan)
