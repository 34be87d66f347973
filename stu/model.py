"""Flash-STU: a language model whose blocks mix tokens by long convolutions and attention."""

from collections import Counter
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from stu.common.errors import UserError
from stu.config import ModelConfig, Weights
from stu.filters import spectral_filters
from stu.layers import make_mlp, make_norm
from stu.mixers import LongConvolution, Mixer, Remembered, make_mixer
from stu.quantization import ByteWeights
from stu.sequences.base import WHOLE, Sequences
from stu.slices.channels import ChannelRanks


class FlashSTU(nn.Module):
    """A language model of blocks, each a mixer and an MLP, with a tied embedding.

    The model of Liu et al. 2024, "Flash STU: Fast Spectral Transform Units", arXiv:2409.10489, and
    variants with the other mixers of `stu.layouts`. Weights are initialised from torch's global
    generator, except on the meta device. The filters and the weights in `wide_names` stay float32
    or wider when the model is cast.
    """

    filters: Tensor
    """Spectral filters `[L, K]`, or `[L, 0]` if no mixer needs them."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.weights: Weights | ByteWeights = "float"
        """Format in which the engine decodes by default."""
        self.ranks: ChannelRanks | None = None
        """Ranks among which channels and the vocabulary are divided; None if all are here."""
        # On the meta device, nn.Embedding would import torch._dynamo to initialise this: 1.3 s.
        unset = torch.empty(config.vocab_size, config.width) if torch.empty(0).is_meta else None
        self.embedding = nn.Embedding(config.vocab_size, config.width, _weight=unset)
        self.blocks = nn.ModuleList(Block(config, name) for name in config.mixers)
        self.norm = make_norm(config)
        counts: Counter[type[Remembered]] = Counter()
        for mixer in self.mixers:
            mixer.numbers = {type(memory): counts[type(memory)] for memory in mixer.remembers}
            counts.update(mixer.numbers.keys())
        needs_filters = any(mixer.needs_filters for mixer in self.mixers)
        shape = config.max_seq_len, config.num_filters if needs_filters else 0
        self.register_buffer("filters", torch.empty(shape, dtype=torch.float32))
        if not self.filters.is_meta:
            if needs_filters:
                self.filters.copy_(torch.from_numpy(spectral_filters(*shape)))
            self._initialize()

    @property
    def num_ranks(self) -> int:
        """Ranks among which channels are divided; 1 if all are here."""
        return 1 if self.ranks is None else self.ranks.size

    @property
    def mixers(self) -> list[Mixer]:
        """The mixer of each block."""
        return [block.mixer for block in self.blocks]  # type: ignore[misc]

    def forward(self, tokens: Tensor, sequences: Sequences = WHOLE) -> Tensor:
        """Compute the logits `[B, T, vocab_size]` of the tokens that follow `tokens [B, T]`.

        Args:
            tokens: Token ids.
            sequences: What the rows hold: by default, one whole sequence each."""
        return self.logits(self.hidden(tokens, sequences))

    def hidden(self, tokens: Tensor, sequences: Sequences = WHOLE) -> Tensor:
        """Compute the normalised residual stream `[B, T, D]` that `logits` reads.

        Raises UserError if whole sequences are longer than `max_seq_len`.
        """
        length = sequences.length(tokens.shape[1])
        if length > self.config.max_seq_len:
            raise UserError(
                message=f"a sequence of {length} tokens exceeds "
                f"max_seq_len={self.config.max_seq_len}: shorten it"
            )
        x = self.embedding(tokens)  # [B, T] -> [B, T, D]
        for block in self.blocks:
            x = block(x, self.filters, sequences=sequences)
        normed: Tensor = self.norm(x)
        return normed

    def logits(self, hidden: Tensor) -> Tensor:
        """Compute scores of the next token with the tied embedding:
        `[..., D] -> [..., vocab_size]`."""
        return self.logits_of_all(F.linear(hidden, self.embedding.weight))

    def logits_of_all(self, logits: Tensor) -> Tensor:
        """Return the logits `[..., vocab_size]` of all ranks, given those of this rank's tokens."""
        if self.ranks is None:
            return logits
        return self.ranks.gather(logits)[..., : self.config.vocab_size]

    def convolution_taps(self) -> tuple[Tensor, int]:
        """Return the taps `[convolution layers, N, C]` and their lag step, for decoding.

        They are summed in float64, so that they are as smooth as the filters. Raises UserError if
        the layers' convolutions differ in shape.
        """
        filters = self.filters.double()
        layers = [mixer for mixer in self.mixers if isinstance(mixer, LongConvolution)]
        if not layers:
            return filters.new_zeros(0, 1, self.config.width), 1
        if len({layer.past for layer in layers}) > 1:
            raise UserError(
                message=f"layout={self.config.layout} cannot be decoded: the long convolutions of "
                "its mixers differ in shape; combine others"
            )
        taps = torch.stack([layer.taps(filters) for layer in layers])
        return taps.detach(), layers[0].past.lag_step

    @property
    def wide_names(self) -> set[str]:
        """Names of the tensors that stay float32 or wider when a model is cast."""
        wide = {id(module) for mixer in self.mixers for module in mixer.filter_modules}
        return {"filters"} | {
            f"{prefix}.{name}"
            for prefix, module in self.named_modules()
            if id(module) in wide
            for name, _ in module.named_parameters()
        }

    @property
    def matrices(self) -> dict[str, int]:
        """Names of the matrices that activations are multiplied with, and their dim of outputs; the
        embedding is none of them."""
        found: dict[str, int] = {}
        for number, block in enumerate(self.blocks):
            assert isinstance(block, Block)
            for part, own in (("mixer", block.mixer.matrices), ("mlp", block.mlp.matrices)):
                found |= {f"blocks.{number}.{part}.{name}": dim for name, dim in own.items()}
        return found

    @property
    def linear_maps(self) -> dict[str, int]:
        """Names of the weights whose matrices map activations, and how many matrices are stacked in
        each along its first dim. An optimizer may update each matrix as a whole. Filters and the
        embedding are none of them."""
        found = dict.fromkeys(self.matrices, 1)
        for number, mixer in enumerate(self.mixers):
            stacked = mixer.stacked_matrices
            found |= {f"blocks.{number}.mixer.{name}": count for name, count in stacked}
        return found

    def num_parameters(self) -> int:
        """Return the number of trained weights, which excludes the filters."""
        return sum(parameter.numel() for parameter in self.parameters())

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "FlashSTU":
        filters = self.filters
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        if torch.finfo(self.filters.dtype).bits < 32:
            self.filters = filters.to(self.filters.device)
        return self

    @torch.no_grad()
    def _initialize(self) -> None:
        # Projections that end a residual branch are scaled down, so that the variance of the
        # stream does not grow with depth.
        std, depth_scale = self.config.width**-0.5, (2 * self.config.num_layers) ** -0.5
        nn.init.normal_(self.embedding.weight, std=std)
        for block in self.blocks:
            assert isinstance(block, Block)
            block.mlp.initialize(std, depth_scale)
            block.mixer.initialize(depth_scale)


class Block(nn.Module):
    """A mixer and an MLP, each on a normalised copy of the residual stream."""

    def __init__(self, config: ModelConfig, mixer: str) -> None:
        super().__init__()
        self.mixer_norm = make_norm(config)
        self.mlp_norm = make_norm(config)
        self.mlp = make_mlp(config)
        self.mixer = make_mixer(mixer, config)

    def forward(self, x: Tensor, filters: Tensor, sequences: Sequences) -> Tensor:
        return self.feed_forward(self.mix(x, filters, sequences))

    def mix(self, x: Tensor, filters: Tensor, sequences: Sequences) -> Tensor:
        """Apply the first half, in which tokens see one another: `[B, T, D]` both ways."""
        # By keyword: ZeRO's hooks warn of positional arguments that they do not know.
        mixed: Tensor = x + self.mixer(self.mixer_norm(x), filters, sequences=sequences)
        return mixed

    def feed_forward(self, x: Tensor) -> Tensor:
        """Apply the second half, to each token alone: `[..., D]` both ways."""
        residual: Tensor = x + self.mlp(self.mlp_norm(x))
        return residual
