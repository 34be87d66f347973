"""Flash-STU: a language model whose layers mix tokens by long convolution and attention."""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from stu.config import ModelConfig
from stu.filters import spectral_filters
from stu.hyena import Hyena, ImplicitFilter
from stu.layers import (
    FullSTU,
    GatedMLP,
    LongConvolution,
    Memory,
    RMSNorm,
    SlidingWindowAttention,
    TensordotSTU,
)


class FlashSTU(nn.Module):
    """Liu et al. 2024, "Flash STU: Fast Spectral Transform Units", arXiv:2409.10489; in the layouts
    `hyena` and `attention` the same with other mixers.

    Weights are initialised from torch's global generator, except on the meta device. The spectral
    filters are a buffer that stays at least float32 when the model is cast, and so do the weights
    that make Hyena's filters: `wide_names`.
    """

    filters: Tensor
    """`[L, K]`, or `[L, 0]` where no layer is an STU."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.embedding = nn.Embedding(config.vocab_size, config.width)
        self.blocks = nn.ModuleList(Block(config, index) for index in range(config.num_layers))
        self.norm = RMSNorm(config.width, config.norm_eps)
        shape = config.max_seq_len, config.num_filters if config.stu_layers else 0
        self.register_buffer("filters", torch.empty(shape, dtype=torch.float32))
        if not self.filters.is_meta:
            if config.stu_layers:
                self.filters.copy_(torch.from_numpy(spectral_filters(*shape)))
            _initialize(self)

    def forward(self, tokens: Tensor, memory: Memory | None = None) -> Tensor:
        """Logits `[B, T, vocab_size]` of the tokens that follow each of `tokens [B, T]`.

        With a `memory`, the tokens continue the sequences that it remembers.
        """
        return self.logits(self.hidden(tokens, memory))

    def hidden(self, tokens: Tensor, memory: Memory | None = None) -> Tensor:
        """The normalised residual stream `[B, T, D]` that `logits` reads."""
        if memory is None and tokens.shape[1] > self.config.max_seq_len:
            raise ValueError(
                f"a sequence of {tokens.shape[1]} tokens exceeds "
                f"max_seq_len={self.config.max_seq_len}: shorten it"
            )
        x = self.embedding(tokens)  # [B, T] -> [B, T, D]
        for block in self.blocks:
            x = block(x, self.filters, memory)
        normed: Tensor = self.norm(x)
        return normed

    def logits(self, hidden: Tensor) -> Tensor:
        """Scores of the next token, `[..., D] -> [..., vocab_size]`: the embedding is tied."""
        return F.linear(hidden, self.embedding.weight)

    def convolution_taps(self) -> tuple[Tensor, int]:
        """What an online convolution needs: taps `[convolution_layers, N, C]` float64, and their
        lag step.

        Summed in float64, they are as smooth as the filters are.
        """
        filters = self.filters.double()
        layers = [its.mixer for its in self.blocks if isinstance(its.mixer, LongConvolution)]
        if not layers:
            return filters.new_zeros(0, 1, self.config.width), 1
        return torch.stack([its.taps(filters) for its in layers]).detach(), layers[0].lag_step

    @property
    def wide_names(self) -> set[str]:
        """Of the tensors that are to stay float32 or wider, whatever other weights are cast to."""
        implicit = {
            f"{prefix}.{name}"
            for prefix, module in self.named_modules()
            if isinstance(module, ImplicitFilter)
            for name, _ in module.named_parameters()
        }
        return {"filters", *implicit}

    def num_parameters(self) -> int:
        """Trained weights; the filters are fixed and not counted."""
        return sum(parameter.numel() for parameter in self.parameters())

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "FlashSTU":
        filters = self.filters
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        if torch.finfo(self.filters.dtype).bits < 32:
            self.filters = filters.to(self.filters.device)
        return self


class Block(nn.Module):
    """A mixer and a gated MLP, each on a normalised copy of the residual stream."""

    def __init__(self, config: ModelConfig, index: int) -> None:
        super().__init__()
        self.mixer_norm = RMSNorm(config.width, config.norm_eps)
        self.mlp_norm = RMSNorm(config.width, config.norm_eps)
        self.mlp = GatedMLP(config)
        self.mixer: LongConvolution | SlidingWindowAttention
        if index in config.attention_layers:
            self.mixer = SlidingWindowAttention(config, config.attention_layers.index(index))
            return
        layer = config.convolution_layers.index(index)
        if config.layout == "hyena":
            self.mixer = Hyena(config, layer)
        elif config.stu_form == "tensordot":
            self.mixer = TensordotSTU(config, layer)
        else:
            self.mixer = FullSTU(config, layer)

    def forward(self, x: Tensor, filters: Tensor, memory: Memory | None) -> Tensor:
        return self.feed_forward(self.mix(x, filters, memory))

    def mix(self, x: Tensor, filters: Tensor, memory: Memory | None) -> Tensor:
        """The first half, in which tokens see one another: `[B, T, D]` both ways."""
        normed = self.mixer_norm(x)
        if isinstance(self.mixer, LongConvolution):
            mixed: Tensor = x + self.mixer(normed, filters, memory)
        else:
            mixed = x + self.mixer(normed, memory)
        return mixed

    def feed_forward(self, x: Tensor) -> Tensor:
        """The second half, each token for itself: `[..., D]` both ways."""
        residual: Tensor = x + self.mlp(self.mlp_norm(x))
        return residual


@torch.no_grad()
def _initialize(model: FlashSTU) -> None:
    """Normal with std D^-0.5; mixers Xavier normal; the projections that end a residual branch
    are scaled by `1 / sqrt(2 * layers)`, so that the stream's variance does not grow with depth."""
    std = model.config.width**-0.5
    depth_scale = (2 * model.config.num_layers) ** -0.5
    nn.init.normal_(model.embedding.weight, std=std)
    for block in model.blocks:
        assert isinstance(block, Block)
        nn.init.normal_(block.mlp.gate.weight, std=std)
        nn.init.normal_(block.mlp.up.weight, std=std)
        nn.init.normal_(block.mlp.down.weight, std=std * depth_scale)
        mixer = block.mixer
        if isinstance(mixer, SlidingWindowAttention):
            nn.init.xavier_normal_(mixer.qkv.weight)
            nn.init.xavier_normal_(mixer.output.weight, gain=depth_scale)
        elif isinstance(mixer, TensordotSTU):
            nn.init.xavier_normal_(mixer.input_matrix)
            nn.init.xavier_normal_(mixer.filter_matrix)
        elif isinstance(mixer, FullSTU):
            for matrix in (*mixer.plus_matrices, *mixer.minus_matrices):
                nn.init.xavier_normal_(matrix)
        elif isinstance(mixer, Hyena):
            nn.init.xavier_normal_(mixer.input.weight)
            nn.init.xavier_normal_(mixer.output.weight, gain=depth_scale)
            mixer.initialize_filters()
