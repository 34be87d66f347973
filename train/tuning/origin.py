"""The model whose weights a run starts from (`--init-from`).

Its shape becomes the default of `model.config.*`, of which only two fields may differ:

- `max_seq_len`: an STU's filters are computed anew for the new length, and those of Hyena, which
  are functions of the lag as a share of `max_seq_len`, stretch with it. All weights stay.
- `vocab_size`: rows of the embedding are kept by token (`--init-tokens`).
"""

import hashlib
import json
from collections import defaultdict
from pathlib import Path
from typing import Any

import torch

from stu.common.errors import UserError
from stu.config import ModelConfig
from stu.model import FlashSTU
from stu.model_dir import load_model, load_tokenizer
from stu.tokenizer import Tokenizer, read_tokenizer, tokenizers_in
from train.checkpoint import hyenadna, transformers_folder
from train.checkpoint.folder import CHECKPOINTS, TRAINING_FILE
from train.checkpoint.published import load_published
from train.data.shards import TokenShards

MAY_DIFFER = ("vocab_size", "max_seq_len")
"""Fields of the shape that need not be those of the model to start from."""
EMBEDDING = "embedding.weight"


class Origin:
    """A model to start from: a model directory, or what `stu-import` reads. Weights are mapped from
    the disk.

    Raises UserError, naming the file, for what is missing or damaged.
    """

    model: FlashSTU
    tokenizer: Tokenizer | None
    """Its tokenizer, if its folder has one."""

    def __init__(self, path: Path) -> None:
        self.path = path
        if (path / TRAINING_FILE).exists() or (path / CHECKPOINTS).is_dir():
            fix = f"export it first: stu-export {path} --output MODEL_DIR"
            raise UserError("init_from", path, fix=fix)
        if (config := transformers_folder.read_config(path)) is not None:
            self.model = transformers_folder.load_transformers(path, config)
            folder, size = path if path.is_dir() else path.parent, self.model.config.vocab_size
            self.tokenizer = transformers_folder.load_tokenizer(folder, size)
        elif (config := hyenadna.read_config(path)) is not None:
            self.model = hyenadna.load_hyenadna(path, config)
            self.tokenizer = hyenadna.hyenadna_tokenizer(self.model.config.vocab_size)
        elif path.is_dir() and _is_model_dir(path / "config.json"):
            self.model, self.tokenizer = load_model(path, dtype=None), load_tokenizer(path)
        else:
            self.model = load_published(path)
            self.tokenizer = _published_tokenizer(path, self.model.config.vocab_size)

    def shape(self, shards: TokenShards | None) -> dict[str, Any]:
        """Return the fields of the shape that a run has by default. Shards of another tokenizer
        decide the vocabulary."""
        values = self.model.config.to_dict()
        if shards is not None and self._is_other(shards):
            del values["vocab_size"]
        return values

    def check(self, config: ModelConfig, shards: TokenShards | None, by_bytes: bool) -> None:
        """Raise UserError unless a model of the shape `config` can start from this one.

        by_bytes: whether the tokenizer of the shards may be another one.
        """
        here, there = config.to_dict(), self.model.config.to_dict()
        if differing := [n for n in there if n not in MAY_DIFFER and here[n] != there[n]]:
            listed = "; ".join(
                f"model.config.{name} is {here[name]!r}, and {there[name]!r} in --init-from "
                f"{self.path}"
                for name in differing
            )
            message = f"{listed}: leave these out, as the shape is that of --init-from"
            raise UserError(f"model.config.{differing[0]}", message=message)
        if shards is not None and self._is_other(shards) and not by_bytes:
            assert self.tokenizer is not None
            message = f"data.dir {shards.folder} was made with another tokenizer than --init-from "
            message += f"{self.path} has: prepare the text with stu-prepare --tokenizer "
            message += f"{self.tokenizer.path}, or keep the rows of tokens that both have with "
            raise UserError("init_tokens", message=f"{message}--init-tokens by-bytes")
        if self.tokenizer is not None:
            return
        if here["vocab_size"] != there["vocab_size"]:
            message = f"model.config.vocab_size is {here['vocab_size']}, and "
            message += f"{there['vocab_size']} in --init-from {self.path}, which has no tokenizer: "
            message += "prepare the text with its own, or put that beside its weights"
            raise UserError("model.config.vocab_size", message=message)
        if shards is not None and shards.index.vocab_size != there["vocab_size"]:
            message = f"the tokenizer of data.dir {shards.folder} has {shards.index.vocab_size} "
            message += f"tokens, and the model of --init-from {self.path}, which has no tokenizer, "
            message += f"{there['vocab_size']}: put its own beside its weights, and prepare the "
            raise UserError("data.dir", message=f"{message}text with that")

    @torch.no_grad()
    def copy_to(self, model: FlashSTU, shards: TokenShards) -> None:
        """Give `model`, of a shape that passed `check`, these weights."""
        held = model.state_dict()
        for name, tensor in self.model.state_dict().items():
            if name == EMBEDDING:
                rows = self._rows(read_tokenizer(shards.tokenizer_path, len(held[name])))
                known = rows >= 0
                held[name][known] = tensor[rows[known]].to(held[name].dtype)
                held[name][~known] = tensor.double().mean(0).to(held[name].dtype)
            elif name != "filters" or tensor.shape == held[name].shape:
                held[name].copy_(tensor)

    def record(self) -> dict[str, str]:
        """Return path and hash, which a run's checkpoints and the record of its jobs carry."""
        digest = hashlib.sha256()
        for name, tensor in sorted(self.model.state_dict().items()):
            digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
            digest.update(tensor.contiguous().flatten().view(torch.uint8).numpy())
        return {"path": str(self.path.resolve()), "sha256": digest.hexdigest()}

    def _is_other(self, shards: TokenShards) -> bool:
        """Return whether the shards were made with another tokenizer than that of this model."""
        own = self.tokenizer.sha256 if self.tokenizer else shards.index.tokenizer_sha256
        return own != shards.index.tokenizer_sha256

    def _rows(self, tokenizer: Tokenizer) -> torch.Tensor:
        """Return the row of this model's embedding for each token, -1 for none: `[vocab_size]`."""
        before = self.model.config.vocab_size
        if self.tokenizer is None or self.tokenizer.sha256 == tokenizer.sha256:
            same = torch.arange(tokenizer.vocab_size)
            return same.where(same < before, -1)
        by_key = defaultdict(list)
        for token, keys in enumerate(_keys(self.tokenizer)):
            for key in keys:
                by_key[key].append(token)
        counts: dict[Any, int] = defaultdict(int)
        rows: list[int] = []
        for keys in _keys(tokenizer):
            key = next((key for key in keys if key in by_key), None)
            found = by_key.get(key, [])
            # Several tokens may have the same bytes, such as a letter and the byte that it is.
            rows.append(found[min(counts[key], len(found) - 1)] if found else -1)
            counts[key] += 1
        return torch.tensor(rows)


def _keys(tokenizer: Tokenizer) -> list[list[Any]]:
    """Return what identifies each token in other vocabularies, the surest first: its bytes, or its
    roles and its name; nothing for an id of no token."""
    texts = [tokenizer.token_bytes(token) for token in range(tokenizer.vocab_size)]
    keys: list[list[Any]] = [[text] if text else [] for text in texts]
    names = {token: [name] for name, token in tokenizer.control_tokens().items()}
    roles = defaultdict(list)
    for role, token in (("EOS", tokenizer.eos_id), ("BOS", tokenizer.bos_id)):
        if token >= 0:
            roles[token].append((role,))
    for token in names.keys() | roles.keys():
        keys[token] = [*roles[token], *names.get(token, [])]
    return keys


def _is_model_dir(file: Path) -> bool:
    """Return whether a config.json is that of a model directory, and not a published one."""
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return True  # whose reader names the file
    return not isinstance(values, dict) or {"n_embd", "model_type"}.isdisjoint(values)


def _published_tokenizer(path: Path, vocab_size: int) -> Tokenizer | None:
    folder = path if path.is_dir() else path.parent
    return read_tokenizer(folder, vocab_size) if tokenizers_in(folder) else None
