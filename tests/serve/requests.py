"""Requests of tests."""

from collections.abc import Sequence
from dataclasses import fields, replace
from typing import Any

from serve.request import Request
from serve.sampling_params import SamplingParams

REQUEST_FIELDS = {field.name for field in fields(Request)}
GREEDY = SamplingParams()


def make_request(
    prompt: Sequence[int], max_new_tokens: int, sampling: SamplingParams = GREEDY, **values: Any
) -> Request:
    """Return a request that EOS does not end; `values`: fields of Request and SamplingParams."""
    own = {name: values.pop(name) for name in REQUEST_FIELDS & values.keys()}
    settings = {"max_new_tokens": max_new_tokens, "stop_at_eos": False, **values}
    return Request(prompt, replace(sampling, **settings), **own)
