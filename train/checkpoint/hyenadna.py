"""Reading HyenaDNA's published checkpoints (`LongSafari/hyenadna-*` on Hugging Face's hub).

config.json            of either repository of a model: with `d_model` and `layer`, or with
                       `model_type: hyenadna` in those whose names end in `-hf`
weights.ckpt           or model.safetensors: the same tensors, after `model.` or `hyena.`

The layers are Hyena of order 2 in `plain` blocks. Checkpoints hold the features of lags and the
decays of windows, which are compared with the formula; the number added to windows they do not
hold. The tokenizer has a token for each letter, and no file that says so.
"""

import json
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from stu.common.errors import UserError
from stu.common.safetensors import FLOATS
from stu.config import ModelConfig
from stu.hyena import (
    DECAYED_TO,
    FASTEST,
    FILTER_WIDTH,
    LOWEST_BAND,
    SHORT_TAPS,
    SINE_LAYERS,
    SLOWEST,
)
from stu.model import FlashSTU
from stu.tokenizer import Tokenizer, make_tokenizer
from train.checkpoint.weight_files import read_tensors, weights_file

WINDOW_FLOOR = 0.05
"""Number added to windows in the published code (`shift`)."""
SPECIAL = ("[CLS]", "[SEP]", "[BOS]", "[MASK]", "[PAD]", "[RESERVED]", "[UNK]")
LETTERS = "ACGTN"
REQUIRED = {
    ("hyena_order", "order"): 2,
    ("short_filter_order",): SHORT_TAPS,
    ("num_inner_mlps",): SINE_LAYERS - 1,
    ("modulate",): True,
    ("num_heads",): 1,
}
"""Settings by their names in either config.json, and the value that they must have."""
METRICS = re.compile(r"(train|val|test)_torchmetrics\.")
"""Names of tensors that are no weights."""
EMBEDDING, HEAD = "backbone.embeddings.word_embeddings.weight", "lm_head.weight"
BLOCK = {
    "mixer_norm": "norm1",
    "mlp_norm": "norm2",
    "mlp.up": "mlp.fc1",
    "mlp.down": "mlp.fc2",
    "mixer.input": "mixer.in_proj",
    "mixer.output": "mixer.out_proj",
}
"""Modules with a weight and a bias, by our names."""
SHORT, FILTER = "mixer.short_filter", "mixer.filter_fn"
NETWORK = f"{FILTER}.implicit_filter"


def read_config(path: Path) -> dict[str, Any] | None:
    """Return the contents of the config.json of a HyenaDNA checkpoint, a folder or a file in it;
    None: it is no such checkpoint."""
    folder = path if path.is_dir() else path.parent
    try:
        values = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):  # whoever reads another layout says what is wrong
        return None
    if not isinstance(values, dict):
        return None
    layer = values.get("layer")
    is_hyena = isinstance(layer, dict) and layer.get("_name_") == "hyena"
    return values if is_hyena or values.get("model_type") == "hyenadna" else None


def load_hyenadna(path: Path, config: Mapping[str, Any]) -> FlashSTU:
    """Return the model of a HyenaDNA checkpoint, weights in their own dtype, and those of filters
    in float32 or wider.

    config: Contents of its config.json. Raises UserError, naming the file, for what is missing,
    damaged or not supported.
    """
    file = weights_file(path)
    try:
        tensors = {_plain(name): tensor for name, tensor in read_tensors(file).items()}
        tensors = {name: t for name, t in tensors.items() if not METRICS.match(name)}
        for name, tensor in tensors.items():
            if tensor.dtype not in FLOATS:
                needed = "floats of 16 bits or more"
                raise UserError(message=f"{name} is {tensor.dtype}, not {needed}")
        shape = _shape(tensors, config)
        with torch.device("meta"):
            model = FlashSTU(shape)
        weights = _weights(tensors, shape, model)
    except UserError as error:
        raise UserError(message=f"{file}: {error}") from error
    model.load_state_dict(weights, assign=True)
    return model.eval()


def hyenadna_tokenizer(vocab_size: int) -> Tokenizer:
    """Return the tokenizer of HyenaDNA's models: DNA's letters, and [UNK] for all else."""
    special = {name: token for token, name in enumerate(SPECIAL)}
    values = {
        "alphabet": {letter: len(SPECIAL) + i for i, letter in enumerate(LETTERS)},
        "special_tokens": special,
        "bos_token": None,
        "eos_token": "[SEP]",
        "unknown_token": "[UNK]",
    }
    files = {"alphabet.json": (json.dumps(values, indent=2) + "\n").encode()}
    return make_tokenizer(files, Path("of HyenaDNA"), vocab_size)


def _plain(name: str) -> str:
    """Return a name without the parts in which the two repositories differ, and those that
    recomputation inserts."""
    return (
        name.removeprefix("hyena.")
        .replace(".mixer.layer.", ".mixer.")
        .replace(".mlp.layer.", ".mlp.")
    )


def _shape(tensors: Mapping[str, Tensor], config: Mapping[str, Any]) -> ModelConfig:
    """Return the model that the tensors and their configuration describe. Raises UserError."""
    layer = config.get("layer")
    settings = {**config, **(layer if isinstance(layer, dict) else {})}
    for names, needed in REQUIRED.items():
        for name in names:
            if settings.get(name, needed) != needed:
                raise UserError(name, settings[name], str(needed).lower())
    layers = [re.match(r"backbone\.layers\.(\d+)\.", name) for name in tensors]
    first = "backbone.layers.0"
    for name in (EMBEDDING, f"{first}.mlp.fc1.weight", f"{first}.{NETWORK}.0.weight"):
        if name not in tensors or tensors[name].ndim != 2 or not tensors[name].numel():
            raise UserError(message=f"{name} is missing, or no matrix: not HyenaDNA's layout")
    vocab_size, width = tensors[EMBEDDING].shape
    features = tensors.get(f"{first}.{FILTER}.pos_emb.z")
    longest = settings.get("max_seq_len", settings.get("l_max"))
    if features is not None and features.ndim == 3:
        longest = features.shape[1]
    if longest is None:
        raise UserError("max_seq_len", message="max_seq_len is missing in config.json")
    return ModelConfig(
        vocab_size=vocab_size,
        width=width,
        num_layers=1 + max(int(found[1]) for found in layers if found),
        layout="hyena",
        max_seq_len=longest,
        mlp_ratio=tensors[f"{first}.mlp.fc1.weight"].shape[0] // width,
        num_heads=1,
        norm_eps=settings.get("layer_norm_epsilon", 1e-5),
        blocks="plain",
        filter_bands=tensors[f"{first}.{NETWORK}.0.weight"].shape[1] // 2,
        filter_floor=settings.get("shift", WINDOW_FLOOR),
    )


def _weights(tensors: dict[str, Tensor], config: ModelConfig, model: FlashSTU) -> dict[str, Tensor]:
    """Return the weights by the names of `FlashSTU`. Raises UserError."""
    shapes = model.state_dict()
    weights = {"filters": torch.empty(shapes["filters"].shape, dtype=torch.float32)}
    width = config.width
    # Numbers between the matrices of the network that computes filters.
    sizes = [1 + 2 * config.filter_bands, *[FILTER_WIDTH] * SINE_LAYERS, width]

    def take(name: str, *shape: int) -> Tensor:
        if name not in tensors:
            raise UserError(message=f"{name} is missing")
        if shape and tensors[name].shape != shape:
            found = list(tensors[name].shape)
            raise UserError(message=f"{name} is of shape {found}, not {list(shape)}")
        return tensors.pop(name)

    weights["embedding.weight"] = take(EMBEDDING)
    head = tensors.pop(HEAD, weights["embedding.weight"])
    if not _are_equal(head, weights["embedding.weight"]):
        raise UserError(message=f"{HEAD} differs from {EMBEDDING}: the two must be one matrix here")
    for kind in ("weight", "bias"):
        weights[f"norm.{kind}"] = take(f"backbone.ln_f.{kind}")
    for layer in range(config.num_layers):
        theirs, ours = f"backbone.layers.{layer}.", f"blocks.{layer}."
        for own, published in BLOCK.items():
            for kind in ("weight", "bias"):
                weights[f"{ours}{own}.{kind}"] = take(f"{theirs}{published}.{kind}")
        # A published tap is at its distance from the last one.
        short = take(f"{theirs}{SHORT}.weight", 3 * width, 1, SHORT_TAPS)
        weights[f"{ours}mixer.short_taps"] = short.flatten(1).flip(-1).T.contiguous()
        weights[f"{ours}mixer.short_bias"] = take(f"{theirs}{SHORT}.bias")
        _check_fixed(tensors, theirs, config)
        matrices = [
            take(f"{theirs}{NETWORK}.{2 * i}.weight", *sizes[i : i + 2][::-1]).T
            for i in range(SINE_LAYERS + 1)
        ]
        network = {
            "input_matrix": matrices[0],
            "hidden_matrices": torch.stack(matrices[1:-1]),
            "output_matrix": matrices[-1],
            "biases": torch.stack(
                [take(f"{theirs}{NETWORK}.{2 * i}.bias", FILTER_WIDTH) for i in range(SINE_LAYERS)]
            ),
            "frequencies": _frequencies(tensors, f"{theirs}{NETWORK}"),
            "skip": take(f"{theirs}{FILTER}.bias"),
        }
        for name, tensor in network.items():
            wide = tensor.to(torch.promote_types(tensor.dtype, torch.float32))
            weights[f"{ours}mixer.filter.{name}"] = wide.contiguous()
    if tensors:
        raise UserError(message=f"{next(iter(tensors))} is unknown: not HyenaDNA's layout")
    for name, tensor in weights.items():
        if tensor.shape != shapes[name].shape:
            found, needed = list(tensor.shape), list(shapes[name].shape)
            raise UserError(message=f"{name} would be of shape {found}, not {needed}")
    return weights


def _are_equal(one: Tensor, other: Tensor) -> bool:
    return one.dtype == other.dtype and torch.equal(one, other)


def _frequencies(tensors: dict[str, Tensor], network: str) -> Tensor:
    """Return the factors in the sines, which all layers share; files may have them once."""
    names = [f"{network}.{2 * i + 1}.freq" for i in range(SINE_LAYERS)]
    found = [tensors.pop(name) for name in names if name in tensors]
    if not found or not all(_are_equal(found[0], other) for other in found):
        raise UserError(message=f"{names[0]} is missing, or differs from those of other layers")
    return found[0].flatten()


def _check_fixed(tensors: dict[str, Tensor], layer: str, config: ModelConfig) -> None:
    """Remove what the formula gives. Raises UserError if it was trained."""
    length = config.max_seq_len
    lags = torch.arange(length, dtype=torch.float64)[:, None]
    times = lags / max(1, length - 1)
    ends = LOWEST_BAND, config.filter_bands - 1
    bands = torch.linspace(*ends, config.filter_bands, dtype=torch.float64)
    angles = 2 * math.pi / length * lags * bands
    slow, fast = (math.log(DECAYED_TO) / share for share in (SLOWEST, FASTEST))
    formulas = {
        "pos_emb.z": torch.cat([times, angles.cos(), -angles.sin()], dim=1),
        "pos_emb.t": times,
        "modulation.deltas": torch.linspace(slow, fast, config.width, dtype=torch.float64)[None],
    }
    for name, formula in formulas.items():
        stored = tensors.pop(f"{layer}{FILTER}.{name}", None)
        if stored is None:
            continue
        rounding = max(2e-5, 2 * torch.finfo(stored.dtype).eps) * float(formula.abs().max())
        fits = stored.shape == (1, *formula.shape)
        if not fits or float((stored[0].double() - formula).abs().max()) > rounding:
            raise UserError(
                message=f"{layer}{FILTER}.{name} is not what the formula gives: it was trained, "
                "and here it is fixed"
            )
