"""The ablation's results: one entry per row from the two evaluations, the targets, the table, the sheet of pictures."""

import io
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from PIL import Image

from ..actors.judge import END_SECONDS, SPRITES
from ..cluster.storage import Storage
from .ablation_rows import BY_NAME, ROWS, TEACHER, Ablation, Row, recipe_of, record_of
from .evaluation.examiner import SPEED, STRIPS
from .evaluation.sets import over_prompts
from .telemetry import read_curve

SCHEMA = 1
SHEET_PROMPTS = 2
TABLE, SHEET, FIGURES = "ablation.md", "ablation.png", "ablation.json"
DRIFT_TARGET, DIVERSITY_TARGET = 0.97, 0.8
MANY_STEPS = (TEACHER, "causal-teacher")  # the rows that are no students
# CausVid (arXiv 2412.07772, table 4) has its full method above each of these.
BELOW_CAUSVID = ("ode", "dmd-without-ode", "dmd-causal-teacher")
Entry = dict[str, Any]

# Heads of the table, and where a row's entry has the figure. Of these the interval is shown, too.
WITH_INTERVAL = ("Total", "last / first 5 s")
COLUMNS: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("Total", ("scores", "total")),
    ("Quality", ("scores", "quality")),
    ("Semantic", ("scores", "semantic")),
    ("object class", ("scores", "object_class")),
    ("color", ("scores", "color")),
    ("scene", ("scores", "scene")),
    ("motion", ("scores", "temporal_style")),
    ("imaging quality", ("scores", "imaging_quality")),
    ("Fréchet distance", ("frechet",)),
    ("diversity, of the teacher's", ("diversity", "of_teacher")),
    ("passes per block", ("speed", "forwards_per_block")),
    ("frames/s, denoising", ("speed", "denoise_frames_per_second")),
    ("frames/s, end to end", ("speed", "frames_per_second")),
    ("last / first 5 s", ("drift",)),
)


def build(
    ablation: Ablation,
    reasons: Mapping[str, str],
    clips: Entry | None,
    long: Entry | None,
    pictures: Sequence[Entry] = (),
) -> Entry:
    """All figures. reasons: of the rows that have no model. clips, long: reports of the two evaluations, if any.

    pictures: the clips that sheets show, by row, prompt and key.
    """
    rows = [_row(ablation, row, reasons, clips, long) for row in ROWS]
    return {
        "schema": SCHEMA,
        "rows": rows,
        "targets": targets(rows),
        "by_total": [row["name"] for row in sorted(_graded(rows), key=lambda row: -row["scores"]["total"]["mean"])],
        "pictures": list(pictures),
        "protocol": {name: report and report["protocol"] for name, report in (("clips", clips), ("long", long))},
    }


def _row(ablation: Ablation, row: Row, reasons: Mapping[str, str], clips: Entry | None, long: Entry | None) -> Entry:
    found: Entry = {"name": row.name, "title": row.title, "missing": reasons.get(row.name)}
    if row.name != TEACHER:
        found["stage"] = stage_of(ablation, row.name)
    if found["missing"] is None:
        found["model"] = str(ablation.model(row.name))
        found |= _figures(row.name, clips) if clips else {}
        found["drift"] = _of_set(row.name, long, "drift_ratio")
        if "scores" not in found:
            found["missing"] = "not evaluated: not asked for, or not one of its videos could be made"
    return found


def stage_of(ablation: Ablation, row: str) -> Entry:
    """How a row was trained, as its folder tells it."""
    run = ablation.given[row].parent if row in ablation.given else ablation.run / row
    record, written = record_of(run), recipe_of(run)
    curve = read_curve(run / "curve.jsonl")
    return {
        "run": str(run),
        "command": None if row in ablation.given else ablation.command(row),
        "stage": record.get("stage"),
        "status": record.get("status"),
        "fingerprint": record.get("fingerprint"),
        "gate": record.get("gate"),
        "recipe": written.get("recipe"),
        "seconds": curve[-1]["seconds"] if curve else None,
    }


def _figures(name: str, clips: Entry) -> Entry:
    """Of a row's clips; nothing where there are none."""
    entries = [entry for entry in clips["scores"] if entry["model"] == name]
    graded = {entry["dimension"]: _interval(entry) for entry in entries if entry["judge"] == SPRITES}
    if not graded:
        return {}
    against = [
        entry
        for entry in clips["baseline"]["differences"]
        if (entry["model"], entry["judge"], entry["dimension"]) == (name, SPRITES, "total")
        and entry["than"]["model"] == TEACHER
    ]
    return {
        "scores": graded,
        "total_less_teachers": {**_interval(against[0]), "seen": against[0]["seen"]} if against else None,
        "speed": {entry["dimension"]: _interval(entry) for entry in entries if entry["judge"] == SPEED},
        "videos": next(entry["videos"] for entry in entries if entry["judge"] == SPRITES),
        "frechet": _of_set(name, clips, "frechet"),
        "diversity": _diversity(name, clips),
    }


def _interval(entry: Entry) -> Entry:
    return {name: entry[name] for name in ("mean", "low", "high", "count")}


def _of_set(name: str, report: Entry | None, figure: str) -> Any:
    sets = [entry for entry in report["sets"] if entry["model"] == name] if report else []
    return sets[0][figure] if sets else None


def _diversity(name: str, clips: Entry) -> Entry | None:
    """Of the world's, with the share of the teacher's over the prompts that both have."""
    own, teachers = (_of_set(model, clips, "diversity_by_prompt") or {} for model in (name, TEACHER))
    shared = [prompt for prompt in own if prompt in teachers]
    of_world: Entry | None = _of_set(name, clips, "diversity")
    if of_world is None:
        return None
    pairs = np.array([[own[prompt], teachers[prompt]] for prompt in shared])
    return {**of_world, "of_teacher": over_prompts(pairs, _share) if shared else None}


def _share(means: np.ndarray) -> np.ndarray:
    return np.divide(means[:, 0], means[:, 1], out=np.full(len(means), np.nan), where=means[:, 1] > 0)


# --- what it should show ----------------------------------------------------------------------------------------------


def _graded(rows: Sequence[Entry]) -> list[Entry]:
    return [row for row in rows if row["missing"] is None]


def best_student(rows: Sequence[Entry]) -> Entry | None:
    """The student of the highest Total."""
    students = [row for row in _graded(rows) if row["name"] not in MANY_STEPS]
    return max(students, key=lambda row: row["scores"]["total"]["mean"], default=None)


def targets(rows: Sequence[Entry]) -> list[Entry]:
    """What a good distillation shows: {"rule", "measured", "met"}; None where there is nothing to measure."""
    found, best = {row["name"]: row for row in _graded(rows)}, best_student(rows)
    name = best["name"] if best else "none yet"
    gap = best and best["total_less_teachers"]
    spread = best and best["diversity"] and best["diversity"]["of_teacher"]
    drift, least = found["long"]["drift"] if "long" in found else None, DIVERSITY_TARGET
    kept = f"long: Total of the last {END_SECONDS:g} s of long rollouts, of the first's, at least {DRIFT_TARGET}"
    checks = [
        (f"best student ({name}): Total less the teacher's, at least 0", _mean(gap), 0.0),
        (f"best student ({name}): diversity, of the teacher's, at least {least}", _mean(spread), least),
        (kept, _mean(drift), DRIFT_TARGET),
    ]
    for other in BELOW_CAUSVID:
        both = [found[each]["scores"]["total"]["mean"] for each in ("causvid", other) if each in found]
        measured = both[0] - both[1] if len(both) == 2 else None
        checks.append((f"causvid: Total less that of {other}, at least 0", measured, 0.0))
    return [
        {"rule": rule, "measured": measured, "met": None if measured is None else measured >= least}
        for rule, measured, least in checks
    ]


def _mean(entry: Entry | None) -> float | None:
    return entry["mean"] if entry else None


# --- for the eye ------------------------------------------------------------------------------------------------------


def markdown(figures: Entry) -> str:
    """The table, what it was measured on, and what was hoped for."""
    heads = ["row", *(head for head, _ in COLUMNS)]
    lines = ["# Ablation", "", _told(figures), "", _line(heads), _line(["---"] * len(heads))]
    for row in figures["rows"]:
        if row["missing"] is None:
            lines.append(_line([row["title"], *(_cell(_at(row, path), head) for head, path in COLUMNS)]))
        else:
            lines.append(_line([row["title"], f"missing: {row['missing']}", *[""] * (len(COLUMNS) - 1)]))
    lines += ["", *_notes(figures), "", "| hoped for | measured | |", "|---|---|---|"]
    words = {True: "met", False: "not met", None: "nothing to measure"}
    for target in figures["targets"]:
        measured = "" if target["measured"] is None else f"{target['measured']:+.3f}"
        lines.append(_line([target["rule"], measured, words[target["met"]]]))
    commands = [row["stage"]["command"] for row in figures["rows"] if row.get("stage") and row["stage"]["command"]]
    return "\n".join([*lines, "", "Stage by stage:", "", *(f"    {command}" for command in commands)]) + "\n"


def _told(figures: Entry) -> str:
    clips, long = figures["protocol"]["clips"], figures["protocol"]["long"]
    if clips is None:
        return "Nothing is evaluated yet."
    ((name, prompts),) = clips["prompts"].items()
    sweep, (length,) = clips["sweep"], clips["sweep"]["seconds"]
    told = (
        f"{prompts['count']} prompts of {name}, seeds {', '.join(map(str, clips['seeds']))}, "
        f"{length:g} s of {sweep['clip']['width']}x{sweep['clip']['height']}; {', '.join(clips['devices'])}."
    )
    if long:
        ((_, few),), (length,) = long["prompts"].items(), long["sweep"]["seconds"]
        told += f" Long rollouts: {few['count']} prompts, {length:g} s."
    return told


def _notes(figures: Entry) -> list[str]:
    first, *_ = [row["videos"] for row in _graded(figures["rows"])] or [0]
    return [
        "Scores by the oracle of the sprites world, 0 to 1, higher is better; in brackets 95 % intervals over prompts. "
        f"Fréchet distance to renderings of the same prompts, {first} videos a row, lower is better. A bidirectional "
        "model's block is the whole clip; two passes a step with guidance.",
    ]


def _line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def _at(row: Entry, path: tuple[str, ...]) -> Any:
    value: Any = row
    for name in path:
        value = value.get(name) if isinstance(value, dict) else None
    return value


def _cell(value: Any, head: str) -> str:
    """A figure of a column; three decimals tell scores and shares apart, one is enough for speed."""
    if value is None or (isinstance(value, dict) and value["mean"] is None):
        return "-"
    if not isinstance(value, dict):
        return f"{value:.3f}"
    if head not in WITH_INTERVAL or value["low"] is None:
        return f"{value['mean']:.1f}" if value["mean"] >= 2 else f"{value['mean']:.3f}"
    return f"{value['mean']:.3f} ({value['low']:.3f} to {value['high']:.3f})"


def strips_of(figures: Entry, out: Storage, names: Sequence[str], prompts: int) -> list[tuple[str, np.ndarray]]:
    """Titled strips of clips of the first prompts under the first seed, row under row, for a contact sheet."""
    totals = {row["name"]: row["scores"]["total"]["mean"] for row in _graded(figures["rows"])}
    first = list(dict.fromkeys(picture["prompt"] for picture in figures["pictures"]))[:prompts]
    return [
        (
            f"{BY_NAME[picture['model']].title} ({totals[picture['model']]:.3f}): {picture['prompt']}",
            _frames(out.read(f"{STRIPS}/{picture['key']}.webp")),
        )
        for picture in figures["pictures"]
        if picture["prompt"] in first and picture["model"] in names and picture["model"] in totals
    ]


def _frames(strip: bytes) -> np.ndarray:
    """The frames [N, H, W, 3] that stand side by side in a strip."""
    picture = np.asarray(Image.open(io.BytesIO(strip)).convert("RGB"))
    height, width = picture.shape[:2]
    return np.stack(np.split(picture, width // height, axis=1))  # the world's frames are square
