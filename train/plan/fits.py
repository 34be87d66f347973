"""Which micro-batches and stages fit into a GPU's memory."""

from dataclasses import replace

from stu.config import ModelConfig
from train.parallel.config import ParallelConfig
from train.plan.memory import RankMemory, activation_bytes, rank_memory

MOST = 4096


class Fits:
    """What fits, of one model on so many ranks. Activations grow linearly with the micro-batch.

    is_half: in bfloat16, or else float32. state_bytes: of the optimizer, per parameter.
    """

    def __init__(
        self,
        config: ModelConfig,
        seq_len: int,
        num_ranks: int,
        usable: float,
        is_half: bool,
        state_bytes: int,
    ) -> None:
        self._config, self._seq_len, self._is_half = config, seq_len, is_half
        self._num_ranks, self._usable, self._state_bytes = num_ranks, usable, state_bytes
        self._traced: dict[tuple[bool, bool, int], int] = {}

    def memory(self, parallel: ParallelConfig, micro_batch: int) -> RankMemory:
        """Of a rank."""
        activations = self._trace(parallel, 1)
        if micro_batch > 1:  # counting takes time
            activations += (self._trace(parallel, 2) - activations) * (micro_batch - 1)
        return rank_memory(
            self._config,
            parallel,
            self._num_ranks,
            activations,
            self._is_half,
            on_gpu=True,
            state_bytes=self._state_bytes,
        )

    def largest(self, parallel: ParallelConfig, most: int = MOST) -> int:
        """Return the largest micro-batch up to `most` that fits; 0: none."""
        size = 0
        while size < most and self.holds(parallel, size + 1):
            size += 1
        return size

    def holds(self, parallel: ParallelConfig, micro_batch: int) -> bool:
        """Whether it fits."""
        return self.memory(parallel, micro_batch).total <= self._usable

    def _trace(self, parallel: ParallelConfig, micro_batch: int) -> int:
        key = parallel.kind == "ddp", parallel.checkpoint_activations, micro_batch
        if key not in self._traced:
            self._traced[key] = activation_bytes(
                self._config, self._seq_len, micro_batch, parallel, self._is_half, on_gpu=True
            )
        return self._traced[key]


def stages(parallel: ParallelConfig) -> list[tuple[str, ParallelConfig]]:
    """The one that was asked for among the others."""
    alone = replace(parallel, offload_optimizer=False)
    others = [replace(alone, kind="ddp"), replace(alone, kind="fsdp")]
    for stage in (0, 1, 2, 3):
        offloads = parallel.offload_optimizer and stage > 0
        others.append(replace(parallel, kind="zero", zero_stage=stage, offload_optimizer=offloads))
    return [(f"zero {its.zero_stage}" if its.kind == "zero" else its.kind, its) for its in others]
