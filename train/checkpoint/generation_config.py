"""generation_config.json, where transformers keeps a model's defaults for decoding."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from stu.common.errors import UserError
from stu.common.files import read_json_object

FILE = "generation_config.json"
ALLOWED: dict[str, tuple[float, float, str]] = {
    "max_new_tokens": (1, math.inf, "a whole number >= 1"),
    "temperature": (0, math.inf, "a number >= 0"),
    "top_k": (0, 2**31 - 1, "a whole number from 0 to 2**31 - 1"),
    "top_p": (0, 1, "a number from 0 to 1"),
}
"""Defaults that have the same name and meaning in both, their limits, and these in words."""
WHOLE = {"max_new_tokens", "top_k"}
SAMPLED = {"temperature": 1.0, "top_k": 50}
"""Defaults of transformers for sampling, where the file does not say."""


def load_generation(folder: Path) -> dict[str, Any]:
    """Return the defaults for decoding of a folder for transformers, by our names.

    Raises UserError, naming the file, for one that is damaged.
    """
    file = folder / FILE
    if not file.is_file():
        return {}
    values = read_json_object(file)
    is_sampled = values.get("do_sample")
    if not isinstance(is_sampled, bool | None):
        raise UserError(f"{file}: do_sample", is_sampled, "true or false")
    found: dict[str, Any] = dict(SAMPLED) if is_sampled else {}
    for name, (least, most, allowed) in ALLOWED.items():
        if (value := values.get(name)) is None:
            continue
        is_number = isinstance(value, int if name in WHOLE else int | float)
        is_number = is_number and not isinstance(value, bool) and value != math.inf
        if not is_number or not least <= value <= most:
            raise UserError(f"{file}: {name}", value, allowed)
        found[name] = value
    return found if is_sampled else found | {"temperature": 0.0}


def generation_config(defaults: Mapping[str, Any]) -> dict[str, Any]:
    """Return the contents of the file for defaults by our names."""
    is_sampled = defaults.get("temperature", 0) > 0
    # transformers refuses settings of sampling beside greedy decoding.
    names = tuple(ALLOWED) if is_sampled else ("max_new_tokens",)
    return {"do_sample": is_sampled, **{n: defaults[n] for n in names if n in defaults}}
