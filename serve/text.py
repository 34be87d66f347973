"""From tokens to text while they come: whole characters only, and nothing of a stop string."""

from collections.abc import Sequence

from stu.tokenizer import Tokenizer

BROKEN = "\ufffd"
MOST_BYTES = 4
"""Of a UTF-8 character: more broken bytes than that will not become one."""


class TextStream:
    """The completion of one prompt. All that `append` and `finish` return, joined, is its text, cut
    before the first of `stop_strings` in it.

    Raises ValueError for a stop string that is empty.
    """

    def __init__(
        self, tokenizer: Tokenizer, prompt: Sequence[int], stop_strings: Sequence[str] = ()
    ) -> None:
        for stop in stop_strings:
            if not isinstance(stop, str) or not stop:
                raise ValueError(
                    f"stop_strings has {stop!r}: each must be a text of a character or more"
                )
        self._tokenizer, self._stop_strings = tokenizer, tuple(stop_strings)
        # Decoded with some tokens before: some tokenizers drop the first space of a text.
        self._before = list(prompt[-MOST_BYTES:])
        self._tokens: list[int] = []
        """Whose text is not complete yet."""
        self._held = ""
        """Text that may be the beginning of a stop string."""
        self.stopped = False
        """A stop string has come: no text is to follow."""

    def append(self, token: int) -> str:
        """The text that is certain now that `token` has come."""
        self._tokens.append(token)
        text = self._new_text()
        if text.endswith(BROKEN) and len(self._tokens) < MOST_BYTES:
            return ""
        self._before, self._tokens = self._tokens, []
        return self._cut(text)

    def finish(self) -> str:
        """What was held back, now that no token will follow."""
        text = self._cut(self._new_text()) + self._held
        self._tokens, self._held = [], ""
        return "" if self.stopped else text

    def _new_text(self) -> str:
        known = self._tokenizer.decode(self._before)
        return self._tokenizer.decode(self._before + self._tokens).removeprefix(known)

    def _cut(self, text: str) -> str:
        """`text` and what was held before it, up to a stop string or what may become one."""
        text = self._held + text
        self._held = ""
        found = [at for stop in self._stop_strings if (at := text.find(stop)) >= 0]
        if found:
            self.stopped = True
            return text[: min(found)]
        for start in range(
            max(0, len(text) - max(map(len, self._stop_strings), default=0)), len(text)
        ):
            if any(stop.startswith(text[start:]) for stop in self._stop_strings):
                self._held = text[start:]
                return text[:start]
        return text
