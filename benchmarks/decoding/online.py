"""`python -m benchmarks online`: one long convolution, decoded token by token by each method.

The layer is that of an STU for the longest of the lengths, decoded alone after a prompt of one
token: nothing else is in a step. Methods are direct sums, FutureFill with epochs of several
lengths, continuous FutureFill, and the engine's two caches: FutureFill in pages, and spectral
states. `benchmarks.decoding.sampling` says which steps are timed, and how they are weighted; the
cache for pages cannot jump, and decodes all tokens between them.
"""

import gc
import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from jsonargparse.typing import PositiveInt
from torch import Tensor
from tqdm import tqdm

from benchmarks.decoding.caches import (
    Cache,
    EngineCache,
    Flush,
    SeekableContinuous,
    SeekableEpoched,
    SeekableNaive,
)
from benchmarks.decoding.counting import KINDS, counted
from benchmarks.decoding.sampling import (
    LEAST_NEW_TOKENS,
    Sample,
    mean_counts,
    merged,
    sampled,
    summary,
)
from benchmarks.decoding.shape import Shape
from benchmarks.machine import describe
from benchmarks.process_memory import return_freed_memory
from benchmarks.timing import timed
from stu.common.errors import UserError
from stu.config import ModelConfig
from stu.futurefill import usual_epoch
from stu.model import FlashSTU


@dataclass(frozen=True)
class Options:
    """Settings of the benchmark; every length is decoded by every method."""

    lengths: tuple[PositiveInt, ...] = (512, 2048, 8192, 32768, 131072)
    """Tokens to decode."""
    epochs: tuple[PositiveInt, ...] = (64, 256, 1024, 4096, 16384, 65536)
    """Tokens of an epoch; those below the length are used, besides the length itself and the
    epoch of the paper."""
    width: PositiveInt = 256
    """Channels of the layer."""
    rounds: PositiveInt = 2
    """Rounds of all methods in turn."""


@dataclass(frozen=True)
class Method:
    """A way to decode a length."""

    cache: str
    begin: Callable[[], Cache]
    epoch: int | None = None
    """Tokens of an epoch."""
    is_paper_epoch: bool = False


class ConvolutionSubject:
    """A convolution cache of one layer, as `sampled` decodes it."""

    def __init__(self, begin: Callable[[], Cache], width: int) -> None:
        self.cache, self._inputs = begin(), 0.01 * torch.randn(1, width)

    @property
    def num_bytes(self) -> int:
        """Bytes of the cache, as allocated, without filters."""
        cache = self.cache
        return cache.cache.num_bytes if isinstance(cache, EngineCache) else cache.cache_bytes

    @torch.inference_mode()
    def step(self) -> dict[str, float]:
        """Decode a token; return its milliseconds."""
        return {"step": 1e3 * timed(self._decode)}

    @torch.inference_mode()
    def count(self) -> Counter[str]:
        """Decode a token; return what its operations do."""
        return counted(self._decode, lambda: True)

    @torch.inference_mode()
    def seek(self, position: int) -> None:
        """Move to the state after this number of tokens."""
        self.cache.seek(position)

    def flushes(self) -> list[Flush]:
        """Return the work that some steps do beyond decoding a token."""
        return self.cache.flushes()

    def _decode(self) -> Tensor:
        outputs = self.cache.step(0, self._inputs)
        self.cache.advance()
        return outputs


def measure(options: Options) -> dict[str, Any]:
    """Decode every length by every method."""
    if min(options.lengths) < LEAST_NEW_TOKENS:
        raise UserError("lengths", min(options.lengths), f"at least {LEAST_NEW_TOKENS}")
    torch.manual_seed(0)
    longest, width = max(options.lengths), options.width
    config = ModelConfig(8, width, 1, "stu", max_seq_len=longest)
    model = FlashSTU(config).eval()
    runs: list[dict[str, Any]] = []
    gc.freeze()  # or some steps would wait for a collection of all modules
    for length in options.lengths:
        several = methods(model, Shape(config, 1, 1, length), options.epochs)
        progress = tqdm(total=options.rounds * len(several), desc=f"{length:,} tokens")
        rounds: list[list[list[Sample]]] = [[] for _ in several]
        sizes = [0] * len(several)
        for turn in range(options.rounds):
            for number, method in enumerate(several):
                return_freed_memory()
                subject = ConvolutionSubject(method.begin, width)
                rounds[number].append(sampled(subject, length, counts_too=turn == 0))
                sizes[number] = subject.num_bytes
                progress.update()
        progress.close()
        for method, own, size in zip(several, rounds, sizes, strict=True):
            runs.append(described(method, length, width) | {"cache_bytes": size} | figures(own))
            print(f"{method.cache}: {runs[-1]['step_ms']:.3g} ms a token", file=sys.stderr)
    gc.unfreeze()
    return {"machine": describe(), "runs": runs}


def methods(model: FlashSTU, shape: Shape, epochs: tuple[int, ...]) -> list[Method]:
    """Return the methods for a length, those with epochs from the shortest on."""
    taps, step = model.convolution_taps()
    arguments = taps.detach().float(), 1, shape.new_tokens, step
    paper = step * usual_epoch(-(-shape.new_tokens // step))
    lengths = sorted({epoch for epoch in epochs if epoch < shape.new_tokens} | {shape.new_tokens})

    def of_epoch(epoch: int, is_paper_epoch: bool = False) -> Method:
        columns = -(-epoch // step)
        begin = lambda: SeekableEpoched(*arguments, epoch_columns=columns)  # noqa: E731
        return Method("epoched", begin, columns * step, is_paper_epoch)

    return [
        Method("naive", lambda: SeekableNaive(*arguments, max_prompt_tokens=shape.prompt_tokens)),
        of_epoch(paper, is_paper_epoch=True),
        *(of_epoch(epoch) for epoch in lengths if epoch != paper),
        Method("continuous", lambda: SeekableContinuous(*arguments)),
        Method("pages", lambda: EngineCache(model, shape, "pages")),
        Method("state", lambda: EngineCache(model, shape, "state")),
    ]


def described(method: Method, length: int, width: int) -> dict[str, Any]:
    """Return the head of a run."""
    head = {"cache": method.cache, "new_tokens": length, "width": width}
    head |= {"threads": torch.get_num_threads()}
    if method.epoch:
        head |= {"epoch": method.epoch, "is_paper_epoch": method.is_paper_epoch}
    return head


def figures(rounds: list[list[Sample]]) -> dict[str, Any]:
    """Return times and multiply-adds of a token, over all rounds."""
    run = summary(merged(rounds))
    run["step_ms_by_round"] = [summary(samples)["step_ms"] for samples in rounds]
    counts = mean_counts(rounds[0])
    return run | {"multiply_adds_per_token": sum(counts[kind] for kind in KINDS)}
