"""The gateway before real workers: streams, what viewers do wrong, workers that are lost, and the HTTP side."""

import base64
import contextlib
import io
import json
import sys
import urllib.request
from collections.abc import Iterator
from http.client import HTTPConnection
from pathlib import Path
from typing import Any
from urllib.error import HTTPError

import av
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from prometheus_client.parser import text_string_to_metric_families
from websockets.exceptions import ConnectionClosed

from reelway.actors.generator import Student
from reelway.cluster.session import Session
from reelway.pipelines.serve.keys import make_key
from reelway.pipelines.serve.protocol import INIT
from reelway.pipelines.serve.session import REFUSALS
from reelway.pipelines.video import VideoWriter

sys.path.insert(0, str(Path(__file__).parent))
from serving import PATIENCE, PROMPT, SIZE, START, LocalServer, Viewer

BLUE = "two blue circles on white"
FIRST, CHUNK = 9, 12  # frames of the first chunk, and of every other one


@pytest.fixture(scope="module")
def server(sharp_student: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalServer]:
    with LocalServer(sharp_student, tmp_path_factory.mktemp("state")) as server:
        yield server


@pytest.fixture(scope="module")
def expected(sharp_student: Path) -> list[np.ndarray]:
    """Frames of the bare stream."""
    with Student.from_pretrained(sharp_student).open(PROMPT, height=SIZE[0], width=SIZE[1]) as stream:
        return [frame for _ in range(4) for frame in stream.next_chunk()]


def read(jpeg: bytes) -> np.ndarray:
    return np.array(Image.open(io.BytesIO(jpeg))).astype(int)


def check_pictures(viewer: Viewer, expected: list[np.ndarray]) -> None:
    """JPEG at its best is a level or two off."""
    assert viewer.pictures
    for index, picture in viewer.pictures.items():
        if index < len(expected):
            assert np.abs(read(picture) - expected[index]).mean() < 3, index


def figures(server: LocalServer, key: str | None = None) -> dict[str, float]:
    request = urllib.request.Request(f"{server.url}/metrics", headers={"Authorization": f"Bearer {key}"} if key else {})
    text = urllib.request.urlopen(request, timeout=PATIENCE).read().decode()
    samples = [sample for family in text_string_to_metric_families(text) for sample in family.samples]
    found: dict[str, float] = {}
    for sample in samples:
        rest = {name: value for name, value in sample.labels.items() if name != "gateway"}
        found[sample.name + "".join(f" {value}" for value in rest.values())] = sample.value
    return found


# --- Streams ---------------------------------------------------------------------------------------------------------


def test_a_stream_is_the_bare_stream(server: LocalServer, expected: list[np.ndarray]) -> None:
    with server.viewer() as viewer:
        ready = viewer.start()
        assert (ready["first"], ready["frames_per_chunk"], ready["model"]) == (0, CHUNK, "small")
        assert (ready["height"], ready["width"], ready["mime"]) == (*SIZE, "image/jpeg")
        chunks = viewer.chunks(3)
        assert [(chunk["index"], chunk["first"], chunk["frames"]) for chunk in chunks] == [
            (0, 0, FIRST),
            (1, FIRST, CHUNK),
            (2, FIRST + CHUNK, CHUNK),
        ]
        assert sum(chunk["media_bytes"] for chunk in chunks) == sum(len(item[2]) + 9 for item in viewer.media)
        assert list(viewer.pictures)[: FIRST + 2 * CHUNK] == list(range(FIRST + 2 * CHUNK))
        check_pictures(viewer, expected)
        viewer.say(type="stop")
        (end,) = [record for record in viewer.rest() if record["type"] == "end"]
        assert (end["reason"], viewer.code) == ("stopped by the viewer", 1000)
    server.wait_until(lambda: server.streams() == 0)


def test_mp4_plays_from_the_first_fragment_to_the_last(server: LocalServer) -> None:
    with server.viewer() as viewer:
        ready = viewer.start(media="mp4", seconds=10 * (FIRST + CHUNK + 5))
        assert ready["mime"].startswith('video/mp4; codecs="avc1.')
        end = viewer.rest()[-1]
    assert (end["type"], end["frames"]) == ("end", FIRST + CHUNK + 5)
    assert viewer.media[0][:2] == (INIT, 0)
    with av.open(io.BytesIO(b"".join(payload for _, _, payload in viewer.media))) as container:
        frames = list(container.decode(video=0))
    assert [frame.pts * frame.time_base for frame in frames] == [10 * index for index in range(FIRST + CHUNK + 5)]
    keys = [index for index, frame in enumerate(frames) if frame.key_frame]
    assert keys == [0, FIRST, FIRST + CHUNK]


def test_a_prompt_is_seen_from_the_next_block_on(server: LocalServer) -> None:
    before = figures(server)["reelway_prompt_seconds_count"]
    with server.viewer() as viewer:
        viewer.start()
        viewer.chunks(1)
        viewer.say(type="prompt", text=BLUE)
        shown = viewer.until("prompt")
        after = viewer.until("chunk")
    assert (shown["index"], shown["text"], shown["replaced"]) == (1, BLUE, 0)
    assert (after["index"], after["first"], after["prompt"]) == (shown["block"], shown["frame"], 1)
    assert shown["seconds"] > 0
    assert shown["frame"] == FIRST + CHUNK * (shown["block"] - 1)
    # What was dropped is what lies between the frames that came before and the first one after.
    assert shown["flushed"] == sum(index not in viewer.pictures for index in range(shown["frame"]))
    found = figures(server)
    assert found["reelway_prompt_seconds_count"] == before + 1
    assert found["reelway_first_frame_seconds_count"] >= 1


@pytest.mark.slow
def test_what_waits_of_the_old_prompt_is_dropped(sharp_student: Path, tmp_path: Path) -> None:
    """The first five frames go out at once, the next ones a while later: by then they are of the new prompt."""
    with LocalServer(sharp_student, tmp_path, lead_seconds=6.0) as server, server.viewer() as viewer:
        viewer.start(frame_rate=0.5, media="mp4")
        server.wait_until(lambda: figures(server)["reelway_frames_total"] == 5)
        viewer.say(type="prompt", text=BLUE)
        shown = viewer.until("prompt")
        assert shown["flushed"] == shown["frame"] - 5 >= FIRST - 5
        assert viewer.more_media()[1] == shown["frame"]
        assert [first for _, first, _ in viewer.media] == [0, 0, 1, shown["frame"]]
        assert figures(server)["reelway_frames_flushed_total"] == shown["flushed"]
        with av.open(io.BytesIO(b"".join(payload for _, _, payload in viewer.media))) as container:
            frames = list(container.decode(video=0))
        assert [frame.pts * frame.time_base for frame in frames] == [2 * index for index in range(9)]
        assert [index for index, frame in enumerate(frames) if frame.key_frame] == [0, 5]


def test_many_prompts_at_once_are_one_and_too_many_are_refused(server: LocalServer) -> None:
    with server.viewer() as viewer:
        viewer.start()
        viewer.chunks(1)
        for number in range(30):
            viewer.say(type="prompt", text=f"{BLUE} {number}")
        shown = viewer.until("prompt")
        if _answered(viewer) < 30:
            viewer.until_any(lambda _: _answered(viewer) >= 30)
        viewer.say(type="stop")
        viewer.rest()
    errors = [record for record in viewer.records if record["type"] == "error"]
    assert {(error["code"], error["recoverable"]) for error in errors} == {("too_many_prompts", True)}
    assert _answered(viewer) == 30
    assert shown["text"].startswith(BLUE)
    assert viewer.code == 1000


def test_a_thousand_prompts_a_second_end_their_own_stream_alone(
    server: LocalServer, expected: list[np.ndarray]
) -> None:
    with server.viewer() as watcher, server.viewer() as viewer:
        watcher.start()
        viewer.start()
        with contextlib.suppress(ConnectionClosed):  # the server does not listen to all of them
            for number in range(1000):
                viewer.say(type="prompt", text=f"{BLUE} {number}")
        viewer.rest()
        errors = [record for record in viewer.records if record["type"] == "error"]
        assert {error["code"] for error in errors} == {"too_many_prompts"}
        assert [error["recoverable"] for error in errors] == [True] * REFUSALS + [False]
        assert viewer.code == 1008
        watcher.chunks(3)
        assert list(watcher.pictures) == list(range(len(watcher.pictures)))
        check_pictures(watcher, expected)


def _answered(viewer: Viewer) -> int:
    """Prompts that were shown, replaced or refused."""
    prompts = [record for record in viewer.records if record["type"] == "prompt"]
    errors = [record for record in viewer.records if record["type"] == "error"]
    return len(errors) + len(prompts) + sum(prompt["replaced"] for prompt in prompts)


def test_a_pause_stops_the_stream_where_it_is(server: LocalServer, expected: list[np.ndarray]) -> None:
    with server.viewer() as viewer:
        viewer.start()
        viewer.say(type="pause")
        viewer.until("paused")
        viewer.say(type="pause")
        assert viewer.until("error")["code"] == "not_now"
        had = len(viewer.pictures)
        viewer.say(type="resume")
        viewer.until("resumed")
        viewer.chunks(2)
    assert had < FIRST + CHUNK
    assert list(viewer.pictures) == list(range(len(viewer.pictures)))
    check_pictures(viewer, expected)


def test_a_slow_viewer_makes_only_its_own_stream_stand_still(server: LocalServer) -> None:
    with contextlib.ExitStack() as stack:
        slow = stack.enter_context(server.viewer())
        slow.attentive = False
        ready = slow.start()
        reach = ready["seen_within"] * ready["frame_rate"]
        server.wait_until(lambda: figures(server)["reelway_sessions_slow"] == 1)
        other = stack.enter_context(server.viewer())
        other.start()
        assert [chunk["index"] for chunk in other.chunks(4)] == [0, 1, 2, 3]
        slow.linger(0.3)
        assert reach < len(slow.pictures) <= reach + 4
        slow.say(type="seen", frame=len(slow.pictures))
        slow.attentive = True
        slow.chunks(2)
        assert list(slow.pictures) == list(range(len(slow.pictures)))


def test_a_viewer_that_vanishes_leaves_nothing(server: LocalServer) -> None:
    viewers = [server.viewer() for _ in range(3)]
    for viewer in viewers:
        viewer.start()
    assert server.streams() == 3
    for viewer in viewers:
        viewer.socket.socket.close()  # no goodbye
    server.wait_until(lambda: server.streams() == 0)
    server.wait_until(lambda: figures(server)["reelway_sessions"] == 0)


def test_an_image_begins_a_stream(server: LocalServer) -> None:
    picture = np.zeros((50, 50, 3), np.uint8)
    picture[:, 25:] = 220
    file = io.BytesIO()
    Image.fromarray(picture).save(file, "PNG")
    with server.viewer() as viewer:
        ready = viewer.start(image=base64.b64encode(file.getvalue()).decode())
        viewer.chunks(1)
    assert (ready["height"], ready["width"]) == SIZE
    shown = read(viewer.pictures[4])
    assert shown[:, 18:].mean() > shown[:, :14].mean() + 60


def test_a_camera_is_redrawn(server: LocalServer) -> None:
    with server.viewer() as viewer:
        viewer.start(source={"noise": 0.3})
        due = viewer.until("due")
        assert (due["first"], due["frames"]) == (0, FIRST)
        file = io.BytesIO()
        Image.fromarray(np.full((*SIZE, 3), 200, np.uint8)).save(file, "JPEG")
        for _ in range(FIRST):
            viewer.socket.send(file.getvalue())
        assert viewer.chunks(1)[0]["frames"] == FIRST
        for _ in range(CHUNK):
            viewer.socket.send(file.getvalue())
        assert viewer.chunks(1)[0]["frames"] == CHUNK
    assert {"type": "due", "first": FIRST, "frames": CHUNK} in viewer.records


def test_a_video_is_redrawn_to_its_end(server: LocalServer, tmp_path: Path) -> None:
    path = tmp_path / "source.mp4"
    with VideoWriter(path, 1) as writer:
        writer.write(np.random.default_rng(0).integers(0, 255, (25, 32, 32, 3), dtype=np.uint8))
    video = base64.b64encode(path.read_bytes()).decode()
    with server.viewer() as viewer:
        viewer.start(source={"video": video})
        end = viewer.rest()[-1]
    assert (end["type"], end["reason"], end["frames"]) == ("end", "the source video has ended", FIRST + CHUNK)


# --- Lost sockets and workers ----------------------------------------------------------------------------------------


def test_a_stream_goes_on_on_another_socket(server: LocalServer, expected: list[np.ndarray]) -> None:
    with server.viewer() as viewer:
        ready = viewer.start()
        viewer.chunks(2)
        viewer.socket.socket.close()
    had = viewer.pictures
    with server.viewer() as again:
        message = {"type": "reconnect", "version": 1, "stream": ready["stream"], "frame": FIRST + 5}
        again.say(**message, media="jpeg", quality=100)
        assert again.until("ready")["first"] == FIRST + 5
        again.chunks(2)
        again.say(type="stop")
        again.rest()
    assert list(again.pictures) == list(range(FIRST + 5, FIRST + 5 + len(again.pictures)))
    check_pictures(again, expected)
    assert all(had[index] == again.pictures[index] for index in set(had) & set(again.pictures))
    with server.viewer() as late:  # it was stopped
        late.say(**message)
        assert [record["code"] for record in late.rest()] == ["unknown_stream"]


def test_a_switch_is_told_to_the_socket_that_comes_next(server: LocalServer) -> None:
    """The first one ends while the stream stands still, so that no frame of the new prompt was sent over it."""
    with server.viewer() as viewer:
        viewer.attentive = False
        ready = viewer.start()
        while (sent := len(viewer.pictures)) <= round(ready["seen_within"] * ready["frame_rate"]):
            viewer.more_media()
        viewer.say(type="prompt", text=BLUE)
        server.wait_until(lambda: bool(server.services.state.read_session(ready["stream"]).turns))
        viewer.socket.socket.close()
    with server.viewer() as again:
        again.say(type="reconnect", version=1, stream=ready["stream"], frame=sent, media="jpeg")
        shown = again.until("prompt")
        assert again.pictures == {}
        again.chunks(1)
        again.say(type="stop")
        again.rest()
    assert (shown["index"], shown["text"]) == (1, BLUE)
    assert shown["frame"] == min(again.pictures) == sent + shown["flushed"] > sent


@pytest.mark.slow
def test_an_uploaded_video_outlives_its_socket(server: LocalServer, tmp_path: Path) -> None:
    """The second socket does not send it again, and goes on to its end."""
    path = tmp_path / "source.mp4"
    with VideoWriter(path, 1) as writer:
        writer.write(np.random.default_rng(1).integers(0, 255, (FIRST + 3 * CHUNK, *SIZE, 3), dtype=np.uint8))
    video = base64.b64encode(path.read_bytes()).decode()
    with server.viewer() as whole:
        whole.start(source={"video": video, "noise": 0.3})
        whole.rest()
    with server.viewer() as viewer:
        ready = viewer.start(source={"video": video, "noise": 0.3})
        viewer.chunks(1)
        viewer.socket.socket.close()
    with server.viewer() as again:
        message = {"type": "reconnect", "version": 1, "stream": ready["stream"], "frame": FIRST}
        again.say(**message, media="jpeg", quality=100)
        end = again.rest()[-1]
    assert (end["reason"], end["frames"]) == ("the source video has ended", FIRST + 3 * CHUNK)
    assert list(again.pictures) == list(range(FIRST, FIRST + 3 * CHUNK))
    for index, picture in again.pictures.items():
        assert np.abs(read(picture) - read(whole.pictures[index])).mean() < 3, index


@pytest.mark.slow
def test_a_stream_outlives_its_worker(sharp_student: Path, tmp_path: Path, expected: list[np.ndarray]) -> None:
    with LocalServer(sharp_student, tmp_path, model={"min_workers": 2, "max_workers": 2}) as server:
        with server.viewer() as viewer:
            viewer.start()
            viewer.chunks(2)
            viewer.say(type="prompt", text=BLUE)
            shown = viewer.until("prompt")
            viewer.chunks(1)
            (worker,) = [worker for worker in server.workers() if server.here(worker)]
            server.loop.call_soon_threadsafe(server.hands.kill, worker)
            moved = viewer.until("moved")
            viewer.chunks(2)
        assert "killed by the test" in moved["reason"]
        indices = list(viewer.pictures)
        dropped = range(shown["frame"] - shown["flushed"], shown["frame"])
        assert indices == [index for index in range(indices[-1] + 1) if index not in dropped]
        check_pictures(viewer, expected[: dropped.start])
        student = Student.from_pretrained(sharp_student)
        with student.open(PROMPT, height=SIZE[0], width=SIZE[1]) as stream:
            frames: list[np.ndarray] = []
            for block in range(shown["block"] + 3):
                if block == shown["block"]:
                    stream.switch_prompt(BLUE)
                frames += list(stream.next_chunk())
        check_pictures(viewer, frames)
        assert figures(server)["reelway_streams_moved_total"] == 1


@pytest.mark.slow
def test_students_are_served_side_by_side_by_their_names(sharp_student: Path, tmp_path: Path) -> None:
    model = {"path": str(sharp_student), "size": SIZE, "threads": 1, "load": 1.0}
    models = {"small": model, "other": {**model, "size": (48, 32)}}
    with LocalServer(sharp_student, tmp_path, models=models) as server:
        server.wait_until(lambda: all(row["ready"] for row in server.ask(server.pool.models())))
        with server.viewer() as viewer:
            viewer.say(**START)
            (error,) = viewer.rest()
            assert error["code"] == "unknown_model"
            assert error["message"] == "model: must be one of small, other, got None"
        with server.viewer() as one, server.viewer() as two:
            assert [one.start(model="small")["height"], two.start(model="other")["height"]] == [SIZE[0], 48]
            one.chunks(1)
            two.chunks(1)
            rows = answer(server, "/v1/models")[1]["data"]
            assert [(row["id"], row["height"]) for row in rows] == [("small", SIZE[0]), ("other", 48)]
            status = answer(server, "/v1/status")[1]
            assert [status[name]["streams"] for name in models] == [1, 1]


@pytest.mark.slow
def test_who_has_no_place_waits_or_is_told(sharp_student: Path, tmp_path: Path) -> None:
    model = {"sessions": 1}
    with LocalServer(sharp_student, tmp_path, model=model, limits={"queue": 1}) as server, server.viewer() as first:
        first.start()
        with server.viewer() as second, server.viewer() as third:
            second.say(**START)
            assert second.until("queued")["position"] == 1
            third.say(**START)
            assert third.until("busy")["reason"]
            assert third.rest() == []
            assert third.code == 1013
            first.close()
            second.until("ready")
            second.chunks(1)


@pytest.mark.parametrize(
    ("limits", "words", "message"),
    [
        ({"idle_seconds": 0.3}, "idle: paused", {"type": "pause"}),
        ({"idle_seconds": 0.3}, "idle: nothing was seen", None),
        ({"session_seconds": 0.2}, "over-long", None),
    ],
)
def test_idle_and_over_long_streams_end_with_a_reason(
    server: LocalServer, limits: dict[str, Any], words: str, message: dict[str, Any] | None, monkeypatch: Any
) -> None:
    config = server.config.model_copy(update={"limits": server.config.limits.model_copy(update=limits)})
    monkeypatch.setattr(server.services, "config", config)
    with server.viewer() as viewer:
        viewer.attentive = False
        viewer.say(**START)
        if message:  # at once: later it might stand still already, for another reason
            viewer.say(**message)
        end = viewer.rest()[-1]
    assert end["type"] == "end"
    assert end["reason"].startswith(words)
    assert viewer.code == 1000


# --- What viewers do wrong -------------------------------------------------------------------------------------------

WRONG_FIRST = [
    ("nope", "bad_message"),
    (json.dumps({"type": "pause"}), "bad_message"),
    (b"\x00\x01", "bad_message"),
    (json.dumps(START | {"model": "other"}), "unknown_model"),
    (json.dumps(START | {"prompt": "x" * 3000}), "prompt_too_long"),
    (json.dumps(START | {"image": "***"}), "bad_media"),
    (json.dumps(START | {"image": base64.b64encode(b"no image").decode()}), "bad_media"),
    (json.dumps(START | {"source": {"video": base64.b64encode(b"no video").decode()}}), "bad_media"),
    (json.dumps(START | {"width": 40, "height": 32}), "bad_order"),
    (json.dumps(START | {"mode": "overlap", "source": {}}), "bad_order"),
    (json.dumps({"type": "reconnect", "version": 1, "stream": "guess", "frame": 0}), "unknown_stream"),
    (json.dumps(START) + " " * (12 << 20), "too_large"),
]


@pytest.mark.parametrize(("message", "code"), WRONG_FIRST, ids=range(len(WRONG_FIRST)))
def test_each_mistake_has_its_one_answer(server: LocalServer, message: str | bytes, code: str) -> None:
    with server.viewer() as viewer:
        viewer.socket.send(message)
        records = [record for record in viewer.rest() if record["type"] != "ready"]
    assert [(record["type"], record["code"]) for record in records] == [("error", code)]
    assert viewer.code == 1008
    assert "Traceback" not in records[0]["message"]
    server.wait_until(lambda: server.streams() == 0)


MESSAGES = st.one_of(
    st.text(max_size=40),
    st.binary(max_size=40),
    st.fixed_dictionaries(
        {"type": st.sampled_from(["start", "reconnect", "prompt", "pause", "seen", "stop", "nope"])},
        optional={
            "version": st.sampled_from([0, 2, "1", None]),
            "text": st.sampled_from(["", 5, None, []]),
            "frame": st.sampled_from([-1, "0", 1.5, None]),
            "more": st.just(1),
        },
    ).map(json.dumps),
)


def is_sound(message: str | bytes) -> bool:
    """Whether a running stream would obey it."""
    try:
        fields = json.loads(message) if isinstance(message, str) else None
    except ValueError:
        return False
    return fields in ({"type": "pause"}, {"type": "stop"})


def test_garbage_gets_one_answer_and_touches_no_other_stream(server: LocalServer, expected: list[np.ndarray]) -> None:
    with server.viewer() as watcher:
        watcher.start()

        @settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
        @given(MESSAGES, st.booleans())
        def throw(message: str | bytes, running: bool) -> None:
            if is_sound(message):
                return
            with server.viewer() as viewer:
                if running:
                    viewer.start()
                viewer.socket.send(message)
                answers = [record for record in viewer.rest() if record["type"] not in ("ready", "chunk")]
            assert [(record["type"], record["code"]) for record in answers] == [("error", "bad_message")], message
            assert viewer.code == 1008

        throw()
        watcher.chunks(2)
        assert list(watcher.pictures) == list(range(len(watcher.pictures)))
        check_pictures(watcher, expected)
    server.wait_until(lambda: server.streams() == 0)


def test_keys_guard_everything_but_health(sharp_student: Path, tmp_path: Path) -> None:
    (key, hashed), (other, other_hash) = make_key(), make_key()
    limits = {"sessions_per_key": 1}
    with LocalServer(sharp_student, tmp_path, keys=[hashed, other_hash], limits=limits) as server:
        for wrong in ({}, {"key": "rw-wrong"}, {"subprotocols": ("reelway.v1", "reelway.key.rw-wrong")}):
            with server.viewer(**wrong) as viewer:  # type: ignore[arg-type]
                assert [record["code"] for record in viewer.rest()] == ["wrong_key"]
                assert viewer.code == 1008
        with server.viewer(subprotocols=("reelway.v1", f"reelway.key.{key}")) as viewer:
            assert viewer.socket.subprotocol == "reelway.v1"
            ready = viewer.start()
            viewer.chunks(1)
            with server.viewer(key=key) as second:
                second.say(**START)
                assert [record["code"] for record in second.rest()] == ["too_many_sessions"]
            with server.viewer(key=other) as thief:  # another key's stream is one that does not exist
                thief.say(type="reconnect", version=1, stream=ready["stream"], frame=9)
                assert [record["code"] for record in thief.rest()] == ["unknown_stream"]
            viewer.chunks(1)
        for path, status in (("/v1/models", 401), ("/v1/videos", 401), ("/metrics", 401), ("/v1/status", 401)):
            assert answer(server, path)[0] == status
            assert answer(server, path, headers={"Authorization": f"Bearer {key}"})[0] == 200
        assert answer(server, "/healthz")[0] == answer(server, "/readyz")[0] == 200


# --- HTTP ------------------------------------------------------------------------------------------------------------


def answer(server: LocalServer, path: str, method: str = "GET", **named: Any) -> tuple[int, Any, Any]:
    """Status, body, headers."""
    connection = HTTPConnection("127.0.0.1", server.port, timeout=PATIENCE)
    connection.request(method, path, **named)
    response = connection.getresponse()
    body = response.read()
    headers = {name.lower(): value for name, value in response.getheaders()}
    is_json = headers.get("content-type", "").startswith("application/json")
    return response.status, json.loads(body) if is_json else body, headers


def test_health_models_and_status(server: LocalServer) -> None:
    assert answer(server, "/healthz")[:2] == (200, {"status": "ok"})
    assert answer(server, "/readyz")[:2] == (200, {"ready": True, "workers": {"small": 1}})
    (row,) = answer(server, "/v1/models")[1]["data"]
    assert (row["id"], row["object"], row["height"], row["width"]) == ("small", "model", *SIZE)
    status = answer(server, "/v1/status")[1]
    assert status["small"]["workers"][0]["state"] == "ready"


def test_figures_of_all_kinds_are_there(server: LocalServer) -> None:
    with server.viewer() as viewer:
        viewer.start()
        viewer.chunks(3)
        found = figures(server)
        assert found["reelway_sessions"] == 1
    for name in (
        *(f"reelway_chunk_gap {quantile}" for quantile in (0.5, 0.95, 0.99)),
        "reelway_deadline_attainment",
        "reelway_underruns_total",
        "reelway_sent_bytes_total",
        "reelway_queue small",
        "reelway_first_frame_seconds_count",
    ):
        assert name in found, name
    assert found["reelway_chunks_total"] >= 3
    assert 0 < found["reelway_chunk_gap 0.5"] <= found["reelway_chunk_gap 0.99"]


@pytest.mark.parametrize(
    ("path", "method", "status"),
    [("/v1/nothing", "GET", 404), ("/v1/videos/video_x", "GET", 404), ("/v1/models", "POST", 405)],
)
def test_errors_have_openais_form(server: LocalServer, path: str, method: str, status: int) -> None:
    found, body, _ = answer(server, path, method)
    assert found == status
    assert set(body["error"]) == {"message", "type", "param", "code"}


def test_a_fault_of_the_server_shows_no_trace(server: LocalServer, monkeypatch: Any, capfd: Any) -> None:
    async def broken() -> Any:
        raise RuntimeError("secret detail")

    monkeypatch.setattr(server.services.backend, "models", broken)
    status, body, _ = answer(server, "/v1/models")
    assert status == 500
    assert body["error"]["message"] == "the server failed"
    assert "secret" not in json.dumps(body)
    assert "secret detail" in capfd.readouterr().err


def test_other_sites_pages_are_kept_out(server: LocalServer) -> None:
    with server.viewer(headers={"Origin": "https://evil.example"}) as viewer:
        assert [record["code"] for record in viewer.rest()] == ["wrong_origin"]
    order = json.dumps({"prompt": "x"})
    named = {"body": order, "headers": {"Content-Type": "application/json", "Origin": "https://evil.example"}}
    assert answer(server, "/v1/videos", "POST", **named)[0] == 403
    # A name that its owner has resolved to this machine (DNS rebinding).
    assert answer(server, "/v1/models", headers={"Host": "evil.example:8000"})[0] == 403
    assert answer(server, "/v1/models", headers={"Host": "localhost"})[0] == 200
    with server.viewer(headers={"Origin": server.url}) as viewer:
        viewer.start()
    found, _, headers = answer(server, "/healthz", headers={"Origin": "https://evil.example"})
    assert found == 200
    assert "access-control-allow-origin" not in headers
    assert "default-src 'self'" in headers["content-security-policy"]
    assert headers["x-content-type-options"] == "nosniff"


def test_a_body_over_the_limit_is_refused_before_it_is_read(server: LocalServer) -> None:
    headers = {"Content-Type": "application/json", "Content-Length": str(1 << 40)}
    assert answer(server, "/v1/videos", "POST", headers=headers)[0] == 413


# --- Ray -------------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.ray
def test_a_server_on_ray_serve(
    ray_session: Session, sharp_student: Path, tmp_path: Path, expected: list[np.ndarray]
) -> None:
    import socket

    from ray import serve

    from reelway.pipelines.serve import app
    from reelway.pipelines.serve.config import ServeConfig
    from reelway.pipelines.serve.keys import Keyring

    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    model = {"path": str(sharp_student), "size": SIZE, "threads": 1, "load": 1.0, "cpus": 1}
    config = ServeConfig.model_validate(
        {"models": {"small": model}, "state": str(tmp_path), "port": port, "lead_seconds": 1e6}
    )
    key, hashed = make_key()
    remote = LocalServer.__new__(LocalServer)  # its client side only
    remote.port = port
    try:
        app.run(config, Keyring([hashed]))
        remote.wait_until(lambda: _is_ready(remote))
        with remote.viewer(key="rw-wrong") as viewer:
            assert [record["code"] for record in viewer.rest()] == ["wrong_key"]
        with remote.viewer(key=key) as viewer:
            viewer.start()
            viewer.chunks(2)
            viewer.say(type="prompt", text=BLUE)
            shown = viewer.until("prompt")
            viewer.chunks(1)
            viewer.say(type="stop")
            viewer.rest()
            assert viewer.code == 1000
        check_pictures(viewer, expected[: shown["frame"] - shown["flushed"]])
        assert figures(remote, key)["reelway_sessions_begun_total"] == 1
    finally:
        serve.shutdown()


def _is_ready(server: LocalServer) -> bool:
    try:
        return bool(urllib.request.urlopen(f"{server.url}/readyz", timeout=5).status == 200)
    except (HTTPError, OSError):
        return False
