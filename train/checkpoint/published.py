"""Reading and writing checkpoints in the published layout, weights mapped from the disk.

config.json          see `train.checkpoint.published_layout`
model.safetensors    or a PyTorch file of the same tensors, or several files with an index
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

from stu.common.errors import UserError
from stu.common.files import new_directory
from stu.common.safetensors import write_safetensors
from stu.config import ModelConfig
from stu.model import FlashSTU
from stu.tokenizer import Tokenizer
from train.checkpoint.published_layout import (
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
"""Parts of names that DDP, torch.compile, FSDP and recomputation insert."""
HOLDERS = {"model", "state_dict"}
"""Prefixes of names in modules that contain the model."""
STATE_DICTS = ("state_dict", "model_state_dict", "model")
"""Keys of the weights in training checkpoints."""
INDEX_SUFFIX = ".index.json"
LAYER_FILTERS = re.compile(r"layers\.\d+\.stu\.phi")


def save_published(
    path: Path,
    model: FlashSTU,
    tokenizer: Tokenizer,
    dtype: torch.dtype,
    overwrite: bool = False,
) -> None:
    """Write `model` as a folder that the published code loads, casting one weight at a time.

    Raises UserError if `path` exists and `overwrite` is off; OSError, leaving nothing behind, if
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
            tokenizer.save(folder)
            # transformers opens a file only if it says that it is torch's.
            write_safetensors(folder / "model.safetensors", weights, {"format": "pt"}, dtypes)
        except OSError as error:
            raise OSError(f"{path}: could not be written: {error}") from error
    if model.config.norm_eps != NORM_EPS:
        logger.warning(
            "%s: norm_eps is %g, but the published code uses PyTorch's default, %g",
            path,
            model.config.norm_eps,
            NORM_EPS,
        )


def load_published(path: Path, norm_eps: float | None = None) -> FlashSTU:
    """Return the model of a published checkpoint.

    Weights keep their dtype; the stored filters become float32 or wider.

    Args:
        path: Folder, file of weights beside its config.json, or index of several such files.
        norm_eps: Epsilon of RMSNorm, instead of that in config.json.

    Raises UserError, naming the file, for what is missing, damaged or not supported.
    """
    file = _weights_file(path)
    config = _read_config(file.parent / "config.json", norm_eps)
    with torch.device("meta"):
        model = FlashSTU(config)
    try:
        weights = _model_weights(_read_tensors(file), config, model.state_dict())
    except UserError as error:
        raise UserError(message=f"{file}: {error}") from error
    model.load_state_dict(weights, assign=True)
    return model.eval()


def _weights_file(path: Path) -> Path:
    if path.is_file():
        return path
    if not path.is_dir():
        raise UserError(message=f"{path}: no such file or folder")
    if (whole := path / "model.safetensors").is_file():
        return whole
    indexes = sorted(path.glob(f"*{INDEX_SUFFIX}"))
    found = sorted(f for f in path.iterdir() if f.suffix in (".safetensors", *TORCH_SUFFIXES))
    if len(indexes) == 1:
        return indexes[0]
    if len(found) == 1:
        return found[0]
    names = ", ".join(f.name for f in (*indexes, *found)) or "none"
    raise UserError(
        message=f"{path}: a model.safetensors, one other file of weights, or several with one "
        f"model.safetensors.index.json are needed ({names} found): name the file"
    )


def _read_config(file: Path, norm_eps: float | None) -> ModelConfig:
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
        if not isinstance(values, dict):
            raise UserError(message="a JSON object is needed")
        if norm_eps is not None:
            values["norm_eps"] = norm_eps
        elif "norm_eps" not in values:
            logger.warning(
                "%s has no norm_eps: the epsilon of RMSNorm is PyTorch's default, %g, as in the "
                "published code; with liger-kernel it is 1e-6: give --norm-eps",
                file,
                NORM_EPS,
            )
        return model_config(values)
    except FileNotFoundError as error:
        raise UserError(message=f"{file}: no such file; put it beside the weights") from error
    except (UserError, ValueError) as error:  # ValueError: not JSON, or not UTF-8
        raise UserError(message=f"{file}: {error}") from error


def _read_tensors(file: Path) -> dict[str, Tensor]:
    """Return tensors by their published names, mapped from the disk where the file allows it."""
    tensors: dict[str, Any] = {}
    for name, tensor in _read_file(file).items():
        plain = _plain_name(str(name))
        if not isinstance(tensor, Tensor):
            raise UserError(message=f"{name} is not a tensor: save model.state_dict() alone")
        if plain in tensors:
            raise UserError(message=f"{plain} is there twice: save the state dict of one model")
        tensors[plain] = tensor
    return tensors


def _plain_name(name: str) -> str:
    """Return `name` without the parts that wrappers of the model or of its modules insert."""
    parts = name.split(".")
    while len(parts) > 1 and parts[0] in {*WRAPPERS, *HOLDERS}:
        parts.pop(0)
    return ".".join(part for part in parts if part not in WRAPPERS)


def _read_index(index: Path) -> dict[str, Any]:
    """Return the tensors of all files that an index names. Raises UserError if a file or a tensor
    is missing."""
    try:
        places = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        files = sorted({str(file) for file in places.values()})
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(message=f"not an index of weights with a weight_map ({error!r})") from error
    stored: dict[str, Any] = {}
    for name in files:
        file = index.parent / name
        if Path(name).name != name or not file.is_file():
            raise UserError(
                message=f"{name}, which it names, is not a file beside it: copy all of them"
            )
        try:
            contents = _read_file(file)
        except UserError as error:
            raise UserError(message=f"{name}: {error}") from error
        wanted = [tensor for tensor, place in places.items() if place == name]
        if missing := [tensor for tensor in wanted if tensor not in contents]:
            raise UserError(
                message=f"{name} has no {missing[0]}, unlike the index says: copy it again"
            )
        stored.update({tensor: contents[tensor] for tensor in wanted})
    return stored


def _read_file(file: Path) -> Mapping[Any, Any]:
    """Return the contents of a safetensors file, a PyTorch file or an index, by stored name."""
    if file.name.endswith(INDEX_SUFFIX):
        return _read_index(file)
    if file.suffix not in TORCH_SUFFIXES:
        try:
            archive: Any = safe_open(file, framework="pt")
            return {name: archive.get_tensor(name) for name in archive.keys()}  # noqa: SIM118
        except SafetensorError as error:
            raise UserError(
                message=f"not a whole safetensors file ({error}); copy it again"
            ) from error
    try:
        is_zip = zipfile.is_zipfile(file)  # old PyTorch versions wrote files that cannot be mapped
        contents = torch.load(file, map_location="cpu", weights_only=True, mmap=is_zip)
    except Exception as error:  # torch.load documents no errors, and raises many kinds
        kind = type(error).__name__
        raise UserError(
            message=f"cut short, or not a file of tensors alone ({kind}): save model.state_dict()"
        ) from error
    for name in STATE_DICTS:
        if isinstance(contents, dict) and isinstance(contents.get(name), dict):
            contents = contents[name]
    if not isinstance(contents, dict):
        raise UserError(message="not a state dict: save model.state_dict()")
    return contents


def _model_weights(
    tensors: dict[str, Tensor], config: ModelConfig, shapes: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """Return the tensors by the names of `FlashSTU`."""
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
        raise UserError(
            message=f"does not fit config.json: {', '.join(problems[:3])}{more}; supported are "
            "STU of either form and attention, alternating or STU alone, without biases"
        )
    filters = tensors[FILTERS]
    tensors[FILTERS] = filters.to(torch.promote_types(filters.dtype, torch.float32))
    return {name: tensors[names[name]] for name in shapes}


def _merge_head(tensors: dict[str, Tensor]) -> None:
    """Keep one name of the output matrix, the embedding: checkpoints have either or both."""
    head = tensors.pop(HEAD, None)
    if head is None:
        return
    embedding = tensors.setdefault(EMBEDDING, head)
    if head.dtype != embedding.dtype or not torch.equal(head, embedding):
        raise UserError(
            message=f"{HEAD} differs from {EMBEDDING}: the two must be one tensor here; "
            "import a checkpoint that was trained with tied embeddings"
        )


def _merge_filters(tensors: dict[str, Tensor]) -> None:
    for name in [name for name in tensors if LAYER_FILTERS.fullmatch(name)]:
        layer = tensors.pop(name)
        filters = tensors.setdefault(FILTERS, layer)
        if layer.dtype != filters.dtype or not torch.equal(layer, filters):
            raise UserError(
                message=f"{name} differs from {FILTERS}: all layers must have the same filters"
            )
    if FILTERS not in tensors:
        raise UserError(
            message=f"{FILTERS} is missing: the signs of filters differ between machines; add "
            "the tensor [seq_len, num_eigh] that the checkpoint was trained with to the file"
        )
