"""`reelway card`: a student's model card, from its ablation: how it was made, how good it is, and where it ends."""

import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from matplotlib.figure import Figure

from .. import __version__
from ..actors.judge import END_SECONDS
from ..cluster.storage import Storage
from ..kernels.causal.student import StudentSettings
from .ablation import CLIPS
from .ablation_rows import BY_NAME, TEACHER, with_needs
from .ablation_table import FIGURES, MANY_STEPS, best_student, strips_of
from .evaluation.examiner import STRIP_FRAMES
from .sheet import contact_sheet
from .telemetry import read_curve
from .training import write_json

CARD, SCORES, SAMPLES, CURVES = "card", "scores.json", "samples.png", "curves.png"
SHEET_PROMPTS = 4
SMOOTHING = 50  # steps in a curve's running mean
Entry = dict[str, Any]

app = typer.Typer(add_completion=False, help="Write a student's model card from its ablation.")


@app.command()
def card_command(
    ablation: Annotated[Path, typer.Argument(metavar="RUN", help="The folder of `reelway ablation`.")],
    row: Annotated[str | None, typer.Option(help="Whose card; by default that of the best student.")] = None,
    out: Annotated[Path | None, typer.Option(help="Copy the student there first, and write the card there.")] = None,
) -> None:
    """Write README.md and card/ into the student's folder."""
    figures = read_figures(ablation)
    student = choose(figures, row)
    folder = out or Path(student["model"])
    if out is not None:
        copy_model(Path(student["model"]), out)
    write_card(figures, student, ablation, folder)
    size = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
    typer.echo(f"{folder / 'README.md'}: the card of {student['name']}; the folder holds {size / 1e6:.1f} MB")


def read_figures(run: Path) -> Entry:
    """ablation.json of a run; FileNotFoundError where there is none."""
    path = run / FIGURES
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file; `reelway ablation` writes it")
    figures: Entry = json.loads(path.read_text())
    return figures


def choose(figures: Entry, row: str | None) -> Entry:
    """The entry of a row, the best student's without one. ValueError where it is no student that was graded."""
    if row is None:
        best = best_student(figures["rows"])
        if best is None:
            raise ValueError("ablation: no student in it is graded yet")
        return best
    if row not in BY_NAME or row in MANY_STEPS:
        raise ValueError(f"--row: must be a student of {', '.join(BY_NAME)}, got {row!r}")
    found: Entry = next(entry for entry in figures["rows"] if entry["name"] == row)
    if found["missing"] is not None:
        raise ValueError(f"--row {row}: is missing: {found['missing']}")
    return found


def copy_model(source: Path, target: Path) -> None:
    """The model in another folder, whole or not at all; a model that was there is replaced, other files are not."""
    if target.exists() and any(target.iterdir()) and not (target / "student.json").is_file():
        raise ValueError(f"--out {target}: holds something that is no student; choose another folder")
    partial = target.with_name(f"{target.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    shutil.copytree(source, partial)
    shutil.rmtree(target, ignore_errors=True)
    partial.rename(target)


def write_card(figures: Entry, student: Entry, run: Path, folder: Path) -> None:
    """README.md and card/{scores.json, samples.png, curves.png} in the student's folder."""
    card = folder / CARD
    card.mkdir(parents=True, exist_ok=True)
    teacher = next(entry for entry in figures["rows"] if entry["name"] == TEACHER)
    stages = [entry for entry in figures["rows"] if entry["name"] in with_needs([student["name"]])]
    compared = {"student": student, **({TEACHER: teacher} if teacher["missing"] is None else {})}
    kept = {
        name: {key: entry[key] for key in entry if key not in ("stage", "model")} for name, entry in compared.items()
    }
    write_json(card / SCORES, {**kept, "protocol": _without_folders(figures["protocol"])})
    _draw_samples(figures, student["name"], run, card / SAMPLES)
    has_curves = draw_curves(stages, card / CURVES)
    (folder / "README.md").write_text(_text(figures, compared, stages, StudentSettings.read(folder), has_curves))


def _without_folders(protocol: Entry) -> Entry:
    """The protocol without the paths of the machine that it was carried out on."""
    found = json.loads(json.dumps(protocol))
    for report in filter(None, found.values()):
        report["sweep"].pop("models")
        for model in report["models"].values():
            model.pop("folder")
    return found


def _draw_samples(figures: Entry, student: str, run: Path, path: Path) -> None:
    """Student under teacher, the same prompt and seed."""
    strips = strips_of(figures, Storage.open(str(run / CLIPS)), (TEACHER, student), SHEET_PROMPTS)
    if strips:
        contact_sheet(strips, path, columns=STRIP_FRAMES, scale=1)


def draw_curves(stages: Sequence[Entry], path: Path) -> bool:
    """The loss of every stage with its running mean, and the scores of its sheets. False where no curve is there."""
    known = [(entry["name"], Path(entry["stage"]["run"])) for entry in stages]
    curves = [(name, run, rows) for name, run in known if (rows := read_curve(run / "curve.jsonl"))]
    if not curves:
        return False
    figure = Figure(figsize=(3.4 * len(curves), 4.6), layout="constrained")
    panels = figure.subplots(2, len(curves), squeeze=False)
    for column, (name, run, rows) in enumerate(curves):
        steps, losses = [row["step"] for row in rows], [row["loss"] for row in rows]
        width = min(SMOOTHING, len(losses))
        panels[0, column].plot(steps, losses, color="0.8", linewidth=0.6)
        panels[0, column].plot(steps[width - 1 :], _running_mean(losses, width), color="C0")
        panels[0, column].set_title(name)
        scores = [row for row in read_curve(run / "scores.jsonl") if "score" in row]
        panels[1, column].plot([row["step"] for row in scores], [row["score"] for row in scores], "o-", color="C1")
        panels[1, column].set_xlabel("step")
    panels[0, 0].set_ylabel("loss")
    panels[1, 0].set_ylabel("score of the sheets")
    figure.savefig(path, dpi=90)
    return True


def _running_mean(values: Sequence[float], width: int) -> list[float]:
    return [sum(values[end - width : end]) / width for end in range(width, len(values) + 1)]


# --- the words --------------------------------------------------------------------------------------------------------


def _text(
    figures: Entry, compared: Mapping[str, Entry], stages: Sequence[Entry], settings: StudentSettings, curves: bool
) -> str:
    student, teacher = compared["student"], compared.get(TEACHER)
    sweep = figures["protocol"]["clips"]["sweep"]
    prompts = sum(entry["count"] for entry in figures["protocol"]["clips"]["prompts"].values())
    size = f"{settings.width}x{settings.height}" if settings.width else "unknown size"
    return _CARD.format(
        title=", ".join(entry["name"] for entry in stages),
        steps=len(settings.timesteps),
        timesteps=", ".join(f"{value:.4g}" for value in settings.timesteps),
        block=settings.block,
        window=settings.window,
        sink=settings.sink,
        size=size,
        stages="\n".join(_stage_row(entry) for entry in stages),
        commands="\n".join(f"    {entry['stage']['command']}" for entry in stages if entry["stage"]["command"]),
        curves="![losses and scores](card/curves.png)\n\n" if curves else "",
        count=prompts,
        seeds=len(figures["protocol"]["clips"]["seeds"]),
        seconds=f"{sweep['seconds'][0]:g}",
        heads="student | teacher" if teacher else "student",
        bars="---|---|" if teacher else "---|",
        scores="\n".join(_score_rows(student, teacher)),
        speed="\n".join(_speed_rows(student, teacher)),
        devices=", ".join(figures["protocol"]["clips"]["devices"]),
        limits="\n".join(f"- {line}" for line in limits(figures, student)),
        version=__version__,
    )


def _stage_row(entry: Entry) -> str:
    stage = entry["stage"]
    recipe, gate = stage["recipe"] or {}, stage["gate"]
    rate = recipe.get("optimizer", recipe.get("student", {})).get("learning_rate")
    hours = "-" if stage["seconds"] is None else f"{stage['seconds'] / 3600:.2f}"
    passed = "-" if gate is None else "passed" if gate["passed"] else "not passed"
    cells = (entry["name"], recipe.get("steps"), recipe.get("batch"), rate, recipe.get("seed"))
    words = ["-" if cell is None else f"{cell:g}" if isinstance(cell, float) else str(cell) for cell in cells]
    return "| " + " | ".join([*words, hours, passed, f"`{stage['fingerprint'] or '-'}`"]) + " |"


def _score_rows(student: Entry, teacher: Entry | None) -> list[str]:
    entries = [student, teacher] if teacher else [student]
    rows = [_figures_row(name, [entry["scores"].get(name) for entry in entries]) for name in student["scores"]]
    rows.append(_figures_row("Fréchet distance (lower is better)", [entry["frechet"] for entry in entries]))
    rows.append(_figures_row("diversity, of the world's", [entry["diversity"] for entry in entries]))
    return rows


def _speed_rows(student: Entry, teacher: Entry | None) -> list[str]:
    entries = [student, teacher] if teacher else [student]
    names = {
        "frames_per_second": "frames per second, end to end",
        "denoise_frames_per_second": "frames per second, denoising alone",
        "time_to_first_frame": "seconds to the first frame",
        "forwards_per_block": "passes of the network per block",
    }
    return [_figures_row(said, [entry["speed"].get(name) for entry in entries]) for name, said in names.items()]


def _figures_row(name: str, values: Sequence[Any]) -> str:
    return f"| {name.replace('_', ' ')} | " + " | ".join(_figure(value) for value in values) + " |"


def _figure(value: Any) -> str:
    if value is None or (isinstance(value, dict) and value["mean"] is None):
        return "-"
    if not isinstance(value, dict):
        return f"{value:.3f}"
    bounds = "" if value["low"] is None else f" ({value['low']:.3f} to {value['high']:.3f})"
    return f"{value['mean']:.3f}{bounds}"


def limits(figures: Entry, student: Entry) -> list[str]:
    """What the figures say against the student, and what they do not say."""
    lines = ["It knows the words of the sprites world and nothing else."]
    gap, spread, drift = student["total_less_teachers"], student["diversity"], student["drift"]
    if gap:
        told = "outside the noise" if gap["seen"] else "inside the noise"
        lines.append(f"Its Total less its teacher's is {gap['mean']:+.3f} ({told}; paired by prompt).")
    if spread and spread["of_teacher"] and spread["of_teacher"]["mean"] is not None:
        share = spread["of_teacher"]["mean"]
        lines.append(
            f"Its videos of one prompt under different seeds are spread {share:.2f} times as far as its teacher's."
        )
    if drift:
        (seconds,) = figures["protocol"]["long"]["sweep"]["seconds"]
        told = f"{drift['mean']:.3f} times the Total of the first ({_bounds(drift)}; {drift['count']} prompts)"
        lines.append(f"Over rollouts of {seconds:g} s the last {END_SECONDS:g} s have {told}.")
        lines.append("Nothing longer was measured.")
    else:
        lines.append("Nothing was measured beyond the length of the training clips.")
    return lines


def _bounds(entry: Entry) -> str:
    return "no interval" if entry["low"] is None else f"{entry['low']:.3f} to {entry['high']:.3f}"


_CARD = """---
license: apache-2.0
library_name: reelway
pipeline_tag: text-to-video
tags: [reelway, wan, sprites, causal, distilled]
---

# A causal student of {steps} steps ({title})

It streams video of the sprites world, {block} latent frames at a time, as long as it is asked to: {steps} steps at
timesteps {timesteps}, no guidance, a KV cache of {window} latent frames with a sink of {sink}. Trained at {size}.

    reelway rollout --student DIR --prompt "a small red star drifts left over a navy background" --out star.mp4

## How it was made

{commands}

| stage | steps | batch | learning rate | seed | hours | gate | fingerprint |
|---|---|---|---|---|---|---|---|
{stages}

Fingerprints are those of the stages' `recipe.json`. In a distillation a step is an update of the critic. Written by
Reelway {version}.

{curves}## Scores

By the oracle of the sprites world on {count} held-out prompts (combinations of attributes that training never
showed), {seeds} seeds, clips of {seconds} s; in brackets 95 % intervals over prompts. Names and weights as in VBench.
Videos for random prompts reach 0.85 in Total and 0.30 in Semantic, so read Total with care.

| dimension | {heads} |
|---|{bars}
{scores}

![samples](card/samples.png)

## Speed

One video at a time on {devices}; end to end is from the prompt to frames in host memory.

| | {heads} |
|---|{bars}
{speed}

## Limits

{limits}
"""
