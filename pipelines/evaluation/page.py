"""The report as one HTML page that loads nothing: tables, charts, pictures, and links to the videos beside it."""

import base64
import json
from collections.abc import Callable, Mapping, Sequence
from html import escape
from typing import Any

from ...actors.judge import END_SECONDS, PIXELS, SPRITES
from ...actors.vbench import DIMENSIONS as VBENCH_DIMENSIONS
from ...kernels.metrics.measures import MEASURES
from ...kernels.metrics.statistics import FEWEST
from .charts import Curve, Point, color, curves_chart, points_chart
from .examiner import SPEED
from .report import Report
from .style import STYLE

Pictures = Callable[[str], bytes]
Place = tuple[str, str, str]  # model, setting, prompt set
CURVES = {
    SPRITES: ("total", "quality", "semantic"),
    PIXELS: ("sharpness", "exposure", "saturation", "flicker", "motion"),
}
SHEET_PROMPTS = 6
NOTHING = "&ndash;"
BUSY = 0.9  # tasks per CPU, from which a machine counts as busy
ROUGH = 10  # prompts below which intervals are called rough
JUDGES = {
    SPRITES: "Sprites oracle (0 to 1, higher is better)",
    PIXELS: "Pixels",
    SPEED: "Speed",
    "vbench": "VBench, each video's own value",
}
SPEED_UNITS = {
    "frames_per_second": "1/s",
    "denoise_frames_per_second": "1/s",
    "forwards_per_block": "passes",
    "forwards_per_latent": "passes",
    "latents_per_block": "latent frames",
}


def render_page(report: Report, sheet: Sequence[Report], pictures: Pictures) -> str:
    """The page. sheet: the cells whose strips are shown (`model`, `setting`, `prompts`, `prompt`, `key`).

    pictures: the WebP strip of a cell's key. The page's links are relative: it stands beside `videos/`.
    """
    groups = _groups(report)
    sections = [
        _head(report),
        _warnings(report),
        _overview(report, groups),
        _vbench(report),
        _speed_and_quality(report, groups),
        _differences("Against an earlier report", report["against"], earlier=True),
        _differences(f"Against {report['baseline']['model']}", report["baseline"]),
        _over_time(report, groups),
        _dimensions(report, groups),
        _whole_sets(report, groups),
        _sheets(sheet, pictures, groups),
        _worst(report, pictures),
        _failed(report),
        _protocol(report),
    ]
    body = "\n".join(section for section in sections if section)
    head = f'<meta charset="utf-8"><meta name="viewport" content="width=device-width"><title>Evaluation</title>{STYLE}'
    return f'<!doctype html>\n<html lang="en"><head>{head}</head>\n<body><main>{body}</main></body></html>\n'


# --- small parts --------------------------------------------------------------------------------------


def _groups(report: Report) -> dict[Place, int]:
    """Every group and its colour: one per model and setting, the same in all sets of prompts."""
    pairs: dict[tuple[str, str], int] = {}
    found = {}
    for entry in report["scores"]:
        pair = (entry["model"], entry["setting"])
        found[_place(entry)] = pairs.setdefault(pair, len(pairs))
    return found


def _place(entry: Mapping[str, Any]) -> Place:
    return (entry["model"], entry["setting"], entry["prompts"])


def _name(model: str, setting: str, index: int) -> str:
    dot = f'<span class="dot" style="background:{color(index)}"></span>'
    return f'{dot}<b>{escape(model)}</b> <span class="soft">{escape(setting)}</span>'


def number(value: float | None) -> str:
    """Three or four figures that tell something; a dash for nothing."""
    if value is None:
        return NOTHING
    if value and not 1e-3 <= abs(value) < 1e5:
        return f"{value:.2e}"
    digits = 3 if abs(value) < 1 else 2 if abs(value) < 100 else 0
    return f"{value:,.{digits}f}"


def _estimate(entry: Report | None) -> str:
    """A mean over its interval, in a table's cell."""
    if entry is None:
        return f"<td>{NOTHING}</td>"
    bounds = "" if entry["low"] is None else f"{number(entry['low'])} to {number(entry['high'])}"
    return f'<td><span class="mean">{number(entry["mean"])}</span><span class="bounds">{bounds}</span></td>'


def _section(title: str, content: str, note: str = "") -> str:
    told = f'<p class="note">{note}</p>' if note else ""
    return f"<section><h2>{escape(title)}</h2>{told}{content}</section>"


def _table(head: Sequence[str], rows: Sequence[str]) -> str:
    columns = "".join(f"<th>{column}</th>" for column in head)
    return f'<div class="wide"><table><thead><tr>{columns}</tr></thead><tbody>{"".join(rows)}</tbody></table></div>'


def _lookup(report: Report) -> dict[tuple[Place, str, str], Report]:
    return {(_place(entry), entry["judge"], entry["dimension"]): entry for entry in report["scores"]}


def _sets(groups: Mapping[Place, int]) -> list[str]:
    return list(dict.fromkeys(place[2] for place in groups))


# --- sections -----------------------------------------------------------------------------------------


def _head(report: Report) -> str:
    protocol, cells = report["protocol"], report["cells"]
    prompts = sum(entry["count"] for entry in protocol["prompts"].values())
    clip = protocol["sweep"]["clip"]
    tiles = {
        "models": len(protocol["models"]),
        "prompts": prompts,
        "seeds": len(protocol["seeds"]),
        "videos": f"{cells['done']} of {cells['planned']}" if cells["done"] < cells["planned"] else cells["done"],
        "seconds": ", ".join(f"{seconds:.3g}" for seconds in protocol["sweep"]["seconds"]),
        "size": f"{clip['width']}x{clip['height']}",
        "device": ", ".join(protocol["devices"]) or "none",
    }
    shown = "".join(f"<div><b>{escape(str(value))}</b><span>{name}</span></div>" for name, value in tiles.items())
    return f'<header><h1>Evaluation</h1><div class="tiles">{shown}</div></header>'


def _warnings(report: Report) -> str:
    protocol, cells = report["protocol"], report["cells"]
    lines = []
    if cells["done"] < cells["planned"]:
        lines.append(f"{cells['planned'] - cells['done']} of {cells['planned']} videos are not there; see the end.")
    fewest = min((entry["count"] for entry in report["scores"]), default=0)
    if fewest < ROUGH:
        lines.append(f"Some figures are over {fewest} prompts: their intervals are rough.")
    if len(protocol["devices"]) > 1:
        lines.append("The videos were made on different devices: figures of speed do not compare.")
    if protocol["workers"] and max(protocol["workers"]) > 1:
        lines.append("Several workers ran at once: where they shared a machine, figures of speed are too low.")
    if (protocol["load"] or 0) > BUSY:
        told = f"{protocol['load']:.1f} tasks per CPU at worst"
        lines.append(f"The machine had other work ({told}): figures of speed are too low, and not equally so.")
    lines += [
        f"The videos were made with different versions of {name}: {', '.join(found)}."
        for name, found in protocol["versions"].items()
        if len(found) > 1
    ]
    return "".join(f'<p class="warning">{escape(line)}</p>' for line in lines)


def _overview(report: Report, groups: Mapping[Place, int]) -> str:
    found, content = _lookup(report), []
    graded = any(entry["judge"] == SPRITES for entry in report["scores"])
    if graded:
        columns = [(SPRITES, "total"), (SPRITES, "quality"), (SPRITES, "semantic")]
    else:
        columns = [(PIXELS, "temporal_flickering"), (PIXELS, "motion"), (PIXELS, "seam")]
    columns += [(SPEED, "frames_per_second"), (SPEED, "time_to_first_frame"), (SPEED, "forwards_per_block")]
    heads = ["model", *(escape(name.replace("_", " ")) for _, name in columns), "videos"]
    for prompt_set in _sets(groups):
        rows = []
        for place, index in groups.items():
            if place[2] == prompt_set:
                cells = "".join(_estimate(found.get((place, *column))) for column in columns)
                videos = found[place, PIXELS, "exposure"]["videos"]
                rows.append(f"<tr><td>{_name(*place[:2], index)}</td>{cells}<td>{videos}</td></tr>")
        content.append(f"<h3>{escape(prompt_set)}</h3>{_table(heads, rows)}")
    note = "Means over prompts with 95 % intervals. Speed is end to end, seconds for the first frame, passes per block."
    return _section("Scores", "".join(content), note)


def _vbench(report: Report) -> str:
    if not report["vbench"]:
        return ""
    totals = ("total", "quality", "semantic")
    rows = []
    for entry in report["vbench"]:
        cells = "".join(f"<td>{_percent(entry[name])}</td>" for name in totals)
        cells += "".join(f"<td>{_percent(entry['raw'].get(name))}</td>" for name in VBENCH_DIMENSIONS)
        rows.append(f"<tr><td><b>{escape(entry['model'])}</b> {escape(entry['setting'])}</td>{cells}</tr>")
    heads = ["model", *totals, *(name.replace("_", " ") for name in VBENCH_DIMENSIONS)]
    missing = {
        f"{entry['model']}, {entry['setting']}: {line}" for entry in report["vbench"] for line in entry["missing"]
    }
    told = "".join(f"<li>{escape(line)}</li>" for line in sorted(missing))
    return _section("VBench", _table(heads, rows) + (f"<ul>{told}</ul>" if told else ""), "In percent, raw dimensions.")


def _percent(value: float | None) -> str:
    return NOTHING if value is None else f"{100 * value:.2f}"


def _speed_and_quality(report: Report, groups: Mapping[Place, int]) -> str:
    found, charts = _lookup(report), []
    for prompt_set in _sets(groups):
        points = []
        for place, index in groups.items():
            quality, speed = found.get((place, SPRITES, "total")), found.get((place, SPEED, "frames_per_second"))
            if place[2] == prompt_set and quality and speed:
                bounds = (quality["mean"], quality["low"], quality["high"])
                points.append(Point(f"{place[0]}, {place[1]}", index, speed["mean"], *bounds))
        if points:
            charts.append(_figure(prompt_set, points_chart(points, "frames per second", "total"), points))
    return _section("Speed against quality", f'<div class="charts">{"".join(charts)}</div>') if charts else ""


def _figure(title: str, chart: str, drawn: Sequence[Curve] | Sequence[Point]) -> str:
    keys = "".join(
        f'<li><span class="dot" style="background:{color(one.color)}"></span>{escape(one.label)}</li>' for one in drawn
    )
    return f'<figure><figcaption>{escape(title)}</figcaption>{chart}<ul class="key">{keys}</ul></figure>'


def _differences(title: str, section: Report | None, *, earlier: bool = False) -> str:
    if not section or not section["differences"]:
        return ""
    entries = section["differences"]
    rows = [_difference_row(entry, earlier) for entry in _by_interest(entries)]
    seen = sum(entry["seen"] for entry in entries)
    chance = round(len(entries) / 20)
    note = (
        f"{seen} of {len(entries)} differences lie outside the noise; about {chance} would by chance alone. Paired by "
        f"prompt; with fewer than {FEWEST} prompts none can be told from noise."
    )
    if earlier and section["unmatched"]:
        note += f" Not in the earlier report: {escape('; '.join(section['unmatched']))}."
    table = _table(["model", "judge", "dimension", "difference", "verdict"], rows)
    shown = f"<details {'open' if len(rows) <= 24 else ''}><summary>{len(rows)} differences</summary>{table}</details>"
    return _section(title, shown, note)


def _by_interest(entries: Sequence[Report]) -> list[Report]:
    """What is outside the noise first; otherwise as they come."""
    return sorted(entries, key=lambda entry: not entry["seen"])


def _difference_row(entry: Report, earlier: bool) -> str:
    verdict, kind = verdict_of(entry)
    than = "" if earlier else f' <span class="soft">than {escape(entry["than"]["setting"])}</span>'
    whose = f'<td><b>{escape(entry["model"])}</b> <span class="soft">{escape(entry["setting"])}</span>{than}</td>'
    what = f"<td>{escape(entry['judge'])}</td><td>{escape(entry['dimension'].replace('_', ' '))}</td>"
    return f'<tr>{whose}{what}{_estimate(entry)}<td class="{kind}">{verdict}</td></tr>'


def verdict_of(difference: Report) -> tuple[str, str]:
    """A difference in a word, and the class of its cell: better, worse, other, noise."""
    if not difference["seen"]:
        return "inside the noise", "noise"
    direction = difference["better"]
    if direction not in ("higher", "lower"):
        return ("higher" if difference["mean"] > 0 else "lower"), "other"
    good = (difference["mean"] > 0) == (direction == "higher")
    return ("better", "better") if good else ("worse", "worse")


def _over_time(report: Report, groups: Mapping[Place, int]) -> str:
    charts = []
    for prompt_set in _sets(groups):
        for judge, names in CURVES.items():
            for name in names:
                entries = [
                    entry
                    for entry in report["curves"]
                    if (entry["prompts"], entry["judge"], entry["dimension"]) == (prompt_set, judge, name)
                ]
                if max((len(entry["seconds"]) for entry in entries), default=0) > 1:
                    drawn = [_curve(entry, groups[_place(entry)]) for entry in entries]
                    unit = MEASURES[name].unit if judge == PIXELS and name in MEASURES else name
                    unit = "sides/frame" if name == "motion" else unit
                    charts.append(_figure(f"{name}, {prompt_set}", curves_chart(drawn, unit), drawn))
    note = "Means over prompts of each second, in a band of 95 %. A level line is what a stream should show."
    return _section("Over time", f'<div class="charts">{"".join(charts)}</div>', note) if charts else ""


def _curve(entry: Report, index: int) -> Curve:
    middles = [second + 0.5 for second in entry["seconds"]]
    lines = (entry["mean"], entry["low"], entry["high"])
    return Curve(f"{entry['model']}, {entry['setting']}", index, middles, *lines)


def _dimensions(report: Report, groups: Mapping[Place, int]) -> str:
    found, content = _lookup(report), []
    for prompt_set in _sets(groups):
        places = {place: index for place, index in groups.items() if place[2] == prompt_set}
        names: dict[str, dict[str, None]] = {}
        for entry in report["scores"]:
            if entry["prompts"] == prompt_set:
                names.setdefault(entry["judge"], {})[entry["dimension"]] = None
        for judge in (judge for judge in JUDGES if judge in names):
            heads = [escape(JUDGES[judge]), *(_name(*place[:2], index) for place, index in places.items())]
            rows = []
            for name in names[judge]:
                cells = "".join(_estimate(found.get((place, judge, name))) for place in places)
                rows.append(f"<tr><td>{_dimension(judge, name)}</td>{cells}</tr>")
            content.append(f"<h3>{escape(prompt_set)}</h3>{_table(heads, rows)}")
    return _section("Dimension by dimension", "".join(content))


def _dimension(judge: str, name: str) -> str:
    shown = escape(name.replace("_", " "))
    if judge == PIXELS:
        measure = MEASURES[name]
        return f'{shown} <span class="soft">{escape(measure.unit)}</span><div class="soft">{escape(measure.says)}</div>'
    unit = f" {SPEED_UNITS.get(name, 's')}" if judge == SPEED else ""
    return f'{shown}<span class="soft">{unit}</span>'


def _whole_sets(report: Report, groups: Mapping[Place, int]) -> str:
    rows = []
    for entry in report["sets"]:
        distance = f"<td>{number(entry['frechet'])}</td><td>{entry['videos']}</td>"
        name = _name(entry["model"], entry["setting"], groups[_place(entry)])
        ratios = _estimate(entry["diversity"]) + _estimate(entry["drift_ratio"])
        rows.append(f"<tr><td>{name}</td><td>{escape(entry['prompts'])}</td>{distance}{ratios}</tr>")
    heads = ["model", "prompts", "Fr&eacute;chet distance", "videos", "diversity", "last over first seconds"]
    note = (
        "The distance is to renderings of the same prompts, on fixed random features; compare it at equal numbers of "
        "videos. Diversity over seeds is a share of the world's. The last column is the Total of a long video's last "
        f"{END_SECONDS:g} seconds over that of its first."
    )
    return _section("Whole sets", _table(heads, rows), note) if rows else ""


def _sheets(sheet: Sequence[Report], pictures: Pictures, groups: Mapping[Place, int]) -> str:
    content, last = [], None
    for cell in sheet:
        heading = (cell["prompts"], cell["prompt"])
        if heading != last:
            content.append(f"<h3>{escape(cell['prompt'])}</h3>")
        last = heading
        name = _name(cell["model"], cell["setting"], groups[_place(cell)])
        content.append(f'<div class="strip">{_picture(cell, pictures)}<div>{name}</div></div>')
    return _section("Pictures", "".join(content), "The same prompt and seed, frames evenly spread.") if sheet else ""


def _picture(cell: Report, pictures: Pictures) -> str:
    data = base64.b64encode(pictures(cell["key"])).decode()
    image = f'<img src="data:image/webp;base64,{data}" alt="{escape(cell["prompt"], quote=True)}">'
    return f'<a href="videos/{cell["key"]}.mp4">{image}</a>'


def _worst(report: Report, pictures: Pictures) -> str:
    content = []
    for cell in report["worst"]:
        about = f"<b>{escape(cell['why'])}</b> {escape(cell['prompt'])}"
        whose = f"{cell['model']}, {cell['setting']}, seed {cell['seed']}"
        seen = f'<div class="soft">seen: {escape(cell["seen"])}</div>' if cell["seen"] else ""
        link = f'<a href="{cell["video"]}">video</a>'
        told = f'<div>{about}<div class="soft">{escape(whose)} · {link}</div>{seen}</div>'
        content.append(f'<div class="strip">{_picture(cell, pictures)}{told}</div>')
    return _section("The worst videos", "".join(content)) if content else ""


def _failed(report: Report) -> str:
    lines = "".join(f"<li>{escape(line)}</li>" for line in report["cells"]["failed"])
    return _section("Given up", f"<ul>{lines}</ul>") if lines else ""


def _protocol(report: Report) -> str:
    rows = []
    for name, model in report["protocol"]["models"].items():
        cells = f"<td>{escape(model['kind'])}</td><td>{escape(model['folder'])}</td><td>{model['fingerprint']}</td>"
        rows.append(f"<tr><td><b>{escape(name)}</b></td>{cells}</tr>")
    models = _table(["model", "kind", "folder", "fingerprint"], rows)
    sets = [
        f"<tr><td><b>{escape(name)}</b></td><td>{entry['count']}</td><td>{entry['fingerprint']}</td></tr>"
        for name, entry in report["protocol"]["prompts"].items()
    ]
    whole = escape(json.dumps(report["protocol"], indent=2))
    rest = f"<details><summary>All of it</summary><pre>{whole}</pre></details>"
    return _section("Protocol", models + _table(["prompts", "count", "fingerprint"], sets) + rest)
