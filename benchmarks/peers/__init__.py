"""Other language models with as many parameters, decoded token by token with their own caches.

Weights are random, in float32. The models are built from configurations of `transformers`, but for
S4; nothing is downloaded. Matrices are packed as the engine packs its own, so that the models
differ in how they mix tokens.
"""

import importlib.util
import os
from collections.abc import Iterable

from benchmarks.peers.peer import Peer
from benchmarks.peers.s4 import S4
from benchmarks.peers.transformers_models import GroupedLlama, Llama, Mamba2, Rwkv
from stu.common.errors import UserError, how_to_install
from stu.config import ModelConfig

PEERS: dict[str, type[Peer]] = {
    "llama": Llama,
    "llama_grouped": GroupedLlama,
    "mamba2": Mamba2,
    "rwkv": Rwkv,
    "s4": S4,
}


def build_peers(names: Iterable[str], shape: ModelConfig, num_parameters: int) -> dict[str, Peer]:
    """Build packed peers of about this size. Raises UserError if transformers is missing."""
    needing = [name for name in names if name != "s4"]
    if needing and importlib.util.find_spec("transformers") is None:
        raise UserError("peers", needing, fix=f"{how_to_install('bench')}, or give s4 alone")
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    peers = {name: PEERS[name](shape, num_parameters) for name in names}
    for peer in peers.values():
        peer.pack()
    return peers
