"""OpenAI's choices of text completions: what came of a request, whole or piece by piece."""

from serve.completion import Completion
from serve.request import Request, TokenLogprobs
from serve.sampling.detokenizer import TextStream
from stu.common.text import Json
from stu.tokenizer import Tokenizer


class ChoiceWriter:
    """One choice, `index`.

    echo: the prompt's text, if it is to go before the completion. adds_bos: the first of the
    request's tokens is BOS, which nobody wrote.
    """

    def __init__(
        self, tokenizer: Tokenizer, request: Request, index: int, echo: str | None, adds_bos: bool
    ) -> None:
        self._tokenizer, self._request, self._index = tokenizer, request, index
        self._echo, self._adds_bos = echo, adds_bos
        self._stream = TextStream(tokenizer, request.prompt_token_ids)
        self._num_chars = self._num_written = 0
        self._has_begun = False

    def write(self, piece: Completion) -> Json:
        """The choice with the next piece of the completion."""
        text = piece.text
        logprobs: Json | None = None
        if self._request.sampling.logprobs is not None:
            logprobs = {"tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []}
        if not self._has_begun and self._echo is not None:
            text = self._echo + text
            if logprobs is not None:
                self._write_prompt(logprobs, piece)
            self._num_chars = len(self._echo)
        self._has_begun = True
        self._num_written += len(text)
        if logprobs is not None:
            for its in piece.logprobs:
                self._add(logprobs, its.token, its)
                self._num_chars += len(self._stream.append(its.token))
            if piece.finish_reason is not None:  # what a stop string cut off has no text
                offsets = logprobs["text_offset"]
                logprobs["text_offset"] = [min(at, self._num_written) for at in offsets]
        return {
            "index": self._index,
            "text": text,
            "logprobs": logprobs,
            "finish_reason": piece.finish_reason,
        }

    def _write_prompt(self, logprobs: Json, piece: Completion) -> None:
        tokens = self._request.prompt_token_ids
        stream = TextStream(self._tokenizer, ())
        if not self._adds_bos:
            self._add(logprobs, tokens[0], None)
            self._num_chars += len(stream.append(tokens[0]))
        for its in piece.prompt_logprobs:
            self._add(logprobs, its.token, its)
            self._num_chars += len(stream.append(its.token))

    def _add(self, logprobs: Json, token: int, its: TokenLogprobs | None) -> None:
        """A token; None if nothing comes before it that could tell how probable it is."""
        named = self._tokenizer.token_text
        logprobs["tokens"].append(named(token))
        logprobs["text_offset"].append(self._num_chars)
        logprobs["token_logprobs"].append(None if its is None else its.logprob)
        if its is None:
            logprobs["top_logprobs"].append(None)
            return
        top: dict[str, float] = {}
        for other, logprob in [*its.top.items(), (token, its.logprob)]:
            name = named(other)  # which two tokens may share
            top[name] = max(logprob, top.get(name, logprob))
        logprobs["top_logprobs"].append(top)
