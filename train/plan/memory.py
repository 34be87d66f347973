"""How much memory a training step takes on each rank, found without any device.

What a step keeps for the backward pass, and what it needs besides at its fullest moment, is counted
by running it on tensors without contents (torch's FakeTensorMode and MemTracker). What weights,
gradients and the optimizer take follows from the ZeRO stage (Rajbhandari et al. 2020, section 5).
"""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext
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

from stu import convolution, layers
from stu import model as flash_stu
from stu.config import ModelConfig
from stu.model import FlashSTU
from train import loss
from train.flops import convolution_shape, layer_period, max_block_parameters, num_parameters
from train.loss import next_token_loss
from train.parallel.config import ParallelConfig, prepare_blocks

BUCKET_ELEMENTS = 200_000_000
"""That DeepSpeed, as Lightning sets it, sums over the ranks at a time."""
GATHERED_AHEAD_ELEMENTS = 50_000_000
"""Of parameters that stage 3 fetches before they are used (DeepSpeed's prefetch bucket)."""
LOSS_CHUNKS = 3
"""Of the loss that are counted: the first, one that takes its place, and one more."""


@dataclass(frozen=True)
class RankMemory:
    """Bytes on one rank, at the fullest moment of a step."""

    weights: int
    """Those the model computes with, and the filters."""
    gradients: int
    optimizer: int
    """Moments, and in 16-bit training the weights in float32."""
    buffers: int
    """In which ranks exchange gradients and weights."""
    activations: int
    """Kept for the backward pass, with FFTs, logits and all else of the fullest moment."""

    @property
    def total(self) -> int:
        """All of it."""
        return self.weights + self.gradients + self.optimizer + self.buffers + self.activations


def rank_memory(
    config: ModelConfig,
    parallel: ParallelConfig,
    num_ranks: int,
    activations: int,
    is_half: bool,
    on_gpu: bool,
    state_bytes: int,
) -> RankMemory:
    """Of one of `num_ranks`.

    activations: what `activation_bytes` says. is_half: bf16-mixed. on_gpu: ZeRO's stages 1 and 2
    allocate buckets there; a CPU's memory is taken as they are written to, and then gradients move
    into them, whose own memory is freed. state_bytes: of the optimizer's state per parameter
    (`OptimizerKind.state_bytes`).
    """
    count = num_parameters(config)
    stage = parallel.zero_stage if parallel.kind == "zero" else 0
    share = -(-count // num_ranks)
    filters = 4 * config.max_seq_len * config.num_filters if config.stu_layers else 0
    if parallel.kind == "ddp":
        # Autocast's own copies of weights are among the activations. DDP sums gradients in buckets
        # besides.
        buffers = 4 * count if num_ranks > 1 else 0
        return RankMemory(4 * count + filters, 4 * count, state_bytes * count, buffers, activations)
    width = 2 if is_half else 4
    if parallel.kind == "fsdp":
        # What is outside of the blocks stays gathered, and of the blocks one is computed with while
        # the next one arrives; gradients are there whole, in either width, until they are summed.
        outside = config.vocab_size * config.width
        block = max_block_parameters(config)
        buffers = width * (2 * outside + 3 * block) + 4 * max(outside, block)
        return RankMemory(4 * share + filters, 4 * share, state_bytes * share, buffers, activations)
    held = share if stage > 0 else count
    master = 4 * held if stage > 0 or is_half else 0
    moments = state_bytes * held
    weights = width * (share if stage == 3 else count)
    gradients = width * (share if stage >= 2 else count)
    buffers = 0
    if stage in (1, 2) and on_gpu:
        buffers = width * 2 * BUCKET_ELEMENTS  # one is summed while the other is filled
    if stage == 3:
        buffers = width * min(BUCKET_ELEMENTS, count)
        block = max_block_parameters(config)
        buffers += width * (max(block, config.vocab_size * config.width) + GATHERED_AHEAD_ELEMENTS)
        buffers = min(buffers, 3 * width * count)
    optimizer = 0 if parallel.offload_optimizer else master + moments
    return RankMemory(weights + filters, gradients, optimizer, buffers, activations)


def activation_bytes(
    config: ModelConfig,
    seq_len: int,
    micro_batch_size: int,
    parallel: ParallelConfig,
    is_half: bool,
    on_gpu: bool,
) -> int:
    """Bytes over weights and gradients at the fullest moment of forward and backward pass.

    A model of two periods of layers is counted, and what a period keeps for the backward pass is
    added for the others. on_gpu: FFTs go over all channels at once, and attention is flash-attn's
    if is_half.
    """
    period = layer_period(config)
    num_layers = min(config.num_layers, 2 * period + config.num_layers % period)
    few = replace(config, num_layers=num_layers)
    step = step_memory(few, seq_len, micro_batch_size, parallel, is_half, on_gpu)
    num_more = (config.num_layers - num_layers) // period
    return max(step.all_kept + num_more * step.of_period, step.peak)


class StepMemory(NamedTuple):
    """Bytes over weights and gradients in forward and backward pass."""

    peak: int
    """At the fullest moment."""
    all_kept: int
    """At the fullest moment before the backward pass comes to the first period of layers: until
    then it grows with the number of layers, and in what follows (the embedding's) it does not."""
    of_period: int
    """Kept for the backward pass by one period of layers."""


def step_memory(
    config: ModelConfig,
    seq_len: int,
    micro_batch_size: int,
    parallel: ParallelConfig,
    is_half: bool,
    on_gpu: bool,
) -> StepMemory:
    """Count over all layers."""
    with FakeTensorMode(), _as_on_gpu(on_gpu, flash=on_gpu and is_half), _without_repetition():
        # DeepSpeed and FSDP cast the model; elsewhere autocast makes copies as it goes.
        casts = is_half and parallel.kind != "ddp"
        model = _with_weights_in(torch.bfloat16 if casts else torch.float32, config)
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
        kept: list[int] = []  # when the second period begins, and when it ends
        peaks: list[int] = []  # when the backward pass has gone through the second period

        def see(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            kept.append(_total(tracker, "current"))
            if len(kept) == 1:
                inputs[0].register_hook(  # type: ignore[no-untyped-call]
                    lambda _: peaks.append(_total(tracker, "peak"))
                )

        period = layer_period(config)
        for module in [*model.blocks, model.norm][period : 2 * period + 1 : period]:
            module.register_forward_pre_hook(see)
        with tracker, autocast:
            tokens = torch.zeros(micro_batch_size, seq_len + 1, dtype=torch.int64)
            hidden = model.hidden(tokens[:, :-1]).flatten(0, 1)
            minimised, _ = next_token_loss(hidden, model.embedding.weight, tokens[:, 1:].flatten())
            minimised.backward()  # type: ignore[no-untyped-call]
        peak = _total(tracker, "peak")
    held = sum(t.numel() * t.element_size() for t in (*model.parameters(), *model.buffers()))
    held += sum(p.numel() * p.element_size() for p in model.parameters())
    of_period = kept[1] - kept[0] if len(kept) > 1 else 0
    return StepMemory(max(0, peak - held), max([0, *peaks]) - held, of_period)


def _total(tracker: MemTracker, moment: str) -> int:
    (snapshot,) = tracker.get_tracker_snapshot(moment).values()
    return int(snapshot["Total"])


def fft_bytes(config: ModelConfig, seq_len: int, micro_batch_size: int) -> int:
    """Bytes in which one layer's FFTs work on a GPU, at the fullest moment of its backward pass:
    spectra and padded copies, besides what the convolution takes and returns."""
    if not config.convolution_layers:
        return 0
    streams, channels, lag_step = convolution_shape(config, micro_batch_size)
    with FakeTensorMode(), _as_on_gpu(True, flash=False):
        inputs = torch.zeros(streams, seq_len, channels, requires_grad=True)
        taps = torch.zeros(-(-seq_len // lag_step), channels, requires_grad=True)
        grad = torch.zeros_like(inputs)
        tracker = MemTracker()
        tracker.track_external(inputs, taps, grad)
        with tracker:
            convolution.causal_convolution(inputs, taps, lag_step).backward(grad)  # type: ignore[no-untyped-call]
        peak = _total(tracker, "peak")
    held = [inputs, taps, grad, inputs, inputs, taps]  # outputs, and both gradients
    return max(0, peak - sum(4 * its.numel() for its in held))


def _with_weights_in(dtype: torch.dtype, config: ModelConfig) -> FlashSTU:
    usual = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        return FlashSTU(config)
    finally:
        torch.set_default_dtype(usual)


@contextmanager
def _without_repetition() -> Iterator[None]:
    """Leave out what changes no peak: filters of no interest, and the loss of further rows, each
    chunk of which takes the place of the one before."""
    logits = loss._logits

    def few(hidden: Tensor, output: Tensor) -> Iterator[tuple[slice, Tensor]]:
        return islice(logits(hidden, output), LOSS_CHUNKS)

    def zeros(length: int, count: int) -> NDArray[np.float64]:
        return np.zeros((length, count))

    with (
        patch.object(loss, "_logits", few),
        patch.object(flash_stu, "spectral_filters", zeros),
    ):
        yield


@contextmanager
def _as_on_gpu(on_gpu: bool, flash: bool) -> Iterator[None]:
    """Have the CPU's code paths keep what a GPU's would."""
    with ExitStack() as changed:
        if on_gpu:
            changed.enter_context(patch.object(convolution, "CPU_BLOCK_ELEMENTS", 2**62))
        if flash:
            changed.enter_context(patch.object(layers, "sliding_window_attention", _flash_stand_in))
        yield


def _flash_stand_in(queries: Tensor, keys: Tensor, values: Tensor, *_: Any) -> Tensor:
    attended: Tensor = _FlashStandIn.apply(queries, keys, values)  # type: ignore[no-untyped-call]
    return attended


class _FlashStandIn(torch.autograd.Function):
    """Keeps what flash-attn does: its inputs, its output, a float32 for each query and head."""

    @staticmethod
    def forward(ctx: Any, queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        attended = torch.empty_like(queries)
        sums = torch.empty(queries.shape[:3], dtype=torch.float32)
        ctx.save_for_backward(queries, keys, values, attended, sums)
        return attended

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        queries, keys, values, _, _ = ctx.saved_tensors
        return torch.empty_like(queries), torch.empty_like(keys), torch.empty_like(values)
