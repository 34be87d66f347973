"""Reading and writing checkpoints in the published layout, weights mapped from the disk.

config.json          see `train.checkpoint.published_layout`
model.safetensors    or a PyTorch file of the same tensors, or several files with an index
"""

import json
import logging
import re
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from stu.common.errors import UserError
from stu.common.files import new_directory
from stu.common.safetensors import misfits, write_safetensors
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
from train.checkpoint.weight_files import read_tensors, weights_file

logger = logging.getLogger(__name__)

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
    file = weights_file(path)
    config = _read_config(file.parent / "config.json", norm_eps)
    with torch.device("meta"):
        model = FlashSTU(config)
    try:
        weights = _model_weights(read_tensors(file), config, model.state_dict())
    except UserError as error:
        raise UserError(message=f"{file}: {error}") from error
    model.load_state_dict(weights, assign=True)
    return model.eval()


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


def _model_weights(
    tensors: dict[str, Tensor], config: ModelConfig, shapes: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """Return the tensors by the names of `FlashSTU`."""
    _merge_head(tensors)
    _merge_filters(tensors)
    names = published_names(config)
    if problems := misfits(tensors, {names[name]: tensor for name, tensor in shapes.items()}):
        raise UserError(
            message=f"does not fit config.json: {problems}; supported are STU of either form and "
            "attention, alternating or STU alone, without biases"
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
