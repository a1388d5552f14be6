"""Figures of whole sets of videos of the sprites world: Fréchet distance, diversity over seeds, drift to the end."""

import hashlib
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict
from functools import cache
from typing import Any

import numpy as np

from ...actors.judge import scene_of
from ...kernels.metrics.statistics import Interval, bootstrap
from ...kernels.sprites.fidelity import diversity_of_paths, features, frechet_of_features
from ...kernels.sprites.render import render
from ...kernels.sprites.scene import Scene
from .plan import Cell
from .tables import SPRITES_DIMENSIONS, Group, Row, group_of, sprites_statistic

FEWEST_VIDEOS = 2  # that have a covariance


def set_figures(cells: Sequence[Cell], rows: Mapping[str, Row]) -> list[dict[str, Any]]:
    """An entry for each model, setting and set of prompts whose videos have what a figure is made from.

    frechet: distance to renderings of the same prompts, one for each video. diversity: of the videos of a prompt
    under different seeds, as a share of the world's; by_prompt: each prompt's. drift_ratio: Total of the last seconds
    over that of the first. What cannot be told is None.
    """
    groups: dict[Group, list[Cell]] = defaultdict(list)
    for cell in cells:
        if rows[cell.key]["traits"] or rows[cell.key]["ends"]:
            groups[group_of(cell)].append(cell)
    return [{**_whose(group), **_figures(members, rows)} for group, members in groups.items()]


def _whose(group: Group) -> dict[str, str]:
    return {"model": group.model, "setting": group.setting, "prompts": group.prompt_set}


def _figures(cells: Sequence[Cell], rows: Mapping[str, Row]) -> dict[str, Any]:
    clips = [cell for cell in cells if rows[cell.key]["traits"]]
    spread = diversity_by_prompt(clips, rows)
    return {
        "videos": len(clips),
        "frechet": frechet_to_world(clips, rows),
        "diversity": over_prompts(np.array(list(spread.values()))[:, None], _only) if spread else None,
        "diversity_by_prompt": spread,
        "drift_ratio": drift_ratio([cell for cell in cells if rows[cell.key]["ends"]], rows),
    }


def frechet_to_world(clips: Sequence[Cell], rows: Mapping[str, Row]) -> float | None:
    """The distance of the clips' features to those of as many renderings. It is biased upward for few clips."""
    if len(clips) < FEWEST_VIDEOS:
        return None
    made = np.array([rows[cell.key]["traits"]["features"] for cell in clips])
    world = [_rendered(cell.graded[0], cell.seed, cell.level, cell.frames, cell.size[0]) for cell in clips]
    return frechet_of_features(made, np.array(world))


@cache
def _rendered(prompt: str, seed: int, level: int, frames: int, side: int) -> tuple[float, ...]:
    """Features of a rendering of the prompt."""
    video = render(_scene(prompt), rendering_seed(prompt, seed), frames, level=level, size=side)
    return tuple(features([video])[0])


def rendering_seed(prompt: str, seed: int) -> int:
    """Of the rendering that a prompt's video under a seed is held against."""
    digest = hashlib.blake2b(f"rendering {seed} {prompt}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


def diversity_by_prompt(clips: Iterable[Cell], rows: Mapping[str, Row]) -> dict[str, float]:
    """{prompt's identity: diversity} of the prompts that were made under two seeds or more."""
    found: dict[str, list[Cell]] = defaultdict(list)
    for cell in clips:
        found[cell.prompt.identity].append(cell)
    spread = {}
    for identity, cells in found.items():
        if len(cells) > 1:
            paths = np.array([rows[cell.key]["traits"]["paths"] for cell in cells])
            spread[identity] = diversity_of_paths(paths, _scene(cells[0].graded[0]), level=cells[0].level)
    return spread


def drift_ratio(cells: Iterable[Cell], rows: Mapping[str, Row]) -> dict[str, Any] | None:
    """Total of the last seconds over the first ones', each from the dimensions' means, with an interval."""
    prompts: dict[str, list[list[float]]] = defaultdict(list)
    for cell in cells:
        ends = rows[cell.key]["ends"]
        both = [ends[end].get(name, np.nan) for end in ("first", "last") for name in SPRITES_DIMENSIONS]
        prompts[cell.prompt.identity].append(both)
    if not prompts:
        return None
    # Over a prompt's seeds first; a dimension applies to all videos of a prompt or to none.
    return over_prompts(np.array([np.mean(values, axis=0) for values in prompts.values()]), _last_over_first)


def over_prompts(values: np.ndarray, statistic: Callable[[np.ndarray], np.ndarray]) -> dict[str, Any]:
    """A statistic of the prompts' values [P, D] with its interval, for JSON."""
    interval: Interval = bootstrap(values, statistic)
    plain = asdict(interval).items()
    return {name: None if isinstance(value, float) and np.isnan(value) else value for name, value in plain}


def _only(means: np.ndarray) -> np.ndarray:
    return means[:, 0]


def _last_over_first(means: np.ndarray) -> np.ndarray:
    width = len(SPRITES_DIMENSIONS)
    first, last = (sprites_statistic("total", part) for part in (means[:, :width], means[:, width:]))
    return last / np.maximum(first, 1e-9)


def _scene(prompt: str) -> Scene:
    scene = scene_of(prompt)
    assert scene is not None, prompt
    return scene
