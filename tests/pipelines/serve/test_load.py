"""`reelway load` against a server whose faults are known."""

import asyncio
import io
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import av
import pytest
from click.testing import Result
from typer.testing import CliRunner

from reelway.kernels.sprites.captions import parse
from reelway.kernels.sprites.render import render
from reelway.pipelines.serve import load, protocol
from reelway.pipelines.serve import viewers as viewers_module
from reelway.pipelines.serve.load import Report, app, make_crew, make_report, quantiles, stream_address, watch_all
from reelway.pipelines.serve.media import encoder
from reelway.pipelines.serve.viewers import Kind, Ledger, Plan, frames_in

from . import stand_in
from .serving import START, LocalServer
from .stand_in import SIDE, StandIn
from .virtual_time import run_virtually

SLACK = 0.06  # seconds: what is sent may arrive a poll later
PROMPTS = ("a large red circle circling fast on black", "a big yellow star bouncing slowly on navy")


@pytest.fixture
def server() -> Iterator[StandIn]:
    with StandIn() as running:
        yield running


def play(server: StandIn, viewers: int = 1, seconds: float = 2.0, **options: Any) -> Report:
    """Let viewers watch in virtual time, and their report."""

    async def run() -> Report:
        async with server:
            return await watched(server, viewers, seconds, **options)

    return run_virtually(run, load, viewers_module, stand_in)


async def watched(server: StandIn | LocalServer, viewers: int, seconds: float, **options: Any) -> Report:
    kinds = {name: options.pop(name, 0) for name in ("slow", "vanish", "garbage")}
    plan = Plan(url=stream_address(server.url), seconds=seconds, **{"prompts": PROMPTS, **options})
    crew = make_crew(plan, viewers, seed=3, **kinds)
    await watch_all(crew, seconds, lambda passed: None)
    return make_report(plan, crew, seed=3)


@pytest.mark.parametrize("media", ["mp4", "jpeg"])
def test_a_sound_server(media: str) -> None:
    """All frames once, in time, with prompts that change and frames that the server drops and says so."""
    server = StandIn(flush=12)
    report = play(server, 2, 6.0, media=media, switch_every=1.0)
    assert report["frames"]["lost"] == report["frames"]["doubled"] == 0
    assert report["frames"]["received"] == sum(one["frames"] for one in report["each"]) > 2 * 6 * 16
    assert report["pieces"]["in_time"] == report["chunks"]["in_time"] == 1.0
    assert report["time_to_first_frame"]["count"] == 2
    assert report["time_to_first_frame"]["max"] == pytest.approx(server.making, abs=SLACK)
    assert report["prompt_to_frame"]["count"] >= 6
    assert 0 < report["prompt_to_frame"]["p50"] < 0.75 + SLACK  # at most what is left of the chunk that is made
    assert report["failures"] == report["refused"] == []
    assert {"seen", "prompt", "stop"} <= set(server.heard)


def test_a_server_that_loses_and_repeats() -> None:
    report = play(StandIn(loses=4, doubles=6))
    assert report["frames"]["lost"] == 4
    assert report["frames"]["doubled"] == 4


def test_a_server_that_is_too_slow() -> None:
    """12 frames of 16 a second, made in 1.5 s: half the pace."""
    report = play(StandIn(making=1.5), 1, 30.5, start_buffer=0.1)
    assert report["chunks"] | {"in_time": 0} == {"count": 20, "late": 19, "in_time": 0}
    assert report["stalled_seconds"] == pytest.approx(30 - 1.5 - 0.1 - (9 + 18 * 12) / 16, abs=0.1)
    assert report["chunk_gap"]["p50"] == pytest.approx(1.5, abs=SLACK)


def test_vanishing_viewers_come_back_without_a_gap() -> None:
    server = StandIn()
    report = play(server, 2, 10.0, vanish=1)
    assert report["viewers"] == {"steady": 1, "slow": 0, "vanishing": 1, "garbage": 0}
    assert report["reconnects"]["count"] >= 2
    assert report["frames"]["lost"] == report["frames"]["doubled"] == 0
    assert any(isinstance(message, protocol.Reconnect) for message in server.first_messages)


def test_slow_viewers_are_not_counted_as_late() -> None:
    report = play(StandIn(), 2, 10.0, slow=1)
    (slow,) = (one for one in report["each"] if one["kind"] == "slow")
    assert 0 < slow["frames"] <= 4 * 10  # a message a second, and 4 frames in one
    assert report["pieces"]["late"] == 0


def test_a_refusal_that_comes_before_the_first_message_is_heard() -> None:
    """The server closes while the viewer speaks; who heard only that would come back again and again."""
    report = play(StandIn(key="right"), 1, 9.0, key="wrong")
    assert report["failures"] == ["wrong_key: no such key"]


def test_garbage_is_answered() -> None:
    report = play(StandIn(), 1, 10.0, garbage=1)
    assert report["garbage"]["sent"] == report["garbage"]["answered"] >= 10
    assert report["garbage"]["unanswered"] == []


def test_queued_and_refused() -> None:
    report = play(StandIn(queue=(2, 1)), 1, 3.0)
    assert report["queued"]["count"] == 1
    assert report["queued"]["max"] == pytest.approx(0.8, abs=SLACK)
    report = play(StandIn(full=True), 2, 1.0)
    assert report["refused"] == ["2 of 2 sessions are taken"] * 2


def test_the_real_server_loses_nothing(small_student: Path, tmp_path: Path) -> None:
    """New prompts, sockets that are cut, and garbage; streams so slow that they are let in on any machine."""
    options = {"frame_rate": START["frame_rate"], "switch_every": 1.0, "vanish": 1, "garbage": 1}
    with LocalServer(small_student, tmp_path / "state") as real:
        for seconds in (4.0, 12.0, 36.0, 60.0):  # a slow machine needs longer for the same
            report = asyncio.run(watched(real, 3, seconds, **options))
            assert report["frames"]["lost"] == report["frames"]["doubled"] == 0, report["each"]
            assert report["garbage"]["unanswered"] == []
            if report["prompt_to_frame"]["count"] and report["reconnects"]["count"]:
                break
    assert report["frames"]["received"] > 20
    assert report["prompt_to_frame"]["count"] >= 1
    assert report["reconnects"]["count"] >= 1


def ledger(kind: Kind = "steady") -> Ledger:
    """A viewer at 10 frames per second that plays half a second after its first frame, asked for at 100 s."""
    return Ledger(kind, rate_wanted=10.0, start_buffer=0.5, asked=100.0)


def test_deadlines_in_numbers() -> None:
    one = ledger()
    one.media(0, 5, 101.0)  # plays from 101.5 on
    one.media(5, 5, 101.9)  # due at 102.0
    one.media(10, 5, 102.7)  # due at 102.5: the clock waits 0.2
    one.media(15, 5, 103.1)  # due at 103.2
    assert one.first == pytest.approx(1.0)
    assert (one.pieces, one.late) == (4, 1)
    assert one.stalled == pytest.approx(0.2)
    assert one.rate() == pytest.approx(20 / 2.1)


@pytest.mark.parametrize(("kind", "late"), [("steady", 1), ("vanishing", 0)])
def test_a_viewers_own_absence_is_not_lateness(kind: Kind, late: int) -> None:
    one = ledger(kind)
    one.media(0, 5, 101.0)
    one.left(101.2)
    one.media(5, 5, 105.0)
    assert (one.late, one.lost, one.returns) == (late, 0, [pytest.approx(3.8)])


def test_a_flush_may_drop_what_it_says_and_no_more() -> None:
    one = ledger()
    one.media(0, 10, 101.0)
    one.asks_prompt("another", 101.2)
    one.prompt("another", 22, flushed=12)
    one.media(22, 4, 101.7)
    assert (one.lost, one.doubled, one.switches) == (0, 0, [pytest.approx(0.5)])
    one.prompt("a third", 50, flushed=12)
    assert one.lost == 50 - 26 - 12


def test_chunks_are_late_with_their_pieces() -> None:
    one = ledger()
    for place, moment in enumerate((101.0, 101.1, 105.0, 105.1)):
        one.media(5 * place, 5, moment)
        one.chunk(moment)
    assert (one.chunks, one.late_chunks) == (4, 1)
    assert one.gaps == pytest.approx([0.1, 3.9, 0.1])


def test_quantiles_are_of_the_nearest_rank() -> None:
    values = [float(value) for value in range(1, 101)]
    assert quantiles(values) == {"count": 100, "p50": 50.0, "p95": 95.0, "p99": 99.0, "max": 100.0}
    assert quantiles([7.0])["p99"] == 7.0
    assert quantiles([])["p50"] is None


def test_frames_of_a_fragment() -> None:
    coder = encoder("mp4", SIDE, SIDE, 16.0, 80)
    pixels = render(parse(PROMPTS[0])[0], 1, 9, size=SIDE)
    parts = [*coder.begin(0), *coder.encode(pixels[:1], 0, True), *coder.encode(pixels[1:], 1, False)]
    assert [frames_in(part.payload) for part in parts] == [0, 1, 8]
    with av.open(io.BytesIO(b"".join(part.payload for part in parts))) as file:
        assert sum(1 for _ in file.decode(video=0)) == 9


# --- The command -------------------------------------------------------------------------------------------------


def run(*arguments: str) -> Result:
    return CliRunner().invoke(app, list(arguments))


def test_the_command_prints_and_writes_the_report(server: StandIn, tmp_path: Path) -> None:
    target = tmp_path / "report.json"
    options = ("--viewers", "2", "--seconds", "2", "--prompt-switch-every", "1", "--json", str(target))
    result = run(server.url, *options)
    assert result.exit_code == 0, result.output
    report = json.loads(target.read_text())
    assert report["frames"]["lost"] == 0
    assert report["frames"]["received"] > 0
    assert "time to first frame" in result.output


def test_it_starts_without_any_model_library() -> None:
    """Viewers need the messages, and prompts; not torch, which takes seconds to import."""
    code = (
        "import sys; from reelway.pipelines.serve.load import _read_prompts; assert _read_prompts(None, 0); "
        "print(*{'torch', 'diffusers', 'transformers', 'ray'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=100)
    assert done.stdout.split() == []


def test_lost_frames_are_exit_code_1(server: StandIn) -> None:
    server.loses = 2
    assert run(server.url, "--viewers", "1", "--seconds", "2").exit_code == 1


def test_mistakes_are_one_line(server: StandIn, tmp_path: Path) -> None:
    server.key = "right"
    mistakes = {
        ("http://127.0.0.1:9", "--seconds", "9"): "cannot be reached",
        ("127.0.0.1:8000",): "must be the address of a server",
        (server.url, "--viewers", "2", "--slow", "3"): "--viewers: 2 cannot be 3 slow",
        (server.url, "--json", str(tmp_path / "no" / "report.json")): "--json: no such folder",
        (server.url, "--media", "gif"): "--media: must be mp4 or jpeg",
        (server.url, "--key", "wrong", "--seconds", "9"): "wrong_key",
        (server.url, "--prompts", str(tmp_path / "none.txt")): "--prompts: no such file",
    }
    for arguments, words in mistakes.items():
        error = run(*arguments).exception
        assert isinstance(error, (ValueError, OSError)), (arguments, error)
        assert words in str(error)
        assert "\n" not in str(error)


@pytest.mark.parametrize(
    ("url", "address"),
    [
        ("ws://host:8000", "ws://host:8000/v1/stream"),
        ("https://host/reelway/", "wss://host/reelway/v1/stream"),
        ("ws://host/v1/stream", "ws://host/v1/stream"),
    ],
)
def test_addresses(url: str, address: str) -> None:
    assert stream_address(url) == address
