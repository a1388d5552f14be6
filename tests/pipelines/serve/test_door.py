"""HTTP without any stream: who may ask, how often, and what the answers look like."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from starlette.testclient import TestClient

from reelway.pipelines.serve.gateway import create_app
from reelway.pipelines.serve.metrics import Metrics

from .played import PlayedBackend, services_on

OURS, EVIL = "https://studio.example", "https://evil.example"
OPERATORS_PAGE = Path(__file__).parents[3] / "docs" / "serving.md"


@contextmanager
def gateway(folder: Path, **changes: Any) -> Iterator[TestClient]:
    with TestClient(create_app(services_on(PlayedBackend(), folder, **changes)), "http://127.0.0.1:8000") as client:
        yield client


def test_pages_of_other_sites_are_let_in_where_they_are_named(tmp_path: Path) -> None:
    with gateway(tmp_path, cors=(OURS,)) as client:
        asks = {"Origin": OURS, "Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "x"}
        allowed = client.options("/v1/videos", headers=asks)
        assert (allowed.status_code, allowed.headers["access-control-allow-origin"]) == (200, OURS)
        assert client.get("/v1/models", headers={"Origin": OURS}).headers["access-control-allow-origin"] == OURS
        assert client.post("/v1/videos", json={"prompt": "x"}, headers={"Origin": OURS}).status_code == 200
        assert client.post("/v1/videos", json={"prompt": "x"}, headers={"Origin": EVIL}).status_code == 403
        assert "access-control-allow-origin" not in client.get("/v1/models", headers={"Origin": EVIL}).headers


def test_pages_of_other_sites_are_kept_out_by_default(tmp_path: Path) -> None:
    with gateway(tmp_path) as client:
        asks = {"Origin": OURS, "Access-Control-Request-Method": "POST"}
        assert "access-control-allow-origin" not in client.options("/v1/videos", headers=asks).headers
        assert client.post("/v1/videos", json={"prompt": "x"}, headers={"Origin": OURS}).status_code == 403


def test_who_asks_too_often_is_told_when_to_come_back(tmp_path: Path) -> None:
    with gateway(tmp_path, limits={"requests_per_minute": 2}) as client:
        answers = [client.post("/v1/videos", json={"prompt": "x"}) for _ in range(3)]
        assert [answer.status_code for answer in answers] == [200, 200, 429]
        error = answers[-1].json()["error"]
        assert (error["type"], error["code"]) == ("rate_limit_error", "too_many_requests")
        assert int(answers[-1].headers["retry-after"]) > 0


@pytest.mark.parametrize(
    ("body", "kind", "status"),
    [
        (b"{", "application/json", 400),
        (b"[" * 100_000, "application/json", 400),
        (b"prompt=x", "application/x-www-form-urlencoded", 415),
        (b'{"prompt": "x", "input_reference": {"image_url": "http://127.0.0.1/secret"}}', "application/json", 400),
    ],
)
def test_a_broken_body_is_an_error_in_openais_form(tmp_path: Path, body: bytes, kind: str, status: int) -> None:
    with gateway(tmp_path) as client:
        answer = client.post("/v1/videos", content=body, headers={"Content-Type": kind})
    assert answer.status_code == status
    assert set(answer.json()["error"]) == {"message", "type", "param", "code"}


def test_every_figure_is_explained_to_the_operator() -> None:
    text = OPERATORS_PAGE.read_text()
    families = [family.name for family in Metrics("test").registry.collect()]
    names = [name.removeprefix("reelway") for name in families if not name.endswith("_created")]
    assert len(names) > 20
    assert [name for name in names if f"`reelway{name}" not in text and f"`{name}" not in text] == []
