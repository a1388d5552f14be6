"""Who is let in, and how much they may ask for; the small clocks of a session."""

from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from reelway.actors.orders import Piece
from reelway.actors.timeline import Turn
from reelway.pipelines.serve.config import LimitsConfig
from reelway.pipelines.serve.keys import ANYBODY, Keyring, hash_of, make_key, read_keys
from reelway.pipelines.serve.limits import Limits, Rate
from reelway.pipelines.serve.pace import ChunkLog, Pace, PromptLog, Unseen
from reelway.pipelines.serve.protocol import BadMessage


def test_a_key_opens_its_own_door_only() -> None:
    (key, hashed), (other, _) = make_key(), make_key()
    ring = Keyring([hashed])
    assert key != other
    owner = ring.owner(key)
    assert owner
    assert key not in owner
    for wrong in (None, "", other, key[:-1], key + "x", hashed):
        assert ring.owner(wrong) is None, wrong


def test_without_keys_anybody_comes_in() -> None:
    assert Keyring().owner(None) == ANYBODY


def test_a_key_can_be_a_subprotocol() -> None:
    allowed = set("!#$%&'*+-.^_`|~") | set(map(chr, [*range(48, 58), *range(65, 91), *range(97, 123)]))
    assert all(set(make_key()[0]) <= allowed for _ in range(20))


def test_keys_come_from_a_file_and_the_environment(tmp_path: Path) -> None:
    (first, one), (second, two), (third, _) = make_key(), make_key(), make_key()
    path = tmp_path / "keys"
    path.write_text(f"# the team's\n{one}  # Ada\n\n")
    ring = read_keys(str(path), {"REELWAY_API_KEYS": f"{two}, {one}"})
    assert len(ring) == 2
    assert ring.owner(first)
    assert ring.owner(second)
    assert ring.owner(third) is None


@pytest.mark.parametrize(("content", "words"), [("", "has no key"), ("rw-secret", "line 1: must be a key's sha256")])
def test_a_file_without_hashes_is_refused_and_not_shown(tmp_path: Path, content: str, words: str) -> None:
    path = tmp_path / "keys"
    path.write_text(content)
    with pytest.raises(ValueError, match=words) as caught:
        read_keys(str(path), {})
    assert "secret" not in str(caught.value)
    with pytest.raises(FileNotFoundError, match="no such file"):
        read_keys(str(tmp_path / "none"), {})


def test_the_hash_is_sha256() -> None:
    assert hash_of("abc") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"  # FIPS 180-2, B.1


# --- Limits ----------------------------------------------------------------------------------------------------------


@given(st.lists(st.floats(0, 10), max_size=60).map(sorted), st.integers(1, 5))
def test_never_more_than_so_many_in_a_window(times: list[float], most: int) -> None:
    rate = Rate(most, 1.0)
    taken = [now for now in times if rate.take(now)]
    assert all(now - before >= 1.0 for before, now in zip(taken, taken[most:], strict=False))
    refused = [now for now in times if now not in taken]
    assert all(sum(now - 1.0 < other <= now for other in taken) >= most for now in refused)


def test_sessions_are_counted_for_each_key() -> None:
    limits = Limits(LimitsConfig(sessions_per_key=2))
    with limits.session("a"), limits.session("b"), limits.session("a"):
        with pytest.raises(BadMessage, match="at most 2 at once") as caught, limits.session("a"):
            pass
        assert caught.value.code == "too_many_sessions"
    with limits.session("a"), limits.session("a"):
        pass
    assert not limits._open  # nothing is kept of those who have left


def test_requests_are_counted_for_each_key() -> None:
    limits = Limits(LimitsConfig(requests_per_minute=2))
    limits.request("a", 0.0)
    limits.request("a", 1.0)
    limits.request("b", 1.0)
    with pytest.raises(BadMessage, match="at most 2 in a minute"):
        limits.request("a", 59.0)
    limits.request("a", 60.5)


def test_prompts_and_uploads_have_a_length() -> None:
    limits = Limits(LimitsConfig(prompt_length=5, upload_bytes=1 << 16))
    limits.check_prompt("12345")
    limits.check_size("image", 1 << 16)
    with pytest.raises(BadMessage, match="prompt: at most 5 characters, got 6"):
        limits.check_prompt("123456")
    with pytest.raises(BadMessage, match="image: at most 65536 bytes, got 65537"):
        limits.check_size("image", (1 << 16) + 1)


# --- Clocks ----------------------------------------------------------------------------------------------------------


def test_media_goes_out_a_moment_before_it_is_shown() -> None:
    pace, now, sent = Pace(10.0, 0.5), 100.0, []
    for _ in range(8):
        now += max(0.0, pace.delay(now))
        sent.append(now)
        assert pace.sent(2, now) == 0
    # The first half second goes out at once, after that at the playback's pace.
    assert sent == pytest.approx([100.0, 100.0, 100.0, 100.1, 100.3, 100.5, 100.7, 100.9])


def test_a_late_piece_delays_all_that_follow_and_a_pause_is_not_late() -> None:
    pace = Pace(10.0, 0.0)
    pace.sent(10, 0.0)
    assert pace.delay(0.0) == pytest.approx(1.0)
    assert pace.sent(10, 1.5) == pytest.approx(0.5)  # the player had nothing for half a second
    assert pace.delay(1.5) == pytest.approx(1.0)
    pace.stop(2.0)
    pace.go_on(12.0)
    assert pace.delay(12.0) == pytest.approx(0.5)
    assert pace.sent(10, 12.5) == pytest.approx(0.0)


def test_gaps_do_not_count_pauses() -> None:
    pace = Pace(10.0, 0.0)
    assert pace.gap(1.0) is None
    assert pace.gap(1.75) == pytest.approx(0.75)
    pace.stop(2.0)
    pace.go_on(9.0)
    assert pace.gap(9.5) is None
    assert pace.gap(10.25) == pytest.approx(0.75)


def test_unseen_frames_are_those_after_what_was_seen() -> None:
    unseen = Unseen(12)
    for first in (0, 4, 8, 40):  # frames 12 to 39 were dropped
        assert not unseen.is_too_much
        unseen.sent(first, 4)
    assert unseen.is_too_much
    unseen.note(3)
    assert unseen.is_too_much
    unseen.note(4)
    assert not unseen.is_too_much
    unseen.note(10**9)
    assert not unseen.is_too_much


def test_of_prompts_that_wait_the_last_one_wins() -> None:
    log = PromptLog(Rate(100, 1.0))
    assert log.shown(0, 0, 0.0) is None
    for index, text in enumerate("abc"):
        log.want(text, float(index))
    wanted = log.wanted
    assert wanted is not None
    assert (wanted.text, wanted.replaced) == ("c", 2)
    log.took(wanted, Turn(5, "c", 1, 57, 9), 48)
    log.want("d", 3.0)
    assert log.wanted is not None
    log.took(log.wanted, Turn(6, "d", 2, 69, 12), 57)
    assert log.shown(60, 5, 4.0) is None
    shown = log.shown(69, 6, 4.5)
    assert shown is not None
    assert (shown.index, shown.text, shown.block, shown.frame) == (2, "d", 6, 69)
    assert (shown.flushed, shown.replaced, shown.seconds) == (21, 3, 1.5)
    assert log.shown(73, 6, 4.6) is None


def test_a_prompt_that_was_passed_on_is_not_counted_as_replaced() -> None:
    """The second one comes while the first is on its way to the worker, the third while the second waits."""
    log = PromptLog(Rate(100, 1.0))
    log.want("a", 0.0)
    first = log.wanted
    assert first is not None
    log.want("b", 0.1)
    log.want("c", 0.2)
    log.took(first, Turn(5, "a", 1, 57, 0), 57)
    shown = log.shown(57, 5, 1.0)
    assert shown is not None
    assert (shown.text, shown.replaced) == ("a", 0)
    last = log.wanted
    assert last is not None
    log.took(last, Turn(7, "c", 2, 81, 0), 81)
    shown = log.shown(81, 7, 2.0)
    assert shown is not None
    assert (shown.text, shown.replaced) == ("c", 1)


def test_what_an_earlier_socket_asked_for_is_said_to_the_next() -> None:
    """Each at its own block; of two that no frame was shown between, the last one; and a new one is instead of all."""
    missed = [Turn(5, "a", 1, 57, 9), Turn(6, "b", 2, 69, 12), Turn(9, "c", 3, 105, 0)]
    log = PromptLog(Rate(100, 1.0), missed, 10.0)
    assert log.shown(45, 4, 10.5) is None
    shown = log.shown(69, 6, 11.0)
    assert shown is not None
    assert (shown.text, shown.flushed, shown.replaced, shown.seconds) == ("b", 21, 1, 1.0)
    shown = log.shown(105, 9, 12.0)
    assert shown is not None
    assert (shown.index, shown.text, shown.flushed, shown.replaced) == (3, "c", 0, 0)
    log = PromptLog(Rate(100, 1.0), missed, 10.0)
    log.want("d", 10.1)
    assert log.wanted is not None
    log.took(log.wanted, Turn(10, "d", 4, 117, 77), 40)
    assert log.shown(57, 5, 10.2) is None
    shown = log.shown(117, 10, 11.1)
    assert shown is not None
    assert (shown.text, shown.flushed, shown.replaced, shown.seconds) == ("d", 77, 3, pytest.approx(1.0))


def test_prompts_have_a_rate() -> None:
    log = PromptLog(Rate(2, 1.0))
    log.want("a", 0.0)
    log.want("b", 0.1)
    with pytest.raises(BadMessage, match="at most 2 in 1 s"):
        log.want("c", 0.2)
    assert log.wanted is not None
    assert log.wanted.text == "b"


def test_a_chunk_is_as_late_as_its_latest_piece() -> None:
    pieces = [
        Piece(first, np.zeros((4, 2, 2, 3), np.uint8), 3, first == 41, 1, 0.1 * first, late)
        for first, late in ((33, 0.5), (37, -0.2), (41, -0.1))
    ]
    log = ChunkLog(pieces[0], 35)  # the viewer had two of its frames
    for frames in (2, 4, 4):
        log.add(frames, 100)
    record = log.record(pieces[-1])
    assert (record.index, record.first, record.frames, record.prompt) == (3, 35, 10, 1)
    assert (record.late, record.media_bytes, record.seconds) == (0.5, 300, pytest.approx(4.1))
    assert all(earlier.first < later.first for earlier, later in pairwise(pieces))
