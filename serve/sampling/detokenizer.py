"""Text of tokens as they are generated, in whole characters and without stop strings."""

import codecs
from collections.abc import Sequence

from serve.request import Request
from stu.tokenizer import Tokenizer

MOST_BYTES = 4
"""Most bytes of a UTF-8 character."""


class TextStream:
    """Text of one completion: what `append` and `finish` return, joined.

    It ends before the first of `stop_strings` that begins after the first `min_tokens` tokens.
    Bytes that are not UTF-8 become U+FFFD. Tokens without text add none, or their names if
    `skips_special` is false.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        prompt: Sequence[int],
        stop_strings: Sequence[str] = (),
        min_tokens: int = 0,
        skips_special: bool = True,
    ) -> None:
        self._tokenizer, self._stop_strings = tokenizer, tuple(stop_strings)
        self._skips_special = skips_special
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        # A character that begins in the prompt belongs to the completion.
        for token in prompt[-MOST_BYTES:]:
            self._decoder.decode(tokenizer.token_bytes(token))
        self._num_early = min_tokens
        """Number of next tokens whose text is not searched for stop strings."""
        self._held = ""
        """Text that may be the beginning of a stop string."""
        self.stopped = False
        """Whether a stop string was found, after which there is no text."""

    @classmethod
    def of(cls, tokenizer: Tokenizer, request: Request) -> "TextStream":
        """Return the text of a request's completion, before its first token."""
        params = request.sampling
        return cls(
            tokenizer,
            request.prompt_token_ids,
            params.stop,
            params.min_new_tokens,
            params.skip_special_tokens,
        )

    def append(self, token: int) -> str:
        """Return the text that is certain after `token`."""
        token_bytes = self._tokenizer.token_bytes(token)
        if not token_bytes and not self._skips_special:
            token_bytes = self._tokenizer.token_text(token).encode()
        text = self._decoder.decode(token_bytes)
        if self._num_early > 0:
            self._num_early -= 1
            return text
        return self._cut(text)

    def finish(self) -> str:
        """Return the text that was held back, after the last token."""
        if self.stopped:
            return ""
        text = self._cut(self._decoder.decode(b"", final=True)) + self._held
        self._held = ""
        return text

    def _cut(self, text: str) -> str:
        """Return held and new text, up to a stop string or what may become one."""
        text = self._held + text
        self._held = ""
        found = [at for stop in self._stop_strings if (at := text.find(stop)) >= 0]
        if found:
            self.stopped = True
            return text[: min(found)]
        longest = max(map(len, self._stop_strings), default=1)
        for start in range(max(0, len(text) - longest + 1), len(text)):
            if any(stop.startswith(text[start:]) for stop in self._stop_strings):
                self._held = text[start:]
                return text[:start]
        return text
