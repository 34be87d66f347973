"""The format of a training checkpoint: a folder that any number of ranks writes and reads.

    training.pt               loops, schedule, position in the data, settings, tokenizer
    rank-00000.safetensors    tensors by name: `weight/NAME`, and the optimizer's `exp_avg/NAME` ..
    rank-00001.safetensors    ..
    SHA256SUMS                checksums of these files for `sha256sum --check`

Names are those of the model's parameters. Tensors are whole and float32, however they were divided
in training, so that ranks, ZeRO stages and micro-batches may differ between a save and a resume.
`training.pt` holds tensors and plain values only; no other pickle is read.
"""

import hashlib
import io
import socket
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from stu.common.errors import UserError
from stu.common.files import fsync
from stu.common.safetensors import write_safetensors

FORMAT_VERSION = 3
WITHOUT_CHECKSUMS = 2
"""Version of the format without `SHA256SUMS`, which is read too."""
CHECKSUM_FILE = "SHA256SUMS"
CHECKSUM_SUFFIX = ".sha256"
MOST_READERS = 8
"""Number of files that are verified at once."""
TRAINING_FILE = "training.pt"
CHECKPOINTS, LAST = "checkpoints", "last.ckpt"
"""Folder of a run's checkpoints, and the link to its newest one."""
TENSOR_KEYS = ("state_dict", "optimizer_states")
"""Keys of Lightning's dictionary whose values are stored as tensors by name."""
WEIGHT = "weight"
DEFAULT_STATE_TENSORS = ["exp_avg", "exp_avg_sq"]
"""State tensors of checkpoints whose groups do not name them, and that do not name those of all
parameters either, as only AdamW's were there."""


class CheckpointFolder:
    """Checkpoint on disk, whose tensors are read one at a time.

    Raises UserError if it is missing, damaged, or not written by stu-train.
    """

    def __init__(self, path: Path) -> None:
        if not path.is_dir():
            raise UserError(message=f"checkpoint {path}: no such folder")
        self.path = path
        self.training = self._read_training()
        """Contents of `training.pt`."""
        version = self.training["stu"].get("format_version", 0)
        self.has_checksums = version == FORMAT_VERSION
        if version not in (WITHOUT_CHECKSUMS, FORMAT_VERSION):
            kind = "a newer" if version > FORMAT_VERSION else "an older"
            raise self._refused(
                f"format version {version}, and this stu reads {FORMAT_VERSION}: install {kind} stu"
            )
        self._files: dict[str, Any] = {}
        for rank in range(self.training["stu"]["num_files"]):
            file = path / _rank_file(rank)
            try:
                opened: Any = safe_open(file, framework="pt")
            except (OSError, SafetensorError) as error:
                raise self._refused(f"{file.name} is damaged ({error})") from error
            self._files |= dict.fromkeys(opened.keys(), opened)

    @property
    def names(self) -> list[str]:
        """Names of all parameters and buffers."""
        start = f"{WEIGHT}/"
        return [name.removeprefix(start) for name in self._files if name.startswith(start)]

    @property
    def optimizer_groups(self) -> list[dict[str, Any]]:
        """The optimizer's parameter groups, with names of parameters as `params`, and those of the
        `state_tensors` that it keeps for each."""
        former = self.training["stu"].get("state_tensors", DEFAULT_STATE_TENSORS)
        return [{"state_tensors": former, **group} for group in self.training["optimizer_groups"]]

    def tensor(self, kind: str, name: str) -> Tensor:
        """Return `weight`, or one of its state tensors, of a parameter."""
        key = f"{kind}/{name}"
        if key not in self._files:
            raise self._refused(f"{key} is missing")
        tensor: Tensor = self._files[key].get_tensor(key)
        return tensor

    def check(self) -> None:
        """Raise UserError unless all tensors of all parameters are there."""
        for group in self.optimizer_groups:
            kinds = group["state_tensors"] if self.training["optimizer_step"] else []
            for key in (f"{kind}/{name}" for name in group["params"] for kind in (WEIGHT, *kinds)):
                if key not in self._files:
                    raise self._refused(f"{key} is missing")

    def verify(self) -> None:
        """Read all files and compare their checksums. Raises UserError if one is damaged."""
        if not self.has_checksums:
            return
        sums = self._read_checksums()
        names = [TRAINING_FILE, *map(_rank_file, range(self.training["stu"]["num_files"]))]
        with ThreadPoolExecutor(min(MOST_READERS, len(names))) as readers:
            found = readers.map(self._checksum, names)
        for name, checksum in zip(names, found, strict=True):
            if checksum != sums.get(name):
                stored = f"{sums.get(name, 'none')} in {CHECKSUM_FILE}"
                raise self._refused(f"{name} is damaged (its sha256 is {checksum}, and {stored})")

    def _read_checksums(self) -> dict[str, str]:
        try:
            lines = (self.path / CHECKSUM_FILE).read_text(encoding="utf-8").splitlines()
            return {name: checksum for checksum, name in (line.split() for line in lines)}
        except (OSError, ValueError) as error:
            raise self._refused(f"{CHECKSUM_FILE} is missing or damaged ({error})") from error

    def _checksum(self, name: str) -> str:
        digest, buffer = hashlib.sha256(), bytearray(2**22)
        try:
            with (self.path / name).open("rb", buffering=0) as file:
                while count := file.readinto(buffer):
                    digest.update(memoryview(buffer)[:count])
        except OSError as error:
            raise self._refused(f"{name} cannot be read ({error})") from error
        return digest.hexdigest()

    def _read_training(self) -> dict[str, Any]:
        file = self.path / TRAINING_FILE
        try:
            contents = torch.load(file, map_location="cpu", weights_only=True)
        except Exception as error:  # torch.load documents no errors, and raises many kinds
            kind = type(error).__name__
            raise self._refused(f"cut short, or not written by stu-train ({kind})") from error
        if not isinstance(contents, dict) or "stu" not in contents:
            raise self._refused("not written by stu-train")
        return contents

    def _refused(self, reason: str) -> UserError:
        return UserError(message=f"checkpoint {self.path}: {reason}")


def write_rank(
    folder: Path, rank: int, tensors: Iterable[tuple[str, str, Tensor]], path: Path
) -> None:
    """Write one rank's share of the checkpoint `path` into the temporary `folder`.

    tensors: kind, name and value. Raises OSError, naming rank and host.
    """
    held = {f"{kind}/{name}": tensor for kind, name, tensor in tensors}
    file, digest = folder / _rank_file(rank), hashlib.sha256()
    try:
        write_safetensors(file, held, {"format": "stu-train"}, {}, digest)
        _write_checksum(file, digest.hexdigest())
        fsync(file)
    except OSError as error:
        raise _not_written(path, rank, error) from error


def write_training(folder: Path, training: dict[str, Any], path: Path) -> None:
    """Write `training.pt` and the checksums on the first rank, after all have written their shares.

    Raises OSError, naming rank and host.
    """
    file, contents = folder / TRAINING_FILE, io.BytesIO()
    try:
        torch.save(training, contents)
        file.write_bytes(contents.getbuffer())
        _write_checksum(file, hashlib.sha256(contents.getbuffer()).hexdigest())
        # By name: a list of the folder may be cached, and lack files of other nodes.
        names = [*map(_rank_file, range(training["stu"]["num_files"])), TRAINING_FILE]
        parts = [folder / f"{name}{CHECKSUM_SUFFIX}" for name in names]
        (folder / CHECKSUM_FILE).write_text("".join(part.read_text() for part in parts))
        for part in parts:
            part.unlink()
        for written in (file, folder / CHECKSUM_FILE, folder):
            fsync(written)
    except (RuntimeError, OSError) as error:  # torch reports a failed write as RuntimeError
        raise _not_written(path, 0, error) from error


def step_name(step: int) -> str:
    """Return the name of a run's checkpoint at a step."""
    return f"step-{step:08d}.ckpt"


def _not_written(path: Path, rank: int, error: Exception) -> OSError:
    host = socket.gethostname()
    text = f"checkpoint {path}: could not be written by rank {rank} on {host} ({error})"
    named = OSError(text)
    named.__cause__ = error
    return named


def _write_checksum(file: Path, checksum: str) -> None:
    """Write the checksum of one file, which `write_training` joins with the others."""
    file.with_name(file.name + CHECKSUM_SUFFIX).write_text(f"{checksum}  {file.name}\n")


def _rank_file(rank: int) -> str:
    return f"rank-{rank:05d}.safetensors"
