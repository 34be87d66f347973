"""OpenAI's choices of chat completions: what came of a request, whole or piece by piece."""

from serve.completion import Completion
from serve.request import Request, TokenLogprobs
from stu.common.text import Json
from stu.tokenizer import Tokenizer


class ChatChoiceWriter:
    """One choice, `index`, in pieces if `is_stream`."""

    def __init__(self, tokenizer: Tokenizer, request: Request, index: int, is_stream: bool) -> None:
        self._tokenizer, self._request, self._index = tokenizer, request, index
        self._field = "delta" if is_stream else "message"
        self._has_begun = False

    def write(self, piece: Completion) -> Json:
        """The choice with the next piece of the completion."""
        message: Json = {"content": piece.text}
        if not self._has_begun:
            message = {"role": "assistant", **message}
            self._has_begun = True
        asks = self._request.sampling.logprobs is not None
        logprobs = {"content": [self._logprob(its) for its in piece.logprobs]} if asks else None
        return {
            "index": self._index,
            self._field: message,
            "logprobs": logprobs,
            "finish_reason": piece.finish_reason,
        }

    def _logprob(self, its: TokenLogprobs) -> Json:
        top = [self._token(token, logprob) for token, logprob in its.top.items()]
        return {**self._token(its.token, its.logprob), "top_logprobs": top}

    def _token(self, token: int, logprob: float) -> Json:
        text, its_bytes = self._tokenizer.token_text(token), self._tokenizer.token_bytes(token)
        return {"token": text, "logprob": logprob, "bytes": list(its_bytes)}
