"""Peers that `transformers` has: a Llama-like model, Mamba-2, RWKV.

`forward` is called with the cache directly, and gives the logits of the last token alone.
"""

from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch.nn.functional import silu, softplus

from benchmarks.costs import FLOAT_BYTES, Costs, attention_bytes, attention_multiply_adds
from benchmarks.peer import MULTIPLE, Peer, fitted

STATE_SIZE, EXPAND, HEAD_DIM, CONV_KERNEL = 128, 2, 64, 4
"""Of Mamba-2, as published."""
CHUNK = 16
"""Tokens of a prompt at once; of a published 256, most would be padding of the short prompts here,
which are not timed."""


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

        return fitted(build, num_parameters)

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

    note = (
        "with a state that is updated in place: what transformers does on CPU goes over it 15 times"
    )

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
                chunk_size=CHUNK,
                tie_word_embeddings=True,
            )
            return Mamba2ForCausalLM(config)

        return fitted(build, num_parameters)

    def start(self, batch: int, positions: int) -> None:
        from transformers import DynamicCache

        self._cache = DynamicCache(config=self.model.config)

    def step(self, tokens: Tensor) -> Tensor:
        from transformers.models.mamba2 import modeling_mamba2

        with mock.patch.multiple(
            modeling_mamba2,
            causal_conv1d_update=convolved_in_place,
            mamba2_selective_state_update=updated_in_place,
        ):
            return super().step(tokens)

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
        """Of the recurrence `h = a h + B x, y = C h`: three of each number of the state, which is
        read in each, and written by two."""
        width, layers = self.shape.width, self.model.config.num_hidden_layers
        inner, convolved = self._channels
        projections = width * (inner + convolved + self.model.config.num_heads + inner)
        state = self.cache_bytes(1, 1)
        return Costs(
            dense=layers * projections + self.shape.vocab_size * width,
            convolution=layers * CONV_KERNEL * convolved,
            recurrence=layers * 3 * inner * STATE_SIZE,
            cache_read=3 * state,
            cache_written=2 * state,
        )


def convolved_in_place(
    inputs: Tensor, state: Tensor, weight: Tensor, bias: Tensor, activation: str
) -> Tensor:
    """Outputs `[B, channels, 1]` of one token of Mamba-2's short convolution, by a sum, which
    is faster than `conv1d` for so few taps. `state [B, channels, taps]` goes on."""
    assert activation == "silu"
    state.copy_(torch.cat([state[..., 1:], inputs], dim=-1))
    return silu((state * weight).sum(-1, keepdim=True) + bias[:, None])


def updated_in_place(
    state: Tensor,
    inputs: Tensor,
    time_steps: Tensor,
    decay_rates: Tensor,
    to_state: Tensor,
    from_state: Tensor,
    skip: Tensor,
    *,
    dt_bias: Tensor,
    **_: Any,
) -> Tensor:
    """Outputs `[B, heads, head_dim]` of a token in Mamba-2; `state [B, heads, head_dim, N]` goes
    on. In place of what `transformers` falls back to without a GPU, which makes seven tensors of
    its size. Time steps, decay rates and skip come expanded, but are those of a head; there is
    one group, `to_state` and `from_state [B, 1, N]`."""
    steps = softplus(time_steps[..., 0] + dt_bias[:, 0])  # [B, heads]
    state.mul_(torch.exp(steps * decay_rates[:, 0, 0])[..., None, None])
    state.addcmul_((steps[..., None] * inputs)[..., None], to_state[:, :, None])
    outputs = torch.bmm(state.flatten(1, 2), from_state.mT).view_as(inputs)
    return outputs + inputs * skip


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

        return fitted(build, num_parameters)

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
