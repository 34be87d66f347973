"""Requests from prompts and settings as JSON has them."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import numpy as np

from serve.request import Request, are_token_ids
from serve.sampling_params import SamplingParams
from stu.common.errors import UserError
from stu.common.text import nearest
from stu.model_dir import load_generation
from stu.tokenizer import Tokenizer, encode_text

NOT_IN_ROWS = ("n", "constraint")
SETTINGS = [field.name for field in fields(SamplingParams) if field.name not in NOT_IN_ROWS]
"""Fields of `SamplingParams` that a row of a file may have."""
TOKEN_ID = re.compile(r"0|[1-9][0-9]{0,99}")
MOST_STOP_TOKENS = 128
MOST_CANDIDATES = 128
LEAST_SEED = -(2**63)


class RequestBuilder:
    """Makes requests of prompts for one tokenizer.

    Args:
        tokenizer: The model's tokenizer.
        defaults: Values of `SETTINGS` for requests that leave them out.

    Raises UserError if a default is not allowed.
    """

    def __init__(self, tokenizer: Tokenizer, defaults: Mapping[str, Any]) -> None:
        for key in defaults:
            if key not in SETTINGS:
                message = f"unknown generation setting {key!r}{nearest(key, SETTINGS)}"
                raise UserError(key, message=message)
        self._tokenizer, self._values = tokenizer, defaults
        self.defaults = _params(defaults)
        """Settings of a request that names none."""

    def build(self, number: int, prompt: object, settings: Mapping[str, Any]) -> Request:
        """Return the request of row `number`.

        Args:
            number: Place of the row. With the default seed it makes the seed of a row that has
                none, so that equal prompts get different completions.
            prompt: Text, which BOS goes before if the tokenizer has one, or token ids, which are
                used as they are. An empty list starts from BOS.
            settings: Fields of `SamplingParams`.

        Raises UserError for a prompt or a setting that is not allowed. Whether the model has room
        for the request is checked by `serve.request.check_request`.
        """
        seed = derived_seed(self.defaults.seed, number)
        sampling = _params({**self._values, "seed": seed, **_with_seed(settings)})
        return Request(encode_prompt(self._tokenizer, prompt), sampling)


def default_params(path: str | Path, tokenizer: Tokenizer) -> SamplingParams:
    """Return the settings of a model directory's `generation.json`. Raises UserError."""
    values = load_generation(path)
    try:
        return RequestBuilder(tokenizer, values).defaults
    except UserError as error:
        file = Path(path) / "generation.json"
        raise UserError(error.field, message=f"{file}: {error}") from error


def encode_prompt(tokenizer: Tokenizer, prompt: object) -> list[int]:
    """Return the token ids of a text, with BOS if there is one, or a list of token ids unchanged.

    Raises UserError for anything else, and for a prompt without tokens where there is no BOS.
    """
    if isinstance(prompt, str):
        tokens = tokenizer.start_ids + encode_text(tokenizer, "prompt", prompt)
    elif isinstance(prompt, list | tuple) and are_token_ids(prompt):
        tokens = list(prompt) or tokenizer.start_ids
    else:
        raise UserError("prompt", prompt, "a string or a list of token ids")
    if not tokens:
        raise UserError("prompt", prompt, "not empty, as the model's tokenizer has no BOS token")
    return tokens


def listed_prompts(prompts: Any) -> list[Any]:
    """Return a list of prompts, given one or several, each a text or a list of token ids."""
    is_list = isinstance(prompts, list) and any(isinstance(part, str | list) for part in prompts)
    return list(prompts) if is_list else [prompts]


def choices(requests: Sequence[Request]) -> list[Request]:
    """Return a request with its own seed for each completion that is generated for each request:
    `n` or `best_of`, which are compared by their log probabilities.

    All seeds derive from that of the first request, which keeps it.
    """
    seed, single = requests[0].sampling.seed, []
    repeated = [request for request in requests for _ in range(request.sampling.num_candidates)]
    for index, request in enumerate(repeated):
        params = request.sampling
        are_compared = params.num_candidates > params.n and params.logprobs is None
        own = replace(
            params,
            n=1,
            best_of=None,
            seed=derived_seed(seed, index) if index else seed,
            logprobs=0 if are_compared else params.logprobs,
        )
        single.append(replace(request, sampling=own))
    return single


def derived_seed(seed: int, number: int) -> int:
    """Return a seed for one of many requests that share `seed`."""
    return int(np.random.SeedSequence(seed, spawn_key=(number,)).generate_state(1, np.uint64)[0])


def _with_seed(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return settings whose seed is none if it was -1, as for vLLM, and unsigned if negative."""
    seed = settings.get("seed")
    if type(seed) is not int or not LEAST_SEED <= seed < 0:
        return dict(settings)
    without = {name: value for name, value in settings.items() if name != "seed"}
    return without if seed == -1 else {**without, "seed": seed % 2**64}


def _params(settings: Mapping[str, Any]) -> SamplingParams:
    bias, ids = settings.get("logit_bias"), settings.get("stop_token_ids")
    if isinstance(ids, list) and len(ids) > MOST_STOP_TOKENS:
        raise UserError("stop_token_ids", ids, f"a list of at most {MOST_STOP_TOKENS} token ids")
    best_of = settings.get("best_of")
    if isinstance(best_of, int) and best_of > MOST_CANDIDATES:
        raise UserError("best_of", best_of, f"at most {MOST_CANDIDATES}")
    if not isinstance(bias, dict):
        return SamplingParams(**settings)
    for token in bias:  # JSON has no keys but strings
        if isinstance(token, str) and not TOKEN_ID.fullmatch(token):
            raise UserError("logit_bias", bias, "an object whose keys are token ids in digits")
    return SamplingParams(**{**settings, "logit_bias": {int(k): v for k, v in bias.items()}})
