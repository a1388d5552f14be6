"""The renderer of the sprites world: motion against closed forms, pixels against sampled polygons."""

import hashlib
import math
import time

import numpy as np
import pytest
from matplotlib.path import Path as Outline

from reelway.kernels.sprites.motion import TurnSource
from reelway.kernels.sprites.render import LEVELS, Track, draw, ground, render, simulate
from reelway.kernels.sprites.scene import (
    COLORS,
    FRAMES_PER_SECOND,
    GROUNDS,
    MOTIONS,
    SHAPES,
    SIZES,
    SPEEDS,
    Scene,
    Sprite,
)
from reelway.kernels.sprites.splits import sample_scene

FROZEN = "9f40bcf49bb625781b199668a34834ad65e424b891bbabb6a4a5755542297aeb"
DIRECTIONS = {"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1)}


def one(motion="still", shape="square", color="red", size="large", speed="fast", ground="black", **fields):
    return Scene((Sprite(shape, color, size, motion, speed),), ground, **fields)


def two(first="left", second="circling", **fields):
    sprites = Sprite("star", "red", "large", first, "fast"), Sprite("cross", "cyan", "small", second, "slow")
    return Scene(sprites, "navy", **fields)


def pairs(count, level):
    """Scenes with two sprites, each with its seed."""
    scenes = ((sample_scene("train", seed, level=level), seed) for seed in range(10 * count))
    return [found for found in scenes if len(found[0].sprites) == 2][:count]


def steps(positions):
    """Moves from frame to frame on the torus [F - 1, 2]."""
    return (np.diff(positions.astype(np.float64), axis=0) + 0.5) % 1.0 - 0.5


def track_at(points, radius=SIZES["large"], wraps=True, orders=(0,)):
    positions = np.array(points, np.float32)
    shape = positions.shape[:2]
    radii = np.full(shape[1], radius, np.float32)
    return Track(positions, radii, np.ones(shape, bool), np.full(shape, wraps), orders)


# --- determinism --------------------------------------------------------------------------------------


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("motion", MOTIONS)
def test_a_window_is_a_piece_of_the_endless_video(motion, level):
    scene = two(motion, "bouncing")
    whole = render(scene, 7, 60, level=level)
    assert whole.shape == (60, 64, 64, 3)
    assert whole.dtype == np.uint8
    assert np.array_equal(whole[10:50], render(scene, 7, 40, level=level, start=10))
    assert np.array_equal(whole[59], render(scene, 7, 1, level=level, start=59)[0])


@pytest.mark.parametrize("motion", MOTIONS)
def test_far_frames_are_reached_directly_and_agree(motion):
    scene, far = two(motion, "left"), 5_000
    one_go = simulate(scene, 3, far + 40, level=2)
    jump = simulate(scene, 3, 40, level=2, start=far)
    assert np.array_equal(one_go.positions[far:], jump.positions)
    hours = simulate(scene, 3, 10, level=2, start=10**6)
    assert np.array_equal(hours.positions[9], simulate(scene, 3, 1, level=2, start=10**6 + 9).positions[0])


def test_the_same_arguments_give_the_same_bytes_and_other_seeds_others():
    scene = two()
    assert np.array_equal(render(scene, 5, 8, level=2), render(scene, 5, 8, level=2))
    assert not np.array_equal(render(scene, 5, 8, level=2), render(scene, 6, 8, level=2))


def test_frozen_bytes():
    """Data sets are named by their fingerprints: the pixels of a clip must not change unnoticed.

    The clip needs only sums, products and rounding, which are the same on every platform.
    """
    sprites = Sprite("square", "red", "large", "left", "fast"), Sprite("cross", "yellow", "small", "down")
    clip = render(Scene(sprites, "navy", gradient=True), 1, 16)
    assert hashlib.sha256(clip.tobytes()).hexdigest() == FROZEN


def test_render_draws_what_simulate_tells():
    scene = two()
    track = simulate(scene, 2, 12, level=2, start=5)
    drawn = draw(scene, track, 48, level=2, seed=2)
    assert np.array_equal(drawn, render(scene, 2, 12, level=2, size=48, start=5))


# --- motion -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("speed", SPEEDS)
@pytest.mark.parametrize("motion", DIRECTIONS)
def test_straight_motion_is_a_line_on_the_torus(motion, speed):
    positions = simulate(one(motion, speed=speed), 4, 200).positions[:, 0].astype(np.float64)
    way = np.arange(200)[:, None] * np.array(DIRECTIONS[motion]) * SPEEDS[speed] / FRAMES_PER_SECOND
    error = (positions - positions[0] - way + 0.5) % 1.0 - 0.5
    assert np.abs(error).max() < 1e-4
    assert positions.min() >= 0
    assert positions.max() < 1


@pytest.mark.parametrize("motion", [motion for motion in MOTIONS if motion not in ("still", "bouncing")])
def test_speed_is_the_captioned_speed(motion):
    moves = np.linalg.norm(steps(simulate(one(motion), 4, 100).positions[:, 0]), axis=-1)
    assert moves == pytest.approx(SPEEDS["fast"] / FRAMES_PER_SECOND, rel=0.02)


def test_still_is_still():
    assert not steps(simulate(one("still"), 4, 100, level=2).positions[:, 0]).any()


@pytest.mark.parametrize("seed", range(5))
def test_circling_goes_round_inside_the_frame(seed):
    positions = simulate(one("circling"), seed, 200).positions[:, 0].astype(np.float64)
    centre = (positions.min(0) + positions.max(0)) / 2
    distances = np.linalg.norm(positions - centre, axis=-1)
    assert distances == pytest.approx(distances.mean(), rel=0.05)
    assert 0.11 < distances.mean() < 0.19
    assert positions.min() > SIZES["large"] - 1e-3
    assert positions.max() < 1 - SIZES["large"] + 1e-3


@pytest.mark.parametrize("level", [0, 2])
def test_bouncing_is_reflected_at_the_edges(level):
    positions = simulate(one("bouncing"), 3, 400, level=level).positions[:, 0].astype(np.float64)
    margin = SIZES["large"]
    assert positions.min() >= margin - 1e-6
    assert positions.max() <= 1 - margin + 1e-6
    moves = np.diff(positions, axis=0)
    flat = (np.abs(moves) < 0.01 / FRAMES_PER_SECOND).mean()
    assert flat < 0.05  # always aslant
    turned = np.flatnonzero(np.diff(np.sign(moves[:, 0])) != 0)
    assert len(turned) >= 8
    if level == 0:
        at_edge = np.minimum(positions[turned + 1, 0] - margin, 1 - margin - positions[turned + 1, 0])
        assert at_edge.max() < SPEEDS["fast"] / FRAMES_PER_SECOND


@pytest.mark.parametrize("motion", DIRECTIONS)
def test_swerves_keep_the_captioned_direction(motion):
    frames = 20 * FRAMES_PER_SECOND
    moves = steps(simulate(one(motion), 9, frames + 1, level=2).positions[:, 0])
    direction = np.array(DIRECTIONS[motion])
    along, across = moves @ direction, moves @ direction[::-1]
    assert along == pytest.approx(SPEEDS["fast"] / FRAMES_PER_SECOND, rel=1e-3)
    swerving = np.abs(across) > 1e-5
    swerves = np.count_nonzero(np.diff(swerving.astype(int)) == 1)
    assert 6 <= swerves <= 20
    assert 0.1 < swerving.mean() < 0.6


def test_turns_belong_to_levels():
    """Level 0 goes straight for ever; from level 1 on the way ahead cannot be known."""
    plain, turning = (steps(simulate(one("right"), 9, 320, level=level).positions[:, 0]) for level in (0, 1))
    assert np.ptp(plain, axis=0).max() < 1e-5
    assert np.ptp(turning, axis=0).max() > 1e-3


def test_circling_reverses_its_sense():
    positions = simulate(one("circling"), 1, 320, level=2).positions[:, 0].astype(np.float64)
    moves = np.diff(positions, axis=0)
    turning = moves[:-1, 0] * moves[1:, 1] - moves[:-1, 1] * moves[1:, 0]
    senses = np.sign(turning[np.abs(turning) > 1e-5])
    assert 6 <= np.count_nonzero(np.diff(senses)) <= 20


def test_turns_come_at_random_about_every_one_to_two_and_a_half_seconds():
    source = TurnSource(one("left"), 0, 0)
    turns = source.until(40_000).frames
    assert turns[-1] > 40_000
    assert np.array_equal(turns[:16], source.until(0).frames)
    gaps = np.diff(turns) / FRAMES_PER_SECOND
    assert 1.4 < gaps.mean() < 2.0
    assert gaps.std() > 0.4
    assert np.mean((gaps >= 0.95) & (gaps <= 2.5)) > 0.6


# --- two sprites --------------------------------------------------------------------------------------


@pytest.mark.parametrize("level", [0, 1, 3])
@pytest.mark.parametrize(
    ("relation", "axis", "sign"), [("left of", 0, -1), ("right of", 0, 1), ("above", 1, -1), ("below", 1, 1)]
)
def test_a_relation_holds_in_the_first_frame(relation, axis, sign, level):
    for seed in range(20):
        for motions in (("circling", "circling"), ("left", "bouncing"), ("still", "diagonal")):
            sprites = [Sprite(s, "red", "large", m) for s, m in zip(SHAPES, motions, strict=False)]
            track = simulate(Scene(tuple(sprites), "navy", relation=relation), seed, 1, level=level)
            first, second = track.positions[0, :, axis]
            assert sign * (first - second) > track.radii.sum()
            assert track.visible.all()


def overlaps(level):
    """For each clip, the share of frames in which the two sprites' discs overlap."""
    shares, chances = [], []
    for scene, seed in pairs(150, level):
        track = simulate(scene, seed, 64, level=level)
        apart = (track.positions[:, 0] - track.positions[:, 1] + 0.5) % 1.0 - 0.5
        shares.append(np.mean(np.linalg.norm(apart, axis=-1) < track.radii.sum()))
        chances.append(math.pi * track.radii.sum() ** 2)
    return np.array(shares), np.array(chances)


def test_plain_sprites_meet_by_chance_only_and_from_level_one_on_by_design():
    plain, chances = overlaps(0)
    textured, _ = overlaps(1)
    assert plain.mean() < chances.mean()
    assert np.mean(textured > 0) > np.mean(plain > 0) + 0.08
    assert np.mean(textured > 0) > 0.75


def test_one_sprite_is_always_in_front():
    scene = Scene((Sprite("square", "red"), Sprite("circle", "cyan")), "black")
    middle = [[[0.5, 0.5], [0.5, 0.5]]] * 2
    for orders, color in (((0, 1), "cyan"), ((1, 0), "red")):
        frames = draw(scene, track_at(middle, orders=orders), 64, level=0, seed=0)
        assert np.array_equal(frames[1, 32, 32], COLORS[color])
    assert {simulate(scene, seed, 1).orders for seed in range(20)} == {(0, 1), (1, 0)}


def test_a_sprite_enters_or_leaves_once():
    kinds = set()
    for scene, seed in pairs(60, 3):
        track = simulate(scene, seed, 200, level=3)
        going = [i for i in range(2) if not track.visible[:, i].all()]
        assert len(going) == 1, scene
        seen = track.visible[:, going[0]]
        assert np.count_nonzero(np.diff(seen.astype(int))) == 1
        assert scene.sprites[going[0]].motion != "still"
        assert scene.relation is None or seen[0]
        kinds.add("enters" if seen[-1] else "leaves")
        edge = np.flatnonzero(np.diff(seen.astype(int)))[0]
        assert edge >= FRAMES_PER_SECOND - 1
        assert edge <= 3 * FRAMES_PER_SECOND or not seen[-1]
        on_either_side = track.positions[edge : edge + 2, going[0]].astype(np.float64)
        assert np.abs(np.diff(on_either_side, axis=0)).max() < 0.05  # no jump
        always = Track(track.positions, track.radii, track.visible | True, track.wraps, track.orders)
        shown = render(scene, seed, 200, level=3, size=32).astype(int)
        hidden = np.abs(draw(scene, always, 32, level=3, seed=seed) - shown)
        assert hidden.max() < 80  # half a pixel of soft edge at most
        assert np.count_nonzero(hidden > 8) < 12
    assert kinds == {"enters", "leaves"}


def test_comings_and_goings_have_no_jumps():
    for scene, seed in pairs(40, 3):
        track = simulate(scene, seed, 200, level=3)
        for index in range(2):
            both = track.visible[1:, index] & track.visible[:-1, index]
            moves = np.linalg.norm(steps(track.positions[:, index])[both], axis=-1)
            assert moves.max(initial=0) < 2.2 * SPEEDS["fast"] / FRAMES_PER_SECOND


# --- pixels -------------------------------------------------------------------------------------------


def outline(shape):
    """Corners of a shape of radius 1, y downwards."""
    if shape == "circle":
        angles = np.linspace(0, 2 * np.pi, 200)
        return 0.94 * np.stack([np.cos(angles), np.sin(angles)], -1)
    if shape == "star":
        angles = np.arange(10) * np.pi / 5
        radii = np.where(np.arange(10) % 2, 0.47, 1.0)
        return np.stack([radii * np.sin(angles), 0.09 - radii * np.cos(angles)], -1)
    a, b = 0.3, 0.94
    arm = [(-a, -a), (-a, -b), (a, -b)]
    corners = {
        "square": [(-0.82, -0.82), (0.82, -0.82), (0.82, 0.82), (-0.82, 0.82)],
        "triangle": [(0, -0.95), (0.98, 0.8), (-0.98, 0.8)],
        "diamond": [(0, -1), (1, 0), (0, 1), (-1, 0)],
        "cross": arm + [(-y, x) for x, y in arm] + [(-x, -y) for x, y in arm] + [(y, -x) for x, y in arm],
    }
    return np.array(corners[shape])


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("shape", SHAPES)
def test_shapes_are_anti_aliased_polygons(shape, size):
    scene, x, y, fine = one(shape=shape, size=size, color="yellow"), 0.4132, 0.5571, 8
    frame = draw(scene, track_at([[[x, y]]], SIZES[size]), 64, level=0, seed=0)[0].astype(np.float64)
    low, high = GROUNDS["black"][0], COLORS["yellow"][0]
    cover = (frame[..., 0] - low) / (high - low)
    at = (np.arange(64 * fine) + 0.5) / (64 * fine)
    points = np.stack(np.meshgrid((at - x) / SIZES[size], (at - y) / SIZES[size]), -1).reshape(-1, 2)
    inside = Outline(outline(shape)).contains_points(points).reshape(64, fine, 64, fine).mean((1, 3))
    assert np.abs(cover - inside).max() < 0.4  # at a sharp tip
    assert np.abs(cover - inside).sum() < 0.04 * inside.sum()
    assert cover.sum() == pytest.approx(inside.sum(), rel=0.02)


@pytest.mark.parametrize("level", [0, 1])
def test_the_frame_is_a_torus(level):
    scene = one(shape="star")
    middle, corner = draw(scene, track_at([[[0.5, 0.5]], [[0.0, 0.0]]]), 64, level=level, seed=3)
    rolled = np.roll(middle, (32, 32), (0, 1))
    sprite = np.abs(rolled.astype(int) - np.array(GROUNDS["black"])).max(-1) > 40
    assert sprite.sum() > 200
    assert np.abs(rolled.astype(int) - corner)[sprite].max() < 20  # the ground shows through at the edge
    if level == 0:
        assert np.array_equal(rolled, corner)


def test_a_leaving_sprite_is_cut_off_at_the_edge():
    scene = one()
    frame = draw(scene, track_at([[[0.0, 0.5]]], wraps=False), 64, level=0, seed=0)[0]
    red = frame[..., 0] > 100
    assert red[:, :8].any()
    assert not red[:, 32:].any()


@pytest.mark.parametrize("size", [32, 64, 128])
def test_sizes_show_the_same_picture(size):
    scene = two(gradient=True)
    frame = render(scene, 3, 1, size=size)[0].astype(np.float64)
    assert frame.shape == (size, size, 3)
    cells = frame.reshape(16, size // 16, 16, size // 16, 3).mean((1, 3))
    other = render(scene, 3, 1, size=256)[0].astype(np.float64).reshape(16, 16, 16, 16, 3).mean((1, 3))
    assert np.abs(cells - other).max() < 16


def test_textures_and_grounds_belong_to_levels():
    scene = one(shape="square", color="orange")
    plain = draw(scene, track_at([[[0.5, 0.5]]]), 64, level=1, seed=4)[0]
    assert len(np.unique(plain[26:38, 26:38].reshape(-1, 3), axis=0)) == 1
    assert len(np.unique(plain[:8].reshape(-1, 3), axis=0)) == 1
    textured = draw(scene, track_at([[[0.5, 0.5]], [[0.5, 0.5]]]), 64, level=2, seed=4)
    assert np.ptp(textured[0, 24:40, 24:40].astype(int), axis=(0, 1)).max() > 40
    assert 4 < np.ptp(textured[0, :8].astype(int), axis=(0, 1)).max() < 25
    assert np.array_equal(textured[0], textured[1])
    other = draw(scene, track_at([[[0.5, 0.5]]]), 64, level=2, seed=5)[0].astype(int)
    assert np.abs(other - textured[0])[24:40, 24:40].max() > 40


def test_a_graded_ground_changes_from_top_to_bottom_only():
    graded = ground(one(gradient=True, ground="navy"), 64, level=0, seed=0).astype(int)
    assert np.ptp(graded, axis=1).max() == 0
    assert np.abs(graded[0, 0] - GROUNDS["navy"]).max() <= 1
    assert np.abs(graded[-1, 0] - graded[0, 0]).max() > 40


def test_two_thousand_frames_per_second_on_one_core():
    scene = two("bouncing", "left")
    render(scene, 0, 16)
    start = time.process_time()
    for seed in range(10):
        render(scene, seed, 80)
    assert 800 / (time.process_time() - start) > 2000


@pytest.mark.parametrize(
    ("arguments", "word"),
    [({"level": 4}, "level"), ({"start": -1}, "start"), ({"frames": -1}, "frames"), ({"size": 8}, "size")],
)
def test_wrong_arguments_are_named(arguments, word):
    with pytest.raises(ValueError, match=word):
        render(one(), 0, **{"frames": 2, **arguments})
