"""The oracle of the sprites world: renderings grade near 1, each corruption costs its own dimension."""

import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
from numpy.typing import NDArray

from reelway.kernels.sprites import agreement, detect, fidelity, fit, scores, splits
from reelway.kernels.sprites.agreement import Path
from reelway.kernels.sprites.oracle import Grade, captioned_paths, grade
from reelway.kernels.sprites.render import Track, draw, render, simulate
from reelway.kernels.sprites.scene import SIZES, Scene, Sprite

Video = NDArray[np.uint8]
FRAMES = 49

ONE = Scene((Sprite("star", "cyan", "large", "right", "fast"),), "brown", gradient=True)
TWO = Scene(
    (Sprite("triangle", "yellow", "large", "up", "slow"), Sprite("circle", "blue", "small", "circling", "fast")),
    "gray",
    relation="left of",
)
BOUNCE = Scene((Sprite("square", "pink", "large", "bouncing", "fast"),), "navy")
SCENES = (ONE, TWO, BOUNCE)
SEMANTIC = tuple(scores.SEMANTIC_WEIGHTS)


def blurred(video: Video, sigma: float) -> Video:
    frames = fit.blurred(
        np.pad(video.astype(np.float32), ((0, 0), (6, 6), (6, 6), (0, 0)), "edge").transpose(0, 3, 1, 2), sigma
    )
    return to_bytes(frames[:, :, 6:-6, 6:-6].transpose(0, 2, 3, 1))


def noisy(video: Video, sigma: float) -> Video:
    return to_bytes(video + 255 * sigma * np.random.default_rng(7).standard_normal(video.shape))


def to_bytes(frames: NDArray[np.floating]) -> Video:
    return np.clip(np.rint(frames), 0, 255).astype(np.uint8)


def drawn(scene: Scene, track: Track) -> Video:
    return draw(scene, track, 64, level=0, seed=0)


# --- corruptions: (scene, track, strength) -> video ---------------------------------------------------


def add_noise(scene: Scene, track: Track, strength: float) -> Video:
    return noisy(drawn(scene, track), strength)


def add_blur(scene: Scene, track: Track, strength: float) -> Video:
    return blurred(drawn(scene, track), strength)


def flicker(scene: Scene, track: Track, strength: float) -> Video:
    shifts = np.random.default_rng(1).uniform(-1, 1, (len(track.positions), 1, 1, 1))
    return to_bytes(drawn(scene, track) + 255 * strength * shifts)


def drift(scene: Scene, track: Track, strength: float) -> Video:
    ramp = np.linspace(-0.5, 0.5, len(track.positions))[:, None, None, None]
    return to_bytes(drawn(scene, track) + 255 * strength * ramp)


def fade_to_other_color(scene: Scene, track: Track, strength: float) -> Video:
    ramp = np.linspace(0, strength, len(track.positions))[:, None, None, None]
    return to_bytes((1 - ramp) * drawn(scene, track) + ramp * drawn(recolored(scene), track))


def shift_color(scene: Scene, track: Track, strength: float) -> Video:
    return to_bytes((1 - strength) * drawn(scene, track) + strength * drawn(recolored(scene), track))


def recolored(scene: Scene) -> Scene:
    others = {"cyan": "green", "yellow": "red", "blue": "cyan", "pink": "orange"}
    return replace(scene, sprites=tuple(replace(s, color=others[s.color]) for s in scene.sprites))


def freeze(scene: Scene, track: Track, strength: float) -> Video:
    last = round((1 - strength) * (len(track.positions) - 1))
    return drawn(scene, track)[np.minimum(np.arange(len(track.positions)), last)]


def jitter(scene: Scene, track: Track, strength: float) -> Video:
    shaken = track.positions + strength / 64 * np.random.default_rng(2).standard_normal(track.positions.shape)
    return drawn(scene, replace(track, positions=(shaken % 1).astype(np.float32)))


def drop_frames(scene: Scene, track: Track, strength: float) -> Video:
    lost = np.random.default_rng(3).random(len(track.positions)) < strength
    lost[0] = False
    return drawn(scene, track)[np.maximum.accumulate(np.where(lost, 0, np.arange(len(lost))))]


# corruption, strengths, dimensions that must fall, highest value at the end, dimensions that may fall too
LADDER: list[tuple[Callable[[Scene, Track, float], Video], tuple[float, ...], str, float, set[str]]] = [
    (add_noise, (0.04, 0.1, 0.25), "imaging_quality", 0.35, {"temporal_flickering", *SEMANTIC, "motion_smoothness"}),
    (add_blur, (0.8, 1.6, 3.0), "imaging_quality", 0.8, {"object_class", "color"}),
    (flicker, (0.02, 0.06, 0.15), "temporal_flickering", 0.45, {"scene"}),
    (drift, (0.1, 0.25, 0.5), "background_consistency", 0.5, {"scene", "color", "subject_consistency"}),
    (fade_to_other_color, (0.3, 0.6, 1.0), "subject_consistency", 0.8, {"color", "imaging_quality"}),
    (shift_color, (0.3, 0.6, 1.0), "color", 0.1, set()),
    (freeze, (0.3, 0.6, 1.0), "dynamic_degree", 0.1, {"temporal_style", "motion_smoothness"}),
    (jitter, (0.3, 0.8, 2.0), "motion_smoothness", 0.2, {"temporal_style"}),
    (drop_frames, (0.05, 0.2, 0.5), "motion_smoothness", 0.6, {"temporal_style", "dynamic_degree"}),
]


def mean_grade(videos: Iterator[Video]) -> dict[str, float]:
    return scores.mean_scores(grade(video, scene).scores for video, scene in zip(videos, SCENES, strict=True))


@pytest.fixture(scope="module")
def tracks() -> list[Track]:
    return [simulate(scene, 5, FRAMES) for scene in SCENES]


@pytest.mark.parametrize(
    ("corrupt", "strengths", "own", "low", "side"), LADDER, ids=lambda part: getattr(part, "__name__", "")
)
def test_a_corruption_costs_its_own_dimension_more_the_stronger_it_is(
    corrupt: Callable[[Scene, Track, float], Video],
    strengths: tuple[float, ...],
    own: str,
    low: float,
    side: set[str],
    tracks: list[Track],
) -> None:
    ladder = [
        mean_grade(corrupt(scene, track, strength) for scene, track in zip(SCENES, tracks, strict=True))
        for strength in strengths
    ]
    for strength, result in zip(strengths, ladder, strict=True):
        print(corrupt.__name__, strength, {name: round(value, 3) for name, value in result.items()})
    values = [0.995, *(result[own] for result in ladder)]
    assert all(later < earlier for earlier, later in pairwise(values)), values
    assert values[-1] <= low
    others = {name: ladder[1][name] for name in scores.DIMENSIONS if name != own and name not in side}
    assert min(others.values()) >= 0.9, others


# --- renderings ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("level", [0, 1, 2, 3])
def test_renderings_grade_near_one(level: int) -> None:
    graded = []
    for index, (_, scene) in enumerate(splits.prompts("validation", 5, seed=3, level=level)):
        graded.append(grade(render(scene, index, 81, level=level), scene, level=level).scores)
    means = scores.mean_scores(graded)
    print(level, {name: round(value, 4) for name, value in means.items()})
    assert set(means) == set(scores.DIMENSIONS)
    assert min(means.values()) >= 0.975, means
    assert min(min(each.values()) for each in graded) >= 0.6


def test_an_autoencoders_blur_leaves_the_semantics() -> None:
    graded = []
    for index, (_, scene) in enumerate(splits.prompts("validation", 8, seed=4, level=2)):
        soft = noisy(blurred(render(scene, index, FRAMES, level=2), 0.7), 0.02)
        graded.append(grade(soft, scene, level=2).scores)
    means = scores.mean_scores(graded)
    print({name: round(value, 3) for name, value in means.items()})
    assert min(means[name] for name in SEMANTIC) >= 0.95, means
    assert means["imaging_quality"] < 0.9


def test_random_pairs_of_video_and_caption_score_at_chance() -> None:
    pairs = [scene for _, scene in splits.prompts("validation", 60, seed=5)]
    ones = [scene for scene in pairs if len(scene.sprites) == 1][:11]
    twos = [scene for scene in pairs if len(scene.sprites) == 2][:11]
    graded = []
    for group in (ones, twos):
        for index, (shown, asked) in enumerate(pairwise(group)):
            graded.append(grade(render(shown, index, FRAMES), asked).scores)
    means = scores.mean_scores(graded)
    print({name: round(value, 3) for name, value in means.items()})
    for name in ("object_class", "color", "scene", "temporal_style"):
        assert means[name] < 0.4, (name, means)
    assert scores.semantic(means) < 0.6
    unasked = ("subject_consistency", "background_consistency", "temporal_flickering", "motion_smoothness")
    assert min(means[name] for name in unasked) > 0.95


# --- swapped attributes -------------------------------------------------------------------------------


def regraded(change: Callable[[Sprite], Sprite], seed: int = 5) -> Grade:
    """Draw ONE with a changed sprite on the same track, and grade it against ONE."""
    other = replace(ONE, sprites=(change(ONE.sprites[0]),))
    track = replace(simulate(ONE, seed, FRAMES), radii=simulate(other, seed, 1).radii)
    return grade(drawn(other, track), ONE)


def assert_only(result: Grade, own: str, most: float, side: set[str] = frozenset()) -> None:  # type: ignore[assignment]
    assert result.scores[own] <= most, result.scores
    rest = {name: value for name, value in result.scores.items() if name != own and name not in side}
    assert min(rest.values()) >= 0.95, rest


def test_another_shape_costs_object_class() -> None:
    assert_only(regraded(lambda sprite: replace(sprite, shape="square")), "object_class", 0.05)


def test_another_size_costs_half_of_object_class() -> None:
    result = regraded(lambda sprite: replace(sprite, size="small"))
    assert_only(result, "object_class", 0.55)
    assert result.scores["object_class"] >= 0.45


def test_another_color_costs_color() -> None:
    result = regraded(lambda sprite: replace(sprite, color="pink"))
    assert_only(result, "color", 0.05)
    assert "pink" in str(result)


def test_another_ground_costs_scene() -> None:
    track = simulate(ONE, 5, FRAMES)
    assert_only(grade(drawn(replace(ONE, ground="navy"), track), ONE), "scene", 0.05)
    assert_only(grade(drawn(replace(ONE, gradient=False), track), ONE), "scene", 0.3)


@pytest.mark.parametrize("motion", ["left", "up", "diagonal", "circling", "bouncing", "still"])
def test_another_motion_costs_temporal_style(motion: str) -> None:
    other = replace(ONE, sprites=(replace(ONE.sprites[0], motion=motion),))
    result = grade(render(other, 5, 81), ONE)
    assert_only(result, "temporal_style", 0.5, {"dynamic_degree"} if motion == "still" else set())


@pytest.mark.parametrize("motion", ["right", "diagonal", "circling", "bouncing"])
def test_another_speed_costs_half_of_temporal_style(motion: str) -> None:
    slow, fast = (Scene((Sprite("star", "cyan", "large", motion, speed),), "brown") for speed in ("slow", "fast"))
    result = grade(render(slow, 5, 81), fast)
    assert_only(result, "temporal_style", 0.6)
    assert result.scores["temporal_style"] >= 0.4


def test_a_moving_sprite_that_should_be_still_costs_dynamic_degree() -> None:
    still = replace(ONE, sprites=(replace(ONE.sprites[0], motion="still"),))
    result = grade(render(ONE, 5, FRAMES), still)
    assert result.scores["dynamic_degree"] <= 0.05
    assert result.scores["temporal_style"] <= 0.05


def test_the_wrong_side_costs_spatial_relationship() -> None:
    assert_only(grade(render(TWO, 5, FRAMES), replace(TWO, relation="right of")), "spatial_relationship", 0.01)


def test_a_missing_sprite_costs_multiple_objects() -> None:
    track = simulate(TWO, 5, FRAMES)
    shown = track.visible.copy()
    shown[:, 1] = False
    result = grade(drawn(TWO, replace(track, visible=shown)), TWO)
    assert result.scores["multiple_objects"] <= 0.05
    assert result.scores["spatial_relationship"] == 0
    assert result.scores["object_class"] == pytest.approx(0.5, abs=0.03)
    assert len(result.found) == 1


def test_a_surplus_sprite_costs_object_class() -> None:
    alone = Scene(TWO.sprites[:1], TWO.ground)
    result = grade(render(TWO, 5, FRAMES), alone)
    assert_only(result, "object_class", 0.6)


def test_an_empty_video_has_nothing_in_it() -> None:
    empty = np.broadcast_to(np.array([104, 66, 36], np.uint8), (16, 64, 64, 3))
    result = grade(empty, ONE)
    assert result.found == ()
    for name in ("object_class", "color", "temporal_style", "subject_consistency", "motion_smoothness"):
        assert result.scores[name] == 0
    assert result.scores["temporal_flickering"] == 1


def test_noise_alone_has_no_sprite_in_it() -> None:
    result = grade(np.random.default_rng(0).integers(0, 256, (16, 64, 64, 3)).astype(np.uint8), TWO)
    assert result.scores["object_class"] <= 0.2
    assert result.total <= 0.45


def test_coming_and_going_is_free_at_level_three_only() -> None:
    prompts = splits.prompts("train", 40, seed=2, level=3)
    scene, seed = next(
        (scene, seed)
        for seed, (_, scene) in enumerate(prompts)
        if len(scene.sprites) == 2 and simulate(scene, seed, 81, level=3).visible.mean() < 0.8
    )
    video = render(scene, seed, 81, level=3)
    tolerant, strict = grade(video, scene, level=3).scores, grade(video, scene, level=2).scores
    assert tolerant["multiple_objects"] >= 0.95
    assert strict["multiple_objects"] <= 0.85
    assert tolerant["object_class"] >= 0.9 > strict["object_class"]


# --- the parts ----------------------------------------------------------------------------------------


def test_paths_are_found_to_a_fifth_of_a_pixel() -> None:
    for scene in SCENES:
        track = simulate(scene, 9, FRAMES)
        for index, path in enumerate(captioned_paths(drawn(scene, track), scene)):
            assert path is not None
            gap = detect.torus_gap(path.astype(np.float32), track.positions[:, index], 1)
            assert np.percentile(np.abs(gap), 90) * 64 < 0.2


def test_the_ground_is_found_behind_still_sprites_in_any_color() -> None:
    share = (np.arange(64, dtype=np.float32) + 0.5)[:, None, None] / 64
    top, bottom = np.array([0.2, 0.6, 0.3], np.float32), np.array([0.7, 0.5, 0.1], np.float32)
    frames = np.repeat(np.broadcast_to(top + (bottom - top) * share, (64, 64, 3))[None], 8, axis=0)
    frames = np.where(detect.disc(np.full((1, 2), 24.0, np.float32), 18.0, 64)[..., None] > 0.5, 0.95, frames)
    ground = detect.fit_ground(frames.astype(np.float32))
    np.testing.assert_allclose(ground.top, top, atol=0.01)
    np.testing.assert_allclose(ground.bottom, bottom, atol=0.01)


def known_path(points: NDArray[np.float64], **changes: bool) -> Path:
    return replace(Path(points, np.ones(len(points), np.bool_), 16.0, 0.1, False, False), **changes)


def test_agreement_falls_with_the_angle_and_with_the_speed() -> None:
    frames, sprite = np.arange(40)[:, None] / 16, Sprite("star", "red", "small", "right", "fast")

    def go(angle: float, speed: float) -> float:
        way = np.array([[np.cos(angle), np.sin(angle)]])
        return agreement.agreement(known_path(0.5 + frames * speed * way), sprite)

    turned = [go(np.radians(degrees), 0.55) for degrees in (0, 20, 30, 45, 90)]
    assert turned[0] > 0.999
    assert all(later < earlier for earlier, later in pairwise(turned))
    slower = [go(0, speed) for speed in (0.55, 0.45, 0.35, 0.22)]
    assert all(later < earlier for earlier, later in pairwise(slower))
    assert slower[-1] == pytest.approx(0.5, abs=0.02)


def test_one_lost_or_repeated_frame_is_seen_and_a_clean_turn_is_not() -> None:
    line = 0.1 + 0.03 * np.arange(24)[:, None] * np.array([[1.0, 0.0]])
    turned = line.copy()
    turned[12:] = line[12] + 0.03 * np.arange(12)[:, None] * np.array([[0.0, 1.0]])
    assert agreement.smoothness(known_path(line)) > 0.999
    assert agreement.smoothness(known_path(turned)) > 0.98
    assert agreement.smoothness(known_path(np.delete(line, 12, axis=0))) < 0.93
    assert agreement.smoothness(known_path(np.insert(line, 12, line[12], axis=0))) < 0.93


def test_a_circle_is_fitted_through_a_noisy_arc() -> None:
    angles = np.linspace(0, 2.0, 40)
    points = np.array([0.4, 0.6]) + 0.15 * np.stack([np.cos(angles), np.sin(angles)], -1)
    centre, radius = agreement.fit_circle(points + 0.001 * np.random.default_rng(0).standard_normal(points.shape))
    np.testing.assert_allclose([*centre, radius], [0.4, 0.6, 0.15], atol=0.005)


def test_scores_combine_as_in_vbench() -> None:
    values = {
        "subject_consistency": 0.9,
        "background_consistency": 0.8,
        "temporal_flickering": 0.7,
        "motion_smoothness": 0.6,
        "dynamic_degree": 0.2,
        "imaging_quality": 0.5,
        "object_class": 0.4,
        "color": 0.6,
    }
    quality = (0.9 + 0.8 + 0.7 + 0.6 + 0.5 * 0.2 + 0.5) / 5.5
    assert scores.quality(values) == pytest.approx(quality)
    assert scores.semantic(values) == pytest.approx(0.5)
    assert scores.total(values) == pytest.approx((4 * quality + 0.5) / 5)
    assert scores.mean_scores([values, {"color": 0.2}])["color"] == pytest.approx(0.4)
    with pytest.raises(ValueError, match="scores: needs at least one of"):
        scores.quality({"color": 1.0})


def test_dimensions_apply_by_the_rule() -> None:
    assert set(scores.DIMENSIONS) - set(scores.applicable(ONE)) == {"multiple_objects", "spatial_relationship"}
    assert set(scores.DIMENSIONS) - set(scores.applicable(replace(TWO, relation=None))) == {"spatial_relationship"}
    assert scores.applicable(TWO) == scores.DIMENSIONS


@pytest.mark.parametrize(
    ("video", "level", "message"),
    [
        (np.zeros((8, 64, 64, 3), np.float32), 0, "video: must be uint8"),
        (np.zeros((8, 64, 64), np.uint8), 0, "video: must be uint8"),
        (np.zeros((4, 64, 64, 3), np.uint8), 0, "at least 5"),
        (np.zeros((8, 64, 32, 3), np.uint8), 0, "square"),
        (np.zeros((8, 64, 64, 3), np.uint8), 4, "level must be one of"),
    ],
)
def test_a_video_of_the_wrong_form_is_refused(video: Video, level: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        grade(video, ONE, level=level)


def test_a_clip_is_graded_in_a_moment() -> None:
    video = render(TWO, 5, 81, level=2)
    spent = []
    for _ in range(3):
        start = time.process_time()
        grade(video, TWO, level=2)
        spent.append(time.process_time() - start)
    assert min(spent) < 1.0  # a third of it on an idle core


# --- sets of videos, and long ones --------------------------------------------------------------------


def test_frechet_distance_of_gaussians_is_the_closed_form() -> None:
    rng = np.random.default_rng(0)
    first = rng.standard_normal((40000, 3)) * [1.0, 2.0, 3.0]
    second = rng.standard_normal((40000, 3)) * [2.0, 2.0, 1.0] + [1.0, 0.0, -1.0]
    assert fidelity.frechet_of_features(first, second) == pytest.approx(1 + 1 + 1 + 0 + 4, rel=0.03)
    with pytest.raises(ValueError, match="second: needs"):
        fidelity.frechet_of_features(first, second[:, :2])


def test_frechet_distance_is_zero_for_itself_small_for_the_world_and_grows_with_blur() -> None:
    sets = []
    for seed in (0, 1):
        prompts = splits.prompts("validation", 100, seed=seed)
        sets.append([render(scene, index, 12) for index, (_, scene) in enumerate(prompts)])
    reference, other = (fidelity.features(videos) for videos in sets)
    assert fidelity.frechet_of_features(reference, reference) < 1e-6
    world = fidelity.frechet_of_features(reference, other)
    soft = [
        fidelity.frechet_of_features(reference, fidelity.features(blurred(v, s) for v in sets[1])) for s in (0.7, 1.4)
    ]
    frozen = fidelity.frechet_of_features(reference, fidelity.features(np.repeat(v[:1], 12, 0) for v in sets[1]))
    print("frechet", world, soft, frozen)
    assert 1.5 * world < soft[0] < soft[1]
    assert frozen > 1.5 * world


def test_diversity_is_one_for_the_world_and_falls_for_copies() -> None:
    for scene in (ONE, BOUNCE):
        videos = [render(scene, 100 + seed, 24) for seed in range(10)]
        full = fidelity.diversity(videos, scene)
        half = fidelity.diversity([videos[0]] * 5 + videos[:5], scene)
        none = fidelity.diversity([videos[0]] * 3, scene)
        print("diversity", full, half, none)
        assert full == pytest.approx(1, abs=0.3)
        assert none < 0.01 < half < 0.9 * full
    with pytest.raises(ValueError, match="at least two"):
        fidelity.diversity([render(ONE, 0, 8)], ONE)


def test_a_curve_sees_where_a_long_video_goes_wrong() -> None:
    video = render(TWO, 5, 70)
    video[32:] = blurred(video[32:], 2.0)
    points = fidelity.curve(video, TWO, 1.0)
    assert [point.start for point in points] == [0.0, 1.0, 2.0, 3.0]
    quality = [point.grade.scores["imaging_quality"] for point in points]
    assert min(quality[:2]) > 0.95
    assert max(quality[2:]) < 0.9
    assert "spatial_relationship" in points[0].grade.scores
    assert "spatial_relationship" not in points[1].grade.scores
    assert min(point.grade.scores["temporal_style"] for point in points) > 0.9
    pieces = iter([video[:10], video[10:11], video[11:50], video[50:]])
    assert fidelity.curve(pieces, TWO, 1.0) == points
    with pytest.raises(ValueError, match="seconds: a window needs"):
        fidelity.curve(video, TWO, 0.2)


def test_a_sprite_that_left_is_not_missed_later() -> None:
    prompts = splits.prompts("train", 60, seed=2, level=3)
    for seed, (_, scene) in enumerate(prompts):
        track = simulate(scene, seed, 160, level=3)
        if len(scene.sprites) == 2 and not track.visible[100:].all(axis=1).any():
            break
    points = fidelity.curve(render(scene, seed, 144, level=3), scene, 1.5, level=3)
    last = points[-1].grade.scores
    assert last["object_class"] > 0.9
    assert last["color"] > 0.9


def test_sizes_have_room_in_the_window() -> None:
    window = fit.window_of(64)
    for shape in ("star", "square"):
        mask = fit.cover(shape, SIZES["large"] * 64, np.zeros((1, 2), np.float32), window)[0]
        assert mask[0].max() == mask[:, 0].max() == 0
        assert mask[window // 2, window // 2] == 1
