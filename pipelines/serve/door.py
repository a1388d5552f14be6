"""What every request passes first: where it comes from, how large it is; and what every answer carries."""

import json
from collections.abc import Callable, Sequence
from typing import Any, Final
from urllib.parse import urlsplit

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from .config import is_loopback
from .protocol import KEY_PREFIX, REFUSED, SUBPROTOCOL, BadMessage, Error
from .wire import BASE64, OVERHEAD

SAFE_METHODS: Final = ("GET", "HEAD", "OPTIONS")
HEADERS: Final = {
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Content-Security-Policy": (
        "default-src 'self'; img-src 'self' blob: data:; media-src 'self' blob:; connect-src 'self' ws: wss: blob:; "
        "object-src 'none'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
}

# Status and OpenAI's type of each code.
STATUS: Final = {
    "wrong_key": (401, "authentication_error"),
    "wrong_origin": (403, "permission_error"),
    "unknown_model": (404, "invalid_request_error"),
    "unknown_stream": (404, "invalid_request_error"),
    "not_now": (409, "invalid_request_error"),
    "too_large": (413, "invalid_request_error"),
    "too_many_sessions": (429, "rate_limit_error"),
    "too_many_requests": (429, "rate_limit_error"),
    "failed": (503, "server_error"),
}


def status_of(code: str) -> tuple[int, str]:
    """HTTP status and OpenAI's type of error."""
    return STATUS.get(code, (400, "invalid_request_error"))


def error_body(message: str, kind: str, code: str | None, param: str | None = None) -> dict[str, Any]:
    """An error in OpenAI's form."""
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


def bearer(headers: Headers) -> str | None:
    """The key of an Authorization header."""
    scheme, _, key = headers.get("authorization", "").partition(" ")
    return key.strip() if scheme.lower() == "bearer" else None


def socket_key(headers: Headers, subprotocols: Sequence[str]) -> str | None:
    """A WebSocket's key: browsers can set no header, so it may be a subprotocol."""
    offered = [name.removeprefix(KEY_PREFIX) for name in subprotocols if name.startswith(KEY_PREFIX)]
    return bearer(headers) or (offered[0] if offered else None)


class Door:
    """ASGI. Refuses what a page of another site sent, and, on a server without keys, any name but loopback's: a page
    could have its own name resolved to this machine.
    """

    def __init__(self, app: ASGIApp, origins: Sequence[str], has_keys: Callable[[], bool], upload_bytes: int) -> None:
        self._app, self._origins, self._has_keys = app, origins, has_keys
        self._most = int(upload_bytes * BASE64) + OVERHEAD

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] not in ("http", "websocket"):
            await self._app(scope, receive, send)
            return
        refusal = self._refusal(scope)
        if scope["type"] == "websocket":
            await (
                self._app(scope, receive, send) if refusal is None else _refuse_socket(refusal, scope, receive, send)
            )
            return
        answer = _with_headers(send)
        if refusal is not None:
            await _refuse(refusal, answer)
        else:
            await self._app(scope, self._limited(scope, receive), answer)

    def _refusal(self, scope: Scope) -> BadMessage | None:
        headers = Headers(scope=scope)
        host, origin = headers.get("host", ""), headers.get("origin")
        if not self._has_keys() and not is_loopback(_name(host)):
            return BadMessage(
                "wrong_origin", f"host: a server without keys answers on loopback only, not as {host!r:.80}"
            )
        changes = scope["type"] == "websocket" or scope["method"] not in SAFE_METHODS
        if changes and origin is not None and urlsplit(origin).netloc != host and origin not in self._origins:
            return BadMessage("wrong_origin", f"origin: pages of {origin!r:.80} may not use this server")
        size = headers.get("content-length", "0")
        if not size.isdigit() or int(size[:18]) > self._most:
            return BadMessage("too_large", f"request: at most {self._most} bytes, got {size:.20}")
        return None

    def _limited(self, scope: Scope, receive: Receive) -> Receive:
        """A body that comes in pieces is counted as it comes."""
        seen = 0

        async def counted() -> Message:
            nonlocal seen
            message = await receive()
            seen += len(message.get("body", b""))
            if seen > self._most:
                raise BadMessage("too_large", f"request: at most {self._most} bytes, got more")
            return message

        return counted


def _name(host: str) -> str:
    """The host of a Host header, without its port."""
    try:
        return urlsplit(f"//{host}").hostname or ""
    except ValueError:
        return ""


def _with_headers(send: Send) -> Send:
    async def sending(message: Message) -> None:
        if message["type"] == "http.response.start":
            headers = MutableHeaders(scope=message)
            for name, value in HEADERS.items():
                headers.setdefault(name, value)
        await send(message)

    return sending


async def _refuse(refusal: BadMessage, send: Send) -> None:
    status, kind = status_of(refusal.code)
    body = json.dumps(error_body(str(refusal), kind, refusal.code)).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})


async def _refuse_socket(refusal: BadMessage, scope: Scope, receive: Receive, send: Send) -> None:
    await receive()  # websocket.connect
    subprotocol = SUBPROTOCOL if SUBPROTOCOL in scope["subprotocols"] else None
    await send({"type": "websocket.accept", "subprotocol": subprotocol})
    record = Error(code=refusal.code, message=str(refusal))
    await send({"type": "websocket.send", "text": record.model_dump_json()})
    await send({"type": "websocket.close", "code": REFUSED})
