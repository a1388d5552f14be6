"""Blocks, prompts and deadlines against what can be counted by hand."""

import math

import pytest

from reelway.actors.timeline import Layout, Playback, Turn, Turns

LAYOUT = Layout(first=3, block=3, factor=4)  # 9 frames, then 12 per block


def test_a_layout_counts_frames_as_the_decoder_gives_them() -> None:
    """One frame for the first latent, four for each after it; also with a shorter first block."""
    for layout in (LAYOUT, Layout(first=1, block=3, factor=4)):
        sizes = [1 + 4 * (layout.first - 1), *[12] * 5]
        owners = [block for block, size in enumerate(sizes) for _ in range(size)]
        assert [layout.size(block) for block in range(6)] == sizes
        assert [layout.holding(frame) for frame in range(len(owners))] == owners
        edges = [next((b for b in range(6) if layout.start(b) >= frame), None) for frame in range(layout.start(5))]
        assert [layout.edge(frame) for frame in range(layout.start(5))] == edges
        assert [layout.blocks(latents) for latents in (0, layout.first, layout.first + 6)] == [0, 1, 3]


def test_flushed_frames_are_not_counted_as_shown() -> None:
    turns = Turns(LAYOUT)
    first = turns.switch(2, "blue", seen=14)
    assert first == Turn(2, "blue", index=1, frame=21, flushed=7)
    turns.switch(4, "red", seen=45)  # nothing of it was waiting
    shown = [turns.shown(frame) for frame in range(50)]
    expected, count = [], 0
    for frame in range(50):
        expected.append(count)
        count += not 14 <= frame < 21
    assert shown == expected
    assert [frame for frame in range(50) if turns.is_flushed(frame, frame + 1)] == list(range(14, 21))
    assert turns.is_flushed(13, 17)  # a piece that begins before the range was not taken as a whole
    assert [turns.prompt_of(block) for block in range(6)] == [0, 0, 1, 1, 2, 2]
    assert [turns.at(block) for block in (1, 2, 3)] == [None, first, None]


def test_the_last_switch_before_an_edge_takes_the_others_place() -> None:
    turns = Turns(LAYOUT)
    turns.switch(2, "blue", seen=9)
    turns.switch(2, "red", seen=15)
    assert turns.log == (Turn(2, "red", index=1, frame=21, flushed=12),)
    assert turns.flushed == 12


def test_a_second_switch_flushes_only_what_the_first_one_left() -> None:
    turns = Turns(LAYOUT)
    turns.switch(2, "blue", seen=9)
    assert turns.switch(3, "red", seen=9) == Turn(3, "red", index=2, frame=33, flushed=12)
    assert turns.switch(3, "green", seen=9) == Turn(3, "green", index=2, frame=33, flushed=12)
    assert turns.flushed == 24
    assert turns.shown(33) == 9


def test_a_log_of_turns_is_made_again_from_itself() -> None:
    turns = Turns(LAYOUT)
    turns.switch(1, "blue", seen=5)
    turns.switch(3, "red", seen=30)
    again = Turns(LAYOUT, turns.log)
    assert again.log == turns.log
    assert again.flushed == 4 + 3
    with pytest.raises(ValueError, match=r"must rise, got \[3, 3\]"):
        Turns(LAYOUT, [Turn(3, "a"), Turn(3, "b")])
    with pytest.raises(ValueError, match="flushed 10"):
        Turns(LAYOUT, [Turn(1, "a", flushed=10)])


def test_deadlines_follow_playback_pauses_and_a_player_that_had_to_wait() -> None:
    play = Playback(rate=10.0, shown=20, now=100.0)
    assert play.due(30, 100.0) == pytest.approx(101.0)  # before playback: from the opening on
    play.take(20, now=105.0)
    assert play.due(30, 105.0) == pytest.approx(106.0)
    play.take(30, now=105.5)  # in time: nothing moves
    assert play.due(40, 105.5) == pytest.approx(107.0)
    play.pause(106.0)
    play.pause(106.5)
    assert play.due(40, 108.0) == pytest.approx(109.0)
    play.resume(108.0)
    assert play.due(40, 108.0) == pytest.approx(109.0)
    play.take(40, now=110.0)  # a second too late
    assert play.due(50, 110.0) == pytest.approx(111.0)


def test_without_a_frame_rate_nothing_is_ever_due() -> None:
    play = Playback(rate=None, shown=0, now=0.0)
    play.take(0, now=1.0)
    assert play.due(100, 2.0) == math.inf
