"""The parts of the demo's page, as HTML text."""

import json
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from ...actors.bench_report import FRAME_RATE
from ..evaluation.charts import BOTTOM, HEIGHT, LEFT, RIGHT, TOP, WIDTH, Curve, color, curves_chart
from ..evaluation.page import verdict_of
from ..recipe import Recipe
from .figures import MODELS, Figures
from .rollouts import CLIP, IMAGE, MINUTE, SWITCH, TEACHER, VIDEO
from .runner import Record
from .settings import MEDIA, Demo
from .stages import DISTILL, EVALUATE, FRESH_NAME, INITIALIZE, STUDENT_NAME, TEACHER_NAME, TRAJECTORIES

NAMES = {
    CLIP: "student-clip",
    TEACHER: "teacher-clip",
    MINUTE: "student-long",
    IMAGE: "image-video",
    VIDEO: "video-redrawn",
    SWITCH: "prompt-switch",
}
WORDS = {TEACHER_NAME: "Teacher", FRESH_NAME: "Fresh student", STUDENT_NAME: "Shipped student"}
SHOWN = 4  # held-out prompts before the fold
WHERE_HEAD = ("Stage", '<th class="words">What it made</th>', '<th class="words">Where</th>', "Time")
STRONG = ("total", "quality", "semantic")
LABELLED = 0.08  # of the whole time, from which a stage's name fits into its bar
CALM = ("#4f6d9e", "#6b8f71", "#b0784f", "#8a6aa5", "#a8894a", "#5c8d96", "#9c5d6d", "#737b86")


# --- Small parts -----------------------------------------------------------------------------------------------


def video(name: str, label: str, identity: str = "") -> str:
    """A video of the media folder. It plays by itself when it is seen, or by its controls without scripts."""
    mark = f' id="{identity}"' if identity else ""
    return (
        f'<video{mark} src="{MEDIA}/{name}.mp4" poster="{MEDIA}/{name}.webp" aria-label="{escape(label, quote=True)}" '
        "muted loop playsinline controls preload=none></video>"
    )


def table(head: Sequence[str], rows: Sequence[Sequence[str]], strong: Sequence[bool] = ()) -> str:
    """Cells are HTML; one that begins with `<td` stands as it is."""
    marks = strong or [False] * len(rows)
    lines = [
        f"<tr{' class=strong' if mark else ''}>{''.join(_cell(cell) for cell in row)}</tr>"
        for row, mark in zip(rows, marks, strict=True)
    ]
    columns = "".join(column if column.startswith("<th") else f"<th>{column}</th>" for column in head)
    return f'<div class="wide"><table><thead><tr>{columns}</tr></thead><tbody>{"".join(lines)}</tbody></table></div>'


def _cell(content: str) -> str:
    return content if content.startswith("<td") else f"<td>{content}</td>"


def _key(names: Mapping[str, int]) -> str:
    dots = (
        f'<li><span class="dot" style="background:{color(at)}"></span>{escape(name)}</li>' for name, at in names.items()
    )
    return f'<ul class="key">{"".join(dots)}</ul>'


def _line(label: str, place: int, seconds: Sequence[float], values: Sequence[float | None]) -> Curve:
    """A curve without an interval."""
    nothing = [None] * len(values)
    return Curve(label, place, seconds, values, nothing, nothing)


def _minutes(seconds: float) -> str:
    whole = round(seconds)
    return f"{whole // 60} min {whole % 60:02d} s" if whole >= 60 else f"{whole} s"


def _score(value: float | None) -> str:
    return "not graded" if value is None else f"{value:.3f}"


def _take_score(take: Mapping[str, Any]) -> str:
    scores = take["scores"].get("sprites")
    return f"total {scores['total']:.3f}, semantic {scores['semantic']:.2f}" if scores else "not graded"


# --- Top -------------------------------------------------------------------------------------------------------


def intro(figures: Figures) -> str:
    spent = sum(record["seconds"] for record in figures.records.values())
    cores, steps = figures.protocol["cores"], figures.takes[TEACHER]["figures"]["steps"]
    return (
        f"Everything here was made on one machine in {_minutes(spent)}: {cores} cores, no GPU, no network. A teacher "
        f"that takes {steps} steps with guidance for a clip; a causal student that makes the same kind of video block "
        "by block, in a few steps, and can go on for as long as one likes."
    )


def tiles(lines: Mapping[str, tuple[str, str]]) -> str:
    return "".join(
        f"<div><dt>{escape(name)}</dt><dd><b>{escape(figure)}</b>{escape(meaning)}</dd></div>"
        for name, (figure, meaning) in lines.items()
    )


# --- Videos ----------------------------------------------------------------------------------------------------


def twice(figures: Figures) -> dict[str, str]:
    teacher, student = figures.takes[TEACHER], figures.takes[CLIP]
    cards = []
    for take, name, who in ((teacher, TEACHER, "Teacher"), (student, CLIP, "Shipped student")):
        made = take["figures"]
        first, seconds = made["time_to_first_frame"], made["seconds"]
        told = f"first frame after {first:.2f} s, all {made['frames']} after {seconds:.2f} s; {_take_score(take)}"
        cards.append(
            f'<figure class="card" data-first="{first:.3f}"><div class="screen">{video(NAMES[name], who)}'
            f'<div class="cover" hidden></div></div><figcaption><b>{who}</b>: {told}</figcaption></figure>'
        )
    steps = teacher["figures"]["steps"], student["figures"]["steps"]
    note = (
        f"On the left the teacher: {steps[0]} steps with guidance, over the whole clip at once. On the right the "
        f"student: {steps[1]} steps a block, without guidance, each picture shown as it is made. The button plays both "
        "as they came."
    )
    return {"twice": "".join(cards), "twice_note": note, "twice_prompt": escape(student["shots"][0]["prompt"])}


def long_stream(figures: Figures) -> dict[str, str]:
    take = figures.takes[MINUTE]
    made, drift = take["figures"], take["drift"]
    length, prompt = made["seconds_of_video"], take["shots"][0]["prompt"]
    chart = f'<p class="soft">{"The oracle could not grade it."}</p>'
    if drift.get("total"):
        seconds = list(range(len(drift["total"])))
        names = {name: index for index, name in enumerate(STRONG)}
        curves = [_line(name, index, seconds, drift[name]) for name, index in names.items()]
        frame = f"{LEFT} {WIDTH - RIGHT} {TOP} {HEIGHT - BOTTOM} {seconds[-1] or 1}"
        chart = (
            f'<div data-follows="long-video" data-frame="{frame}">{curves_chart(curves, "score")}</div>{_key(names)}'
        )
    shown = (
        f'<figure class="card"><div class="screen">{video(NAMES[MINUTE], "the long stream", "long-video")}</div>'
        f"<figcaption><q>{escape(prompt)}</q></figcaption></figure>"
        f'<figure class="card">{chart}<figcaption><b>Drift.</b> The score of every second, by the oracle.</figcaption>'
        "</figure>"
    )
    clips = length / (figures.takes[TEACHER]["figures"]["seconds_of_video"])
    gap = made["chunk_gap"]["p95"]
    steady = f", 95 % of its chunks of {made['frames_per_block']} frames within {gap:.2f} s" if gap else ""
    note = (
        f"{length / clips:.0f} s is what the teacher's clips last; this stream is {clips:.0f} times as long, made at "
        f"{made['frames_per_second']:.0f} frames per second ({FRAME_RATE} are shown){steady}. A window of "
        f"{made['window']} latent frames with {made['sink']} of them fixed: memory stays as it is however long it runs."
    )
    return {"long": shown, "long_note": note, "long_title": f"One stream of {length:.0f} seconds"}


def ways(figures: Figures) -> str:
    image, redrawn, switch = (figures.takes[name] for name in (IMAGE, VIDEO, SWITCH))
    given = (
        f'<div><div class="screen"><img src="{MEDIA}/image-given.png" alt="the image"></div><span>given</span></div>'
    )
    source = f'<div><div class="screen">{video("video-given", "the source video")}</div><span>given</span></div>'
    level = redrawn["figures"]["noise"]["level"]
    shots = escape(json.dumps(switch["shots"]), quote=True)
    turn = f"{switch['shots'][-1]['second']:.2f}" if len(switch["shots"]) > 1 else "-"
    cards = (
        ("Image to video", f'<div class="both">{given}{_made(IMAGE)}</div>', image, _asked(image, "")),
        (
            "Video to video",
            f'<div class="both">{source}{_made(VIDEO)}</div>',
            redrawn,
            _asked(redrawn, f"noise {level:g}; "),
        ),
        (
            "Prompt switch",
            f'<div class="screen">{video(NAMES[SWITCH], "the prompt switch")}</div>'
            f'<p class="now" data-shots="{shots}">{escape(switch["shots"][0]["prompt"])}</p>',
            switch,
            f"The prompt changes at {turn} s; ",
        ),
    )
    return "".join(
        f'<figure class="card"><h3>{title}</h3>{shown}<figcaption>{told}{_take_score(take)}</figcaption></figure>'
        for title, shown, take, told in cards
    )


def _asked(take: Mapping[str, Any], more: str) -> str:
    return f"<q>{escape(take['shots'][-1]['prompt'])}</q>, {more}"


def _made(name: str) -> str:
    return f'<div><div class="screen">{video(NAMES[name], "what was made of it")}</div><span>made</span></div>'


def prompts_of(figures: Figures) -> list[str]:
    """The graded prompts, each once, in their order."""
    return list(dict.fromkeys(cell["prompt"] for cell in figures.cells))


def cell_name(index: int, model: str) -> str:
    """Of a graded video in the media folder."""
    return f"heldout-{index:02d}-{model}"


def heldout(figures: Figures) -> dict[str, str]:
    names = "".join(f"<div>{WORDS[model]}</div>" for model in MODELS)
    rows = [_heldout_row(figures, index, prompt) for index, prompt in enumerate(prompts_of(figures))]
    shown, folded = rows[:SHOWN], rows[SHOWN:]
    more = f"<details><summary>{len(folded)} more prompts</summary>{''.join(folded)}</details>" if folded else ""
    note = (
        "Combinations of shape, colour and motion that no training has shown. Every model makes each of them once, "
        "under the same seed; the number is the oracle's total, 0 to 1."
    )
    return {"heldout": f'<div class="grid names"><div></div>{names}</div>{"".join(shown)}{more}', "heldout_note": note}


def _heldout_row(figures: Figures, index: int, prompt: str) -> str:
    totals = {cell["model"]: cell["total"] for cell in figures.cells if cell["prompt"] == prompt}
    screens = "".join(
        f'<figure><div class="screen">{video(cell_name(index, model), f"{WORDS[model]}: {prompt}")}</div>'
        f"<figcaption>{_score(totals[model])}</figcaption></figure>"
        for model in MODELS
    )
    return f'<div class="grid"><p>{escape(prompt)}</p>{screens}</div>'


# --- Tables ----------------------------------------------------------------------------------------------------


def speed(figures: Figures) -> dict[str, str]:
    found = figures.speed
    student, teacher, ratio = found["student"], found["teacher"], found["student_over_teacher"]
    rows = []
    for label, section, name in (
        ("Frames per second, denoise only", "frames_per_second", "denoise_only"),
        ("Frames per second, end to end", "frames_per_second", "end_to_end"),
    ):
        values = [part[section][name] for part in (student, teacher, ratio)]
        rows.append((label, f"{values[0]:.1f}", f"{values[1]:.1f}", f"{values[2]:.1f} times"))
    first = student["time_to_first_frame"], teacher["time_to_first_frame"]
    rows.append(
        ("Time to first frame", f"{first[0]:.3f} s", f"{first[1]:.2f} s", f"{first[1] / first[0]:.0f} times sooner")
    )
    passes = student["forwards_per_latent"], teacher["forwards_per_latent"]
    rows.append(("Passes per latent frame", *map(str, passes), f"{passes[1] / passes[0]:.0f} times fewer"))
    gap = student["chunk_gap"]
    if gap["count"]:
        gaps = " / ".join(f"{gap[name]:.3f}" for name in ("p50", "p95", "p99"))
        rows.append((f"Gap between chunks, p50 / p95 / p99 of {gap['count']}", f"{gaps} s", "-", "-"))
    shown = table(
        ("", "Student", "Teacher", "Student against teacher"), rows, [True, True, True, *[False] * (len(rows) - 3)]
    )
    note = "Measured in this run, one after the other, on the same machine, with nothing else of the demo beside it."
    return {"speed": shown, "speed_note": note, "speed_setting": escape(_speed_setting(found))}


def _speed_setting(found: Mapping[str, Any]) -> str:
    setting, device = found["setting"], found["setting"]["device"]
    return (
        f"{device['name']}, {device['cpu_threads']} threads, {setting['precision']}, "
        f"{setting['width']}x{setting['height']}, blocks of {setting['block']} latent frames, {setting['steps']} steps "
        f"and a clean pass, window {setting['window']} with {setting['sink']} sink frames, {setting['warmup_blocks']} "
        f"blocks of warm-up; {found['teacher']['latents']} latent frames and {found['teacher']['forwards']} passes of "
        "the teacher, which is the same network over the whole clip. Text encoding not in. End to end holds the VAE, "
        "denoise only does not."
    )


def quality(figures: Figures) -> dict[str, str]:
    rows, strong = [], []
    for name, models in figures.scores.items():
        cells = [_estimate(models.get(model)) for model in MODELS]
        difference = figures.differences.get(name, {}).get(STUDENT_NAME)
        words, look = verdict_of(difference) if difference else ("-", "noise")
        size = f"<small>{difference['mean']:+.3f}</small>" if difference else ""
        rows.append((name.replace("_", " "), *cells, f'<td class="{look}">{words}{size}</td>'))
        strong.append(name in STRONG)
    count = max((entry["count"] for models in figures.scores.values() for entry in models.values()), default=0)
    note = (
        f"The world's own oracle grades all three models on the same {count} held-out prompts, under VBench's names "
        "and weights; below each mean its 95 % interval over prompts. Chance alone reaches a high total: read semantic "
        "first."
    )
    head = ("", *(WORDS[model] for model in MODELS), "Shipped against teacher")
    return {"quality": table(head, rows, strong), "quality_note": note}


def _estimate(entry: Mapping[str, Any] | None) -> str:
    if entry is None:
        return "-"
    bounds = "" if entry["low"] is None else f"<small>{entry['low']:.3f} to {entry['high']:.3f}</small>"
    return f"{entry['mean']:.3f}{bounds}"


# --- Training, places, recipe ----------------------------------------------------------------------------------


def training(figures: Figures, base: Recipe, full: Recipe) -> dict[str, str]:
    samples = figures.records[TRAJECTORIES]["figures"]["samples"]
    used = {INITIALIZE: base.initialize, DISTILL: base.distill.causvid}
    whole = {INITIALIZE: full.initialize, DISTILL: full.distill.causvid}
    titles = {INITIALIZE: "ODE initialisation", DISTILL: "Distribution matching (DMD)"}
    charts = []
    for name, curve in figures.curves.items():
        steps = [row["step"] + 1 for row in curve]
        drawn = curves_chart([_line("loss", 0, steps, [row["loss"] for row in curve])], "loss")
        size = (
            f"{used[name].steps} steps of {used[name].batch}, shortened from {whole[name].steps} of {whole[name].batch}"
        )
        charts.append(
            f'<figure class="card">{drawn.replace(">seconds<", ">steps<").replace("over seconds", "over steps")}'
            f"<figcaption><b>{titles[name]}</b>: {size}</figcaption></figure>"
        )
    zero = base.zero
    note = (
        f"Both stages are shortened here, so that they take minutes: {samples} trajectories of the teacher instead of "
        f"thousands. It shows that the machinery runs: Ray workers, DeepSpeed ZeRO stage {zero.stage} "
        f"({zero.precision}) on Ray Train. The loss of distribution matching need not fall: it does "
        f"not measure quality. {_lineage(figures.origin)}"
    )
    return {"training": "".join(charts), "training_note": note}


def _lineage(origin: Mapping[str, Any]) -> str:
    """How the shipped student was made, by its own account, from the first stage on."""
    stages: list[str] = []
    while "method" in origin:
        steps = f" ({origin['steps']:,} steps)" if "steps" in origin else ""
        stages.insert(0, f"{origin['method']}{steps}")
        origin = origin.get("parent", {})
    if not stages:
        return "The shipped student does not say how it was made."
    return f"The shipped student, by its own account: {escape(', then '.join(stages))}."


def where(records: Mapping[str, Record]) -> dict[str, str]:
    bars, rows = [], []
    whole = sum(record["seconds"] for record in records.values())
    for index, (name, record) in enumerate(records.items()):
        seconds = record["seconds"]
        tone = CALM[index % len(CALM)]
        told = f"{name}: {_minutes(seconds)}"
        label = name if seconds > LABELLED * whole else ""
        bars.append(f'<span style="flex:{max(seconds, 0.1):.1f} 0 0;background:{tone}" title="{told}">{label}</span>')
        dot = f'<span class="dot" style="background:{tone}"></span>'
        title = f'<td class="words">{dot}<b>{name}</b><small class="long-words">{escape(record["title"])}</small></td>'
        places = f'<td class="words">{_places(record["workers"])}</td>'
        made = f'<td class="words">{escape(record["summary"])}</td>'
        rows.append((title, made, places, f'<td class="short">{seconds:.1f} s</td>'))
    shown = f'<div class="time">{"".join(bars)}</div>{table(WHERE_HEAD, rows)}'
    note = (
        "Each stage reads folders and writes one. Those with workers are Ray jobs, which run on a cluster by the same "
        "commands; here the workers are processes of this machine."
    )
    return {"where": shown, "where_note": note}


def _places(workers: Sequence[Mapping[str, Any]]) -> str:
    """Processes by what they did: `2 pool workers (pids 11, 12 on 127.0.0.1)`."""
    found: dict[tuple[str, str], list[int]] = {}
    for worker in workers:
        pids = found.setdefault((worker["role"], worker["node"]), [])
        if worker["pid"] not in pids:
            pids.append(worker["pid"])
    lines = []
    for (role, node), pids in found.items():
        many = f"{len(pids)} {role}s" if len(pids) > 1 and node else role
        label, on = "pids" if len(pids) > 1 else "pid", f" on {escape(node)}" if node else ""
        lines.append(f"{escape(many)}<small>{label} {', '.join(map(str, pids))}{on}</small>")
    return "".join(lines)


def recipe(demo: Demo, figures: Figures) -> dict[str, str]:
    base = demo.base.model_dump(mode="json", exclude={"pretrain", "finetune", "ingest", "causal_teacher"})
    base["distill"] = {"causvid": base["distill"]["causvid"]}
    content = {
        "demo": demo.recipe.model_dump(mode="json"),
        "resolved": base,
        "models": {"teacher": demo.prints["teacher"], "student": demo.prints["student"]},
        "stages": {name: record["fingerprint"] for name, record in figures.records.items()},
        "machine": figures.protocol,
    }
    note = (
        "Every stage is kept with the fingerprint of all that decides it. The same command skips what is done and goes "
        f"on with what is not. The stages' folders stand in work/; the evaluation's own page is "
        f"work/{EVALUATE}/report.html."
    )
    return {"recipe": escape(json.dumps(content, indent=2)), "recipe_note": note}


def footer(figures: Figures) -> str:
    protocol = figures.protocol
    parts = (f"Reelway {protocol['reelway']}", f"torch {protocol['torch']}", f"Python {protocol['python']}")
    return escape(f"{', '.join(parts)}; {protocol['processor']}, {protocol['cores']} cores.")
