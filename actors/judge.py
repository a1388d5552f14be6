"""The judge: grades videos of the sprites world and adds their grades up."""

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from ..kernels.sprites.oracle import Grade, grade
from ..kernels.sprites.scene import Scene
from ..kernels.sprites.scores import mean_scores, quality, semantic, total


@dataclass(frozen=True)
class Verdict:
    """Grades of a set of videos. means: mean score of each dimension over the videos that it applies to."""

    grades: list[Grade]
    means: dict[str, float]

    @property
    def table(self) -> dict[str, float]:
        """The means, then Quality, Semantic and Total of the means, as VBench adds up."""
        overall = {"quality": quality(self.means), "semantic": semantic(self.means), "total": total(self.means)}
        return {**self.means, **overall}


def judge(videos: Iterable[np.ndarray], scenes: Iterable[Scene], *, level: int) -> Verdict:
    """Grade videos, uint8 [T, H, W, 3], each against its caption's scene."""
    grades = [grade(video, scene, level=level) for video, scene in zip(videos, scenes, strict=True)]
    return Verdict(grades, mean_scores(each.scores for each in grades))
