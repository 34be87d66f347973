"""Other language models of as many parameters, decoded token by token with their own caches.

Random weights in float32. The models are those of `transformers` but for S4, and their matrices
are packed for oneDNN as the engine packs its own (`serve.engine.packing`), so that the mixers are
what differs. Nothing is downloaded: models are built from their configurations.
"""

import importlib.util
import os
from collections.abc import Iterable

import torch
from torch import Tensor, nn

from benchmarks.costs import FLOAT_BYTES, Costs
from benchmarks.peer import MULTIPLE, Peer, fitted
from benchmarks.s4 import PAIRS, S4Model
from benchmarks.transformers_peers import Llama, LlamaDynamic, Mamba2, Rwkv
from stu.config import ModelConfig


class S4(Peer):
    """Diagonal state spaces in the blocks of a Flash-STU (`benchmarks.s4`)."""

    note = "recurrent, with 64 numbers of state for each channel; in operations of torch"

    def _build(self, num_parameters: int) -> nn.Module:
        return fitted(lambda hidden: S4Model(self.shape, MULTIPLE * hidden), num_parameters)

    def start(self, batch: int, positions: int) -> None:
        shape = self.shape
        self._discretized = self.model.discretized()
        self._states = torch.zeros(
            shape.num_layers, batch, shape.width, PAIRS, dtype=torch.complex64
        )

    def prefill(self, tokens: Tensor) -> Tensor:
        for column in tokens.unbind(1):
            logits = self.step(column)
        return logits

    def step(self, tokens: Tensor) -> Tensor:
        logits: Tensor = self.model.step(tokens, self._states, self._discretized)
        return logits

    def cache_bytes(self, batch: int, positions: int) -> int:
        return batch * self.shape.num_layers * self.shape.width * 2 * PAIRS * FLOAT_BYTES

    def costs(self, positions: range) -> Costs:
        """Of the recurrence (Gu et al. 2022, arXiv:2206.11893): for each complex number of the
        state four to decay it, two to read its real share, and one for the channel's skip. The four
        operations of torch (decay, add, weigh, sum) read the state or as large a product, and all
        but the last write one."""
        shape, state = self.shape, self.cache_bytes(1, 1)
        width = shape.width
        per_layer = width**2 + 3 * width * self.model.hidden
        parameters = 4 * PAIRS * width * shape.num_layers * FLOAT_BYTES
        return Costs(
            dense=shape.num_layers * per_layer + shape.vocab_size * width,
            recurrence=shape.num_layers * width * (6 * PAIRS + 1),
            filter_bytes=parameters,
            cache_read=4 * state,
            cache_written=3 * state,
        )


PEERS: dict[str, type[Peer]] = {
    "llama": Llama,
    "llama-dynamic": LlamaDynamic,
    "mamba2": Mamba2,
    "rwkv": Rwkv,
    "s4": S4,
}


def build_peers(names: Iterable[str], shape: ModelConfig, num_parameters: int) -> dict[str, Peer]:
    """Peers of about so many parameters, packed. Raises ValueError if transformers is missing."""
    needing = [name for name in names if name != "s4"]
    if needing and importlib.util.find_spec("transformers") is None:
        raise ValueError(
            f"--peers {' '.join(needing)} needs transformers: pip install 'stu[bench]', or leave "
            "all but s4 out"
        )
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    peers = {name: PEERS[name](shape, num_parameters) for name in names}
    for peer in peers.values():
        peer.pack()
    return peers
