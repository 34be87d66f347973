"""Adapters by their names, as callers from Python give them."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from serve.config import is_whole
from stu.common.errors import UserError

LoraRequest = str | Sequence[str | None] | None


def adapter_folders(
    lora_modules: Mapping[str, str | Path] | None, tensor_parallel: int
) -> dict[str, Path]:
    """Return the folders of adapters by their names. Raises UserError."""
    if not lora_modules:
        return {}
    if not isinstance(lora_modules, Mapping) or not all(
        isinstance(name, str) and name and isinstance(path, str | Path)
        for name, path in lora_modules.items()
    ):
        allowed = "a mapping from names, none of them empty, to folders"
        raise UserError("lora_modules", lora_modules, allowed)
    if is_whole(tensor_parallel) and tensor_parallel > 1:
        allowed = "1 with lora_modules, as adapters are not divided"
        raise UserError("tensor_parallel", tensor_parallel, allowed)
    return {name: Path(path) for name, path in lora_modules.items()}


def requested_adapters(
    lora_request: LoraRequest, count: int, known: Mapping[str, Path]
) -> list[str]:
    """Return the names of the adapters of so many prompts, empty ones for the model alone.

    Args:
        lora_request: A name for all prompts, or a name or None for each.
        count: Number of prompts.
        known: Adapters that there are.

    Raises UserError.
    """
    if lora_request is None or isinstance(lora_request, str):
        lora_request = [lora_request] * count
    if not isinstance(lora_request, Sequence):
        allowed = "the name of an adapter, or a list with a name or None for each prompt"
        raise UserError("lora_request", lora_request, allowed)
    if len(lora_request) != count:
        message = f"{len(lora_request)} lora_request for {count} prompts: give one for each"
        raise UserError("lora_request", message=message)
    for name in lora_request:
        if name is not None and not (isinstance(name, str) and name in known):
            names = ", ".join(known) or "None, as there are no lora_modules"
            raise UserError("lora_request", name, f"one of {names}")
    return [name or "" for name in lora_request]
