"""The videos API, asked by OpenAI's own client, and by a client that knows nothing but its schema."""

import asyncio
import io
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
from hypothesis import HealthCheck, Phase, given, settings
from PIL import Image

from reelway.pipelines.serve import videos as videos_module
from reelway.pipelines.serve.keys import make_key
from reelway.pipelines.serve.videos import FRAME_RATE

sys.path.insert(0, str(Path(__file__).parent))
from serving import PATIENCE, PROMPT, LocalServer

openai = pytest.importorskip("openai")
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")


@pytest.fixture(scope="module")
def keys() -> list[tuple[str, str]]:
    return [make_key(), make_key()]


@pytest.fixture(scope="module")
def server(
    sharp_student: Path, tmp_path_factory: pytest.TempPathFactory, keys: list[tuple[str, str]]
) -> Iterator[LocalServer]:
    folder, hashes = tmp_path_factory.mktemp("state"), [hashed for _, hashed in keys]
    with LocalServer(sharp_student, folder, keys=hashes, limits={"video_seconds": 4, "videos_per_key": 2}) as server:
        yield server


def client(server: LocalServer, key: str) -> Any:
    return openai.OpenAI(api_key=key, base_url=f"{server.url}/v1", max_retries=0, timeout=PATIENCE)


def finished(asking: Any, video: str) -> Any:
    """Wait for a video as the package's own `poll` does, but not for ever."""
    until = time.monotonic() + PATIENCE
    while (found := asking.videos.retrieve(video)).status in ("queued", "in_progress"):
        assert time.monotonic() < until, found
        time.sleep(0.05)
    return found


def frames_of(content: bytes) -> list[np.ndarray]:
    with av.open(io.BytesIO(content)) as container:
        return [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]


def test_openais_client_orders_a_video(server: LocalServer, keys: list[tuple[str, str]]) -> None:
    asking = client(server, keys[0][0])
    ordered = asking.videos.create(prompt=PROMPT, seconds="1", size="32x48", model="small")
    assert ordered.status in ("queued", "in_progress")
    video = finished(asking, ordered.id)
    assert (video.status, video.progress, video.error) == ("completed", 100, None)
    assert (video.model, video.size, video.seconds, video.prompt) == ("small", "32x48", "1", PROMPT)
    assert video.created_at <= video.completed_at < video.expires_at
    content = asking.videos.download_content(ordered.id).read()
    assert content.index(b"moov") < content.index(b"mdat")  # plays before it is whole
    frames = frames_of(content)
    assert len(frames) == FRAME_RATE
    assert frames[0].shape == (48, 32, 3)
    assert [row.id for row in asking.videos.list(limit=1)] == [ordered.id]
    # Another key sees nothing of it.
    other = client(server, keys[1][0])
    assert list(other.videos.list()) == []
    with pytest.raises(openai.NotFoundError):
        other.videos.retrieve(ordered.id)
    with pytest.raises(openai.NotFoundError):
        other.videos.delete(ordered.id)
    deleted = asking.videos.delete(ordered.id)
    assert (deleted.deleted, deleted.object) == (True, "video.deleted")
    with pytest.raises(openai.NotFoundError):
        asking.videos.download_content(ordered.id)


def test_an_image_begins_the_video_and_pages_follow_each_other(
    server: LocalServer, keys: list[tuple[str, str]]
) -> None:
    asking = client(server, keys[0][0])
    picture = np.zeros((40, 40, 3), np.uint8)
    picture[:, 20:] = 220
    file = io.BytesIO()
    Image.fromarray(picture).save(file, "PNG")
    made = []
    for _ in range(2):
        reference = ("start.png", file.getvalue(), "image/png")
        made.append(asking.videos.create(prompt=PROMPT, seconds="0.5", size="32x32", input_reference=reference))
    for video in made:
        assert finished(asking, video.id).status == "completed"
    first = frames_of(asking.videos.download_content(made[0].id).read())[0].astype(int)
    assert first[:, 18:].mean() > first[:, :14].mean() + 60
    page = asking.videos.list(limit=1)
    assert len(page.data) == 1
    assert page.has_more
    assert {row.id for row in asking.videos.list(limit=1)} == {video.id for video in made}  # page after page
    for video in made:
        asking.videos.delete(video.id)


@pytest.mark.parametrize(
    ("changes", "kind", "words"),
    [
        ({"model": "sora-2"}, "NotFoundError", "model: must be one of small"),
        ({"seconds": "400"}, "BadRequestError", "seconds: must lie in"),
        ({"seconds": "nan"}, "BadRequestError", "seconds: must lie in"),
        ({"size": "big"}, "BadRequestError", "size: must be WIDTHxHEIGHT"),
        ({"prompt": "x" * 5000}, "BadRequestError", "prompt: at most"),
        ({"input_reference": ("x.png", b"no image", "image/png")}, "BadRequestError", "not a JPEG, PNG or WebP"),
        ({"extra_body": {"colour": "red"}}, "BadRequestError", "colour"),
    ],
)
def test_a_wrong_order_is_told_in_openais_form(
    server: LocalServer, keys: list[tuple[str, str]], changes: dict[str, Any], kind: str, words: str
) -> None:
    with pytest.raises(getattr(openai, kind), match=words):
        client(server, keys[0][0]).videos.create(**{"prompt": PROMPT, "size": "32x32"} | changes)


def test_a_size_that_the_model_cannot_make_fails_with_the_reason(
    server: LocalServer, keys: list[tuple[str, str]]
) -> None:
    asking = client(server, keys[0][0])
    video = finished(asking, asking.videos.create(prompt=PROMPT, seconds="1", size="40x32").id)
    assert video.status == "failed"
    assert video.error.code == "invalid_order"
    assert "multiple of 16" in video.error.message
    asking.videos.delete(video.id)


def test_a_wrong_key_is_refused(server: LocalServer) -> None:
    with pytest.raises(openai.AuthenticationError):
        client(server, "rw-wrong").videos.list()


@pytest.mark.slow
def test_another_gateway_goes_on_with_a_job(
    sharp_student: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(videos_module, "ABANDONED", 0.0)
    with LocalServer(sharp_student, tmp_path, model={"sessions": 1}) as server, server.viewer() as viewer:
        viewer.start()  # the only place is taken: the job cannot begin before the server ends
        asking = client(server, "any")
        ordered = asking.videos.create(prompt=PROMPT, seconds="0.5", size="32x32")
        assert asking.videos.retrieve(ordered.id).status == "queued"
    with LocalServer(sharp_student, tmp_path) as again:
        video = finished(client(again, "any"), ordered.id)
        assert video.status == "completed"
        assert len(frames_of(client(again, "any").videos.download_content(ordered.id).read())) == FRAME_RATE // 2


@pytest.mark.slow
def test_the_schema_holds_for_any_request(server: LocalServer, keys: list[tuple[str, str]]) -> None:
    schemathesis = pytest.importorskip("schemathesis")
    schema = schemathesis.openapi.from_url(f"{server.url}/openapi.json")
    checked = []
    for result in schema.get_all_operations():
        operation = result.ok()

        @settings(
            max_examples=12,
            deadline=None,
            derandomize=True,
            phases=[Phase.generate],
            suppress_health_check=list(HealthCheck),
        )
        @given(operation.as_strategy())
        def ask(case: Any) -> None:
            response = case.call(headers={"Authorization": f"Bearer {keys[1][0]}"}, timeout=PATIENCE)
            assert response.status_code < 500, response.text
            case.validate_response(response, excluded_checks=_not_ours(schemathesis))

        ask()
        checked.append(operation.label)
    assert len(checked) >= 9
    asyncio.run(_forget_all(server, keys[1][0]))


def _not_ours(schemathesis: Any) -> list[Any]:
    """A request that the schema allows may still be refused: no such video, no such model."""
    checks = schemathesis.checks
    return [checks.positive_data_acceptance, checks.negative_data_rejection, checks.unsupported_method]


async def _forget_all(server: LocalServer, key: str) -> None:
    asking = client(server, key)
    for video in list(asking.videos.list()):
        asking.videos.delete(video.id)
    until = time.monotonic() + PATIENCE
    while server.streams() and time.monotonic() < until:
        await asyncio.sleep(0.05)
