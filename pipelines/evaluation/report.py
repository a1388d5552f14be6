"""A sweep's report: means and intervals, curves, comparisons and the worst videos, as plain data."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import Any

import numpy as np
import pyarrow as pa

from ...actors.judge import PIXELS, SPRITES, VERSION
from ...kernels.metrics.measures import MEASURES
from ...kernels.metrics.statistics import (
    CONFIDENCE,
    RESAMPLES,
    Difference,
    Interval,
    bootstrap,
    bootstrap_columns,
    paired_difference,
)
from .examiner import SPEED, VIDEOS
from .plan import Cell, Plan, prompts_hash
from .sets import set_figures
from .tables import (
    SPRITES_DIMENSIONS,
    SPRITES_TOTALS,
    Group,
    GroupScores,
    Row,
    group_of,
    scores_by_group,
    sprites_statistic,
)

SCHEMA = 2
WORST = 10
VBENCH_JUDGE = "vbench"
JUDGES = (VBENCH_JUDGE, SPRITES, SPEED, PIXELS)  # in the order in which they are read
HIGHER_IS_BETTER = {"frames_per_second", "denoise_frames_per_second"}
NOT_COMPARED = {"seconds", "latents_per_block", "forwards_per_block"}  # they follow from a clip's and a block's length
Report = dict[str, Any]


@dataclass(frozen=True)
class Sources:
    """What a report is made from. failed: a line per cell that was given up. vbench: its own section, if any."""

    plan: Plan
    rows: Mapping[str, Row]
    results: pa.Table
    drift: pa.Table
    failed: list[str] = field(default_factory=list)
    vbench: list[Report] = field(default_factory=list)


def build_report(sources: Sources) -> Report:
    """The report of all cells that are there. Every mean and interval is over prompts, after the mean over seeds."""
    scores = scores_by_group(sources.results)
    done = [cell for cell in sources.plan.cells if cell.key in sources.rows]
    order = list(dict.fromkeys(group_of(cell) for cell in done))
    return {
        "schema": SCHEMA,
        "protocol": _protocol(sources),
        "cells": {"planned": len(sources.plan.cells), "done": len(done), "failed": sources.failed},
        "scores": [entry for group in order for entry in _scores(group, scores[group])],
        "curves": curves(sources.drift, order),
        "sets": set_figures(done, sources.rows),
        "baseline": baseline(sources.plan, order, scores),
        "against": None,
        "vbench": sources.vbench,
        "worst": worst(sources),
    }


def _scores(group: Group, judges: Mapping[str, GroupScores]) -> list[Report]:
    entries = []
    for judge in (judge for judge in JUDGES if judge in judges):
        found = judges[judge]
        for name, interval in intervals(judge, found).items():
            whose = {"model": group.model, "setting": group.setting, "prompts": group.prompt_set}
            entries.append({**whose, "judge": judge, "dimension": name, **_plain(interval), "videos": found.videos})
    return entries


def intervals(judge: str, found: GroupScores) -> dict[str, Interval]:
    """Each dimension's mean and interval; of the sprites' judge first the totals, from the dimensions' means."""
    names = _dimensions(judge, found)
    columns = dict(zip(names, bootstrap_columns(found.columns(names)), strict=True))
    if judge != SPRITES:
        return columns
    values = found.columns(SPRITES_DIMENSIONS)
    totals = {name: bootstrap(values, partial(sprites_statistic, name)) for name in SPRITES_TOTALS}
    return {**totals, **columns}


def _dimensions(judge: str, found: GroupScores) -> list[str]:
    if judge == SPRITES:
        return [name for name in SPRITES_DIMENSIONS if name in found.dimensions]
    return list(found.dimensions)


def _plain(found: Interval | Difference) -> Report:
    """For JSON, which has no NaN."""
    return {
        name: None if isinstance(value, float) and np.isnan(value) else value for name, value in asdict(found).items()
    }


# --- comparisons --------------------------------------------------------------------------------------


def baseline(plan: Plan, order: list[Group], scores: Mapping[Group, Mapping[str, GroupScores]]) -> Report:
    """Every group less the baseline's on the same prompts: the baseline model's first setting, of the same length if
    there is one.
    """
    name = plan.sweep.baseline or plan.models[0].name
    frames = {group_of(cell): cell.frames for cell in plan.cells}
    firsts: dict[tuple[str, int | None], Group] = {}
    for group in order:
        if group.model == name:
            firsts.setdefault((group.prompt_set, None), group)
            firsts.setdefault((group.prompt_set, frames[group]), group)
    entries = []
    for group in order:
        first = firsts.get((group.prompt_set, frames[group]), firsts.get((group.prompt_set, None)))
        if first is not None and group != first:
            entries += compared(first, scores[first], group, scores[group])
    return {"model": name, "differences": entries}


def against(old: pa.Table, new: pa.Table, source: str) -> Report:
    """Every group of the new results less the group of the same model, setting and prompts in the old ones.

    Raises ValueError when the two have no such group in common.
    """
    before, after = scores_by_group(old), scores_by_group(new)
    shared = [group for group in after if group in before]
    if not shared:
        there = "; ".join(f"{group.label} on {group.prompt_set}" for group in before) or "nothing"
        raise ValueError(f"--against {source}: no model, setting and prompts in common with this sweep; it has {there}")
    entries = [entry for group in shared for entry in compared(group, before[group], group, after[group])]
    unmatched = [f"{group.label} on {group.prompt_set}" for group in after if group not in before]
    return {"source": source, "differences": entries, "unmatched": unmatched}


def compared(
    first: Group, before: Mapping[str, GroupScores], second: Group, after: Mapping[str, GroupScores]
) -> list[Report]:
    """Second less first, dimension by dimension, over the prompts that both have. seen: outside the noise."""
    entries = []
    for judge in (judge for judge in JUDGES if judge in after and judge in before):
        shared = [prompt for prompt in after[judge].prompts if prompt in set(before[judge].prompts)]
        if not shared:
            continue
        pair = (before[judge].of_prompts(shared), after[judge].of_prompts(shared))
        for name, difference in _differences(judge, *pair).items():
            entries.append(
                {
                    "model": second.model,
                    "setting": second.setting,
                    "prompts": second.prompt_set,
                    "than": {"model": first.model, "setting": first.setting},
                    "judge": judge,
                    "dimension": name,
                    **_plain(difference),
                    "seen": difference.seen,
                    "better": better(judge, name),
                }
            )
    return entries


def _differences(judge: str, first: GroupScores, second: GroupScores) -> dict[str, Difference]:
    found = {}
    if judge == SPRITES:
        values = (first.columns(SPRITES_DIMENSIONS), second.columns(SPRITES_DIMENSIONS))
        found = {name: paired_difference(*values, partial(sprites_statistic, name)) for name in SPRITES_TOTALS}
    for name in _dimensions(judge, second):
        if name in first.dimensions and not (judge == SPEED and name in NOT_COMPARED):
            values = (first.columns([name]), second.columns([name]))
            both = np.isfinite(values[0][:, 0]) & np.isfinite(values[1][:, 0])
            if both.any():
                found[name] = paired_difference(values[0][both], values[1][both])
    return found


def better(judge: str, name: str) -> str:
    """Which values of a dimension are better: higher, lower, zero, one or neither."""
    if judge in (SPRITES, VBENCH_JUDGE):
        return "higher"
    if judge == PIXELS:
        return MEASURES[name].better
    return "higher" if name in HIGHER_IS_BETTER else "lower"


# --- over time, and one by one ------------------------------------------------------------------------


def curves(drift: pa.Table, order: list[Group]) -> list[Report]:
    """Mean and interval of each group, judge and dimension, second by second."""
    collected: dict[tuple[Group, str, str], dict[str, dict[int, list[float]]]] = {}
    for row in drift.to_pylist():
        place = (Group(row["model"], row["setting"], row["prompt_set"]), row["judge"], row["dimension"])
        timed = collected.setdefault(place, {}).setdefault(row["prompt_id"], {})
        timed.setdefault(row["second"], []).append(row["value"])
    found = []
    for (group, judge, name), prompts in sorted(collected.items(), key=lambda item: order.index(item[0][0])):
        seconds = sorted({second for values in prompts.values() for second in values})
        matrix = [[np.mean(values[at]) if at in values else np.nan for at in seconds] for values in prompts.values()]
        points = bootstrap_columns(np.array(matrix, np.float64))
        whose = {"model": group.model, "setting": group.setting, "prompts": group.prompt_set}
        lines = {name: [_plain(point)[name] for point in points] for name in ("mean", "low", "high")}
        found.append({**whose, "judge": judge, "dimension": name, "seconds": seconds, **lines})
    return found


def worst(sources: Sources) -> list[Report]:
    """The ten videos to look at first, the worst of them first.

    Of videos that the sprites' oracle graded those of the lowest total; of the others those that lie furthest from
    the rest in one of the pixels' figures, in robust standard deviations (1.4826 times the median deviation).
    """
    done = [cell for cell in sources.plan.cells if cell.key in sources.rows]
    graded = [cell for cell in done if SPRITES in sources.rows[cell.key]["scores"]]
    ranked = []
    for cell in graded:
        total = sources.rows[cell.key]["scores"][SPRITES]["total"]
        ranked.append((total, cell, f"total {total:.3f}"))
    if not graded:
        ranked = _outliers(done, sources.rows)
    ranked.sort(key=lambda entry: (entry[0], entry[1].key))
    return [
        {
            "key": cell.key,
            "model": cell.model.name,
            "setting": cell.label,
            "prompts": cell.prompt_set,
            "prompt": " → ".join(cell.graded),
            "seed": cell.seed,
            "why": why,
            "seen": sources.rows[cell.key]["seen"],
            "video": f"{VIDEOS}/{cell.key}.mp4",
        }
        for _, cell, why in ranked[:WORST]
    ]


def _outliers(cells: list[Cell], rows: Mapping[str, Row]) -> list[tuple[float, Cell, str]]:
    names = [name for name in MEASURES if all(name in rows[cell.key]["scores"][PIXELS] for cell in cells)]
    if not cells or not names:
        return []
    values = np.array([[rows[cell.key]["scores"][PIXELS][name] for name in names] for cell in cells])
    gaps = np.abs(values - np.median(values, axis=0))
    usual = 1.4826 * np.median(gaps, axis=0)
    far = np.where(usual > 0, gaps / np.where(usual > 0, usual, 1), 0)
    return [
        (-float(row.max()), cell, f"{names[int(row.argmax())]} {row.max():.1f} deviations from the rest")
        for cell, row in zip(cells, far, strict=True)
    ]


# --- the protocol -------------------------------------------------------------------------------------


def _protocol(sources: Sources) -> Report:
    plan, runs = sources.plan, [row["run"] for row in sources.rows.values()]
    versions = {name: sorted({run["versions"][name] for run in runs}) for name in (runs[0]["versions"] if runs else ())}
    sets = {
        name: {"count": len(prompts), "fingerprint": prompts_hash(prompts)} for name, prompts in plan.prompts.items()
    }
    return {
        "sweep": plan.sweep.model_dump(mode="json"),
        "prompts": sets,
        "seeds": plan.sweep.seeds,
        "models": {
            model.name: {name: value for name, value in asdict(model).items() if name != "name"}
            for model in plan.models
        },
        "devices": sorted({run["device"] for run in runs}),
        "threads": sorted({run["threads"] for run in runs}),
        "workers": sorted({run["workers"] for run in runs}),
        "load": max((run["load"] / run["cpus"] for run in runs), default=None),
        "versions": versions,
        "judge": VERSION,
        "intervals": {"over": "prompts", "confidence": CONFIDENCE, "resamples": RESAMPLES},
        "speed": "from the prompt to frames in host memory: text encoder, network and VAE; model loading, judging and "
        "writing left out; one warm-up before",
    }
