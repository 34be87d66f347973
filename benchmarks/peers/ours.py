"""Our engine and server, measured in processes of their own as the others are.

    python -m benchmarks.peers.ours '{"model": FOLDER, "weights": "int8", "context": 512, ...}'

prints the figures of `Ours.decode` as JSON.
"""

import json
import os
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import cast

import torch

from benchmarks.gpu_check.engines import NoText
from benchmarks.peers.program import Figures, Program, Work, run_program
from benchmarks.recorded import ROOT
from benchmarks.serving.load import serving
from serve.config import EngineConfig
from serve.engine.engine import Engine
from serve.request import Request
from serve.sampling_params import SamplingParams
from stu.config import Weights
from stu.model import FlashSTU
from stu.model_dir import load_model, save_model
from stu.tokenizer import Tokenizer
from stu.tokenizers.hugging_face import train_byte_level_bpe


class Ours(Program):
    """Our engine.

    weights: Format of the matrices.
    dtype: Type of the weights, if they are floats.
    """

    serves = True

    def __init__(self, work: Work, weights: Weights, dtype: str = "float32") -> None:
        super().__init__(work)
        self._weights, self._dtype = weights, dtype

    def prepare(self) -> None:
        """See `Program.prepare`."""
        self._model = self.work.file("ours")
        if not self._model.exists():
            torch.manual_seed(0)
            model = FlashSTU(self.work.shape)
            save_model(self._model, model, train_tokenizer(self.work.shape.vocab_size))

    def decode(self, context: int, batch: int) -> Figures:
        """See `Program.decode`."""
        settings = {"model": str(self._model), "weights": self._weights, "context": context}
        settings |= {"batch": batch, "new_tokens": self.work.new_tokens}
        settings |= {"threads": self.work.threads, "dtype": self._dtype}
        command = [sys.executable, "-m", "benchmarks.peers.ours", json.dumps(settings)]
        variables = {"OMP_NUM_THREADS": str(self.work.threads), "PYTHONPATH": str(ROOT)}
        printed, _, peak = run_program(command, variables)
        figures: Figures = json.loads(printed)
        return figures | {"resident_mib": peak}

    @contextmanager
    def serving(self, clients: int) -> Iterator[tuple[str, int]]:
        """See `Program.serving`."""
        options = "--weights", self._weights, "--dtype", self._dtype
        with serving(self._model, clients, *options) as (url, _, pid):
            yield url, pid


def train_tokenizer(vocab_size: int) -> Tokenizer:
    """Return a tokenizer of the standard library's modules."""
    modules = sorted(Path(os.__file__).parent.glob("*.py"))
    texts = (module.read_text(encoding="utf-8") for module in modules)
    with tempfile.TemporaryDirectory() as folder:
        return train_byte_level_bpe(texts, vocab_size, Path(folder))


def main() -> None:
    """Measure once and print the figures; `benchmarks.peers.vllm_steps` does the same."""
    settings = json.loads(sys.argv[1])
    torch.set_num_threads(settings["threads"])
    context, batch, new_tokens = (settings[name] for name in ("context", "batch", "new_tokens"))
    model = load_model(settings["model"], dtype=getattr(torch, settings["dtype"]))
    tokenizer = cast(Tokenizer, NoText(model.config.vocab_size))
    engine = Engine(model, tokenizer, EngineConfig(max_running=batch, weights=settings["weights"]))
    del model  # or its weights would be in memory twice
    for number in range(batch):  # the first calls allocate
        add(engine, number, [3] * 8, 4)
    while engine.has_work:
        engine.step()
    prompt = [10 + number % 1000 for number in range(context)]
    start = time.perf_counter()
    first = add(engine, 0, prompt, new_tokens + 1 + batch)
    step_until(engine, {first})
    prefill_seconds = time.perf_counter() - start
    # The prompt is remembered.
    others = {add(engine, i, prompt, new_tokens + 1 + batch) for i in range(1, batch)}
    step_until(engine, others)
    start = time.perf_counter()
    for _ in range(new_tokens):
        engine.step()
    step_ms = 1e3 * (time.perf_counter() - start) / new_tokens
    cache = engine.stats().convolution_cache
    assert cache is not None
    figures = {"prefill_seconds": prefill_seconds, "step_ms": step_ms}
    print(json.dumps(figures | {"sequence_bytes": cache.page_bytes}))


def add(engine: Engine, seed: int, prompt: list[int], new_tokens: int) -> int:
    """Add a request, sampled at temperature 1, and return its id."""
    sampling = SamplingParams(
        temperature=1.0, max_new_tokens=new_tokens, stop_at_eos=False, seed=seed
    )
    return engine.add(Request(prompt, sampling))


def step_until(engine: Engine, ids: set[int]) -> None:
    """Step until each of these requests has a new token."""
    while ids:
        ids = ids - {output.request_id for output in engine.step() if output.new_token_ids}


if __name__ == "__main__":
    main()
