"""Reads the calls of tools in an answer while it is written.

The answer follows a grammar of `serve.sampling.tool_grammar`, so that each mark is where it is
expected; it may end anywhere, if it is cut off.
"""

from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from typing import Literal

from serve.request import Request
from serve.sampling.tool_grammar import (
    BEFORE_ARGUMENTS,
    BEFORE_NAME,
    BEGIN,
    END,
    may_follow_text,
)

Kind = Literal["text", "call", "arguments", "end"]


@dataclass(frozen=True)
class Part:
    """A part of an answer.

    A call is a `call` with the name of the tool, `arguments` piece by piece, and an `end`.
    """

    kind: Kind
    text: str = ""


class CallReader:
    """Divides an answer into text and calls.

    follows_text: Whether calls may follow text. If not, an answer is either.
    """

    def __init__(self, follows_text: bool = True) -> None:
        self._follows_text = follows_text
        self._place: Literal["text", "only_text", "name", "arguments", "between"] = "text"
        self._rest = ""
        self.num_ended = 0
        """Number of calls that are complete."""

    @property
    def has_open_call(self) -> bool:
        """Whether the arguments of the last call are not complete."""
        return self._place == "arguments"

    def read(self, text: str, is_last: bool) -> list[Part]:
        """Return the parts that are certain once `text` is appended, empty ones left out.

        Text that may be the beginning of a mark is kept back, and white space that a call may
        follow, which belongs to neither.
        """
        self._rest += text
        parts = list(self._parts())
        if is_last and self._place in ("text", "only_text"):
            parts.append(Part("text", self._taken(len(self._rest))))
        return [part for part in parts if part.text or part.kind == "end"]

    def _parts(self) -> Iterator[Part]:
        while True:
            if self._place == "text" and not self._follows_text:
                if self._rest.startswith(BEGIN[: len(self._rest)]):
                    if len(self._rest) < len(BEGIN):
                        return
                else:
                    self._place = "only_text"
            if self._place == "only_text":
                yield Part("text", self._taken(len(self._rest)))
                return
            if self._place in ("text", "between"):
                at = self._rest.find(BEGIN)
                is_text = self._place == "text"
                end = at if at >= 0 else len(self._rest) - _num_begun(self._rest, BEGIN)
                text = self._taken(len(self._rest[:end].rstrip()))
                if is_text:
                    yield Part("text", text)
                if at < 0:
                    return
                self._taken(self._rest.index(BEGIN) + len(BEGIN))
                self._place = "name"
            elif self._place == "name":
                at = self._rest.find(BEFORE_ARGUMENTS)
                if at < 0:
                    return
                name = self._taken(at).removeprefix(BEFORE_NAME)
                self._taken(len(BEFORE_ARGUMENTS))
                self._place = "arguments"
                yield Part("call", name)
            else:
                at = self._rest.find(END)
                end = at if at >= 0 else len(self._rest) - _num_begun(self._rest, END)
                yield Part("arguments", self._taken(end))
                if at < 0:
                    return
                self._taken(len(END))
                self._place = "between"
                self.num_ended += 1
                yield Part("end")

    def _taken(self, count: int) -> str:
        taken, self._rest = self._rest[:count], self._rest[count:]
        return taken


def call_reader(request: Request) -> CallReader | None:
    """Return the reader of a request's answer, or None if it may call no tools."""
    constraint = request.sampling.constraint
    if constraint is None or constraint.kind != "tools":
        return None
    return CallReader(may_follow_text(constraint.source))


def call_id(prompt_token_ids: Sequence[int], seed: int, index: int) -> str:
    """Return the id of a call: the same whenever its answer is generated anew, and different from
    those of other turns of the conversation."""
    digest = blake2b(array("q", prompt_token_ids).tobytes(), digest_size=12)
    digest.update(f"{seed} {index}".encode())
    return f"call_{digest.hexdigest()}"


def _num_begun(text: str, mark: str) -> int:
    """Return how many characters at the end of `text` begin `mark`."""
    longest = min(len(text), len(mark) - 1)
    return next(count for count in range(longest, -1, -1) if text.endswith(mark[:count]))
