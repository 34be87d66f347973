"""CUDA graphs of a step, one for each size of the batch.

A graph replays the kernels of a function with the same arguments and addresses, which takes one
launch instead of one for each kernel. Graphs of all sizes share one pool of memory: they run one
after the other, and nothing in the pool is read after a replay.
"""

import logging
import time
from collections.abc import Callable, Mapping, Sequence

import torch
from tqdm import tqdm

logger = logging.getLogger(__name__)

WARM_UPS = 2
"""Runs on the capture's stream before a capture: libraries then have their handles, workspaces and
plans, which must not be made during a capture."""


class Graphs:
    """Functions of the number of rows, captured for some numbers of rows.

    Args:
        device: A CUDA device.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._graphs: dict[tuple[str, int], torch.cuda.CUDAGraph] = {}
        with torch.cuda.device(device):
            self._pool = torch.cuda.graph_pool_handle()
            self._stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]

    def capture(
        self, functions: Mapping[str, Callable[[int], None]], batches: Sequence[int]
    ) -> None:
        """Capture functions for each of some numbers of rows.

        functions: By names that no other function has. They read and write tensors that stay where
            they are, and never wait for the device.
        """
        began, free = time.monotonic(), torch.cuda.mem_get_info(self._device)[0]
        names = ", ".join(functions)
        with torch.cuda.device(self._device):
            # The largest first: smaller ones then fit into memory that the pool has.
            sizes = sorted(batches, reverse=True)
            for batch in tqdm(sizes, f"capturing {names}", unit="size", disable=None):
                for name, function in functions.items():
                    self._graphs[name, batch] = self._capture(function, batch)
            torch.cuda.synchronize()
        logger.info(
            "captured CUDA graphs of %s at %d batch sizes up to %d in %.1f s and %.2f GiB",
            names,
            len(batches),
            max(batches),
            time.monotonic() - began,
            (free - torch.cuda.mem_get_info(self._device)[0]) / 2**30,
        )

    def replay(self, name: str, batch: int) -> None:
        """Run a function for `batch` rows, one of the numbers that were captured, after all earlier
        work of the current stream."""
        self._graphs[name, batch].replay()

    def _capture(self, function: Callable[[int], None], batch: int) -> torch.cuda.CUDAGraph:
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            for _ in range(WARM_UPS):
                function(batch)
        torch.cuda.current_stream().wait_stream(self._stream)
        graph = torch.cuda.CUDAGraph()
        # Other threads may use CUDA meanwhile.
        with torch.cuda.graph(
            graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"
        ):
            function(batch)
        return graph
