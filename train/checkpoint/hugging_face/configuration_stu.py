"""The configuration of Stu models: the fields of config.json."""

from typing import Any

from transformers import PretrainedConfig

LAYOUTS = {"hybrid": ("stu", "attention")}
"""Layouts of several mixers, which the blocks take in turn; others are the name of one mixer."""


class StuConfig(PretrainedConfig):  # type: ignore[misc]
    """Everything that decides the weights of a model and the function they compute.

    Args:
        vocab_size: Number of token ids.
        width: Channels D of the residual stream.
        num_layers: Number of blocks, each of a mixer and a gated MLP.
        layout: Mixers of the blocks: `hybrid` (STU and attention in turn), or `stu`, `attention` or
            `hyena` in all of them.
        stu_form: `tensordot`: one filter per channel; `full`: a D x D matrix per filter.
        num_filters: Number of spectral filters.
        max_seq_len: Longest context in tokens.
        mlp_ratio: Hidden width of the MLP, in units of `width`.
        num_heads: Attention heads.
        window_tokens: Tokens that attention sees before the current one.
        softcap: Bound on attention scores.
        norm_eps: Number added to the mean square, or to the variance, inside norms.
        blocks: Layers around the mixers. `gated`: RMSNorm and a gated MLP, without biases; `plain`:
            LayerNorm and an MLP without a gate, with biases.
        filter_bands: Frequencies in the features of lags of Hyena's filters.
        filter_floor: Number added to the window of Hyena's filters.
        state_rates: Rates of decay of the numbers in which the past of an STU layer's channel is
            kept while generating; None: no state of constant size gives its filters, and inputs are
            kept instead.
        use_cache: Whether forward passes return a cache.
        tie_word_embeddings: Must be true: the output matrix is the embedding.
    """

    model_type = "stu"
    keys_to_ignore_at_inference = ["cache", "past_key_values"]  # noqa: RUF012
    attribute_map = {  # noqa: RUF012
        "hidden_size": "width",
        "num_hidden_layers": "num_layers",
        "num_attention_heads": "num_heads",
        "max_position_embeddings": "max_seq_len",
    }

    def __init__(
        self,
        vocab_size: int = 256,
        width: int = 512,
        num_layers: int = 8,
        layout: str = "hybrid",
        stu_form: str = "tensordot",
        num_filters: int = 24,
        max_seq_len: int = 4096,
        mlp_ratio: int = 4,
        num_heads: int = 8,
        window_tokens: int = 1024,
        softcap: float = 50.0,
        norm_eps: float = 1e-5,
        blocks: str = "gated",
        filter_bands: int = 16,
        filter_floor: float = 0.0,
        state_rates: list[float] | None = None,
        use_cache: bool = True,
        tie_word_embeddings: bool = True,
        **kwargs: Any,
    ) -> None:
        if not tie_word_embeddings:
            raise ValueError(
                "tie_word_embeddings must be true: Stu models have one matrix for both"
            )
        self.vocab_size = vocab_size
        self.width = width
        self.num_layers = num_layers
        self.layout = layout
        self.stu_form = stu_form
        self.num_filters = num_filters
        self.max_seq_len = max_seq_len
        self.mlp_ratio = mlp_ratio
        self.num_heads = num_heads
        self.window_tokens = window_tokens
        self.softcap = softcap
        self.norm_eps = norm_eps
        self.blocks = blocks
        self.filter_bands = filter_bands
        self.filter_floor = filter_floor
        self.state_rates = state_rates
        self.use_cache = use_cache
        super().__init__(tie_word_embeddings=tie_word_embeddings, **kwargs)

    @property
    def mixers(self) -> list[str]:
        """Kind of mixer of each block."""
        kinds = LAYOUTS.get(self.layout, (self.layout,))
        return [kinds[i % len(kinds)] for i in range(self.num_layers)]
