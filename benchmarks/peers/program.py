"""Processes and environments of the programs that `python -m benchmarks peers` compares.

Each decodes in a process of its own, so that its memory is its own and no package of one has to
suit another. Peers are installed into a virtual environment each.
"""

import json
import os
import signal
import subprocess
import sys
import tempfile
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

import torch
from tqdm import tqdm

from benchmarks.peers.transformers_models import Llama
from stu.common.errors import UserError, requires_extra
from stu.common.processes import last_output
from stu.config import ModelConfig

SAMPLES_PER_SECOND = 5
"""Looks at the memory of a process."""
Figures = dict[str, Any]


@dataclass(frozen=True)
class Work:
    """Work that all programs do."""

    shape: ModelConfig
    """Shape of our model, whose `max_seq_len` holds the longest sequence."""
    num_parameters: int
    """Parameters of our model, which peers come near to."""
    new_tokens: int
    """Tokens that a sequence decodes after its prompt."""
    threads: int
    folder: Path
    """Folder of environments and model files."""
    install: bool = True
    """Whether a peer is installed that is not there."""
    failures: dict[str, str] = field(default_factory=dict)
    """Errors of requirements that could not be installed, which is not tried again."""

    def file(self, name: str) -> Path:
        """Return the path of a model file, for models of this shape and size alone."""
        shape = self.shape
        hidden = shape.mlp_ratio * shape.width
        size = f"{shape.width}x{shape.num_layers}-{hidden}-{shape.vocab_size}-{shape.max_seq_len}"
        return self.folder / f"{size}-{self.num_parameters}-{name}"

    def environment(
        self,
        name: str,
        requirement: str,
        without: Sequence[str] = (),
        variables: Mapping[str, str] | None = None,
    ) -> Path:
        """Make a virtual environment, unless it is there, and return its folder.

        Args:
            name: Name of the folder; an environment that was left unfinished is made again.
            requirement: Package to install.
            without: Packages to remove afterwards, which others ask for and do not need.
            variables: Environment variables of a package that is compiled.

        Raises UserError with the end of pip's output.
        """
        folder = self.folder / name
        note = folder / "installed.json"
        wanted = json.dumps([sys.version, requirement, *without])
        if note.exists() and note.read_text(encoding="utf-8") == wanted:
            return folder
        if not self.install:
            raise UserError(message=f"{requirement} is not installed in {folder}")
        if requirement in self.failures:
            raise UserError(message=self.failures[requirement])
        tqdm.write(f"installing {requirement} into {folder}", file=sys.stderr)
        pip = [str(folder / "bin" / "python"), "-m", "pip", "--disable-pip-version-check"]
        try:
            run_program([sys.executable, "-m", "venv", "--clear", str(folder)])
            run_program([*pip, "install", requirement], variables)
            if without:
                run_program([*pip, "uninstall", "--yes", *without])
        except (OSError, ProgramError) as error:
            self.failures[requirement] = f"{requirement} cannot be installed: {error}"
            raise UserError(message=self.failures[requirement]) from error
        note.write_text(wanted, encoding="utf-8")
        return folder


class Program(ABC):
    """A program that decodes a model."""

    serves = False
    """Whether it has a server that is compared."""

    def __init__(self, work: Work) -> None:
        self.work = work

    @abstractmethod
    def prepare(self) -> None:
        """Install the program and write its model, unless they are there already. Raises UserError
        if the program cannot be had."""

    def sequence_bytes(self, positions: int) -> int:
        """Return the bytes that a sequence of so many tokens takes in a cache that grows."""
        return 0

    @abstractmethod
    def decode(self, context: int, batch: int) -> Figures:
        """Measure sequences that share a prompt of `context` tokens.

        Returns the `prefill_seconds` of the prompt, the mean `step_ms` after it, and the peak of
        resident memory, `resident_mib`; without a cache that grows, also the `sequence_bytes` of a
        sequence. Raises ProgramError.
        """

    def serving(self, clients: int) -> AbstractContextManager[tuple[str, int]]:
        """Serve the model as OpenAI does; yield the address and the id of the process. Raises
        ProgramError."""
        raise NotImplementedError


class LlamaProgram(Program):
    """A program with the Llama-like model of `transformers`."""

    cache_number_bytes: int
    """Bytes of a number in the cache of keys and values."""

    def sequence_bytes(self, positions: int) -> int:
        """See `Program.sequence_bytes`."""
        shape = self.work.shape
        return 2 * positions * shape.num_layers * shape.width * self.cache_number_bytes

    def make_model(self) -> Any:
        """Return a LlamaForCausalLM of random weights. Raises UserError without transformers."""
        with requires_extra("bench"):
            import transformers  # noqa: F401
        torch.manual_seed(0)
        return LlamaInBlocks(self.work.shape, self.work.num_parameters).model


class LlamaInBlocks(Llama):
    """The model with matrices that divide into blocks of 32 numbers, as Q8_0 has."""

    multiple = 32


class ProgramError(Exception):
    """A program ended with an error."""


def run_program(
    command: Sequence[str], environment: Mapping[str, str] | None = None
) -> tuple[str, str, float]:
    """Run a program to its end; return its output, its log and its peak of resident MiB. Raises
    ProgramError."""
    with tempfile.TemporaryFile() as output, tempfile.TemporaryFile() as log:
        peak = 0.0
        with started(command, output, log, environment) as process:
            while process.poll() is None:
                peak = max(peak, peak_mib(process.pid))
                with suppress(subprocess.TimeoutExpired):
                    process.wait(1 / SAMPLES_PER_SECOND)
        if process.returncode:
            last = last_output(log) or last_output(output)
            raise ProgramError(f"{command[0]} ended with code {process.returncode}: {last}")
        output.seek(0)
        log.seek(0)
        return output.read().decode(), log.read().decode(errors="replace"), peak


@contextmanager
def started(
    command: Sequence[str],
    output: IO[bytes],
    log: IO[bytes],
    environment: Mapping[str, str] | None = None,
) -> Iterator["subprocess.Popen[bytes]"]:
    """Run a program, which ends with the block at the latest, and so do its own processes."""
    variables = {**os.environ, **(environment or {})}
    process = subprocess.Popen(
        command, stdout=output, stderr=log, env=variables, start_new_session=True
    )
    try:
        yield process
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def peak_mib(pid: int) -> float:
    """Return the peak of a process's resident MiB, or 0 once it has ended."""
    with suppress(OSError):
        for line in Path(f"/proc/{pid}/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) / 2**10
    return 0.0
