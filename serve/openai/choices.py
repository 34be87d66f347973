"""OpenAI's choices of text and chat completions, whole or piece by piece."""

from collections.abc import Sequence
from itertools import chain, islice
from typing import Protocol

from serve.completion import Completion
from serve.openai.tools.reader import CallReader, call_id
from serve.request import Request, TokenLogprobs
from serve.sampling.detokenizer import TextStream
from stu.common.text import Json
from stu.tokenizer import Tokenizer


class ChoiceWriter(Protocol):
    """Writes one choice of an answer."""

    def write(self, piece: Completion) -> Json:
        """Return the choice with the next piece of its completion."""


class TextChoiceWriter:
    """Writes one choice of a text completion.

    Args:
        index: Number of the choice.
        echo: Text of the prompt if it goes before the completion.
        adds_bos: Whether the first prompt token is a BOS that the client did not send.
        prompt_logprobs: Number of most probable tokens in vLLM's field of this name; None: without.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        request: Request,
        index: int,
        echo: str | None,
        adds_bos: bool,
        prompt_logprobs: int | None = None,
    ) -> None:
        self._tokenizer, self._request, self._index = tokenizer, request, index
        self._echo, self._adds_bos, self._prompt_logprobs = echo, adds_bos, prompt_logprobs
        skips = request.sampling.skip_special_tokens
        self._stream = TextStream(tokenizer, request.prompt_token_ids, skips_special=skips)
        self._offset = self._num_written = 0
        self._has_begun = False

    def write(self, piece: Completion) -> Json:
        """Return the choice with the next piece of its completion."""
        text = piece.text
        logprobs: Json | None = None
        if self._request.sampling.logprobs is not None:
            logprobs = {"tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []}
        of_prompt: Json = {}
        if not self._has_begun and self._prompt_logprobs is not None:
            count = self._prompt_logprobs
            values = prompt_logprobs(self._tokenizer, piece.prompt_logprobs, count)
            of_prompt = {"prompt_logprobs": values}
        if not self._has_begun and self._echo is not None:
            text = self._echo + text
            if logprobs is not None:
                self._add_prompt(logprobs, piece, self._echo)
            self._offset = len(self._echo)
        self._has_begun = True
        self._num_written += len(text)
        if logprobs is not None:
            for token in piece.logprobs:
                self._add(logprobs, token.token, token)
                self._offset += len(self._stream.append(token.token))
            # As in vLLM: clients such as lm-eval count on an entry for each generated token.
            for token in piece.stop_logprobs:
                self._offset = self._num_written
                self._add(logprobs, token.token, token)
            if piece.finish_reason is not None:
                # Tokens that a stop string cut off have no text.
                offsets = logprobs["text_offset"]
                logprobs["text_offset"] = [min(offset, self._num_written) for offset in offsets]
        return {
            "index": self._index,
            "text": text,
            "logprobs": logprobs,
            "finish_reason": piece.finish_reason,
            **of_prompt,
        }

    def _add_prompt(self, logprobs: Json, piece: Completion, echo: str) -> None:
        tokens = self._request.prompt_token_ids[int(self._adds_bos) :]
        stream = TextStream(self._tokenizer, ())
        texts = [stream.append(token) for token in tokens]
        # Tokenizers may put a space before a text, which its echo has not.
        self._offset = _num_spaces(echo) - _num_spaces("".join(texts))
        values = chain([] if self._adds_bos else [None], piece.prompt_logprobs)
        for token, text, logprob in zip(tokens, texts, values, strict=False):
            self._add(logprobs, token, logprob)
            self._offset += len(text)

    def _add(self, logprobs: Json, token: int, values: TokenLogprobs | None) -> None:
        """Add a token; `values` is None for the first, whose probability depends on nothing."""
        text_of = self._tokenizer.token_text
        logprobs["tokens"].append(text_of(token))
        logprobs["text_offset"].append(max(0, self._offset))
        logprobs["token_logprobs"].append(None if values is None else values.logprob)
        if values is None:
            logprobs["top_logprobs"].append(None)
            return
        top: dict[str, float] = {}
        # A prompt may have more than are asked for here, for prompt_logprobs.
        shown = islice(values.top.items(), self._request.sampling.logprobs)
        for other, logprob in [*shown, (token, values.logprob)]:
            # Two tokens may have the same text: a byte and a character.
            top[text_of(other)] = max(logprob, top.get(text_of(other), logprob))
        logprobs["top_logprobs"].append(top)


class ChatChoiceWriter:
    """Writes choice number `index` of a chat completion, in deltas if `is_stream`.

    reader: Reader of an answer that may call tools.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        request: Request,
        index: int,
        is_stream: bool,
        reader: CallReader | None = None,
    ) -> None:
        self._tokenizer, self._request, self._index = tokenizer, request, index
        self._is_stream, self._reader = is_stream, reader
        self._num_calls = 0
        self._has_begun = False
        self.prompt_logprobs: Sequence[TokenLogprobs] = ()
        """Log probabilities of the prompt, once the first piece is written."""

    def write(self, piece: Completion) -> Json:
        """Return the choice with the next piece of its completion."""
        if not self._has_begun:
            self.prompt_logprobs = piece.prompt_logprobs
        message: Json = {} if self._has_begun else {"role": "assistant"}
        self._has_begun = True
        logprobs: Json | None = None
        if self._request.sampling.logprobs is not None:
            logprobs = {"content": token_logprobs(self._tokenizer, piece.logprobs)}
        finish_reason: str | None = piece.finish_reason
        if self._reader is None:
            message["content"] = piece.text
        else:
            message |= self._with_calls(self._reader, piece)
            is_whole = self._reader.num_ended and not self._reader.has_open_call
            if finish_reason == "stop" and is_whole:
                finish_reason = "tool_calls"
        return {
            "index": self._index,
            "delta" if self._is_stream else "message": message,
            "logprobs": logprobs,
            "finish_reason": finish_reason,
        }

    def _with_calls(self, reader: CallReader, piece: Completion) -> Json:
        """Return the content and the calls in a piece."""
        texts: list[str] = []
        calls: list[Json] = []
        for part in reader.read(piece.text, piece.finish_reason is not None):
            if part.kind == "text":
                texts.append(part.text)
            elif part.kind == "call":
                calls.append(self._new_call(part.text))
                self._num_calls += 1
            elif part.kind == "arguments":
                if not calls:
                    index = self._num_calls - 1
                    calls.append({"index": index, "function": {"arguments": ""}})
                calls[-1]["function"]["arguments"] += part.text
        message: Json = {"content": "".join(texts)} if texts else {}
        if not self._is_stream:
            message.setdefault("content", None if calls else "")
            for call in calls:
                del call["index"]
        return message | ({"tool_calls": calls} if calls else {})

    def _new_call(self, name: str) -> Json:
        sampling, index = self._request.sampling, self._num_calls
        return {
            "index": index,
            "id": call_id(self._request.prompt_token_ids, sampling.seed, index),
            "type": "function",
            "function": {"name": name, "arguments": ""},
        }


def _num_spaces(text: str) -> int:
    """Return the number of spaces that a text begins with."""
    return len(text) - len(text.lstrip(" "))


def token_logprobs(tokenizer: Tokenizer, tokens: Sequence[TokenLogprobs]) -> list[Json]:
    """Return OpenAI's log probabilities of the tokens of a chat."""

    def logprob(token: int, value: float) -> Json:
        text, token_bytes = tokenizer.token_text(token), tokenizer.token_bytes(token)
        return {"token": text, "logprob": value, "bytes": list(token_bytes)}

    return [
        {
            **logprob(token.token, token.logprob),
            "top_logprobs": [logprob(other, value) for other, value in token.top.items()],
        }
        for token in tokens
    ]


def prompt_logprobs(
    tokenizer: Tokenizer, logprobs: Sequence[TokenLogprobs], count: int
) -> list[Json | None]:
    """Return log probabilities of a prompt as vLLM writes them: null for the first token, and for
    each other an object by token id, of the token itself and of the `count` most probable ones."""
    written: list[Json | None] = [None]
    for values in logprobs:
        ranked = {values.token: (values.logprob, values.rank)}
        for rank, (token, logprob) in enumerate(islice(values.top.items(), count), 1):
            ranked[token] = (logprob, rank)
        written.append(
            {
                str(token): {
                    "logprob": logprob,
                    "rank": rank,
                    "decoded_token": tokenizer.token_text(token),
                }
                for token, (logprob, rank) in ranked.items()
            }
        )
    return written
