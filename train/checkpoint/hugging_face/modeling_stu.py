"""Stu models for transformers: Flash-STU language models, and variants with other mixers."""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import GenerationMixin, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast

from .cache_stu import StuCache
from .configuration_stu import StuConfig
from .layers_stu import (
    StuFilters,
    StuLayerNorm,
    StuMLP,
    StuPlainMLP,
    StuRMSNorm,
    make_norm,
)
from .memory_stu import Realisation
from .mixers_stu import MIXERS, StuHyena, StuImplicitFilter, StuMixer

FIELDS = BaseModelOutputWithPast.__dataclass_fields__
CACHE = "cache" if "cache" in FIELDS else "past_key_values"
"""Name of the cache in outputs, which depends on the version of transformers."""


class StuBlock(nn.Module):
    """A mixer and an MLP, each on a normalised copy of the residual stream."""

    def __init__(self, config: StuConfig, mixer: str) -> None:
        super().__init__()
        self.mixer_norm = make_norm(config)
        self.mlp_norm = make_norm(config)
        self.mlp = StuPlainMLP(config) if config.blocks == "plain" else StuMLP(config)
        self.mixer = MIXERS[mixer](config)

    def forward(self, x: Tensor, *arguments: Any) -> Tensor:
        x = x + self.mixer(self.mixer_norm(x), *arguments)
        residual: Tensor = x + self.mlp(self.mlp_norm(x))
        return residual


class StuPreTrainedModel(PreTrainedModel):  # type: ignore[misc]
    """Base class of Stu models."""

    config_class = StuConfig
    base_model_prefix = "model"
    _no_split_modules = ["StuBlock"]  # noqa: RUF012
    _is_stateful = True

    def __init__(self, config: StuConfig, *arguments: Any, **options: Any) -> None:
        super().__init__(config, *arguments, **options)
        wide = {"stu": "filters", "hyena": "implicit_filter"}
        self._keep_in_fp32_modules_strict = [wide[kind] for kind in wide if kind in config.mixers]

    @classmethod
    def _supports_default_dynamic_cache(cls) -> bool:
        return False  # `forward` makes its own

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        std, depth_scale = self.config.width**-0.5, (2 * self.config.num_layers) ** -0.5
        if isinstance(module, nn.Embedding | nn.Linear):
            nn.init.normal_(module.weight, std=std)
            if isinstance(module, nn.Linear) and module.bias is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, StuRMSNorm):
            nn.init.ones_(module.weight)
        elif isinstance(module, StuLayerNorm):
            nn.init.ones_(module.weight)
            nn.init.zeros_(module.bias)
        elif isinstance(module, StuFilters):
            module.initialize()
        elif isinstance(module, StuMixer):
            for matrices in module.parameters():
                for matrix in matrices if matrices.ndim == 3 else [matrices]:
                    nn.init.xavier_normal_(matrix)
        elif isinstance(module, StuImplicitFilter):
            for matrix in (module.input_matrix, module.hidden_matrices, module.output_matrix):
                nn.init.normal_(matrix, std=0.02)
            nn.init.zeros_(module.biases)
            nn.init.constant_(module.frequencies, 14.0)
            nn.init.normal_(module.skip)
        elif isinstance(module, StuHyena):
            nn.init.uniform_(module.short_taps, -(3**-0.5), 3**-0.5)
            if module.short_bias is not None:
                nn.init.zeros_(module.short_bias)
        elif isinstance(module, StuBlock):  # after its parts
            for part in (module.mlp.down, getattr(module.mixer, "output", None)):
                if part is not None:
                    nn.init.normal_(part.weight, std=std * depth_scale)


class StuModel(StuPreTrainedModel):
    """Embedding, blocks and final norm."""

    def __init__(self, config: StuConfig) -> None:
        super().__init__(config)
        self.embedding = nn.Embedding(config.vocab_size, config.width)
        self.filters = StuFilters(config) if "stu" in config.mixers else None
        self.blocks = nn.ModuleList(StuBlock(config, mixer) for mixer in config.mixers)
        self.norm = make_norm(config)
        self.post_init()

    def get_input_embeddings(self) -> nn.Embedding:
        return self.embedding

    def set_input_embeddings(self, value: nn.Embedding) -> None:
        self.embedding = value

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        cache: StuCache | None = None,
        past_key_values: StuCache | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
        return_dict: bool | None = None,
        **kwargs: Any,
    ) -> Any:
        """Compute the normalised residual stream `[B, T, D]`.

        Args:
            input_ids: Tokens `[B, T]`, or `inputs_embeds [B, T, D]` instead.
            attention_mask: 1 at tokens and 0 at padding, `[B, T]`, or `[B, past + T]` with a cache.
            inputs_embeds: Rows of the embedding.
            cache: A `StuCache` of earlier tokens, which these continue.
            past_key_values: The same, under its older name.
            use_cache: Whether to return a cache.
            output_hidden_states: Whether to return the residual stream before each block, and last
                the result.
            output_attentions: Must be false, as most mixers have no scores.
            return_dict: Whether the outputs have names.
            kwargs: Not used.

        Raises ValueError for what is not supported.
        """
        if output_attentions:
            raise ValueError("output_attentions is not supported: most mixers have no scores")
        cache = past_key_values if cache is None else cache
        use_cache = self.config.use_cache if use_cache is None else use_cache
        x = self.embedding(input_ids) if inputs_embeds is None else inputs_embeds
        length = x.shape[1]
        if cache is None and use_cache:
            cache = StuCache(self.config.num_layers, self._realisation(x.device))
        if cache is not None and not isinstance(cache, StuCache):
            raise ValueError(f"the cache must be a StuCache, not {type(cache).__name__}")
        earlier = 0 if cache is None else cache.num_tokens
        if earlier + length > self.config.max_seq_len:
            raise ValueError(
                f"{earlier + length} tokens exceed max_seq_len={self.config.max_seq_len}"
            )
        present = None
        if attention_mask is not None:
            if attention_mask.ndim != 2 or attention_mask.shape[1] < length:
                raise ValueError("attention_mask must be [batch, tokens], 1 at tokens")
            present = attention_mask[:, -length:, None].bool()
        if cache is not None:
            if cache.ends_in_padding:
                raise ValueError("padding must be on the left: use padding_side='left'")
            if length > 1 and attention_mask is not None:
                cache.ends_in_padding = bool((attention_mask.diff(dim=1) < 0).any())
            cache.num_tokens += length
        states = []
        filters = None if self.filters is None else self.filters()
        for number, block in enumerate(self.blocks):
            if output_hidden_states:
                states.append(x)
            memory = None if cache is None else cache.layers[number]
            realisation = None if cache is None else cache.realisation
            x = block(x, filters, present, memory, realisation)
        x = self.norm(x)
        hidden_states = (*states, x) if output_hidden_states else None
        if return_dict is False:
            return tuple(part for part in (x, cache, hidden_states) if part is not None)
        return BaseModelOutputWithPast(
            last_hidden_state=x, hidden_states=hidden_states, **{CACHE: cache}
        )

    def _realisation(self, device: torch.device) -> Realisation | None:
        # The states need float64, which MPS lacks.
        if self.filters is None or not self.config.state_rates or device.type == "mps":
            return None
        return Realisation(self.filters(), self.config.state_rates)


class StuForCausalLM(StuPreTrainedModel, GenerationMixin):  # type: ignore[misc]
    """A language model, whose output matrix is the embedding."""

    _tied_weights_keys = {"lm_head.weight": "model.embedding.weight"}  # noqa: RUF012

    def __init__(self, config: StuConfig) -> None:
        super().__init__(config)
        self.model = StuModel(config)
        self.lm_head = nn.Linear(config.width, config.vocab_size, bias=False)
        self.post_init()

    def get_input_embeddings(self) -> nn.Embedding:
        return self.model.embedding

    def set_input_embeddings(self, value: nn.Embedding) -> None:
        self.model.embedding = value

    def get_output_embeddings(self) -> nn.Linear:
        return self.lm_head

    def set_output_embeddings(self, value: nn.Linear) -> None:
        self.lm_head = value

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        cache: StuCache | None = None,
        past_key_values: StuCache | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
        return_dict: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        **kwargs: Any,
    ) -> Any:
        """Compute the logits `[B, T, vocab_size]` of the tokens that follow, and the loss.

        Args are those of `StuModel.forward`, and:
            labels: Tokens `[B, T]`, -100 where none counts; they are shifted here.
            logits_to_keep: Number of last positions with logits, or indices of positions; 0: all.
        """
        outputs = self.model(
            input_ids,
            attention_mask,
            inputs_embeds,
            cache,
            past_key_values,
            use_cache,
            output_hidden_states,
            output_attentions,
        )
        is_count = isinstance(logits_to_keep, int)
        kept = slice(-logits_to_keep, None) if is_count else logits_to_keep
        logits = self.lm_head(outputs.last_hidden_state[:, kept])
        loss = None
        if labels is not None:
            vocab_size = self.config.vocab_size
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=vocab_size, **kwargs)
        cache, hidden_states = getattr(outputs, CACHE), outputs.hidden_states
        if return_dict is False:
            return tuple(p for p in (loss, logits, cache, hidden_states) if p is not None)
        return CausalLMOutputWithPast(
            loss=loss, logits=logits, hidden_states=hidden_states, **{CACHE: cache}
        )
