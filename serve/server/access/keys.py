"""API keys from a file or an environment variable.

    KEY
    KEY name=search requests-per-minute=60 tokens-per-minute=100000
    KEY name=operations admin

A line of the file has a key, and may say more of it. Lines that are empty or begin with # say
nothing. Logs and metrics have the name of a key and never the key.
"""

import hashlib
import hmac
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from stu.common.errors import UserError

VARIABLE = "STU_API_KEYS"
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._@-]{0,63}")
COUNT = re.compile(r"[1-9][0-9]{0,14}")
OWNER_DIGITS = 32
SETTINGS = "name=NAME, requests-per-minute=COUNT, tokens-per-minute=COUNT and admin"


@dataclass(frozen=True)
class Key:
    """A valid API key."""

    name: str
    """Name in logs and metrics; `key N` for the Nth key if it has none."""
    digest: bytes
    is_admin: bool = False
    """Whether it may use /admin."""
    requests_per_minute: int | None = None
    """Limit of its requests. None: that of the server."""
    tokens_per_minute: int | None = None
    """Limit of its tokens. None: that of the server."""

    @property
    def owner(self) -> str:
        """Name under which files, batches and responses of the key are stored."""
        return self.digest.hex()[:OWNER_DIGITS]


class Keys:
    """The keys that are valid now. None if requests need no key.

    Args:
        path: File with the keys. None: they are in the environment variable, if that is set.

    Raises:
        UserError: A file or a variable without keys, both together, or a line that is not allowed.
        OSError: The file cannot be read.
    """

    def __init__(self, path: Path | None = None) -> None:
        self.path = path
        self._keys: Sequence[Key] = ()
        self.read()

    def __len__(self) -> int:
        return len(self._keys)

    def read(self) -> None:
        """Read the keys again. The old ones stay valid if that raises an error, as when made."""
        self._keys = _read(self.path)

    def of_owner(self, owner: str) -> Key | None:
        """Return the key with this `owner`, if it is still valid."""
        return next((key for key in self._keys if key.owner == owner), None)

    def find(self, header: bytes) -> Key | None:
        """Return the key in an Authorization header, if it is valid."""
        scheme, _, value = header.partition(b" ")
        digest = hashlib.sha256(value.strip()).digest()
        # Each in constant time, and all of them.
        matches = [hmac.compare_digest(digest, key.digest) for key in self._keys]
        if scheme.lower() != b"bearer" or not any(matches):
            return None
        return self._keys[matches.index(True)]


def _read(path: Path | None) -> Sequence[Key]:
    variable = os.environ.get(VARIABLE)
    if path is None:
        return () if variable is None else _from_variable(variable)
    if variable is not None:
        raise UserError(
            "api_keys",
            message=f"--api-keys {path} and the environment variable {VARIABLE} are both set: "
            "unset one of them",
        )
    keys: list[Key] = []
    known: dict[bytes | str, int] = {}
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except UnicodeDecodeError as error:
        raise UserError("api_keys", message=f"--api-keys {path}: no UTF-8: {error}") from error
    for number, line in enumerate(lines, 1):
        words = line.split()
        if words and not words[0].startswith("#"):
            # No error quotes a word, as any of them may be a key.
            place = f"--api-keys {path}: line {number}"
            keys.append(_settled(_key(place, words[0], len(keys) + 1), place, words[1:]))
            _require_new(place, keys[-1], known)
    if not keys:
        raise UserError(
            "api_keys", message=f"--api-keys {path}: has no key; write one on each line"
        )
    return keys


def _from_variable(variable: str) -> Sequence[Key]:
    values = [value.strip() for value in variable.split(",") if value.strip()]
    if not values:
        raise UserError(
            VARIABLE,
            message=f"the environment variable {VARIABLE} is set and has no key: give keys "
            "separated by commas, or unset it to serve everyone without a key",
        )
    return [_key(VARIABLE, value, number) for number, value in enumerate(values, 1)]


def _key(place: str, value: str, number: int) -> Key:
    if not value.isascii() or not value.isprintable() or " " in value or "," in value:
        raise UserError(
            "api_keys",
            message=f"{place}: an API key has a space, a comma, or a character beyond printable "
            f"ASCII: change it, and put each key on a line of a file, or commas between keys in "
            f"{VARIABLE}",
        )
    return Key(f"key {number}", hashlib.sha256(value.encode()).digest())


def _settled(key: Key, place: str, words: Sequence[str]) -> Key:
    """Return a key with what the words after it say."""
    for word in words:
        name, equals, value = word.partition("=")
        if name == "name" and NAME.fullmatch(value):
            key = replace(key, name=value)
        elif name == "requests-per-minute" and COUNT.fullmatch(value):
            key = replace(key, requests_per_minute=int(value))
        elif name == "tokens-per-minute" and COUNT.fullmatch(value):
            key = replace(key, tokens_per_minute=int(value))
        elif name == "admin" and not equals:
            key = replace(key, is_admin=True)
        else:
            raise UserError(
                "api_keys",
                message=f"{place}: what follows the key is not allowed: it must be some of "
                f"{SETTINGS}, with spaces between, a NAME of up to 64 letters, digits and ._@-, "
                "and a COUNT of at least 1",
            )
    return key


def _require_new(place: str, key: Key, known: dict[bytes | str, int]) -> None:
    """Raise UserError if an earlier key has the same digest or name. Else add both to `known`, with
    the key's number."""
    number = len(known) // 2 + 1
    for what, value in (("key", key.digest), ("name", key.name)):
        if (other := known.setdefault(value, number)) != number:
            message = f"{place}: has the {what} of key {other} again; change or remove it"
            raise UserError("api_keys", message=message)
