"""Training speed: tokens and operations per second, and the share of the GPU's peak."""

import time

import torch

from stu.config import ModelConfig
from train.data.loader import TokenData
from train.flops import token_flops
from train.gpus import GPUS, known_gpu


class Throughput:
    """Clock over a stretch of training, from one logged step to the next."""

    def __init__(self, config: ModelConfig, data: TokenData, num_ranks: int) -> None:
        self._config, self._data, self._num_ranks = config, data, num_ranks
        self.restart()

    def restart(self) -> None:
        """Begin a new stretch."""
        self._start, self._position = time.monotonic(), self._data.position

    def leave_out(self, seconds: float) -> None:
        """Take time that was not spent on training out of the stretch."""
        self._start += seconds

    def metrics(self, device: torch.device) -> dict[str, float]:
        """Return tokens per second of all ranks, and operations per second of each.

        Recomputed blocks count once. FFTs are counted apart from products, as a device's bfloat16
        peak does not apply to them.
        """
        data = self._data
        tokens = (data.position - self._position) * data.seq_len
        tokens_per_second = tokens / (time.monotonic() - self._start)
        num_documents = data.micro_batch_size * data.seq_len // data.context_tokens
        flops = token_flops(self._config, data.context_tokens, num_documents, recomputes=False)
        by_rank = tokens_per_second / self._num_ranks
        products = by_rank * (flops.dense + flops.attention)
        metrics = {
            "train/tokens_per_second": tokens_per_second,
            "data/position": float(data.position),
            **{f"epochs/{name}": count for name, count in data.epochs_read.items()},
            "train/product_teraflops": products / 1e12,
            "train/convolution_teraflops": by_rank * flops.convolution / 1e12,
        }
        gpu = known_gpu(device)
        return {**metrics, "train/mfu": products / GPUS[gpu].flops} if gpu else metrics
