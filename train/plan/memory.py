"""Memory that a training step takes on each rank, computed without a device.

Weights, gradients and the optimizer's state follow from the ZeRO stage (Rajbhandari et al. 2020,
arXiv:1910.02054, section 5). Activations are those of `train.plan.activations`.
"""

from dataclasses import dataclass

from stu.config import ModelConfig
from stu.mixers import planned_mixers
from train.flops import block_parameters, num_parameters
from train.parallel.config import ParallelConfig

BUCKET_ELEMENTS = 200_000_000
"""Elements that DeepSpeed, as Lightning configures it, reduces over the ranks at once."""
GATHERED_AHEAD_ELEMENTS = 50_000_000
"""Weights that ZeRO's stage 3 gathers before they are used (DeepSpeed's prefetch bucket)."""


@dataclass(frozen=True)
class RankMemory:
    """Bytes on one rank at the peak of a step or of an evaluation."""

    weights: int
    """Weights that the model computes with, and the filters."""
    gradients: int
    optimizer: int
    """Moments, and in 16-bit training the float32 weights."""
    buffers: int
    """Buffers in which ranks exchange gradients and weights."""
    activations: int
    """Tensors kept for the backward pass, FFTs, logits and all else at the peak."""
    evaluation: int = 0
    """Copy of the model, caches and activations of an evaluation on tasks. Between steps, when it
    runs, there are no other activations."""

    @property
    def total(self) -> int:
        """Bytes of all parts at the larger of both peaks."""
        held = self.weights + self.gradients + self.optimizer + self.buffers
        return held + max(self.activations, self.evaluation)


def rank_memory(
    config: ModelConfig,
    parallel: ParallelConfig,
    num_ranks: int,
    activations: int,
    is_half: bool,
    on_gpu: bool,
    state_bytes: float,
) -> RankMemory:
    """Return the memory of each of `num_ranks` ranks.

    Args:
        config: Shape of the model.
        parallel: Division of the model among the ranks.
        num_ranks: Number of ranks.
        activations: Bytes from `activation_bytes`.
        is_half: Whether the run is bf16-mixed.
        on_gpu: Whether ranks are GPUs. There, ZeRO stages 1 and 2 allocate whole buckets; on a CPU,
            a bucket grows only as gradients move into it and are freed.
        state_bytes: Mean bytes of the optimizer's state per weight (`OptimizerKind.state_bytes`).
    """
    count = num_parameters(config)
    stage = parallel.zero_stage if parallel.kind == "zero" else 0
    share = -(-count // num_ranks)
    needs_filters = any(mixer.needs_filters for mixer in planned_mixers(config))
    filters = 4 * config.max_seq_len * config.num_filters if needs_filters else 0
    if parallel.kind == "ddp":
        # Autocast's copies of weights are among the activations.
        buffers = 4 * count if num_ranks > 1 else 0
        moments = round(state_bytes * count)
        return RankMemory(4 * count + filters, 4 * count, moments, buffers, activations)
    width = 2 if is_half else 4
    if parallel.kind == "fsdp":
        # Weights outside of the blocks stay gathered. One block computes while the next is
        # gathered. Gradients are whole, in both widths, until they are reduced.
        outside = config.vocab_size * config.width
        block = max(block_parameters(config))
        buffers = width * (2 * outside + 3 * block) + 4 * max(outside, block)
        moments = round(state_bytes * share)
        return RankMemory(4 * share + filters, 4 * share, moments, buffers, activations)
    held = share if stage > 0 else count
    master = 4 * held if stage > 0 or is_half else 0
    moments = round(state_bytes * held)
    weights = width * (share if stage == 3 else count)
    gradients = width * (share if stage >= 2 else count)
    buffers = 0
    if stage in (1, 2) and on_gpu:
        buffers = width * 2 * BUCKET_ELEMENTS  # one is reduced while the other is filled
    if stage == 3:
        buffers = width * min(BUCKET_ELEMENTS, count)
        largest = max(*block_parameters(config), config.vocab_size * config.width)
        buffers += width * (largest + GATHERED_AHEAD_ELEMENTS)
        buffers = min(buffers, 3 * width * count)
    optimizer = 0 if parallel.offload_optimizer else master + moments
    return RankMemory(weights + filters, gradients, optimizer, buffers, activations)
