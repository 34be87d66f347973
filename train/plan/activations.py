"""Memory of activations, counted on tensors without contents.

A step runs under torch's FakeTensorMode and MemTracker, which count the tensors that it keeps for
the backward pass and everything else at its peak.
"""

import functools
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any, NamedTuple
from unittest.mock import patch

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed._tools.mem_tracker import MemTracker

from stu import convolution
from stu import model as flash_stu
from stu.config import ModelConfig
from stu.layouts import mixer_names
from stu.mixers import PastInputs, planned_mixers, remembered
from stu.model import FlashSTU
from stu.realisation import RANKS, Realisation
from stu.sequences.base import WHOLE, Sequences
from stu.sequences.documents import Documents
from stu.sequences.slices import SequenceSlices
from stu.slices import states
from stu.slices.ranks import SliceRanks
from train import loss
from train.loss import next_token_loss
from train.parallel.config import ParallelConfig, prepare_blocks

LOSS_CHUNKS = 3
"""Chunks of the loss that are counted: the first, one that replaces it, and one more."""


@dataclass(frozen=True)
class RankStep:
    """A forward and backward pass of a rank."""

    seq_len: int
    micro_batch_size: int
    parallel: ParallelConfig
    is_half: bool = False
    """Whether it computes in bfloat16 rather than float32."""
    on_gpu: bool = False
    """Whether to count what the GPU's kernels keep, such as flash-attn's if `is_half`."""
    is_apart: bool = False
    """Whether documents are kept apart."""


def activation_bytes(config: ModelConfig, own: RankStep) -> int:
    """Return the bytes beyond weights and gradients at the peak of a forward and backward pass.

    Two periods of the layout are counted; each further period adds what one keeps for the backward
    pass.
    """
    period = len(mixer_names(config.layout))
    num_layers = min(config.num_layers, 2 * period + config.num_layers % period)
    few = replace(config, num_layers=num_layers)
    step = step_memory(few, own)
    num_more = (config.num_layers - num_layers) // period
    return max(step.blocks_peak + num_more * step.period_kept, step.peak)


class StepMemory(NamedTuple):
    """Bytes beyond weights and gradients in one forward and backward pass."""

    peak: int
    """Bytes at the peak."""
    blocks_peak: int
    """Bytes at the peak before the backward pass reaches the first period of layers. It grows with
    the number of layers; what follows, such as the embedding's gradient, does not."""
    period_kept: int
    """Bytes that one period of layers keeps for the backward pass."""


def step_memory(config: ModelConfig, own: RankStep) -> StepMemory:
    """Count the memory of a pass through all layers."""
    parallel, is_half = own.parallel, own.is_half
    with FakeTensorMode(), _whole_width_ffts(own.on_gpu), _without_repetition():
        # DeepSpeed and FSDP cast the model; otherwise autocast makes 16-bit copies on the way.
        casts = is_half and parallel.kind != "ddp"
        model = _make_model(torch.bfloat16 if casts else torch.float32, config)
        for mixer in model.mixers if own.on_gpu else ():
            mixer.imitate_gpu(is_half)
        autocast: Any = nullcontext()
        if is_half and not casts:
            autocast = torch.autocast("cpu", torch.bfloat16)
        prepare_blocks(
            model, ParallelConfig(checkpoint_activations=parallel.checkpoint_activations)
        )
        for parameter in model.parameters():
            parameter.grad = torch.zeros_like(parameter)
        tracker = MemTracker()
        tracker.track_external(model)
        kept: list[int] = []  # bytes at the second period's beginning and end
        peaks: list[int] = []  # peak until the backward pass has left the second period

        def record(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            kept.append(_total(tracker, "current"))
            if len(kept) == 1:
                inputs[0].register_hook(  # type: ignore[no-untyped-call]
                    lambda _: peaks.append(_total(tracker, "peak"))
                )

        period = len(mixer_names(config.layout))
        for module in [*model.blocks, model.norm][period : 2 * period + 1 : period]:
            module.register_forward_pre_hook(record)
        sequences: Sequences = WHOLE
        if own.is_apart:
            sequences = _typical_documents(own.seq_len, own.micro_batch_size)
        elif parallel.context > 1:  # the last rank receives the most
            sequences = SequenceSlices(PlannedRanks(parallel.context - 1, parallel.context))
        with tracker, autocast:
            length = own.seq_len // parallel.context
            tokens = torch.zeros(own.micro_batch_size, length + 1, dtype=torch.int64)
            hidden = model.hidden(tokens[:, :-1], sequences)
            hidden = hidden.flatten(0, 1)  # [B, T, D] -> [B T, D]
            objective, _ = next_token_loss(hidden, model.embedding.weight, tokens[:, 1:].flatten())
            objective.backward()  # type: ignore[no-untyped-call]
        peak = _total(tracker, "peak")
    held = sum(t.nbytes for t in (*model.parameters(), *model.buffers()))
    held += sum(p.nbytes for p in model.parameters())
    period_kept = kept[1] - kept[0] if len(kept) > 1 else 0
    return StepMemory(max(0, peak - held), max([0, *peaks]) - held, period_kept)


class PlannedRanks(SliceRanks):
    """A rank without others, which counts what it would send them."""

    sent_bytes = 0

    def swap(self, parts: Sequence[Tensor], shapes: Sequence[Sequence[int]]) -> list[Tensor]:
        self.sent_bytes += sum(part.nbytes for i, part in enumerate(parts) if i != self.rank)
        return [parts[0].new_empty(shape) for shape in shapes]


@functools.cache
def slice_bytes(
    config: ModelConfig, seq_len: int, micro_batch_size: int, context: int, is_half: bool
) -> int:
    """Return the bytes that a rank in the middle of a sequence sends to those with other slices of
    it, in both passes of a micro-batch."""
    if context == 1:
        return 0
    ranks = PlannedRanks(context // 2, context)
    with FakeTensorMode(), _without_repetition(), torch.autocast("cpu", enabled=is_half):
        model = _make_model(torch.float32, config)
        tokens = torch.zeros(micro_batch_size, seq_len // context, dtype=torch.int64)
        model.hidden(tokens, SequenceSlices(ranks)).sum().backward()  # type: ignore[no-untyped-call]
    return ranks.sent_bytes


def fft_bytes(config: ModelConfig, seq_len: int, micro_batch_size: int, context: int = 1) -> int:
    """Return the bytes in which one layer's FFTs work on a GPU at the peak of its backward pass:
    spectra and padded copies, without the convolution's arguments and results."""
    kinds = set(remembered(planned_mixers(config), PastInputs))
    return max((_fft_bytes(past, seq_len, micro_batch_size, context) for past in kinds), default=0)


def _fft_bytes(past: PastInputs, seq_len: int, micro_batch_size: int, context: int) -> int:
    channels = past.channels
    if past.basis is None:  # without states, ranks exchange slices for channels
        channels = -(-channels // context)
    else:
        seq_len //= context
    with FakeTensorMode(), _whole_width_ffts(True):
        inputs = torch.zeros(past.streams * micro_batch_size, seq_len, channels, requires_grad=True)
        taps = torch.zeros(-(-seq_len // past.lag_step), channels, requires_grad=True)
        grad = torch.zeros_like(inputs)
        tracker = MemTracker()
        tracker.track_external(inputs, taps, grad)
        with tracker:
            outputs = convolution.causal_convolution(inputs, taps, past.lag_step)
            outputs.backward(grad)  # type: ignore[no-untyped-call]
        peak = _total(tracker, "peak")
    held = [inputs, taps, grad, inputs, inputs, taps]  # the last three: outputs, both gradients
    return max(0, peak - sum(tensor.nbytes for tensor in held))


def _typical_documents(seq_len: int, num_rows: int) -> Documents:
    """Return documents that padding makes a fifth longer, as on average."""
    longest = max(1, seq_len * 5 // 8)
    rest = seq_len - longest
    lengths = [length for length in (longest, rest * 5 // 6, rest - rest * 5 // 6) if length]
    return Documents([lengths] * num_rows)


def _total(tracker: MemTracker, moment: str) -> int:
    (snapshot,) = tracker.get_tracker_snapshot(moment).values()
    return int(snapshot["Total"])


def _make_model(dtype: torch.dtype, config: ModelConfig) -> FlashSTU:
    default = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        return FlashSTU(config)
    finally:
        torch.set_default_dtype(default)


@contextmanager
def _whole_width_ffts(on_gpu: bool) -> Iterator[None]:
    """Transform all channels at once, as on a GPU."""
    if not on_gpu:
        yield
        return
    with patch.object(convolution, "CPU_BLOCK_ELEMENTS", 2**62):
        yield


@contextmanager
def _without_repetition() -> Iterator[None]:
    """Skip work that changes no peak: the values of filters and of their states, and chunks of the
    loss that only replace an earlier chunk."""
    logits = loss._logits

    def few(hidden: Tensor, output: Tensor) -> Iterator[tuple[slice, Tensor]]:
        return islice(logits(hidden, output), LOSS_CHUNKS)

    def zeros(length: int, count: int) -> NDArray[np.float64]:
        return np.zeros((length, count))

    def realisation(_: SliceRanks, basis: Tensor, dtype: torch.dtype) -> Realisation:
        count, rank = basis.shape[1], RANKS[-1]
        return Realisation(np.zeros(rank), np.zeros((count, rank)), np.zeros((0, count)))

    with (
        patch.object(loss, "_logits", few),
        patch.object(states, "common_realisation", realisation),
        patch.object(states, "are_equal", lambda *_: True),
        patch.object(flash_stu, "spectral_filters", zeros),
    ):
        yield
