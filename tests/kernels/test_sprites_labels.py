"""The truth as numbers: answers about captions, and maps of what tokens show, against the pixels themselves."""

import numpy as np

from reelway.kernels.sprites.labels import MAP_CHANNELS, STEPS_PER_CELL, answers, question_sizes, token_maps
from reelway.kernels.sprites.render import draw, simulate
from reelway.kernels.sprites.scene import COLORS, GROUNDS, SHAPES, SIZES, Scene, Sprite
from reelway.kernels.sprites.splits import sample_scene

GRID = 4
OFFSET = len(SHAPES) + len(COLORS) + len(SIZES)


def maps_of(scene: Scene, frames: int, seed: int = 3) -> np.ndarray:
    return token_maps(scene, simulate(scene, seed, frames), GRID)


def test_answers_tell_scenes_apart_and_fit_their_questions() -> None:
    scenes = {sample_scene("train", seed) for seed in range(300)}
    told = {answers(scene) for scene in scenes}
    assert len(told) == len(scenes)
    sizes = question_sizes()
    assert all(len(one) == len(sizes) for one in told)
    assert all(0 <= value < size for one in told for value, size in zip(one, sizes, strict=True))


def test_a_second_sprite_that_is_not_there_is_answered_with_nothing() -> None:
    one = answers(Scene((Sprite("star", "red"),), "navy"))
    assert one[5:10] == (0,) * 5
    assert min(one[:5]) > 0


def test_tokens_show_the_sprite_where_its_pixels_are() -> None:
    """Where a map says that there is nothing, the picture is the bare ground; elsewhere mostly not."""
    scene = Scene((Sprite("square", "yellow", "large", "diagonal", "fast"),), "black")
    track = simulate(scene, 3, 9)
    pixels = draw(scene, track, 64, level=0, seed=3).astype(int)
    changed = np.abs(pixels - pixels[0, 0, 0]).sum(-1) > 30
    cells = changed[:1].reshape(1, GRID, 16, GRID, 16).mean((2, 4)).reshape(1, -1)
    square = SHAPES.index("square")
    shown = token_maps(scene, track, GRID)[:1, :, square]
    assert np.all(cells[shown < 1e-6] == 0)
    assert np.corrcoef(cells.ravel(), shown.ravel())[0, 1] > 0.98
    others = [channel for channel in range(len(SHAPES)) if channel != square]
    assert not token_maps(scene, track, GRID)[..., others].any()


def test_centres_and_velocities_are_those_of_the_track() -> None:
    scene = Scene((Sprite("circle", "red", "small", "right", "slow"),), "black")
    track = simulate(scene, 5, 5)
    maps = maps_of(scene, 5, seed=5)
    assert maps.shape == (2, GRID * GRID, MAP_CHANNELS)
    cover = maps[0, :, SHAPES.index("circle")]
    token = int(cover.argmax())
    cell = np.array([token % GRID, token // GRID])
    away = track.positions[0, 0] * GRID - (cell + 0.5)
    away -= GRID * np.rint(away / GRID)
    np.testing.assert_allclose(maps[0, token, OFFSET : OFFSET + 2] / cover[token], away, atol=1e-5)
    step = (track.positions[1, 0] - track.positions[0, 0] + 0.5) % 1 - 0.5
    speed = maps[0, token, OFFSET + 2 : OFFSET + 4] / cover[token]
    np.testing.assert_allclose(speed, step * GRID * STEPS_PER_CELL, atol=1e-4)


def test_later_latent_frames_are_means_of_four_pictures_and_grounds_are_everywhere() -> None:
    scene = Scene((Sprite("cross", "pink", "large", "up", "fast"), Sprite("star", "cyan")), "gray", gradient=True)
    single = token_maps(scene, simulate(scene, 1, 9), GRID, temporal_factor=1)
    np.testing.assert_allclose(maps_of(scene, 9, seed=1)[1], single[1:5].mean(0), atol=1e-6)
    assert np.all(single[..., -1] == 1)
    assert np.all(single[..., OFFSET + 4 + list(GROUNDS).index("gray")] == 1)


def test_a_sprite_across_an_edge_is_shown_on_both_sides() -> None:
    scene = Scene((Sprite("square", "blue", "large", "left", "fast"),), "white")
    track = simulate(scene, 2, 64)
    edge = int(np.abs(track.positions[:, 0, 0] - np.rint(track.positions[:, 0, 0])).argmin())
    cover = token_maps(scene, simulate(scene, 2, 1, start=edge), GRID)[0, :, SHAPES.index("square")].reshape(GRID, GRID)
    assert cover[:, 0].sum() > 0
    assert cover[:, -1].sum() > 0
