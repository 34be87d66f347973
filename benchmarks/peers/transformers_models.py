"""Peers of `transformers`: a Llama-like model, Mamba-2 and RWKV-4."""

from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention, silu, softplus

from benchmarks.peers.peer import FLOAT_BYTES, MULTIPLE, Peer, fitted

STATE_SIZE, EXPAND, HEAD_DIM, CONV_KERNEL = 128, 2, 64, 4
"""Sizes of Mamba-2, as published."""
CHUNK = 16
"""Prompt tokens that Mamba-2 reads at once. The published 256 would mostly be padding for the short
prompts here, whose prefill is not timed."""


class CachedPeer(Peer):
    """A model of `transformers` whose `forward` takes a cache."""

    cache: Any

    def prefill(self, tokens: Tensor) -> Tensor:
        output = self.model(tokens, cache=self.cache, use_cache=True, logits_to_keep=1)
        logits: Tensor = output.logits[:, -1]
        return logits

    def step(self, tokens: Tensor) -> Tensor:
        return self.prefill(tokens[:, None])


class Llama(CachedPeer):
    """Full attention, rotary positions, SwiGLU (Touvron et al. 2023, arXiv:2302.13971)."""

    multiple = MULTIPLE
    """Hidden widths are multiples of this."""

    @property
    def key_heads(self) -> int:
        """Heads of keys and values."""
        return self.shape.num_heads

    def _build(self, num_parameters: int) -> Any:
        from transformers import AttentionInterface, LlamaConfig, LlamaForCausalLM

        AttentionInterface.register("grouped", grouped_attention)

        def build(hidden: int) -> Any:
            config = LlamaConfig(
                vocab_size=self.shape.vocab_size,
                hidden_size=self.shape.width,
                num_hidden_layers=self.shape.num_layers,
                num_attention_heads=self.shape.num_heads,
                num_key_value_heads=self.key_heads,
                attn_implementation="grouped",
                intermediate_size=self.multiple * hidden,
                max_position_embeddings=self.shape.max_seq_len,
                tie_word_embeddings=True,
            )
            return LlamaForCausalLM(config)

        return fitted(build, num_parameters)

    def start(self, batch: int, positions: int) -> None:
        size = batch, self.key_heads, positions, self.shape.head_dim
        self.cache = _preallocated_cache(self.shape.num_layers, size)

    def seek(self, position: int) -> None:
        for layer in self.cache.layers:
            layer.seek(position)

    def cache_bytes(self, batch: int, positions: int) -> int:
        numbers = self.shape.num_layers * self.key_heads * self.shape.head_dim
        return 2 * batch * positions * numbers * FLOAT_BYTES


class GroupedLlama(Llama):
    """The same with grouped-query attention (Ainslie et al. 2023, arXiv:2305.13245)."""

    key_heads = 4


def grouped_attention(
    module: Any, queries: Tensor, keys: Tensor, values: Tensor, mask: Any, scaling: float, **_: Any
) -> tuple[Tensor, None]:
    """Return the outputs `[B, T, heads, head_dim]` of causal attention. All queries of a group go
    over its keys at once; `transformers` would first copy the keys for each of them."""
    batch, heads, length, head_dim = queries.shape
    group, positions = heads // keys.shape[1], keys.shape[2]
    asked = queries.reshape(batch, -1, group * length, head_dim)
    if length > 1:
        mask = torch.ones(length, positions).tril(positions - length).bool().repeat(group, 1)
    outputs = scaled_dot_product_attention(asked, keys, values, mask, scale=scaling)
    return outputs.view(queries.shape).transpose(1, 2), None


class Mamba2(CachedPeer):
    """Selective state spaces (Dao and Gu 2024, arXiv:2405.21060), without MLPs and with about twice
    as many layers."""

    def _build(self, num_parameters: int) -> Any:
        from transformers import Mamba2Config, Mamba2ForCausalLM

        inner = EXPAND * self.shape.width
        head_dim = min(HEAD_DIM, inner)

        def build(num_layers: int) -> Any:
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

        self.cache = DynamicCache(config=self.model.config)

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
        """Channels of a layer's state and of its short convolution."""
        inner = EXPAND * self.shape.width
        return inner, inner + 2 * STATE_SIZE

    def cache_bytes(self, batch: int, positions: int) -> int:
        inner, convolved = self._channels
        numbers = inner * STATE_SIZE + convolved * CONV_KERNEL
        num_layers: int = self.model.config.num_hidden_layers
        return batch * num_layers * numbers * FLOAT_BYTES


def convolved_in_place(
    inputs: Tensor, state: Tensor, weight: Tensor, bias: Tensor, activation: str
) -> Tensor:
    """Return the outputs `[B, channels, 1]` of one token of Mamba-2's short convolution, and update
    `state [B, channels, taps]`. For so few taps a sum is faster than `conv1d`."""
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
    """Return the outputs `[B, heads, head_dim]` of a token in Mamba-2, and update
    `state [B, heads, head_dim, N]` in place: the code that `transformers` falls back to without a
    GPU makes seven tensors of that size. Time steps, decay rates and skip are expanded from one
    number a head; there is one group, `to_state` and `from_state [B, 1, N]`."""
    steps = softplus(time_steps[..., 0] + dt_bias[:, 0])  # [B, heads]
    state.mul_(torch.exp(steps * decay_rates[:, 0, 0])[..., None, None])
    state.addcmul_((steps[..., None] * inputs)[..., None], to_state[:, :, None])
    outputs = torch.bmm(state.flatten(1, 2), from_state.mT).view_as(inputs)
    return outputs + inputs * skip


class Rwkv(Peer):
    """RWKV-4, the version in `transformers` (Peng et al. 2023, arXiv:2305.13048)."""

    def _build(self, num_parameters: int) -> Any:
        from transformers import RwkvConfig, RwkvForCausalLM

        def build(hidden: int) -> Any:
            config = RwkvConfig(
                vocab_size=self.shape.vocab_size,
                hidden_size=self.shape.width,
                num_hidden_layers=self.shape.num_layers,
                intermediate_size=MULTIPLE * hidden,
                context_length=self.shape.max_seq_len,
                rescale_every=0,  # rescaling is for float16
                tie_word_embeddings=True,
            )
            return RwkvForCausalLM(config)

        return fitted(build, num_parameters)

    def start(self, batch: int, positions: int) -> None:
        self.state: list[Any] = []

    def prefill(self, tokens: Tensor) -> Tensor:
        output = self.model(tokens, use_cache=True, logits_to_keep=1)
        self.state = [*map(_Shifts, output.state[:2]), *output.state[2:]]
        logits: Tensor = output.logits[:, -1]
        return logits

    def step(self, tokens: Tensor) -> Tensor:
        output = self.model(tokens[:, None], state=self.state, use_cache=True, logits_to_keep=1)
        logits: Tensor = output.logits[:, -1]
        return logits

    def cache_bytes(self, batch: int, positions: int) -> int:
        return 5 * batch * self.shape.width * self.shape.num_layers * FLOAT_BYTES


class _Shifts:
    """RWKV's state of the token before, `[B, D, layers]`, for one step of several sequences:
    transformers 5.24 takes `[B, D]` where `[B, 1, D]` is meant, which mixes sequences."""

    def __init__(self, state: Tensor) -> None:
        self.state = state.permute(2, 0, 1).contiguous()  # [layers, B, D]

    def __getitem__(self, index: tuple[slice, slice, int]) -> Tensor:
        return self.state[index[2]][:, None]

    def __setitem__(self, index: tuple[slice, slice, int], value: Tensor) -> None:
        self.state[index[2]] = value


def _preallocated_cache(num_layers: int, size: tuple[int, int, int, int]) -> Any:
    """Return a cache of `transformers` for keys and values `[B, heads, positions, head_dim]`. Its
    own caches copy all of them in every step, or attend to what is not filled yet."""
    from transformers.cache_utils import Cache, DynamicLayer

    class Preallocated(DynamicLayer):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self._all = torch.full(size, 0.1), torch.full(size, 0.1)
            self.is_initialized = True
            self.seek(0)

        def seek(self, position: int) -> None:
            self.keys, self.values = (part[:, :, :position] for part in self._all)

        def update(self, keys: Tensor, values: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
            start = self.keys.shape[2]
            self.seek(start + keys.shape[2])
            self.keys[:, :, start:], self.values[:, :, start:] = keys, values
            return self.keys, self.values

    return Cache(layers=[Preallocated() for _ in range(num_layers)])
