"""The judge: what it asks of which video, against the measures and the oracle themselves."""

import numpy as np
import pytest

from reelway.actors.judge import PIXELS, SPRITES, Blocks, Shot, examine, scene_of
from reelway.kernels.metrics.measures import summary
from reelway.kernels.metrics.series import measure
from reelway.kernels.sprites import fidelity
from reelway.kernels.sprites.oracle import grade
from reelway.kernels.sprites.render import render
from reelway.kernels.sprites.scores import quality, semantic, total

PROMPT = "a large red star moves right fast on a navy background"
OTHER = "a small yellow circle moves up slowly on a black background"


def rendering(prompt: str, frames: int = 33) -> np.ndarray:
    scene = scene_of(prompt)
    assert scene is not None
    return render(scene, 3, frames, size=64)


def test_a_clip_keeps_what_sets_are_made_of_and_a_long_video_its_two_ends() -> None:
    clip, scene = rendering(PROMPT), scene_of(PROMPT)
    assert scene is not None
    found = examine(clip, [Shot(0, PROMPT)], fps=16)
    assert found.ends is None
    assert found.traits is not None
    np.testing.assert_allclose(found.traits.features, fidelity.features([clip])[0], atol=1e-4)
    np.testing.assert_allclose(found.traits.paths, fidelity.found_paths(clip, scene), atol=1e-4)
    assert examine(clip, [Shot(0, PROMPT), Shot(16, OTHER)], fps=16).traits is None
    long = np.concatenate([rendering(PROMPT, 80), rendering(OTHER, 81)])
    ends = examine(long, [Shot(0, PROMPT)], fps=16).ends
    assert ends is not None
    assert ends["first"] == grade(long[:80], scene).scores
    assert ends["last"] == grade(long[-80:], scene).scores
    assert ends["last"]["color"] < 0.5 < ends["first"]["color"]


def test_a_sprites_video_is_graded_by_the_oracle_and_measured() -> None:
    video, scene = rendering(PROMPT), scene_of(PROMPT)
    found = examine(video, [Shot(0, PROMPT)], fps=16, blocks=Blocks((9, 21), (5, 13, 17, 25, 29)))
    expected = grade(video, scene)
    assert {name: found.scores[SPRITES][name] for name in expected.scores} == expected.scores
    assert found.scores[SPRITES]["total"] == total(expected.scores)
    assert found.scores[SPRITES]["quality"] == quality(expected.scores)
    assert found.scores[SPRITES]["semantic"] == semantic(expected.scores)
    assert found.scores[PIXELS] == summary(measure(video), 16, (9, 21), (5, 13, 17, 25, 29))
    assert "red star" in found.seen
    assert len(found.drift[SPRITES]["total"]) == 2
    assert len(found.drift[PIXELS]["exposure"]) == 2


def test_other_prompts_and_shapes_are_measured_only() -> None:
    video = rendering(PROMPT)
    assert list(examine(video, [Shot(0, "a cat plays the piano")], fps=16).scores) == [PIXELS]
    assert list(examine(video[:, :48], [Shot(0, PROMPT)], fps=16).scores) == [PIXELS]
    assert list(examine(video[:4], [Shot(0, PROMPT)], fps=16).scores) == [PIXELS]


@pytest.mark.parametrize("prompt", ["", "on navy", "moves left fast", "a red star and a dog", "a red zebra on white"])
def test_only_full_captions_are_scenes(prompt: str) -> None:
    assert scene_of(prompt) is None


def test_after_a_switch_each_stretch_is_asked_its_own_prompt() -> None:
    video = np.concatenate([rendering(PROMPT, 32), rendering(OTHER, 32)])
    right = examine(video, [Shot(0, PROMPT), Shot(32, OTHER)], fps=16)
    wrong = examine(video, [Shot(0, OTHER), Shot(32, PROMPT)], fps=16)
    assert right.scores[SPRITES]["semantic"] > 0.9
    assert wrong.scores[SPRITES]["semantic"] < 0.5
    first, second = grade(video[:32], scene_of(PROMPT)), grade(video[32:], scene_of(OTHER), may_have_left=True)
    assert right.scores[SPRITES]["color"] == pytest.approx((first.scores["color"] + second.scores["color"]) / 2)
    assert min(right.drift[SPRITES]["semantic"]) > 0.8
    assert len(right.drift[SPRITES]["semantic"]) == 4


def test_blocks_are_frames_of_latents() -> None:
    blocks = Blocks.of([3, 3, 3], 4)
    assert blocks.edges == (9, 21)
    assert blocks.inside == (1, 5, 13, 17, 25, 29)
    assert Blocks.of([5], 4) == Blocks((), (1, 5, 9, 13))
