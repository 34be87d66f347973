"""Bytes of the tokens of a tokenizer.json, by its decoder.

Text is streamed token by token, so only decoders are supported in which the bytes of a token do not
depend on the tokens around it.
"""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from stu.common.errors import UserError

BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")
KEPT = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
"""Bytes that byte-level tokens write as the character of that number, and the others, in order, as
those from U+0100 on."""
OTHERS = [byte for byte in range(256) if byte not in KEPT]
BYTE_OF = {chr(byte): byte for byte in KEPT} | {chr(256 + i): byte for i, byte in enumerate(OTHERS)}
SUPPORTED = (
    "ByteLevel, or, in this order, Replace or Metaspace, ByteFallback, Fuse, and then Strip of one "
    "space at the start"
)


class TokenDecoder(NamedTuple):
    """The decoder of a tokenizer."""

    bytes_of: Callable[[str], bytes]
    """Returns the bytes of a token."""
    has_bytes: bool = False
    """Whether tokens such as `<0x0A>` stand for a byte."""
    strips_space: bool = False
    """Whether a space at the beginning of a text is left out, as encoding puts one there."""


def token_decoder(decoder: Any, path: Path) -> TokenDecoder:
    """Return the decoder that a tokenizer.json describes. Raises UserError if it is not supported.

    decoder: Value of `decoder` in the file `path`.
    """
    steps = [decoder] if isinstance(decoder, dict) else []
    if steps and decoder.get("type") == "Sequence":
        steps = decoder.get("decoders", [])
    kinds = [step.get("type") for step in steps]
    if kinds == ["ByteLevel"]:
        return TokenDecoder(_byte_level)
    marks: list[tuple[str, str]] = []
    strips_space = has_bytes = is_fused = False
    for step in steps:
        kind = step["type"]
        is_of_tokens = not (has_bytes or is_fused)  # not of bytes, nor of the whole text
        if kind == "Replace" and "String" in step["pattern"] and is_of_tokens:
            marks.append((step["pattern"]["String"], step["content"]))
        elif kind == "Metaspace" and is_of_tokens:
            marks.append((step["replacement"], " "))
            strips_space |= step.get("prepend_scheme", "always") != "never"
        elif kind == "ByteFallback" and not is_fused:
            has_bytes = True
        elif kind == "Fuse":
            is_fused = True
        elif kind == "Strip" and is_fused and not strips_space and _is_of_one_space(step):
            strips_space = True
        else:
            marks = []
            break
    if not marks:
        found = ", ".join(map(str, kinds)) or "none"
        raise UserError(
            message=f"tokenizer {path}: its decoder ({found}) is not supported: {SUPPORTED} are"
        )

    def bytes_of(token: str) -> bytes:
        for mark, text in marks:
            token = token.replace(mark, text)
        if has_bytes and (byte := BYTE_TOKEN.fullmatch(token)):
            return bytes([int(byte[1], 16)])
        return token.encode()

    return TokenDecoder(bytes_of, has_bytes, strips_space)


def _is_of_one_space(step: dict[str, Any]) -> bool:
    return (step["content"], step["start"], step["stop"]) == (" ", 1, 0)


def _byte_level(token: str) -> bytes:
    try:
        return bytes([BYTE_OF[character] for character in token])
    except KeyError:  # not written in this way
        return token.encode()
