"""Files of weights as other programs write them, mapped from the disk.

A file is safetensors or a PyTorch state dict, from which nothing but tensors is loaded, or several
such files with an index. Parts of names that wrappers of a model insert are left out.
"""

import json
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from stu.common.errors import UserError

TORCH_SUFFIXES = (".pt", ".pth", ".bin", ".ckpt")
WRAPPERS = {"module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"}
"""Parts of names that DDP, torch.compile, FSDP and recomputation insert."""
HOLDERS = {"model", "state_dict"}
"""Prefixes of names in modules that contain the model."""
STATE_DICTS = ("state_dict", "model_state_dict", "model")
"""Keys of the weights in training checkpoints."""
INDEX_SUFFIX = ".index.json"


def weights_file(path: Path) -> Path:
    """Return the file of weights, or the index of several, of a folder or of that file itself.

    Raises UserError.
    """
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


def read_tensors(file: Path) -> dict[str, Tensor]:
    """Return tensors by plain name, mapped from the disk where the file allows it.

    Raises UserError, which does not name the file.
    """
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
        is_beside = Path(name).name == name and file.is_file()
        if not is_beside or name.endswith(INDEX_SUFFIX):
            raise UserError(
                message=f"{name}, which it names, is not a file of weights beside it: copy all of "
                "them"
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
            message=f"cut short, or not a file of tensors alone ({kind}): other objects are never "
            "loaded. If you trust the file, save {'state_dict': ..} with its tensors alone again "
            "where it can be loaded, or take one of safetensors, as in HyenaDNA's folders that end "
            "in -hf"
        ) from error
    for name in STATE_DICTS:
        if isinstance(contents, dict) and isinstance(contents.get(name), dict):
            contents = contents[name]
    if not isinstance(contents, dict):
        raise UserError(message="not a state dict: save model.state_dict()")
    return contents
