"""Decode Flash-STU models from Python, over datasets, and behind a server."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from serve.config import EngineConfig
    from serve.engine.engine import Engine
    from serve.llm import LLM
    from serve.request import Output, Request
    from serve.sampling_params import Constraint, SamplingParams

__all__ = ["LLM", "Constraint", "Engine", "EngineConfig", "Output", "Request", "SamplingParams"]

_MODULES = {
    "LLM": "serve.llm",
    "Constraint": "serve.sampling_params",
    "Engine": "serve.engine.engine",
    "EngineConfig": "serve.config",
    "Output": "serve.request",
    "Request": "serve.request",
    "SamplingParams": "serve.sampling_params",
}


def __getattr__(name: str) -> Any:
    # Imported when they are used: torch takes seconds, which a command's --help cannot wait for.
    if name in _MODULES:
        return getattr(import_module(_MODULES[name]), name)
    raise AttributeError(f"module 'serve' has no attribute {name!r}")
