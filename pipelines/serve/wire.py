"""A viewer's socket: records and media go out in order, messages come in within limits, and it closes once."""

import asyncio
from typing import Final

from fastapi import WebSocket, WebSocketDisconnect

from .limits import Limits
from .media import Part
from .metrics import Metrics
from .protocol import NORMAL, REFUSED, BadMessage, Error, Message, pack

BASE64: Final = 4 / 3
OVERHEAD: Final = 16_384  # of a message's other fields


class Left(Exception):
    """The viewer is gone."""


class Over(Exception):
    """The socket is to close. record: what is said before; how: for the metrics. ended: the stream is over for good."""

    def __init__(self, record: Message, code: int = NORMAL, *, how: str, ended: bool = False) -> None:
        super().__init__(how)
        self.record, self.code, self.how, self.ended = record, code, how, ended


class Socket:
    """May be used by several tasks."""

    def __init__(self, websocket: WebSocket, limits: Limits, metrics: Metrics) -> None:
        self._websocket, self._limits, self._metrics = websocket, limits, metrics
        self._sending = asyncio.Lock()

    async def receive(self) -> str | bytes:
        """The next message. Left, or BadMessage where it is too large."""
        message = await self._websocket.receive()
        if message["type"] == "websocket.disconnect":
            raise Left
        binary, text = message.get("bytes"), message.get("text")
        if binary is not None:
            self._metrics.received_bytes.inc(len(binary))
            self._limits.check_size("message", len(binary))
            return bytes(binary)
        assert text is not None
        self._metrics.received_bytes.inc(len(text))
        most = int(self._limits.config.upload_bytes * BASE64) + OVERHEAD
        if len(text) > most:
            raise BadMessage("too_large", f"message: at most {most} characters, got {len(text)}")
        return str(text)

    async def send(self, record: Message) -> None:
        await self._send("text", record.model_dump_json())

    async def send_media(self, part: Part) -> int:
        """Returns its bytes."""
        message = pack(part.kind, part.first, part.payload)
        await self._send("bytes", message)
        self._metrics.sent_bytes.inc(len(message))
        return len(message)

    async def refuse(self, error: BadMessage, recoverable: bool = False) -> None:
        self._metrics.refused.inc(error.code)
        await self.send(Error(code=error.code, message=str(error), recoverable=recoverable))

    async def finish(self, record: Message | BadMessage, code: int) -> None:
        """The last word, and the close. A viewer that has left meanwhile is no error."""
        try:
            await (self.refuse(record) if isinstance(record, BadMessage) else self.send(record))
            async with self._sending:
                await self._websocket.close(code)
        except Left:
            return

    async def reject(self, error: BadMessage) -> None:
        await self.finish(error, REFUSED)

    async def _send(self, kind: str, content: str | bytes) -> None:
        try:
            async with self._sending:
                await self._websocket.send({"type": "websocket.send", kind: content})
        except (WebSocketDisconnect, RuntimeError) as error:  # RuntimeError: a close was sent or received before
            raise Left from error
