"""Model directories, which training exports and serving loads.

    config.json          ModelConfig
    model.safetensors    weights and spectral filters, `[L, 0]` where no layer is an STU; the format
                         version is in the metadata; matrices of 8 bits (`stu.quantization`) have a
                         tensor NAME.scales beside them
    tokenizer.model      SentencePiece model, or the files of another tokenizer (`stu.tokenizer`)
    generation.json      defaults for decoding

A directory is written under a temporary name and renamed, so readers see all of it or nothing.
"""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import nn

from stu.common.errors import UserError
from stu.common.files import new_directory
from stu.common.safetensors import misfits, write_safetensors
from stu.config import ModelConfig, Weights
from stu.division.parts import SCALES, Parts
from stu.mixers import Mixer
from stu.model import FlashSTU
from stu.quantization import (
    DTYPES,
    ByteWeights,
    Quantized,
    QuantizedLinear,
    dequantize,
    quantize,
)
from stu.slices.channels import ChannelRanks
from stu.tokenizer import Tokenizer, read_tokenizer

FORMAT_VERSIONS: dict[Weights, int] = {"float": 1, "int8": 2}
GENERATION_DEFAULTS: dict[str, Any] = {
    "max_new_tokens": 256,
    "temperature": 0.0,
    "top_k": 0,
    "top_p": 1.0,
}


def save_model(
    path: str | Path,
    model: FlashSTU,
    tokenizer: Tokenizer,
    generation: Mapping[str, Any] | None = None,
    overwrite: bool = False,
    dtype: torch.dtype | None = None,
    weights: Weights = "float",
    others: Mapping[str, bytes] | None = None,
) -> None:
    """Write a model directory.

    Args:
        path: Directory to make.
        model: Model to save.
        tokenizer: Tokenizer that the model was trained with.
        generation: Defaults for decoding, which override `GENERATION_DEFAULTS`.
        overwrite: Whether to replace what is at `path`.
        dtype: Dtype to cast weights to, one at a time; None keeps their dtypes. Tensors in the
            model's `wide_names` are never cast.
        weights: Format of the matrices; those of 8 bits are what the engine makes of the float ones
            under `weights="int8"`. The model itself has float ones.
        others: Contents of other files by name, such as a chat template, which the tokenizer's own
            files replace.

    Raises UserError if `path` is occupied and `overwrite` is off, if the vocabularies differ, or
    for a model with matrices of 8 bits in memory; OSError, with nothing left behind, if the disk is
    full.
    """
    if tokenizer.vocab_size != model.config.vocab_size:
        raise UserError(
            "tokenizer",
            message=f"the tokenizer has {tokenizer.vocab_size} tokens and the model has "
            f"vocab_size={model.config.vocab_size}; give the tokenizer that it was trained with",
        )
    if any(isinstance(module, QuantizedLinear) for module in model.modules()):
        raise UserError(
            "weights",
            message="a model whose matrices have 8 bits in memory cannot be saved: load it with "
            'weights="float", and save it with weights="int8"',
        )
    with new_directory(Path(path), overwrite) as folder:
        _write_json(folder / "config.json", model.config.stored())
        limit = {"max_new_tokens": min(256, max(1, model.config.max_seq_len // 2))}
        defaults = {**GENERATION_DEFAULTS, **limit, **(generation or {})}
        _write_json(folder / "generation.json", defaults)
        for name, contents in (others or {}).items():
            (folder / name).write_bytes(contents)
        tokenizer.save(folder)
        tensors = model.state_dict()
        dtypes = {name: dtype for name in tensors.keys() - model.wide_names if dtype}
        if weights == "int8":
            for name, dim in model.matrices.items():
                matrix, scales = quantize(tensors[name].movedim(dim, 0))
                tensors |= {name: matrix.movedim(0, dim), name + SCALES: scales}
                dtypes.pop(name, None)
        metadata = {"format": "stu", "format_version": str(FORMAT_VERSIONS[weights])}
        try:
            write_safetensors(folder / "model.safetensors", tensors, metadata, dtypes)
        except OSError as error:
            raise OSError(f"{path}: model.safetensors could not be written: {error}") from error


def load_model(
    path: str | Path,
    device: str | torch.device = "cpu",
    dtype: torch.dtype | None = torch.float32,
    weights: Weights | ByteWeights | None = "float",
    ranks: ChannelRanks | None = None,
) -> FlashSTU:
    """Load the model of a model directory, in eval mode. `load_tokenizer` loads the tokenizer.

    Args:
        path: Model directory.
        device: Device of the weights.
        dtype: Dtype of the weights; None keeps the stored dtypes and, on the CPU, maps the weights
            from disk.
        weights: Format of the matrices in memory; None: as stored. Modules with 8-bit matrices are
            `stu.quantization.QuantizedLinear`. The model's attribute `weights` is the format in
            which the engine decodes by default: this one, or int8 if the matrices are stored so.
        ranks: Ranks that divide the model. Each reads only its part of the file, and all must load
            at the same time.

    Raises UserError, naming the file, if a file is missing, truncated, has other shapes, or was
    written by a newer version.
    """
    path = Path(path)
    config = load_config(path)
    with torch.device("meta"):
        model = FlashSTU(config)
    matrices, parts = model.matrices, Parts(model, ranks)
    tensors = _read_weights(path / "model.safetensors", device, parts.read)
    quantized: dict[str, Quantized] = {}
    for name, dim in matrices.items():
        matrix, scales = tensors.get(name), tensors.pop(name + SCALES, None)
        if matrix is not None and scales is not None:
            _check_scales(path / "model.safetensors", name, matrix, scales, dim)
            stored = Quantized(matrix.movedim(dim, 0), scales)
            model.weights = "int8"
            if weights in ("int8", None):
                quantized[name] = stored
                tensors[name] = torch.empty(matrix.shape, device="meta")
            else:
                wide = dequantize(stored).movedim(0, dim)
                tensors[name] = wide.to(dtype or torch.float32).contiguous()
    if problems := misfits(tensors, model.state_dict(), wide={"filters"}):
        file = path / "model.safetensors"
        raise UserError(str(file), message=f"{file} does not fit config.json: {problems}")
    model.load_state_dict(tensors, assign=True)
    del tensors
    if weights in DTYPES:
        model.weights = weights
    for name, dim in matrices.items():
        if weights in DTYPES and name not in quantized:
            wide = model.get_parameter(name).movedim(dim, 0)
            quantized[name] = quantize(wide, weights, parts.largest_of_all(name))
        if name in quantized:
            _replace_matrix(model, name, quantized.pop(name))
    return parts.exchange(model if dtype is None else model.to(dtype)).eval()


def load_config(path: str | Path) -> ModelConfig:
    """Load the configuration of a model directory. Raises UserError."""
    file = Path(path) / "config.json"
    values = _read_json(file)
    try:
        return ModelConfig.from_dict(values)
    except UserError as error:
        raise UserError(error.field, message=f"{file}: {error}") from error


def load_tokenizer(path: str | Path) -> Tokenizer:
    """Load the tokenizer of a model directory, with the vocabulary of the model.

    A model may have ids that belong to no token (`Tokenizer.pad`). Raises UserError.
    """
    return read_tokenizer(path, load_config(path).vocab_size)


def load_generation(path: str | Path) -> dict[str, Any]:
    """Load the decoding defaults of a model directory, with the keys of `GENERATION_DEFAULTS`."""
    return {**GENERATION_DEFAULTS, **_read_json(Path(path) / "generation.json")}


def _replace_matrix(model: FlashSTU, name: str, weight: Quantized) -> None:
    """Replace the matrix of that name, or the module whose weight it is, by one of 8 bits."""
    path = name.rpartition(".")[0]
    module = model.get_submodule(path)
    if isinstance(module, Mixer):  # it multiplies with its own parameter
        module.pack(lambda _: QuantizedLinear(weight))
    else:
        assert isinstance(module, nn.Linear)
        parent, _, child = path.rpartition(".")
        setattr(model.get_submodule(parent), child, QuantizedLinear(weight, module.bias))


def _read_weights(
    file: Path, device: str | torch.device, read: Callable[[Any, str], torch.Tensor]
) -> dict[str, torch.Tensor]:
    if not file.is_file():
        raise UserError(
            str(file), message=f"{file}: no such file; is {file.parent} a model directory?"
        )
    try:
        with safe_open(file, framework="pt", device=str(device)) as archive:
            _check_version(file, archive.metadata() or {})
            return {name: read(archive, name) for name in archive.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise UserError(
            str(file),
            message=f"{file}: not a whole safetensors file ({error}); export or copy it again",
        ) from error


def _check_version(file: Path, metadata: Mapping[str, str]) -> None:
    version = metadata.get("format_version", "")
    if metadata.get("format") != "stu" or not version.isdecimal():
        raise UserError(
            str(file),
            message=f"{file}: not written by stu-export (its metadata names no stu format)",
        )
    newest = max(FORMAT_VERSIONS.values())
    if int(version) > newest:
        raise UserError(
            str(file),
            message=f"{file}: format version {version}, and this stu reads up to {newest}: "
            "install a newer stu",
        )


def _check_scales(
    file: Path, name: str, matrix: torch.Tensor, scales: torch.Tensor, dim: int
) -> None:
    shape = matrix.shape[dim : dim + 1]
    are_scales = scales.dtype == torch.float32 and scales.shape == shape
    if matrix.dtype != torch.int8 or matrix.ndim != 2 or not are_scales:
        raise UserError(
            str(file),
            message=f"{file}: {name}{SCALES} ({scales.dtype}, {tuple(scales.shape)}) does not "
            f"belong to {name} ({matrix.dtype}, {tuple(matrix.shape)}); copy the model again",
        )


def _write_json(file: Path, values: Mapping[str, Any]) -> None:
    file.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")


def _read_json(file: Path) -> dict[str, Any]:
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise UserError(
            str(file), message=f"{file}: no such file; is {file.parent} a model directory?"
        ) from error
    except ValueError as error:
        raise UserError(str(file), message=f"{file}: not JSON ({error})") from error
    if not isinstance(values, dict):
        raise UserError(str(file), message=f"{file}: a JSON object is needed")
    return values
