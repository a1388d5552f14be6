"""Prompt switches: when the oracle sees what is new, and whether anything flashes."""

from collections.abc import Iterable
from functools import partial

import numpy as np

from reelway.kernels.clips import Pixels
from reelway.kernels.metrics.series import measure
from reelway.kernels.sprites.agreement import DIRECTIONS
from reelway.kernels.sprites.oracle import captioned_paths, grade
from reelway.kernels.sprites.scene import Scene

from .common import Bench, Figure, Result, Row, Shown, changed, finite, singles, write_video

BELIEVED = 0.5  # an oracle's score from which on it believes what it was asked
ASKED_OF = {"color": "color", "shape": "object_class", "ground": "scene"}  # its dimension for an attribute
KINDS = (("color",), ("shape",), ("ground",), ("motion",), ("color", "shape"))
BEFORE, AFTER = 5, 6  # blocks before and after a switch
WITHIN = 2  # blocks in which a switch must be seen
STRAIGHT = np.cos(np.radians(45))  # of a direction and the one that was asked for
LEAST_WAY = 0.01  # frame sizes in a block that are a motion


def switches(bench: Bench) -> Result:
    """Does the oracle see what a new prompt asks for within two blocks, and does nothing flash?"""
    ledger = bench.ledger("switches", blocks=[BEFORE, AFTER], kinds=KINDS)
    rows = []
    for index, shown in enumerate(singles(bench, bench.cases)):
        kinds = KINDS[index % len(KINDS)]
        rows.append(ledger.row(f"case-{index:03d}", partial(_switch, bench, index, shown, kinds)))
    return _switch_figures(rows)


def _switch(bench: Bench, index: int, before: Shown, kinds: tuple[str, ...]) -> Row:
    after = changed(before, kinds)
    size = {"height": bench.size, "width": bench.size}
    with bench.model.open(before.caption, bench.seed, **size) as stream:
        chunks = [stream.next_chunk() for _ in range(BEFORE)]
        stream.switch_prompt(after.caption)
        chunks += [stream.next_chunk() for _ in range(AFTER)]
    starts = np.cumsum([0, *map(len, chunks)])[:-1].tolist()
    video = np.concatenate(chunks)
    flicker = measure(video).flicker
    seen = [_sees(chunk, after.scene, kinds, bench.level) for chunk in chunks[BEFORE:]]
    return {
        "kinds": list(kinds),
        "before": before.caption,
        "after": after.caption,
        "seen_before": _sees(chunks[BEFORE - 1], before.scene, kinds, bench.level),
        "seen": seen,
        "flicker_at_switch": finite(flicker[starts[BEFORE]]),
        "flicker_at_edges": [finite(flicker[at]) for number, at in enumerate(starts) if number not in (0, BEFORE)],
        "video": write_video(bench, "switches", f"case-{index:03d}", video),
    }


def _sees(chunk: Pixels, scene: Scene, kinds: Iterable[str], level: int) -> bool:
    """Whether the oracle believes that a chunk shows these attributes of a scene."""
    scores = grade(chunk, scene, level=level, may_have_left=True).scores
    return all(_goes(chunk, scene, level) if kind == "motion" else scores[ASKED_OF[kind]] >= BELIEVED for kind in kinds)


def _goes(chunk: Pixels, scene: Scene, level: int) -> bool:
    """Whether the sprite goes in its scene's direction."""
    (path,) = captioned_paths(chunk, scene, level=level)
    motion = scene.sprites[0].motion
    if motion not in DIRECTIONS:
        return bool(grade(chunk, scene, level=level).scores["temporal_style"] >= BELIEVED)
    if path is None:
        return False
    way = path[-1] - path[0]
    length = float(np.linalg.norm(way))
    return length > LEAST_WAY and float(way @ np.array(DIRECTIONS[motion])) > STRAIGHT * length


def _switch_figures(rows: list[Row]) -> Result:
    by_kind = {}
    for kinds in KINDS:
        of_kind = [row for row in rows if row["kinds"] == list(kinds)]
        if of_kind:
            by_kind[" + ".join(kinds)] = _seen_shares(of_kind)
    everything = _seen_shares(rows)
    figures = [
        Figure(
            f"new attributes seen within {WITHIN} blocks of a switch",
            f"{everything['within']:.2f} of {len(rows)} cases",
            ">= 0.90",
            everything["within"] >= 0.9,
        ),
        Figure(
            "the same where nothing is new: the old attributes in the block before",
            f"{everything['before']:.2f}, and the new ones in the last block {everything['last']:.2f}",
        ),
        Figure("the same by kind", ", ".join(f"{kind} {found['within']:.2f}" for kind, found in by_kind.items())),
    ]
    flash = _flashes(rows)
    return Result(
        [*figures, _flash_figure(flash)], {"all": everything, "by_kind": by_kind, "flash": flash, "cases": rows}
    )


def _flash_figure(flash: Row | None) -> Figure:
    name, target = "flicker at the switch, grey levels (grounds that change left out)", ">= 0.90 below"
    if flash is None:
        return Figure(name, "cannot be told: nothing is at rest in these videos", target)
    told = (
        f"median {flash['median']:.2f}; {flash['share_below']:.2f} of {flash['switches']} below the 99th percentile of "
        f"{flash['edges']} ordinary block edges, {flash['p99']:.2f}"
    )
    return Figure(name, told, target, flash["share_below"] >= 0.9)


def _seen_shares(rows: list[Row]) -> Row:
    firsts = [next((block for block, seen in enumerate(row["seen"], 1) if seen), None) for row in rows]
    return {
        "cases": len(rows),
        "within": float(np.mean([first is not None and first <= WITHIN for first in firsts])),
        "before": float(np.mean([row["seen_before"] for row in rows])),
        "last": float(np.mean([row["seen"][-1] for row in rows])),
        "first_block": firsts,
    }


def _flashes(rows: list[Row]) -> Row | None:
    """None where flicker could be told at no switch, or at no other block edge."""
    kept = [row for row in rows if "ground" not in row["kinds"]]
    edges = np.array([value for row in rows for value in row["flicker_at_edges"] if value is not None])
    at = np.array([row["flicker_at_switch"] for row in kept if row["flicker_at_switch"] is not None])
    if not len(at) or not len(edges):
        return None
    p99 = float(np.quantile(edges, 0.99))
    return {
        "switches": len(at),
        "edges": len(edges),
        "p99": p99,
        "median": float(np.median(at)),
        "highest": float(at.max()),
        "median_of_edges": float(np.median(edges)),
        "share_below": float((at < p99).mean()),
    }
