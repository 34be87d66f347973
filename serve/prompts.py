"""From a prompt and its settings, as a row of a file holds them, to a request."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import fields
from typing import Any

import numpy as np

from serve.request import Request, require_room
from serve.sampling_params import SamplingParams
from stu.common.errors import show
from stu.common.text import nearest, require_unicode
from stu.tokenizer import Tokenizer

SAMPLING = [field.name for field in fields(SamplingParams)]
SETTINGS = ["max_new_tokens", "min_new_tokens", "stop", "stop_at_eos", "stop_token_ids", *SAMPLING]
TOKEN_ID = re.compile(r"0|[1-9][0-9]{0,99}")
MOST_STOP_TOKENS = 128
LEAST_SEED = -(2**63)


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
        request = self._request(tokens, {**self._defaults, "seed": seed, **_with_seed(given)})
        what = "prompt with BOS" if isinstance(prompt, str) else "prompt"
        require_room(request, self._max_seq_len, what)
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
        least, stop_ids = settings.get("min_new_tokens", 0), settings.get("stop_token_ids", [])
        for name, value in {"max_new_tokens": count, "min_new_tokens": least}.items():
            if type(value) is not int or value < 0:
                raise ValueError(
                    f"{name}={show(value)} is not allowed: it must be a whole number >= 0"
                )
        is_list = isinstance(stop_ids, list) and all(type(its) is int for its in stop_ids)
        if not is_list or len(stop_ids) > MOST_STOP_TOKENS:
            raise ValueError(
                f"stop_token_ids={show(stop_ids)} is not allowed: it must be a list of at most "
                f"{MOST_STOP_TOKENS} token ids"
            )
        if type(at_eos) is not bool:
            raise ValueError(f"stop_at_eos={show(at_eos)} is not allowed: it must be true or false")
        eos_id = self._tokenizer.eos_id
        return Request(
            tokens,
            count,
            _sampling({name: settings[name] for name in SAMPLING if name in settings}),
            _stop_strings(settings.get("stop", [])),
            (*((eos_id,) if at_eos and eos_id >= 0 else ()), *stop_ids),
            min_new_tokens=least,
        )


def derived_seed(seed: int, number: int) -> int:
    """A seed for one of many that share `seed`."""
    return int(np.random.SeedSequence(seed, spawn_key=(number,)).generate_state(1, np.uint64)[0])


def _with_seed(given: Mapping[str, Any]) -> dict[str, Any]:
    """Return settings whose seed, if negative, is one that sampling takes: -1 is none, as for vLLM,
    and others are read as unsigned."""
    settings, seed = dict(given), given.get("seed")
    if type(seed) is int and LEAST_SEED <= seed < 0:
        settings["seed"] = seed % 2**64
        if seed == -1:
            del settings["seed"]
    return settings


def _sampling(values: dict[str, Any]) -> SamplingParams:
    bias = values.get("logit_bias")
    if isinstance(bias, dict):  # JSON has no keys but strings
        for token in bias:
            if isinstance(token, str) and not TOKEN_ID.fullmatch(token):
                raise ValueError(
                    f"logit_bias has the key {show(token)}: its keys must be token ids, in digits "
                    "alone"
                )
        values["logit_bias"] = {int(token): number for token, number in bias.items()}
    if type(values.get("top_k")) is int and values["top_k"] == -1:
        values["top_k"] = 0  # vLLM's way to say all
    return SamplingParams(**values)


def _stop_strings(stop: object) -> Sequence[str]:
    strings = [stop] if isinstance(stop, str) else stop
    if not isinstance(strings, list) or not all(its and isinstance(its, str) for its in strings):
        raise ValueError(
            f"stop={show(stop)} is not allowed: it must be a string or a list of strings, none of "
            "them empty"
        )
    return tuple(strings)
