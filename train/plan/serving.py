"""The plan of decoding: memory of each rank, speed of a step, and what fits, without a device."""

import bisect
import functools
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import yaml

from stu.common.errors import UserError
from stu.config import ModelConfig
from stu.decoding.memory import (
    CacheSize,
    bytes_for,
    last_input_bytes,
    last_input_size,
    pages_for,
    pending_page_bytes,
    pending_size,
    state_bytes,
    state_page_bytes,
    state_size,
    usual_rank,
    window_page_bytes,
    window_size,
)
from stu.division.parts import Parts, check_divides_channels
from stu.mixers import KeyWindow, LastInputs, PastInputs, remembered
from stu.model import Block, FlashSTU
from stu.slices.channels import ChannelRanks
from train.gpus import Gpu
from train.plan.costs import PRODUCT_SHARE, USABLE_SHARE

GIB = 2**30
PAGE_LEN = 32
READ_SHARE = 0.6
"""Share of the memory's bandwidth that a step reaches: an assumption, as is the next one."""
EXCHANGE_SECONDS = 10e-6
"""Time of an exchange of a few numbers among the GPUs of a host."""
LIVE_NUMBERS = 16
"""Numbers of a token that a layer holds at once, as multiples of the width."""
CHUNK_TOKENS = 2048
"""Tokens of a prompt that a step prefills, by default."""


@dataclass(frozen=True)
class Decoding:
    """Sequences that decode together.

    Args:
        config: The model.
        length: Tokens of each sequence, prompt and new ones.
        new_tokens: New tokens of each sequence, at most.
        num_ranks: GPUs that divide the model.
        bits: Bits of a weight of a matrix: 32, 16 or 8. Others have 32, or 16 below that.
        rank: Numbers in a state of a channel; None: long convolutions are cached in pages.
    """

    config: ModelConfig
    length: int
    new_tokens: int
    num_ranks: int
    bits: int
    rank: int | None

    @property
    def itemsize(self) -> int:
        """Bytes of an activation, and of a weight that is not in a matrix."""
        return 4 if self.bits == 32 else 2

    def weight_bytes(self) -> int:
        """Return the bytes of a rank's weights and filters."""
        return _weight_bytes(self.config, self.num_ranks, self.bits)

    def row_bytes(self) -> int:
        """Return the bytes that a rank remembers of one sequence."""
        paged = sum(pages * size.page_bytes for size, pages in self._caches(1))
        fixed = [sum(size.fixed_bytes for size, _ in self._caches(rows)) for rows in (0, 1)]
        return paged + fixed[1] - fixed[0]

    def read_bytes(self) -> float:
        """Return the bytes of caches that a rank moves for a token of one sequence: windows, half a
        page of inputs, and a state once a page there and back."""
        total = 0.0
        for memory in self._remembered():
            if isinstance(memory, KeyWindow):
                seen = min(self.length, memory.window_tokens + 1)
                total += seen * window_page_bytes(memory, 1, self.itemsize)
            elif isinstance(memory, LastInputs):
                total += 2 * last_input_bytes(memory, self.itemsize)
            elif self.rank is None:
                total += pending_page_bytes(memory, PAGE_LEN // 2, 4)
            else:
                total += 2 * state_bytes(memory, self.rank) / PAGE_LEN
                total += state_page_bytes(memory, self.rank, PAGE_LEN, 4) / 2
        return total

    def other_bytes(self, batch: int) -> int:
        """Return the bytes of activations of a chunk of a prompt, of logits, and of the tables of
        long convolutions."""
        config = self.config
        hidden = config.mlp_ratio * config.width // self.num_ranks
        live = CHUNK_TOKENS * (LIVE_NUMBERS * config.width + 3 * hidden) * self.itemsize
        taps = sum(
            memory.channels * config.max_seq_len // memory.lag_step
            for memory in self._remembered()
            if isinstance(memory, PastInputs) and self.rank is None
        )
        return live + 3 * batch * config.vocab_size * 4 + 4 * taps

    def cache_bytes(self, batch: int) -> int:
        """Return the bytes that an engine must divide among a rank's caches for so many sequences
        to find room in all of them."""
        sizes, pages = zip(*self._caches(batch), strict=True)
        return bytes_for(sizes, pages, batch)

    def total_bytes(self, batch: int) -> int:
        """Return the bytes of a rank with so many sequences."""
        return self.weight_bytes() + self.cache_bytes(batch) + self.other_bytes(batch)

    def step_seconds(self, gpu: Gpu, batch: int) -> float:
        """Return the seconds of a step, under the shares assumed above: of reading weights and
        caches or of products, whichever takes longer, and of exchanges."""
        config = self.config
        read = self.weight_bytes() + batch * self.read_bytes()
        model = _part(config, self.num_ranks)
        weights = model.embedding.weight.numel()
        for block in model.blocks:
            assert isinstance(block, Block)
            own = (block.mlp.get_parameter(name).numel() for name in block.mlp.matrices)
            weights += block.mixer.decoding_weights + sum(own)
        products = 2.0 * batch * weights / (PRODUCT_SHARE * gpu.flops)
        seconds = max(read / (READ_SHARE * gpu.bytes_per_second), products)
        if self.num_ranks == 1:
            return seconds
        sent = batch * self.itemsize * (2 * config.num_layers * config.width + config.vocab_size)
        sent_seconds = 2 * sent * (self.num_ranks - 1) / self.num_ranks / gpu.link_bytes_per_second
        return seconds + sent_seconds + (2 * config.num_layers + 2) * EXCHANGE_SECONDS

    def fits(self, gpu: Gpu, batch: int) -> bool:
        """Return whether a rank with so many sequences fits."""
        return self.total_bytes(batch) <= USABLE_SHARE * gpu.memory_gib * GIB

    def largest_batch(self, gpu: Gpu) -> int:
        """Return the most sequences that fit; 0 if none does."""
        batches = range(1, int(gpu.memory_gib * GIB))
        return bisect.bisect_left(batches, True, key=lambda batch: not self.fits(gpu, batch))

    def _remembered(self) -> list[Any]:
        mixers = _part(self.config, self.num_ranks).mixers
        return [memory for mixer in mixers for memory in mixer.remembers]

    def _caches(self, rows: int) -> list[tuple[CacheSize, int]]:
        """Return the sizes of a rank's caches with so many rows, and the pages of a sequence in
        each. Its first new token comes with the prompt, and its last one is not remembered."""
        mixers, longest = _part(self.config, self.num_ranks).mixers, self.config.max_seq_len
        caches = []
        if windows := remembered(mixers, KeyWindow):
            usual, own = (
                window_size(windows, tokens, PAGE_LEN, self.itemsize)
                for tokens in (longest, self.length - 1)
            )
            caches.append((usual, own.most_pages))
        if last := remembered(mixers, LastInputs):
            caches.append((last_input_size(last, rows, self.itemsize), 0))
        if past := remembered(mixers, PastInputs):
            if self.rank is None:
                pages = pages_for(self.new_tokens - 1, PAGE_LEN)
                caches.append((pending_size(past, rows, longest, PAGE_LEN, 4), pages))
            else:
                caches.append((state_size(past[0], len(past), self.rank, PAGE_LEN, 4), 1))
        return caches


def plans(
    config: ModelConfig, length: int, new_tokens: int, bits: int, most_ranks: int
) -> list[Decoding]:
    """Return the plan for each power of two of ranks that can divide a model."""
    past = remembered(_part(config, 1).mixers, PastInputs)
    rank = usual_rank(past[0], config.max_seq_len, config.num_filters) if past else None
    one = Decoding(config, length, new_tokens, 1, bits, rank)
    found = []
    for num_ranks in (2**power for power in range(int(math.log2(most_ranks)) + 1)):
        try:
            check_divides_channels(config, num_ranks)
        except UserError:
            break
        found.append(replace(one, num_ranks=num_ranks))
    return found


def evaluation_bytes(config: ModelConfig, is_half: bool, cache_gib: float, rows: int) -> int:
    """Return the bytes that an evaluation during a run adds to what a rank holds between steps: a
    copy of the whole model, and an engine's caches and activations.

    Args:
        config: Shape of the model.
        is_half: Whether the run is bf16-mixed.
        cache_gib: Size of the caches.
        rows: Sequences that the engine decodes together.
    """
    have_states = all(
        past.may_have_states for past in remembered(_part(config, 1).mixers, PastInputs)
    )
    rank = 0 if have_states else None  # it changes nothing but the caches
    own = Decoding(config, config.max_seq_len, 1, 1, 16 if is_half else 32, rank)
    return own.weight_bytes() + int(cache_gib * GIB) + own.other_bytes(rows)


def read_model_config(path: Path) -> ModelConfig:
    """Read the configuration of a model: a model directory, or a YAML or JSON file of settings.
    Raises UserError."""
    file = path / "config.json" if path.is_dir() else path
    if not file.is_file():
        raise UserError("--serve", str(path), "a model directory, or a file of a model's settings")
    try:
        text = file.read_text(encoding="utf-8")
        # YAML takes 1e-05, as JSON writes it, for a text.
        values = json.loads(text) if file.suffix == ".json" else yaml.safe_load(text)
    except (yaml.YAMLError, ValueError) as error:
        raise UserError("--serve", message=f"{file}: not YAML or JSON ({error})") from error
    if not isinstance(values, Mapping):
        raise UserError("--serve", str(path), "a file of a model's settings")
    return ModelConfig.from_dict(values)


class _Planned(ChannelRanks):
    """A rank that exchanges nothing: only the shapes of its tensors are asked for."""

    def all(self, part: torch.Tensor) -> torch.Tensor:
        raise NotImplementedError("a plan computes nothing")


@functools.cache
def _part(config: ModelConfig, num_ranks: int) -> FlashSTU:
    """Return what a rank has of a model, without contents."""
    with torch.device("meta"):
        model = FlashSTU(config)
    Parts(model, _Planned(0, num_ranks) if num_ranks > 1 else None)
    return model


@functools.cache
def _weight_bytes(config: ModelConfig, num_ranks: int, bits: int) -> int:
    model = _part(config, num_ranks)
    matrices, wide = model.matrices if bits == 8 else {}, model.wide_names
    total = 0
    for name, tensor in model.state_dict().items():
        size = 4 if bits == 32 or name in wide else 1 if name in matrices else 2
        total += tensor.numel() * size
    # The unembedding is rounded too, beside the embedding.
    return total + (model.embedding.weight.numel() if bits == 8 else 0)
