"""Folders that Hugging Face's transformers loads with `trust_remote_code=True`, and reading them.

config.json, modeling_stu.py ..    the code of `train.checkpoint.hugging_face`, and what finds it
model.safetensors                  weights by our names, after `model.`
tokenizer.json                     and tokenizer_config.json, chat_template.jinja; beside them, the
                                   files of a tokenizer of another kind
generation_config.json             defaults for decoding
README.md                          model card
"""

import json
import logging
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from stu.chat.template import find_template
from stu.common.errors import UserError
from stu.common.files import new_directory
from stu.common.safetensors import misfits, write_safetensors
from stu.config import ModelConfig
from stu.mixers import LongConvolution
from stu.model import FlashSTU
from stu.realisation import NoRealisation, fitting_realisation
from stu.tokenizer import TOKENIZERS, Tokenizer, read_tokenizer
from train.checkpoint import generation_config
from train.checkpoint.hugging_face import model_card
from train.checkpoint.hugging_face.tokenizer_json import FILE as TOKENIZER_JSON
from train.checkpoint.hugging_face.tokenizer_json import NotExact, tokenizer_json
from train.checkpoint.weight_files import read_tensors, weights_file

logger = logging.getLogger(__name__)

MODEL_TYPE = "stu"
CODE = Path(__file__).parent / "hugging_face"
PARTS = "configuration", "modeling", "mixers", "layers", "cache", "memory"
CODE_FILES = [f"{part}_stu.py" for part in PARTS]
AUTO_MAP = {
    "AutoConfig": "configuration_stu.StuConfig",
    "AutoModel": "modeling_stu.StuModel",
    "AutoModelForCausalLM": "modeling_stu.StuForCausalLM",
}
KNOWN_MIXERS = {"stu", "attention", "hyena"}
FILTERS = "filters"
CHAT_TEMPLATE, TOKENIZER_CONFIG = "chat_template.jinja", "tokenizer_config.json"


def save_transformers(
    path: Path,
    model: FlashSTU,
    tokenizer: Tokenizer,
    dtype: torch.dtype,
    overwrite: bool = False,
    generation: Mapping[str, Any] | None = None,
    others: Mapping[str, bytes] | None = None,
    training: Mapping[str, str] | None = None,
    validation: Mapping[str, str] | None = None,
) -> None:
    """Write `model` as a folder that transformers loads, casting one weight at a time.

    Args:
        path: Folder to write.
        model: Model to save.
        tokenizer: Its tokenizer. If none of transformers gives the same ids, the folder gets none,
            and a warning says so.
        dtype: Dtype to cast weights to.
        overwrite: Whether to replace what is at `path`.
        generation: Defaults for decoding.
        others: Contents of files with a chat template, by name.
        training: Facts of the training by name, for the model card.
        validation: Results on the validation split by name, for the model card.

    Raises UserError if `path` is occupied or the model has a mixer of other code; OSError, with
    nothing left behind, if the disk is full.
    """
    if unknown := {*model.config.mixers} - KNOWN_MIXERS:
        raise UserError(
            message=f"layout={model.config.layout!r} cannot be exported for transformers, whose "
            f"code has no mixer {', '.join(sorted(unknown))}: export a model directory"
        )
    names = {name: _name(name) for name in model.state_dict()}
    tensors = {names[name]: t for name, t in model.state_dict().items() if t.numel()}
    wide = {names[name] for name in model.wide_names}
    dtypes = {name: dtype for name in tensors if name not in wide}
    special = _special_ids(tokenizer)
    values = {
        "architectures": ["StuForCausalLM"],
        "auto_map": AUTO_MAP,
        "model_type": MODEL_TYPE,
        **model.config.to_dict(),
        "state_rates": _state_rates(model),
        "tie_word_embeddings": True,
        "dtype": str(dtype).removeprefix("torch."),
        **special,
    }
    with new_directory(path, overwrite) as folder:
        try:
            for name in CODE_FILES:
                (folder / name).write_bytes((CODE / name).read_bytes())
            _write_json(folder / "config.json", values)
            defaults = generation_config.generation_config(generation or {}) | special
            _write_json(folder / generation_config.FILE, defaults)
            has_tokenizer = _write_tokenizer(folder, path, model.config, tokenizer, others or {})
            card = model_card.model_card(model, training or {}, validation or {}, has_tokenizer)
            (folder / "README.md").write_text(card, encoding="utf-8")
            # transformers opens a file only if it says that it is torch's.
            write_safetensors(folder / "model.safetensors", tensors, {"format": "pt"}, dtypes)
        except OSError as error:
            raise OSError(f"{path}: could not be written: {error}") from error


def read_config(path: Path) -> dict[str, Any] | None:
    """Return the contents of config.json in a folder for transformers, or beside a file in it;
    None: it is no such folder."""
    file = (path if path.is_dir() else path.parent) / "config.json"
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):  # whoever reads another layout says what is wrong
        return None
    return values if isinstance(values, dict) and values.get("model_type") == MODEL_TYPE else None


def load_transformers(path: Path, config: Mapping[str, Any]) -> FlashSTU:
    """Return the model of a folder for transformers, or of a file in it, weights in their own
    dtype.

    config: Contents of its config.json. Raises UserError, naming the file.
    """
    known = {field.name for field in fields(ModelConfig)}
    weights = weights_file(path)
    file = weights.parent / "config.json"
    try:
        shape = ModelConfig.from_dict({key: config[key] for key in config if key in known})
    except UserError as error:
        raise UserError(error.field, message=f"{file}: {error}") from error
    with torch.device("meta"):
        model = FlashSTU(shape)
    try:
        model.load_state_dict(_own_weights(read_tensors(weights), model), assign=True)
    except UserError as error:
        raise UserError(message=f"{weights}: {error}") from error
    return model.eval()


def load_tokenizer(folder: Path, vocab_size: int) -> Tokenizer:
    """Return the tokenizer of a folder for transformers: of the kind that it was exported with, or
    else of its tokenizer.json. Raises UserError."""
    files = {name: folder / name for name in TOKENIZERS if (folder / name).is_file()}
    if len(files) > 1:
        files.pop(TOKENIZER_JSON, None)
    for file in files.values():
        return read_tokenizer(file, vocab_size)
    raise UserError("tokenizer", message=f"{folder}: has no tokenizer: name one with --tokenizer")


def other_files(folder: Path) -> dict[str, bytes]:
    """Return the chat template of a folder for transformers, by the name of its file."""
    template = find_template(folder)[1]
    return {} if template is None else {CHAT_TEMPLATE: template.encode()}


def _name(ours: str) -> str:
    if ours == FILTERS:
        return "model.filters.taps"
    return "model." + ours.replace(".mixer.filter.", ".mixer.implicit_filter.")


def _own_weights(tensors: dict[str, Tensor], model: FlashSTU) -> dict[str, Tensor]:
    """Return the tensors by the names of `FlashSTU`. Raises UserError."""
    tensors = {f"model.{name}": tensor for name, tensor in tensors.items()}
    tensors.pop("model.lm_head.weight", None)  # the embedding
    shapes = model.state_dict()
    if FILTERS in shapes and not shapes[FILTERS].numel():
        tensors[_name(FILTERS)] = torch.empty_like(shapes[FILTERS], device="cpu")
    if problems := misfits(tensors, {_name(name): tensor for name, tensor in shapes.items()}):
        raise UserError(message=f"does not fit config.json: {problems}")
    own = {name: tensors[_name(name)] for name in shapes}
    for name in model.wide_names & own.keys():
        own[name] = own[name].to(torch.promote_types(own[name].dtype, torch.float32))
    return own


def _state_rates(model: FlashSTU) -> list[float] | None:
    """Return the rates of states that give all filters, alone and in each channel, if there are
    any."""
    layers = [mixer for mixer in model.mixers if isinstance(mixer, LongConvolution)]
    layers = [mixer for mixer in layers if mixer.needs_filters]
    if not layers:
        return None
    mixed = [mixer.past.basis == "mixed" for mixer in layers]
    weights = [
        m.basis(model.filters)[1] if is_mixed else None
        for m, is_mixed in zip(layers, mixed, strict=True)
    ]
    detached = [None if own is None else own.detach().double() for own in weights]
    try:
        found, _ = fitting_realisation(model.filters.double(), [None, *detached], torch.float32)
    except NoRealisation as reason:
        logger.warning("transformers will keep all inputs while it generates, as %s", reason)
        return None
    return [float(rate) for rate in found.rates]


def _special_ids(tokenizer: Tokenizer) -> dict[str, int]:
    """Return the ids of BOS, EOS and padding, by the names of transformers."""
    ids = {"bos_token_id": tokenizer.bos_id, "eos_token_id": tokenizer.eos_id}
    ids["pad_token_id"] = tokenizer.eos_id if tokenizer.eos_id >= 0 else tokenizer.bos_id
    return {name: token for name, token in ids.items() if token >= 0}


def _write_tokenizer(
    folder: Path,
    path: Path,
    config: ModelConfig,
    tokenizer: Tokenizer,
    others: Mapping[str, bytes],
) -> bool:
    """Write the files of the tokenizer and its chat template, and return whether transformers can
    use it."""
    own = {name: data for name, data in tokenizer.files.items() if name != TOKENIZER_CONFIG}
    for name, contents in own.items():
        (folder / name).write_bytes(contents)
    if CHAT_TEMPLATE in others:
        (folder / CHAT_TEMPLATE).write_bytes(others[CHAT_TEMPLATE])
    try:
        contents = tokenizer_json(tokenizer)
    except NotExact as reason:
        logger.warning("%s: no tokenizer for transformers gives the same ids: %s", path, reason)
        return False
    (folder / TOKENIZER_JSON).write_bytes(contents)
    names = {
        name.removesuffix("_id"): tokenizer.token_text(token)
        for name, token in _special_ids(tokenizer).items()
    }
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": None,
        "eos_token": None,
        **names,
        "padding_side": "left",
        "model_input_names": ["input_ids", "attention_mask"],
        "model_max_length": config.max_seq_len,
        "clean_up_tokenization_spaces": False,
    }
    _write_json(folder / TOKENIZER_CONFIG, settings)
    return True


def _write_json(file: Path, values: Mapping[str, Any]) -> None:
    file.write_text(json.dumps(values, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
