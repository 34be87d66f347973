"""Checkpoints in the published layout, read and written with their weights mapped from the disk.

config.json          as `train.checkpoint.published_layout` has it
model.safetensors    or a torch file of the same tensors, or several files with an index
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
"""What DDP, torch.compile, FSDP and recomputation put into names."""
HOLDERS = {"model", "state_dict"}
"""Prefixes of names in a module that contains the model."""
STATE_DICTS = ("state_dict", "model_state_dict", "model")
"""Where training checkpoints keep weights among other things."""
INDEX_SUFFIX = ".index.json"
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
            "%s: norm_eps is %g, and the published code has torch's default, %g: change it there",
            path,
            model.config.norm_eps,
            NORM_EPS,
        )


def load_published(path: Path, norm_eps: float | None = None) -> FlashSTU:
    """The model of a published checkpoint: a folder, a file of weights beside its config.json, or
    the index of several such files.

    Weights keep their dtype; the stored filters become float32 or wider. norm_eps: in place of what
    config.json says. Raises ValueError, naming the file and what to do, for what is missing,
    damaged, or no model here.
    """
    file = _weights_file(path)
    config = _read_config(file.parent / "config.json", norm_eps)
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
    if (whole := path / "model.safetensors").is_file():
        return whole
    indexes = sorted(path.glob(f"*{INDEX_SUFFIX}"))
    found = sorted(f for f in path.iterdir() if f.suffix in (".safetensors", *TORCH_SUFFIXES))
    if len(indexes) == 1:
        return indexes[0]
    if len(found) == 1:
        return found[0]
    names = ", ".join(f.name for f in (*indexes, *found)) or "none"
    raise ValueError(
        f"{path}: a model.safetensors, one other file of weights, or several with one "
        f"model.safetensors.index.json are needed ({names} found): name the file"
    )


def _read_config(file: Path, norm_eps: float | None) -> ModelConfig:
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
        if not isinstance(values, dict):
            raise ValueError("a JSON object is needed")
        if norm_eps is not None:
            values["norm_eps"] = norm_eps
        elif "norm_eps" not in values:
            logger.warning(
                "%s has no norm_eps: RMSNorm's epsilon is taken as torch's default, %g, which the "
                "published code has; --norm-eps 1e-6 is that of liger-kernel",
                file,
                NORM_EPS,
            )
        return model_config(values)
    except FileNotFoundError as error:
        raise ValueError(f"{file}: no such file; put it beside the weights") from error
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from error


def _read_tensors(file: Path) -> dict[str, Tensor]:
    """By their published names, mapped from the disk where the file allows it."""
    tensors: dict[str, Any] = {}
    for name, tensor in _stored(file).items():
        plain = _plain_name(str(name))
        if not isinstance(tensor, Tensor):
            raise ValueError(f"{name} is not a tensor: save model.state_dict() alone")
        if plain in tensors:
            raise ValueError(f"{plain} is there twice: save the state dict of one model")
        tensors[plain] = tensor
    return tensors


def _plain_name(name: str) -> str:
    """Without what other modules around the model, and wrappers within it, put into it."""
    parts = name.split(".")
    while len(parts) > 1 and parts[0] in {*WRAPPERS, *HOLDERS}:
        parts.pop(0)
    return ".".join(part for part in parts if part not in WRAPPERS)


def _indexed(index: Path) -> dict[str, Any]:
    """Tensors of all the files that an index names. Raises ValueError for a file that is missing,
    or has not what the index says."""
    try:
        places = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        files = sorted({str(file) for file in places.values()})
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"not an index of weights with a weight_map ({error!r})") from error
    stored: dict[str, Any] = {}
    for name in files:
        file = index.parent / name
        if Path(name).name != name or not file.is_file():
            raise ValueError(f"{name}, which it names, is not a file beside it: copy all of them")
        try:
            contents = _stored(file)
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from error
        wanted = [its for its, place in places.items() if place == name]
        if missing := [its for its in wanted if its not in contents]:
            raise ValueError(f"{name} has no {missing[0]}, unlike the index says: copy it again")
        stored.update({its: contents[its] for its in wanted})
    return stored


def _stored(file: Path) -> Mapping[Any, Any]:
    if file.name.endswith(INDEX_SUFFIX):
        return _indexed(file)
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
    for name in STATE_DICTS:
        if isinstance(contents, dict) and isinstance(contents.get(name), dict):
            contents = contents[name]
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
