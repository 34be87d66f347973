"""From a prompt and its settings, as a row of a file holds them, to a request."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import fields
from typing import Any

import numpy as np

from serve.request import Request
from serve.sampling import SamplingParams
from stu.config import nearest
from stu.tokenizer import Tokenizer

SAMPLING = [field.name for field in fields(SamplingParams)]
SETTINGS = ["max_new_tokens", "stop", "stop_at_eos", *SAMPLING]


class RequestBuilder:
    """Makes requests of one model.

    defaults: settings that a prompt may leave out: some of `SETTINGS`, `max_new_tokens` and `seed`
    among them. Raises ValueError if they are not valid, or the tokenizer has no BOS.
    """

    def __init__(self, tokenizer: Tokenizer, max_seq_len: int, defaults: Mapping[str, Any]) -> None:
        if tokenizer.bos_id < 0:
            raise ValueError(f"{tokenizer.path}: has no BOS token to start prompts with")
        for key in defaults:
            if key not in SETTINGS:
                raise ValueError(f"unknown generation setting {key!r}{nearest(key, SETTINGS)}")
        self._tokenizer, self._max_seq_len, self._defaults = tokenizer, max_seq_len, defaults
        self._request([tokenizer.bos_id], defaults)

    def build(self, number: int, prompt: object, given: Mapping[str, Any]) -> Request:
        """The request of row `number`.

        prompt: text, which BOS goes before, or token ids, taken as they are; none of either start
        from BOS. given: the row's own settings. Without a seed of its own the row gets one from the
        default seed and its number, so that equal prompts get different completions.

        Raises ValueError naming field, value, what is allowed, and what to do.
        """
        tokens = self._tokens(prompt)
        seed = derived_seed(self._defaults["seed"], number)
        request = self._request(tokens, {**self._defaults, "seed": seed, **given})
        if len(tokens) + request.max_new_tokens > self._max_seq_len:
            room = self._max_seq_len - len(tokens)
            lower = f"lower max_new_tokens to {room} or " if room > 0 else ""
            with_bos = " with BOS" if isinstance(prompt, str) else ""
            raise ValueError(
                f"prompt of {len(tokens)} tokens{with_bos} and max_new_tokens="
                f"{request.max_new_tokens} exceed the model's max_seq_len={self._max_seq_len}: "
                f"{lower}shorten the prompt"
            )
        return request

    def _tokens(self, prompt: object) -> list[int]:
        if isinstance(prompt, str):
            require_unicode("prompt", prompt)
            return [self._tokenizer.bos_id, *self._tokenizer.encode(prompt)]
        if isinstance(prompt, list) and all(type(token) is int for token in prompt):
            return prompt or [self._tokenizer.bos_id]
        raise ValueError(
            f"prompt={show(prompt)} is not allowed: it must be a string or a list of token ids"
        )

    def _request(self, tokens: list[int], settings: Mapping[str, Any]) -> Request:
        count, at_eos = settings["max_new_tokens"], settings.get("stop_at_eos", True)
        if type(count) is not int or count < 0:
            raise ValueError(
                f"max_new_tokens={show(count)} is not allowed: it must be a whole number >= 0"
            )
        if type(at_eos) is not bool:
            raise ValueError(f"stop_at_eos={show(at_eos)} is not allowed: it must be true or false")
        eos_id = self._tokenizer.eos_id
        return Request(
            tokens,
            count,
            _sampling({name: settings[name] for name in SAMPLING if name in settings}),
            _stop_strings(settings.get("stop", [])),
            (eos_id,) if at_eos and eos_id >= 0 else (),
        )


def derived_seed(seed: int, number: int) -> int:
    """A seed for one of many that share `seed`."""
    return int(np.random.SeedSequence(seed, spawn_key=(number,)).generate_state(1, np.uint64)[0])


def require_unicode(name: str, text: str) -> None:
    """Raises ValueError if UTF-8 cannot hold `text`."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(
            f"{name} has half of a surrogate pair at character {error.start}: "
            "write the whole character"
        ) from error


def show(value: object) -> str:
    """`value` as JSON, shortened; what JSON has no form for as Python writes it."""
    text = json.dumps(value, default=repr)
    return text if len(text) <= 60 else text[:60] + "..."


def _sampling(values: dict[str, Any]) -> SamplingParams:
    bias = values.get("logit_bias")
    if isinstance(bias, dict):  # JSON has no keys but strings
        try:
            values["logit_bias"] = {int(token): number for token, number in bias.items()}
        except ValueError as error:
            raise ValueError(
                f"logit_bias={show(bias)} is not allowed: its keys must be token ids"
            ) from error
    return SamplingParams(**values)


def _stop_strings(stop: object) -> Sequence[str]:
    strings = [stop] if isinstance(stop, str) else stop
    if not isinstance(strings, list) or not all(its and isinstance(its, str) for its in strings):
        raise ValueError(
            f"stop={show(stop)} is not allowed: it must be a string or a list of strings, none of "
            "them empty"
        )
    return tuple(strings)
