"""API keys. The server knows their hashes only: a file or an environment that leaks gives no access."""

import hashlib
import hmac
import os
import re
import secrets
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Final

VARIABLE: Final = "REELWAY_API_KEYS"
PREFIX: Final = "rw-"
ANYBODY: Final = ""  # the owner where there are no keys
_HASH: Final = re.compile(r"[0-9a-f]{64}")


def make_key() -> tuple[str, str]:
    """A new key with 256 random bits, and its hash. The key is fit for a WebSocket subprotocol (RFC 7230 token)."""
    key = PREFIX + secrets.token_urlsafe(32)
    return key, hash_of(key)


def hash_of(key: str) -> str:
    """sha256 in hexadecimal digits. A key is random, so it needs no salt and no slow hash."""
    return hashlib.sha256(key.encode()).hexdigest()


class Keyring:
    """The keys that are let in; with none, everybody is."""

    def __init__(self, hashes: Iterable[str] = ()) -> None:
        self._hashes = tuple(hashes)

    def __len__(self) -> int:
        return len(self._hashes)

    @property
    def hashes(self) -> tuple[str, ...]:
        return self._hashes

    def owner(self, key: str | None) -> str | None:
        """Whose key it is, as a name that is no secret; None where it is not known.

        Takes the same time for every key: each known one is compared, in constant time.
        """
        if not self._hashes:
            return ANYBODY
        given = hash_of(key or "")
        same = [hmac.compare_digest(given, known) for known in self._hashes]
        return given[:16] if any(same) else None


def read_keys(path: str | None, environment: Mapping[str, str] = os.environ) -> Keyring:
    """The hashes in a file, one per line (what follows `#` is for the reader), and in REELWAY_API_KEYS, with commas.

    FileNotFoundError, or ValueError that names the line.
    """
    found: list[str] = []
    if path is not None:
        if not Path(path).is_file():
            raise FileNotFoundError(f"keys: {path}: no such file")
        lines = Path(path).read_text().splitlines()
        found += _hashes((f"{path}, line {number}", line.partition("#")[0]) for number, line in enumerate(lines, 1))
        if not found:
            raise ValueError(f"keys: {path}: has no key; make one with `reelway serve key`")
    found += _hashes((VARIABLE, part) for part in environment.get(VARIABLE, "").split(","))
    return Keyring(dict.fromkeys(found))


def _hashes(lines: Iterable[tuple[str, str]]) -> list[str]:
    found = []
    for where, text in lines:
        text = text.strip()
        if text and not _HASH.fullmatch(text):  # the text is not shown: it may be a key
            raise ValueError(f"keys: {where}: must be a key's sha256, 64 hexadecimal digits, as `serve key` prints it")
        found += [text] if text else []
    return found
