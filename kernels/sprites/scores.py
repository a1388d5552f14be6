"""How the dimensions of a video's grade are combined: VBench's weights over the dimensions that apply.

The names and the weights are those of VBench (Huang et al., arXiv 2311.17982, and its released scoring
script). VBench first maps each raw measure to [0, 1] with a fixed range; the measures here are made to be in
[0, 1] already, so no range is applied, and a score is comparable to VBench's in kind, not in value.
"""

from collections.abc import Iterable, Mapping

from .scene import Scene

QUALITY_WEIGHTS: dict[str, float] = {
    "subject_consistency": 1.0,
    "background_consistency": 1.0,
    "temporal_flickering": 1.0,
    "motion_smoothness": 1.0,
    "dynamic_degree": 0.5,
    "imaging_quality": 1.0,
}
SEMANTIC_WEIGHTS: dict[str, float] = {
    "object_class": 1.0,
    "color": 1.0,
    "multiple_objects": 1.0,
    "spatial_relationship": 1.0,
    "scene": 1.0,
    "temporal_style": 1.0,
}
DIMENSIONS = (*QUALITY_WEIGHTS, *SEMANTIC_WEIGHTS)
QUALITY_SHARE, SEMANTIC_SHARE = 4.0, 1.0


def applicable(scene: Scene) -> tuple[str, ...]:
    """Return the dimensions that a video of `scene` is graded on, in table order.

    The rule: `multiple_objects` applies to scenes of two sprites or more, `spatial_relationship` to those of
    them whose caption states a relation; all other dimensions apply always.
    """
    left_out = set()
    if len(scene.sprites) < 2:
        left_out.add("multiple_objects")
    if len(scene.sprites) < 2 or scene.relation is None:
        left_out.add("spatial_relationship")
    return tuple(name for name in DIMENSIONS if name not in left_out)


def weighted_mean(scores: Mapping[str, float], weights: Mapping[str, float]) -> float:
    """Return the mean of the scores that have a weight, over those present.

    Raises:
        ValueError: none of the weighted dimensions has a score.
    """
    present = [name for name in weights if name in scores]
    if not present:
        raise ValueError(f"scores: needs at least one of {', '.join(weights)}, got {sorted(scores)}")
    total = sum(weights[name] for name in present)
    return sum(weights[name] * scores[name] for name in present) / total


def quality(scores: Mapping[str, float]) -> float:
    """Return VBench's quality score: the weighted mean in which dynamic_degree counts half."""
    return weighted_mean(scores, QUALITY_WEIGHTS)


def semantic(scores: Mapping[str, float]) -> float:
    """Return VBench's semantic score: the plain mean of the semantic dimensions that apply."""
    return weighted_mean(scores, SEMANTIC_WEIGHTS)


def total(scores: Mapping[str, float]) -> float:
    """Return VBench's total score, (4 Q + S) / 5."""
    parts = QUALITY_SHARE * quality(scores) + SEMANTIC_SHARE * semantic(scores)
    return parts / (QUALITY_SHARE + SEMANTIC_SHARE)


def mean_scores(graded: Iterable[Mapping[str, float]]) -> dict[str, float]:
    """Return the mean of each dimension over the videos that it applies to, in table order.

    A set of videos is scored as VBench does it: first the mean per dimension, then the weights; so
    `total(mean_scores(...))` is the score of a model.
    """
    collected: dict[str, list[float]] = {}
    for scores in graded:
        for name, value in scores.items():
            collected.setdefault(name, []).append(value)
    known = [name for name in DIMENSIONS if name in collected]
    return {name: sum(collected[name]) / len(collected[name]) for name in known}
