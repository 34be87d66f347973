"""OpenAI's text completions: from the body of a request to engine requests, and back to a body."""

import re
from collections.abc import Mapping, Sequence
from typing import Any

from serve.completion import Completion
from serve.openai.choices import ChoiceWriter
from serve.openai.fields import HARMLESS, TEXT_NEUTRAL, without_inert
from serve.openai.response_format import constraint_of
from serve.prompts import SETTINGS, RequestBuilder, choices
from serve.request import Request
from serve.sampling_params import MOST_LOGPROBS, JsonWhitespace
from stu.common.errors import show
from stu.common.text import Json, nearest, require_unicode
from stu.tokenizer import Tokenizer

DEFAULTS: Json = {"max_new_tokens": 16, "temperature": 1.0, "top_p": 1.0}
OWN_SETTINGS = [name for name in SETTINGS if name not in ("max_new_tokens", "min_new_tokens")]
FIELDS = [
    *(
        "model",
        "prompt",
        "max_tokens",
        "min_tokens",
        "n",
        "echo",
        "best_of",
        "stream",
        "ignore_eos",
        "response_format",
    ),
    *OWN_SETTINGS,
]
OWN_NAMES = {
    "max_new_tokens": "max_tokens",
    "min_new_tokens": "min_tokens",
}
"""Clients' names of fields, in errors of what builds requests and decodes them, but in no quote."""
OWN_NAME = re.compile(rf'\b({"|".join(OWN_NAMES)})\b(?!")')
MOST_COMPLETIONS = 128
MOST_PROMPTS = 128
MOST_STOPS, MOST_STOP_CHARACTERS = 128, 1000
CREATED = 0  # in place of the time: rows do not depend on when and how often a run was begun


def in_openai_words(error: str) -> str:
    """An engine's error, of the fields that the client has sent."""
    return OWN_NAME.sub(lambda found: OWN_NAMES[found[0]], error)


class Completions:
    """Reads and writes bodies of completions, with this project's own settings beside OpenAI's.

    `prompt` may hold several prompts; they and the `n` completions of each are choices, in their
    order.
    """

    def __init__(
        self,
        builder: RequestBuilder,
        tokenizer: Tokenizer,
        model_name: str,
        json_whitespace: JsonWhitespace = "compact",
    ) -> None:
        self._builder, self._tokenizer, self._model_name = builder, tokenizer, model_name
        self._json_whitespace = json_whitespace

    def requests(self, number: int, body: Mapping[str, Any]) -> list[Request]:
        """One for each choice; `number` decides the seed if the body has none.

        Raises ValueError naming field, value, what is allowed, and what to do.
        """
        body = without_inert(body, HARMLESS, TEXT_NEUTRAL)
        require_known(body, FIELDS)
        _require_allowed(body)
        settings = {name: body[name] for name in OWN_SETTINGS if name in body}
        if "ignore_eos" in body:
            settings["stop_at_eos"] = not body["ignore_eos"]
        if "max_tokens" in body:
            settings["max_new_tokens"] = body["max_tokens"]
        if "min_tokens" in body:
            settings["min_new_tokens"] = body["min_tokens"]
        asked = body.get("logprobs") if body.get("echo") else None
        constraint = constraint_of(
            body.get("response_format", {"type": "text"}), self._json_whitespace
        )
        if constraint is not None:
            ignores = body.get("ignore_eos", False)
            require("ignore_eos", ignores, not ignores, "false with response_format: EOS ends it")
        settings |= {"n": body.get("n", 1), "prompt_logprobs": asked, "constraint": constraint}
        prompts = prompts_of(body["prompt"])
        return choices([self._builder.build(number, prompt, settings) for prompt in prompts])

    def answer(
        self,
        number: int,
        body: Mapping[str, Any],
        requests: Sequence[Request],
        completions: Sequence[Completion],
    ) -> Json:
        """The body of the answer. In its `usage`, a prompt counts once, with BOS."""
        body = _without_nulls(body)
        writers = self.writers(body, requests)
        choices = [its.write(made) for its, made in zip(writers, completions, strict=True)]
        return {**self.frame(number, body, requests, completions), "choices": choices}

    def frame(
        self,
        number: int,
        body: Mapping[str, Any],
        requests: Sequence[Request],
        completions: Sequence[Completion],
    ) -> Json:
        """The body of an answer without its choices."""
        num_each = body.get("n") or 1
        prompt_tokens = sum(len(request.prompt_token_ids) for request in requests[::num_each])
        completion_tokens = sum(len(completion.token_ids) for completion in completions)
        return {
            "id": f"cmpl-{number}",
            "object": "text_completion",
            "created": CREATED,
            "model": body.get("model") or self._model_name,
            "choices": [],
            "usage": {
                "prompt_tokens": prompt_tokens,
                "completion_tokens": completion_tokens,
                "total_tokens": prompt_tokens + completion_tokens,
            },
        }

    def writers(self, body: Mapping[str, Any], requests: Sequence[Request]) -> list[ChoiceWriter]:
        """Of each choice, for its pieces."""
        prompts, num_each = prompts_of(body["prompt"]), body.get("n") or 1
        writers = []
        for index, request in enumerate(requests):
            prompt = prompts[index // num_each]
            echo = self._text(prompt) if body.get("echo") else None
            adds_bos = isinstance(prompt, str) or not prompt
            writers.append(ChoiceWriter(self._tokenizer, request, index, echo, adds_bos))
        return writers

    def _text(self, prompt: str | list[int]) -> str:
        return prompt if isinstance(prompt, str) else self._tokenizer.decode(prompt)


def require_known(given: Mapping[str, Any], known: list[str]) -> None:
    """Raises ValueError for a field that is not `known`, with the nearest that is."""
    for key in given:
        if key not in known:
            raise ValueError(f"unknown field {show(key)}{nearest(key, known)}")


def require(name: str, value: object, holds: bool, allowed: str) -> None:
    """Raises ValueError unless it `holds` that a value is allowed."""
    if not holds:
        raise ValueError(f"{name}={show(value)} is not allowed: it must be {allowed}")


def _without_nulls(body: Mapping[str, Any]) -> Json:
    """OpenAI's fields may all be null, which is as good as leaving them out."""
    return {name: value for name, value in body.items() if value is not None}


def prompts_of(prompt: Any) -> list[Any]:
    """One or several: text, or token ids."""
    is_several = isinstance(prompt, list) and any(isinstance(its, str | list) for its in prompt)
    return prompt if is_several else [prompt]


def _require_allowed(body: Mapping[str, Any]) -> None:
    """Raises ValueError for what OpenAI's body alone has; the builder sees to the rest."""
    if "prompt" not in body:
        raise ValueError('field "prompt" is missing: give a string, "" to start from nothing')
    num_prompts = len(prompts_of(body["prompt"]))
    if num_prompts > MOST_PROMPTS:
        raise ValueError(
            f"prompt has {num_prompts} prompts, and a row may have {MOST_PROMPTS}: write more rows"
        )
    model, count, echo = body.get("model", ""), body.get("n", 1), body.get("echo", False)
    require("model", model, isinstance(model, str), "a string")
    require_unicode("model", model)
    is_allowed = type(count) is int and 1 <= count <= MOST_COMPLETIONS
    require("n", count, is_allowed, f"a whole number from 1 to {MOST_COMPLETIONS}")
    require("echo", echo, type(echo) is bool, "true or false")
    stop, logprobs = body.get("stop", []), body.get("logprobs", 0)
    stops = stop if isinstance(stop, list) else [stop]
    are_short = all(len(its) <= MOST_STOP_CHARACTERS for its in stops if isinstance(its, str))
    allowed = f"at most {MOST_STOPS} strings of at most {MOST_STOP_CHARACTERS:,} characters"
    require("stop", stop, len(stops) <= MOST_STOPS and are_short, allowed)
    is_allowed = type(logprobs) is int and 0 <= logprobs <= MOST_LOGPROBS
    require("logprobs", logprobs, is_allowed, f"a whole number from 0 to {MOST_LOGPROBS}")
    best_of, stream = body.get("best_of", count), body.get("stream", False)
    require("best_of", best_of, best_of == count, "left out, or equal to n")
    require("stream", stream, stream is False, "false")
    ignores = body.get("ignore_eos")
    is_one = ignores is None or (type(ignores) is bool and body.get("stop_at_eos") is not ignores)
    require("ignore_eos", ignores, is_one, "true or false, and the opposite of stop_at_eos")
