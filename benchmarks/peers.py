"""Other language models of as many parameters, decoded token by token with their own caches.

Random weights in float32. The models are those of `transformers` but for S4, and their matrices
are packed for oneDNN as the engine packs its own (`serve.packing`), so that the mixers are what
differs. `forward` is called with the cache directly, and gives the logits of the last token alone.
Nothing is downloaded: models are built from their configurations.
"""

import importlib.util
import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.costs import FLOAT_BYTES, Costs, attention_bytes, attention_multiply_adds
from benchmarks.s4 import PAIRS, S4Model
from serve.packing import PackedGatedMLP, PackedLinear, packs
from stu.config import ModelConfig
from stu.layers import GatedMLP

LARGEST_DIFFERENCE = 0.05
"""Of a peer's number of parameters from the number asked for."""
MULTIPLE = 16
"""Hidden widths are multiples of it."""
STATE_SIZE, EXPAND, HEAD_DIM, CONV_KERNEL = 128, 2, 64, 4
"""Of Mamba-2, as published."""


class Peer(ABC):
    """A model and its cache. `start` a batch and `prefill` it, perhaps `seek` to where a run would
    be, then call `step` for each token."""

    note = ""
    """What a reader of its figures should know."""

    def __init__(self, shape: ModelConfig, num_parameters: int) -> None:
        self.shape = shape
        self.model = self._build(num_parameters).eval().requires_grad_(False)
        self.num_parameters = _count(self.model)
        """About as many as were asked for, or ValueError is raised."""
        difference = self.num_parameters / num_parameters - 1
        if abs(difference) > LARGEST_DIFFERENCE:
            raise ValueError(
                f"{type(self).__name__} comes to {self.num_parameters:,} parameters, "
                f"{difference:+.0%} of {num_parameters:,}: choose a wider or deeper model"
            )

    def pack(self) -> None:
        """Arrange the matrices as oneDNN multiplies by fastest."""
        for module in list(self.model.modules()):
            for name, child in module.named_children():
                if isinstance(child, nn.Linear) and child.bias is None and packs(child.weight):
                    packed = PackedLinear(child.weight)
                    if name == "lm_head":  # Mamba-2 asks it for its dtype
                        packed.weight = child.weight  # the embedding's: it takes no memory
                    setattr(module, name, packed)
                elif isinstance(child, GatedMLP) and packs(child.gate.weight):
                    setattr(module, name, PackedGatedMLP(child))

    @abstractmethod
    def _build(self, num_parameters: int) -> nn.Module:
        """The model."""

    @abstractmethod
    def start(self, batch: int, positions: int) -> None:
        """Begin with an empty cache, which will hold so many positions of each sequence."""

    @abstractmethod
    def prefill(self, tokens: Tensor) -> Tensor:
        """Take prompts `[B, P]` in; logits `[B, vocab_size]` of what follows."""

    @abstractmethod
    def step(self, tokens: Tensor) -> Tensor:
        """Take a token of each sequence, `[B]`; logits `[B, vocab_size]` of what follows."""

    def seek(self, position: int) -> None:  # noqa: B027, most have nothing to do
        """Go on as if so many tokens had been taken in. Where a state is all, it makes no odds."""

    @abstractmethod
    def cache_bytes(self, batch: int, positions: int) -> int:
        """Allocated at the end of a run of so many positions."""

    @abstractmethod
    def costs(self, positions: range) -> Costs:
        """On average over tokens at these positions."""


class CachedPeer(Peer):
    """Of `transformers`, with a cache of its."""

    _cache: Any

    def prefill(self, tokens: Tensor) -> Tensor:
        output = self.model(tokens, cache=self._cache, use_cache=True, logits_to_keep=1)
        logits: Tensor = output.logits[:, -1]
        return logits

    def step(self, tokens: Tensor) -> Tensor:
        return self.prefill(tokens[:, None])


class Llama(CachedPeer):
    """Full attention, rotary positions, SwiGLU (Touvron et al. 2023, arXiv:2302.13971)."""

    note = "keys and values are written into a preallocated buffer, and its filled part is read"
    copies = 0
    """Of all keys and values, made in every step."""

    def _build(self, num_parameters: int) -> nn.Module:
        from transformers import LlamaConfig, LlamaForCausalLM

        def build(hidden: int) -> nn.Module:
            config = LlamaConfig(
                vocab_size=self.shape.vocab_size,
                hidden_size=self.shape.width,
                num_hidden_layers=self.shape.num_layers,
                num_attention_heads=self.shape.num_heads,
                intermediate_size=MULTIPLE * hidden,
                max_position_embeddings=self.shape.max_seq_len,
                tie_word_embeddings=True,
            )
            return LlamaForCausalLM(config)

        return _fitted(build, num_parameters)

    def start(self, batch: int, positions: int) -> None:
        size = batch, self.shape.num_heads, positions, self.shape.head_dim
        self._cache = _preallocated_cache(self.shape.num_layers, size)

    def seek(self, position: int) -> None:
        for layer in self._cache.layers:
            layer.seek(position)

    def cache_bytes(self, batch: int, positions: int) -> int:
        return 2 * batch * positions * self.shape.num_layers * self.shape.width * FLOAT_BYTES

    def costs(self, positions: range) -> Costs:
        width, layers = self.shape.width, self.shape.num_layers
        hidden = self.model.config.intermediate_size
        keys = [position + 1 for position in positions]
        read, written = attention_bytes(width, layers, keys)
        return Costs(
            dense=layers * (4 * width**2 + 3 * width * hidden) + self.shape.vocab_size * width,
            attention=attention_multiply_adds(width, layers, keys),
            cache_read=(1 + self.copies) * read,
            cache_written=written + self.copies * read,
        )


class LlamaDynamic(Llama):
    """The same with the cache that `transformers` uses where none is chosen."""

    note = "transformers' DynamicCache: all keys and values are copied in every step"
    copies = 1

    def start(self, batch: int, positions: int) -> None:
        from transformers import DynamicCache

        self._batch = batch
        self._cache = DynamicCache(config=self.model.config)

    def seek(self, position: int) -> None:
        size = self._batch, self.shape.num_heads, position, self.shape.head_dim
        for layer in self._cache.layers:
            layer.reset()  # gives the old ones back before there are new ones
            layer.update(torch.full(size, 0.1), torch.full(size, 0.1))


class Mamba2(CachedPeer):
    """Selective state spaces (Dao and Gu 2024, arXiv:2405.21060), without MLPs but with about
    twice as many layers."""

    note = "the reference code in torch, which is what runs on CPU: its fast kernels are for GPUs"

    def _build(self, num_parameters: int) -> nn.Module:
        from transformers import Mamba2Config, Mamba2ForCausalLM

        inner = EXPAND * self.shape.width
        head_dim = min(HEAD_DIM, inner)

        def build(num_layers: int) -> nn.Module:
            config = Mamba2Config(
                vocab_size=self.shape.vocab_size,
                hidden_size=self.shape.width,
                num_hidden_layers=num_layers,
                expand=EXPAND,
                head_dim=head_dim,
                num_heads=inner // head_dim,
                n_groups=1,
                state_size=STATE_SIZE,
                conv_kernel=CONV_KERNEL,
                tie_word_embeddings=True,
            )
            return Mamba2ForCausalLM(config)

        return _fitted(build, num_parameters)

    def start(self, batch: int, positions: int) -> None:
        from transformers import DynamicCache

        self._cache = DynamicCache(config=self.model.config)

    @property
    def _channels(self) -> tuple[int, int]:
        """Of the state of a layer, and of its short convolution."""
        inner = EXPAND * self.shape.width
        return inner, inner + 2 * STATE_SIZE

    def cache_bytes(self, batch: int, positions: int) -> int:
        inner, convolved = self._channels
        numbers = inner * STATE_SIZE + convolved * CONV_KERNEL
        return batch * self.model.config.num_hidden_layers * numbers * FLOAT_BYTES

    def costs(self, positions: range) -> Costs:
        """Of the recurrence `h = a h + B x, y = C h`: three of each number of the state."""
        width, layers = self.shape.width, self.model.config.num_hidden_layers
        inner, convolved = self._channels
        projections = width * (inner + convolved + self.model.config.num_heads + inner)
        state = self.cache_bytes(1, 1)
        return Costs(
            dense=layers * projections + self.shape.vocab_size * width,
            convolution=layers * CONV_KERNEL * convolved,
            recurrence=layers * 3 * inner * STATE_SIZE,
            cache_read=state,
            cache_written=state,
        )


class Rwkv(Peer):
    """Version 4, which is what `transformers` has (Peng et al. 2023, arXiv:2305.13048)."""

    note = "version 4; its products alone are fast code, the rest are operations of torch"

    def _build(self, num_parameters: int) -> nn.Module:
        from transformers import RwkvConfig, RwkvForCausalLM

        def build(hidden: int) -> nn.Module:
            config = RwkvConfig(
                vocab_size=self.shape.vocab_size,
                hidden_size=self.shape.width,
                num_hidden_layers=self.shape.num_layers,
                intermediate_size=MULTIPLE * hidden,
                context_length=self.shape.max_seq_len,
                rescale_every=0,  # is for float16
                tie_word_embeddings=True,
            )
            return RwkvForCausalLM(config)

        return _fitted(build, num_parameters)

    def start(self, batch: int, positions: int) -> None:
        self._state: list[Any] = []

    def prefill(self, tokens: Tensor) -> Tensor:
        output = self.model(tokens, use_cache=True, logits_to_keep=1)
        self._state = [*map(_Shifts, output.state[:2]), *output.state[2:]]
        logits: Tensor = output.logits[:, -1]
        return logits

    def step(self, tokens: Tensor) -> Tensor:
        output = self.model(tokens[:, None], state=self._state, use_cache=True, logits_to_keep=1)
        logits: Tensor = output.logits[:, -1]
        return logits

    def cache_bytes(self, batch: int, positions: int) -> int:
        return 5 * batch * self.shape.width * self.shape.num_layers * FLOAT_BYTES

    def costs(self, positions: range) -> Costs:
        """Of time and channel mixing: for each channel five mixes with the token before, of two,
        and eight for numerators, denominators, their quotient and the gate."""
        width, layers = self.shape.width, self.shape.num_layers
        hidden = self.model.config.intermediate_size
        state = self.cache_bytes(1, 1)
        return Costs(
            dense=layers * (5 * width**2 + 2 * width * hidden) + self.shape.vocab_size * width,
            recurrence=layers * 18 * width,
            cache_read=state,
            cache_written=state,
        )


class S4(Peer):
    """Diagonal state spaces in the blocks of a Flash-STU (`benchmarks.s4`)."""

    note = "recurrent, with 64 numbers of state for each channel; in operations of torch"

    def _build(self, num_parameters: int) -> nn.Module:
        return _fitted(lambda hidden: S4Model(self.shape, MULTIPLE * hidden), num_parameters)

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
        state four to decay it, two to read its real share, and one for the channel's skip."""
        shape, state = self.shape, self.cache_bytes(1, 1)
        width = shape.width
        per_layer = width**2 + 3 * width * self.model.hidden
        parameters = 4 * PAIRS * width * shape.num_layers * FLOAT_BYTES
        return Costs(
            dense=shape.num_layers * per_layer + shape.vocab_size * width,
            recurrence=shape.num_layers * width * (6 * PAIRS + 1),
            filter_bytes=parameters,
            cache_read=state,
            cache_written=state,
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
            f"--peers {' '.join(needing)} needs transformers: pip install 'stu[peers]', or leave "
            "all but s4 out"
        )
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    peers = {name: PEERS[name](shape, num_parameters) for name in names}
    for peer in peers.values():
        peer.pack()
    return peers


def _fitted(build: Callable[[int], nn.Module], num_parameters: int) -> nn.Module:
    """Of the sizes, in which the number of parameters is linear, the one that comes nearest."""
    with torch.device("meta"):
        first, second = _count(build(1)), _count(build(2))
    size = 1 + round((num_parameters - first) / (second - first))
    return build(max(1, size))


def _count(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


class _Shifts:
    """RWKV's state of the token before, `[B, D, layers]`, as one step of several sequences needs
    it: transformers 5.24 takes `[B, D]` from it where `[B, 1, D]` is meant, which mixes sequences.
    """

    def __init__(self, state: Tensor) -> None:
        self._state = state.permute(2, 0, 1).contiguous()  # [layers, B, D]

    def __getitem__(self, index: tuple[slice, slice, int]) -> Tensor:
        return self._state[index[2]][:, None]

    def __setitem__(self, index: tuple[slice, slice, int], value: Tensor) -> None:
        self._state[index[2]] = value


def _preallocated_cache(num_layers: int, size: tuple[int, int, int, int]) -> Any:
    """A cache of `transformers` for keys and values `[B, heads, positions, head_dim]`. Its own
    ones copy all of them in every step, or attend to what is not filled yet."""
    from transformers.cache_utils import Cache, DynamicLayer

    class Preallocated(DynamicLayer):
        def __init__(self) -> None:
            super().__init__()
            self._all = torch.full(size, 0.1), torch.full(size, 0.1)
            self.is_initialized = True
            self.seek(0)

        def seek(self, position: int) -> None:
            self.keys, self.values = (its[:, :, :position] for its in self._all)

        def update(self, keys: Tensor, values: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
            start = self.keys.shape[2]
            self.seek(start + keys.shape[2])
            self.keys[:, :, start:], self.values[:, :, start:] = keys, values
            return self.keys, self.values

    return Cache(layers=[Preallocated() for _ in range(num_layers)])
