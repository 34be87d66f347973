"""Writes a response, and the events of its stream, while its request is decoded.

The events add up to the response: both come from here, whether or not a client asked for a stream.
"""

from typing import Literal

from serve.completion import Completion
from serve.openai.choices import token_logprobs
from serve.openai.tools.reader import call_id, call_reader
from serve.request import Request
from stu.common.text import Json
from stu.tokenizer import Tokenizer

Status = Literal["completed", "incomplete"]


class ResponseWriter:
    """Writes one response.

    Args:
        tokenizer: The model's tokenizer.
        request: The engine's request.
        frame: The response without output, usage and status.
    """

    def __init__(self, tokenizer: Tokenizer, request: Request, frame: Json) -> None:
        self._tokenizer, self._request = tokenizer, request
        self._reader = call_reader(request)
        self.response: Json = {**frame, "status": "in_progress", "output": [], "usage": None}
        """The response up to the last event."""
        self._suffix = str(frame["id"]).partition("_")[2]
        self._num_events = self._num_calls = 0
        self._open: Json | None = None
        """The last item, while it grows."""
        self._texts: list[str] = []
        """Texts of the open item."""
        self._logprobs: list[Json] = []

    def begin(self) -> list[Json]:
        """Return the first events."""
        return [
            self._event(f"response.{kind}", response=self._snapshot())
            for kind in ("created", "in_progress")
        ]

    def write(self, piece: Completion) -> list[Json]:
        """Return the events of the next piece."""
        is_last = piece.finish_reason is not None
        logprobs = token_logprobs(self._tokenizer, piece.logprobs)
        if self._reader is None:
            return self._say(piece.text, logprobs) if piece.text or logprobs else []
        events: list[Json] = []
        for part in self._reader.read(piece.text, is_last):
            if part.kind == "text":
                events += self._say(part.text, [])
            elif part.kind == "call":
                events += self._close("completed") + self._begin_call(part.text)
            elif part.kind == "arguments":
                events.append(self._delta("response.function_call_arguments.delta", part.text))
            else:
                events += self._close("completed")
        return events

    def end(self, usage: Json, is_cut_off: bool, now: int) -> list[Json]:
        """Return the last events.

        Args:
            usage: Numbers of tokens, as of a chat.
            is_cut_off: Whether the answer reached its limit of new tokens.
            now: Unix time in seconds.
        """
        events: list[Json] = []
        if not self.response["output"]:
            events += self._begin_message()
        status: Status = "incomplete" if is_cut_off else "completed"
        # A stop string or token may end a call, which is then no call that a client could run.
        is_call = self._reader is not None and self._reader.has_open_call
        events += self._close("incomplete" if is_call else status)
        self.response |= {"status": status, "usage": response_usage(usage)}
        if is_cut_off:
            self.response["incomplete_details"] = {"reason": "max_output_tokens"}
        else:
            self.response["completed_at"] = now
        return [*events, self._event(f"response.{status}", response=self._snapshot())]

    def fail(self, error: Json) -> list[Json]:
        """Return the last events of a response that failed with the body of an error."""
        wrong = error["error"]
        code = "rate_limit_exceeded" if wrong["type"] == "rate_limit_error" else "server_error"
        if wrong["type"] == "invalid_request_error":
            code = "invalid_prompt"
        events = self._close("incomplete")
        reason = {"code": code, "message": wrong["message"]}
        self.response |= {"status": "failed", "error": reason}
        return [*events, self._event("response.failed", response=self._snapshot())]

    def _event(self, kind: str, **fields: object) -> Json:
        event = {"type": kind, "sequence_number": self._num_events, **fields}
        self._num_events += 1
        return event

    def _snapshot(self) -> Json:
        """Return the response as it is now."""
        return {**self.response, "output": list(self.response["output"])}

    def _place(self) -> Json:
        assert self._open is not None
        return {"item_id": self._open["id"], "output_index": len(self.response["output"]) - 1}

    def _begin(self, item: Json) -> Json:
        """Append an item, and return the event."""
        self._open, self._texts, self._logprobs = item, [], []
        self.response["output"].append(item)
        index = len(self.response["output"]) - 1
        return self._event("response.output_item.added", output_index=index, item=dict(item))

    def _item_id(self, prefix: str) -> str:
        return f"{prefix}_{self._suffix}_{len(self.response['output'])}"

    def _begin_message(self) -> list[Json]:
        item = {"id": self._item_id("msg"), "type": "message", "role": "assistant"}
        added = self._begin({**item, "status": "in_progress", "content": []})
        part = {"type": "output_text", "text": "", "annotations": [], "logprobs": []}
        part_added = self._event(
            "response.content_part.added", **self._place(), content_index=0, part=part
        )
        return [added, part_added]

    def _begin_call(self, name: str) -> list[Json]:
        request = self._request
        item = {
            "id": self._item_id("fc"),
            "type": "function_call",
            "call_id": call_id(request.prompt_token_ids, request.sampling.seed, self._num_calls),
            "name": name,
            "arguments": "",
            "status": "in_progress",
        }
        self._num_calls += 1
        return [self._begin(item)]

    def _say(self, text: str, logprobs: list[Json]) -> list[Json]:
        events = [] if self._open else self._begin_message()
        self._logprobs += logprobs
        kind = "response.output_text.delta"
        return [*events, self._delta(kind, text, content_index=0, logprobs=logprobs)]

    def _delta(self, kind: str, text: str, **fields: object) -> Json:
        self._texts.append(text)
        return self._event(kind, **self._place(), delta=text, **fields)

    def _close(self, status: Status) -> list[Json]:
        """End the open item, if there is one, and return the events."""
        item = self._open
        if item is None:
            return []
        place, text = self._place(), "".join(self._texts)
        item["status"] = status
        if item["type"] == "message":
            logprobs = self._logprobs
            part = {"type": "output_text", "text": text, "annotations": [], "logprobs": logprobs}
            item["content"] = [part]
            place["content_index"] = 0
            events = [
                self._event("response.output_text.done", **place, text=text, logprobs=logprobs),
                self._event("response.content_part.done", **place, part=part),
            ]
        else:
            item["arguments"] = text
            kind = "response.function_call_arguments.done"
            events = [self._event(kind, **place, name=item["name"], arguments=text)]
        self._open = None
        index = place["output_index"]
        return [*events, self._event("response.output_item.done", output_index=index, item=item)]


def response_usage(usage: Json) -> Json:
    """Return the numbers of tokens of a chat with the names that a response has."""
    cached = usage.get("prompt_tokens_details", {}).get("cached_tokens", 0)
    return {
        "input_tokens": usage["prompt_tokens"],
        "input_tokens_details": {"cached_tokens": cached, "cache_write_tokens": 0},
        "output_tokens": usage["completion_tokens"],
        "output_tokens_details": {"reasoning_tokens": 0},
        "total_tokens": usage["total_tokens"],
    }
