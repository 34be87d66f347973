"""Flash-STU convolutional language models: filters, convolutions, FutureFill, model."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from stu.config import ModelConfig
    from stu.model import FlashSTU
    from stu.model_dir import load_model, load_tokenizer, save_model
    from stu.tokenizer import Tokenizer

    __version__: str

__all__ = [
    "FlashSTU",
    "ModelConfig",
    "Tokenizer",
    "__version__",
    "load_model",
    "load_tokenizer",
    "save_model",
]

_MODULES = {
    "FlashSTU": "stu.model",
    "ModelConfig": "stu.config",
    "Tokenizer": "stu.tokenizer",
    "load_model": "stu.model_dir",
    "load_tokenizer": "stu.model_dir",
    "save_model": "stu.model_dir",
}


def __getattr__(name: str) -> Any:
    # Imported when they are used: torch takes seconds, which a command's --help cannot wait for.
    if name in _MODULES:
        return getattr(import_module(_MODULES[name]), name)
    if name == "__version__":
        return import_module("importlib.metadata").version("stu")
    raise AttributeError(f"module 'stu' has no attribute {name!r}")
