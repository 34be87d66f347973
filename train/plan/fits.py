"""The micro-batches and kinds of parallelism that fit into a GPU's memory."""

from dataclasses import dataclass, field, replace

from stu.config import ModelConfig
from train.parallel.config import ParallelConfig
from train.plan.activations import RankStep, activation_bytes
from train.plan.memory import RankMemory, rank_memory

MOST = 4096


@dataclass(frozen=True)
class Fits:
    """Memory of one model on a number of ranks. Activations grow linearly with the micro-batch."""

    config: ModelConfig
    seq_len: int
    num_ranks: int
    usable_bytes: float
    """Bytes of a GPU that a run may take."""
    is_half: bool
    """Whether the run computes in bfloat16 rather than float32."""
    state_bytes: float
    """Mean bytes of the optimizer's state per weight."""
    is_apart: bool = False
    """Whether documents are kept apart."""
    evaluation: int = 0
    """Bytes of an evaluation on tasks; 0 if there are none."""
    _activations: dict[tuple[bool, bool, int], int] = field(default_factory=dict)

    def memory(self, parallel: ParallelConfig, micro_batch: int) -> RankMemory:
        """Return the memory of each rank."""
        activations = self._count(parallel, 1)
        if micro_batch > 1:  # counting takes time
            activations += (self._count(parallel, 2) - activations) * (micro_batch - 1)
        step = rank_memory(
            self.config,
            parallel,
            self.num_ranks,
            activations,
            self.is_half,
            on_gpu=True,
            state_bytes=self.state_bytes,
        )
        return replace(step, evaluation=self.evaluation)

    def largest(self, parallel: ParallelConfig, most: int = MOST) -> int:
        """Return the largest micro-batch up to `most` that fits, or 0 if none does."""
        size = 0
        while size < most and self.holds(parallel, size + 1):
            size += 1
        return size

    def holds(self, parallel: ParallelConfig, micro_batch: int) -> bool:
        """Return whether a micro-batch fits."""
        return self.memory(parallel, micro_batch).total <= self.usable_bytes

    def _count(self, parallel: ParallelConfig, micro_batch: int) -> int:
        key = parallel.kind == "ddp", parallel.checkpoint_activations, micro_batch
        if key not in self._activations:
            shape = self.seq_len, micro_batch, parallel, self.is_half
            step = RankStep(*shape, on_gpu=True, is_apart=self.is_apart)
            self._activations[key] = activation_bytes(self.config, step)
        return self._activations[key]


def stages(parallel: ParallelConfig) -> list[tuple[str, ParallelConfig]]:
    """Return every kind and ZeRO stage with its name, `parallel` itself among them."""
    plain = replace(parallel, kind="ddp", zero_stage=1, offload_optimizer=False)
    ways = [("ddp", plain), ("fsdp", replace(plain, kind="fsdp"))]
    for stage in (0, 1, 2, 3):
        offloads = parallel.offload_optimizer and stage > 0
        way = replace(parallel, kind="zero", zero_stage=stage, offload_optimizer=offloads)
        ways.append((f"zero {stage}", way))
    return ways
