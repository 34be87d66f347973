"""Checkpoints in the published layout, read and written with their weights mapped from the disk.

config.json          as `train.published_layout` has it
model.safetensors    or a torch file of the same tensors
"""

import json
import logging
import re
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from stu.atomic import new_directory
from stu.config import ModelConfig
from stu.model import FlashSTU
from stu.safetensors_writer import write_safetensors
from stu.tokenizer import Tokenizer
from train.published_layout import (
    EMBEDDING,
    FILTERS,
    HEAD,
    NORM_EPS,
    model_config,
    published_config,
    published_names,
)

logger = logging.getLogger(__name__)

TORCH_SUFFIXES = (".pt", ".pth", ".bin")
WRAPPERS = {"module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"}
"""What DDP, torch.compile, FSDP and recomputation put into names."""
LAYER_FILTERS = re.compile(r"layers\.\d+\.stu\.phi")


def save_published(
    path: Path,
    model: FlashSTU,
    tokenizer: Tokenizer,
    dtype: torch.dtype,
    overwrite: bool = False,
) -> None:
    """Write `model` as a folder that the published code loads, weights cast one at a time.

    Raises ValueError if `path` exists and `overwrite` is off; OSError, leaving nothing behind, if
    the disk is full.
    """
    names = published_names(model.config)
    weights = {names[name]: tensor for name, tensor in model.state_dict().items()}
    weights[HEAD] = weights[EMBEDDING]
    dtypes = {name: dtype for name in weights if name != FILTERS}
    config = published_config(model.config, str(dtype).removeprefix("torch."))
    with new_directory(path, overwrite) as folder:
        try:
            (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
            (folder / "tokenizer.model").write_bytes(tokenizer.model_bytes)
            # transformers opens a file only if it says that it is torch's.
            write_safetensors(folder / "model.safetensors", weights, {"format": "pt"}, dtypes)
        except OSError as error:
            raise OSError(f"{path}: could not be written: {error}") from error
    if model.config.norm_eps != NORM_EPS:
        logger.warning(
            "%s: norm_eps is %g, and the published code has %g built in: change it there",
            path,
            model.config.norm_eps,
            NORM_EPS,
        )


def load_published(path: Path) -> FlashSTU:
    """The model of a published checkpoint, a folder or a file of weights beside its config.json.

    Weights keep their dtype; the stored filters become float32 or wider. Raises ValueError, naming
    the file and what to do, for what is missing, damaged, or no model here.
    """
    file = _weights_file(path)
    config = _read_config(file.parent / "config.json")
    with torch.device("meta"):
        model = FlashSTU(config)
    try:
        weights = _model_weights(_read_tensors(file), config, model.state_dict())
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from error
    model.load_state_dict(weights, assign=True)
    return model.eval()


def _weights_file(path: Path) -> Path:
    if path.is_file():
        return path
    if not path.is_dir():
        raise ValueError(f"{path}: no such file or folder")
    file = path / "model.safetensors"
    if file.is_file():
        return file
    found = sorted(f for f in path.iterdir() if f.suffix in (".safetensors", *TORCH_SUFFIXES))
    if len(found) != 1:
        names = ", ".join(f.name for f in found) or "none"
        raise ValueError(
            f"{path}: a model.safetensors, or one other file of weights, is needed ({names} found):"
            " name the file; one that is in several parts must be joined first"
        )
    return found[0]


def _read_config(file: Path) -> ModelConfig:
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
        if not isinstance(values, dict):
            raise ValueError("a JSON object is needed")
        return model_config(values)
    except FileNotFoundError as error:
        raise ValueError(f"{file}: no such file; put it beside the weights") from error
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from error


def _read_tensors(file: Path) -> dict[str, Tensor]:
    """By their published names, mapped from the disk where the file allows it."""
    tensors: dict[str, Any] = {}
    for name, tensor in _stored(file).items():
        plain = ".".join(part for part in str(name).split(".") if part not in WRAPPERS)
        if not isinstance(tensor, Tensor):
            raise ValueError(f"{name} is not a tensor: save model.state_dict() alone")
        if plain in tensors:
            raise ValueError(f"{plain} is there twice: save the state dict of one model")
        tensors[plain] = tensor
    return tensors


def _stored(file: Path) -> Mapping[Any, Any]:
    if file.suffix not in TORCH_SUFFIXES:
        try:
            archive: Any = safe_open(file, framework="pt")
            return {name: archive.get_tensor(name) for name in archive.keys()}  # noqa: SIM118
        except SafetensorError as error:
            raise ValueError(f"not a whole safetensors file ({error}); copy it again") from error
    try:
        mapped = zipfile.is_zipfile(file)  # older torch files are none
        contents = torch.load(file, map_location="cpu", weights_only=True, mmap=mapped)
    except Exception as error:  # torch.load documents none, and raises many kinds
        kind = type(error).__name__
        raise ValueError(
            f"cut short, or not a file of tensors alone ({kind}): save model.state_dict()"
        ) from error
    if isinstance(contents, dict) and isinstance(contents.get("model"), dict):
        contents = contents["model"]
    if not isinstance(contents, dict):
        raise ValueError("not a state dict: save model.state_dict()")
    return contents


def _model_weights(
    tensors: dict[str, Tensor], config: ModelConfig, shapes: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """By the names of our model."""
    _merge_head(tensors)
    _merge_filters(tensors)
    names = published_names(config)
    expected = {names[name]: tensor.shape for name, tensor in shapes.items()}
    problems = [f"{name} is missing" for name in expected if name not in tensors]
    problems += [f"{name} is unknown" for name in tensors if name not in expected]
    problems += [
        f"{name} is {tensor.dtype} {list(tensor.shape)}, not floating point {list(expected[name])}"
        for name, tensor in tensors.items()
        if name in expected and not (tensor.is_floating_point() and tensor.shape == expected[name])
    ]
    if problems:
        more = f", and {len(problems) - 3} more" if len(problems) > 3 else ""
        raise ValueError(
            f"does not fit config.json: {', '.join(problems[:3])}{more}; what can be imported is "
            "STU of either form and attention, alternating or STU alone, without biases"
        )
    filters = tensors[FILTERS]
    tensors[FILTERS] = filters.to(torch.promote_types(filters.dtype, torch.float32))
    return {name: tensors[names[name]] for name in shapes}


def _merge_head(tensors: dict[str, Tensor]) -> None:
    """Leave one name of what is one tensor: a checkpoint may have either or both."""
    head = tensors.pop(HEAD, None)
    if head is None:
        return
    embedding = tensors.setdefault(EMBEDDING, head)
    if head.dtype != embedding.dtype or not torch.equal(head, embedding):
        raise ValueError(
            f"{HEAD} differs from {EMBEDDING}: the two must be one tensor here; "
            "import a checkpoint that was trained with tied embeddings"
        )


def _merge_filters(tensors: dict[str, Tensor]) -> None:
    for name in [name for name in tensors if LAYER_FILTERS.fullmatch(name)]:
        its = tensors.pop(name)
        filters = tensors.setdefault(FILTERS, its)
        if its.dtype != filters.dtype or not torch.equal(its, filters):
            raise ValueError(
                f"{name} differs from {FILTERS}: all layers must have the same filters"
            )
    if FILTERS not in tensors:
        raise ValueError(
            f"{FILTERS} is missing: the signs of filters are not the same on all machines; add the "
            "tensor [seq_len, num_eigh] that the checkpoint was trained with to the file"
        )
