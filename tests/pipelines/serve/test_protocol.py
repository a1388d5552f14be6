"""The messages: what is taken, what is refused, and the document that is made from them."""

import json
from pathlib import Path
from typing import Any, get_args

import pytest
from hypothesis import given
from hypothesis import strategies as st

from reelway.pipelines.serve import protocol
from reelway.pipelines.serve.protocol import BadMessage, ServerMessage, Start, read_base64, read_first, read_later

DOCUMENT = Path(__file__).parents[3] / "docs" / "protocol.md"
START: dict[str, Any] = {"type": "start", "version": 1, "prompt": "a red star"}
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=8,
)


def test_the_document_is_made_from_the_models() -> None:
    assert DOCUMENT.read_text() == protocol.document(), "run `reelway serve protocol > docs/protocol.md`"


def test_the_document_tells_every_field_and_every_code() -> None:
    text = protocol.document()
    for model in (*get_args(ServerMessage), Start, protocol.Reconnect, protocol.Source):
        for name in model.model_fields:
            assert f"`{name}`" in text or name == "type", f"{model.__name__}.{name}"
    assert all(f"| `{code}` |" in text for code in protocol.ERRORS)


def test_what_is_left_out_has_its_default() -> None:
    message = read_first(json.dumps(START))
    assert isinstance(message, Start)
    assert (message.seed, message.frame_rate, message.media, message.mode) == (0, 16.0, "mp4", "rolling")
    assert read_first(json.dumps(START | {"frame_rate": 24})).frame_rate == 24.0  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"version": 2}, "version: "),
        ({"prompt": "   "}, "prompt: "),
        ({"seed": "5"}, "seed: "),
        ({"seed": True}, "seed: "),
        ({"frame_rate": 1e9}, "frame_rate: "),
        ({"media": "gif"}, "media: "),
        ({"colour": "red"}, "colour: "),
        ({"source": {"noise": 0}}, "source.noise: "),
        ({"type": "begin"}, "message: "),
    ],
)
def test_a_wrong_field_is_named(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(BadMessage, match="^" + words) as caught:
        read_first(json.dumps(START | changes))
    assert caught.value.code == "bad_message"


@pytest.mark.parametrize("text", ["", "nope", "[]", "3", "{}", '{"type": "prompt", "text": "x"}', '{"type": "pause"}'])
def test_only_start_and_reconnect_come_first(text: str) -> None:
    with pytest.raises(BadMessage):
        read_first(text)


@given(JSON)
def test_anything_else_is_refused_in_one_short_line(content: Any) -> None:
    for read in (read_first, read_later):
        with pytest.raises(BadMessage) as caught:
            read(json.dumps(content))
        assert len(str(caught.value).splitlines()) == 1
        assert len(str(caught.value)) < 300


def test_a_refusal_does_not_repeat_an_upload() -> None:
    with pytest.raises(BadMessage) as caught:
        read_first(json.dumps(START | {"image": 7, "prompt": ["A" * 100_000]}))
    assert len(str(caught.value)) < 300


@given(st.sampled_from([0, 1, 2]), st.integers(0, 2**64 - 1), st.binary(max_size=100))
def test_a_binary_message_comes_back_as_it_was(kind: int, first: int, payload: bytes) -> None:
    message = protocol.pack(kind, first, payload)
    assert protocol.unpack(message) == (kind, first, payload)
    assert message[0] == kind
    assert int.from_bytes(message[1:9], "big") == first


@given(st.binary(max_size=50))
def test_base64_may_be_a_data_url(content: bytes) -> None:
    import base64

    text = base64.b64encode(content).decode()
    assert read_base64("image", text) == read_base64("image", f"data:image/png;base64,{text}") == content


def test_what_is_not_base64_is_refused() -> None:
    with pytest.raises(BadMessage, match="image: not base64"):
        read_base64("image", "***")
