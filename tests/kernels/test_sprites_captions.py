"""Captions of the sprites world, the way back from text, and the splits."""

import collections

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from reelway.kernels.sprites.captions import MEANINGS, VOCABULARY, caption, parse, tokens
from reelway.kernels.sprites.scene import (
    COLORS,
    GROUNDS,
    MOTIONS,
    RELATIONS,
    SHAPES,
    SIZES,
    SPEEDS,
    Scene,
    Sprite,
)
from reelway.kernels.sprites.splits import (
    HELD_OUT_COLOR_MOTION,
    HELD_OUT_SHAPE_COLOR,
    POOR_CONTRAST,
    clip_seed,
    prompts,
    sample_scene,
)

sprites = st.builds(
    Sprite,
    st.sampled_from(SHAPES),
    st.sampled_from(list(COLORS)),
    st.sampled_from(list(SIZES)),
    st.sampled_from(MOTIONS),
    st.sampled_from(list(SPEEDS)),
)
grounds, flags = st.sampled_from(list(GROUNDS)), st.booleans()
scenes = st.builds(Scene, st.tuples(sprites), grounds, flags) | st.builds(
    Scene, st.tuples(sprites, sprites), grounds, flags, st.none() | st.sampled_from(RELATIONS)
)


# --- captions -----------------------------------------------------------------------------------------


@settings(max_examples=500, deadline=None)
@given(scenes, st.integers(0, 10**9))
def test_parse_reads_what_caption_writes(scene, seed):
    text = caption(scene, seed)
    assert parse(text) == (scene, [])
    assert text == text.lower() == caption(scene, seed)
    assert set(tokens(text)) <= set(VOCABULARY)


@settings(max_examples=100, deadline=None)
@given(scenes, st.integers(0, 10**9))
def test_a_caption_names_every_attribute(scene, seed):
    told = collections.Counter(MEANINGS[word] for word in tokens(caption(scene, seed)) if word in MEANINGS)
    for sprite in scene.sprites:
        assert told["color", sprite.color]
        assert told["size", sprite.size]
        assert told["shape", sprite.shape]
        assert sprite.motion == "still" or told["speed", sprite.speed]
    assert told["ground", scene.ground]
    assert bool(told["gradient", "yes"] or told["moving", "fades"]) == scene.gradient


def test_many_texts_for_one_scene():
    scene = Scene((Sprite("star", "cyan", "small", "left", "slow"),), "gray", True)
    texts = {caption(scene, seed) for seed in range(300)}
    assert len(texts) > 100
    assert len({text.split()[0] for text in texts}) >= 3


def test_vocabulary_is_small_and_has_no_surplus():
    assert len(VOCABULARY) == len(set(VOCABULARY)) <= 200
    assert all(tokens(word) == [word] for word in VOCABULARY)


def small(shape, color, **more):
    return Sprite(shape, color, "small", **more)


def large(shape, color, *more):
    return Sprite(shape, color, "large", *more)


@pytest.mark.parametrize(
    ("text", "scene"),
    [
        (
            "red star, moving fast to the left, black background",
            Scene((Sprite("star", "red", "large", "left", "fast"),), "black"),
        ),
        (
            "Drifting slowly upward: a TINY Violet disc, over a ground that fades from navy!",
            Scene((small("circle", "purple", motion="up"),), "navy", True),
        ),
        (
            "on a grey gradient a huge golden triangle bounces rapidly off the edges",
            Scene((Sprite("triangle", "yellow", "large", "bouncing", "fast"),), "gray", True),
        ),
        (
            "a fast small orange box that circles, dark blue background",
            Scene((small("square", "orange", motion="circling", speed="fast"),), "navy"),
        ),
        (
            "a small red star moving left slowly and a fast large blue cross going down on white",
            Scene((small("star", "red", motion="left"), large("cross", "blue", "down", "fast")), "white"),
        ),
        (
            "a large blue ball moves up; the small red box is left of the ball. the box is not moving",
            Scene((large("circle", "blue", "up"), small("square", "red")), "black", False, "right of"),
        ),
        (
            "a red circle circles quickly under a green diamond drifting from right to left",
            Scene(
                (
                    Sprite("circle", "red", motion="circling", speed="fast"),
                    Sprite("diamond", "green", motion="left"),
                ),
                "black",
                False,
                "below",
            ),
        ),
        ("blue circles bouncing on white", Scene((large("circle", "blue", "bouncing"),), "white")),
        (
            "a star moves left small blue square",
            Scene((large("star", "red", "left"), small("square", "blue")), "black"),
        ),
    ],
)
def test_free_texts_are_understood(text, scene):
    assert parse(text)[0] == scene


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("a red car drives left on a green field", ["car", "drives", "green", "field"]),
        ("a red blue star", ["blue"]),
        ("a black star on white", ["black"]),
        ("a blue circle on a red background", ["red"]),
        ("a circle over green", ["green"]),
        ("a blue circle moves left on black and right", ["right"]),
        ("a red star, a blue square and a small pink cross", ["small", "pink", "cross"]),
        ("a red star above", ["above"]),
        ("", []),
    ],
)
def test_what_the_world_does_not_have_is_told(text, words):
    assert parse(text)[1] == words


def test_defaults_fill_what_a_text_leaves_open():
    assert parse("")[0] == Scene((Sprite("circle", "red", "large", "still", "slow"),), "black")
    assert parse("a star that flies fast")[0].sprites[0] == Sprite("star", "red", "large", "right", "fast")


@pytest.mark.parametrize(
    ("make", "field"),
    [
        (lambda: Sprite("cube", "red"), "shape"),
        (lambda: Sprite("star", "black"), "color"),
        (lambda: Scene((Sprite("star", "red"),), "red"), "ground"),
        (lambda: Scene((), "black"), "sprites"),
        (lambda: Scene((Sprite("star", "red"),), "black", relation="above"), "relation"),
    ],
)
def test_impossible_scenes_are_refused(make, field):
    with pytest.raises(ValueError, match=f"^{field}: "):
        make()


# --- splits -------------------------------------------------------------------------------------------


def sample(split, count=3000, level=0):
    return [sample_scene(split, seed, level=level) for seed in range(count)]


def pairs_of(scenes):
    every = [sprite for scene in scenes for sprite in scene.sprites]
    return {(s.shape, s.color) for s in every}, {(s.color, s.motion) for s in every}


def test_held_out_pairs_are_never_in_training_or_validation():
    assert len(HELD_OUT_SHAPE_COLOR) == 5
    assert len(HELD_OUT_COLOR_MOTION) == 6
    for split in ("train", "validation"):
        shapes, motions = pairs_of(sample(split))
        assert len(shapes) == 48 - 5
        assert len(motions) == 64 - 6
        assert not shapes & HELD_OUT_SHAPE_COLOR
        assert not motions & HELD_OUT_COLOR_MOTION


def test_every_held_out_scene_has_a_held_out_pair_and_all_pairs_occur():
    held_out = sample("heldout", 1000)
    for scene in held_out:
        shapes, motions = pairs_of([scene])
        assert shapes & HELD_OUT_SHAPE_COLOR or motions & HELD_OUT_COLOR_MOTION
    shapes, motions = pairs_of(held_out)
    assert shapes >= HELD_OUT_SHAPE_COLOR
    assert motions >= HELD_OUT_COLOR_MOTION


def test_every_single_value_occurs_in_training():
    train = sample("train")
    every = [sprite for scene in train for sprite in scene.sprites]
    assert {s.shape for s in every} == set(SHAPES)
    assert {s.color for s in every} == set(COLORS)
    assert {s.motion for s in every} == set(MOTIONS)
    assert {s.size for s in every} == set(SIZES)
    assert {s.speed for s in every} == set(SPEEDS)
    assert {scene.ground for scene in train} == set(GROUNDS)
    assert {scene.relation for scene in train} == {None, *RELATIONS}
    assert {scene.gradient for scene in train} == {True, False}


def test_scenes_are_clear_to_see():
    two = 0
    for scene in sample("train"):
        assert not {sprite.color for sprite in scene.sprites} & POOR_CONTRAST[scene.ground]
        if len(scene.sprites) == 2:
            two += 1
            first, second = scene.sprites
            assert first.shape != second.shape
            assert first.color != second.color
    assert 0.36 < two / 3000 < 0.44


def test_something_can_come_or_go_at_level_three():
    for scene in sample("train", 1000, level=3):
        assert len(scene.sprites) == 1 or any(sprite.motion != "still" for sprite in scene.sprites)


def test_prompts_are_stable_and_seeds_differ_between_splits():
    assert prompts("validation", 5) == prompts("validation", 8)[:5]
    assert prompts("validation", 5) != prompts("validation", 5, seed=1)
    assert all(parse(text) == (scene, []) for text, scene in prompts("heldout", 50))
    seeds = {clip_seed(split, i) for split in ("train", "validation", "heldout") for i in range(1000)}
    assert len(seeds) == 3000
    assert all(0 <= seed < 2**63 for seed in seeds)


def test_an_unknown_split_is_refused():
    with pytest.raises(ValueError, match=r"split: .*'test'"):
        sample_scene("test", 0)
