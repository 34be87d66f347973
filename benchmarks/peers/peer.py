"""The interface of another language model, decoded token by token with its own cache."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any

from torch import Tensor, device, nn

from serve.engine.packing import PackedGatedMLP, PackedLinear, packs
from stu.common.errors import UserError
from stu.config import ModelConfig
from stu.layers import GatedMLP

LARGEST_DIFFERENCE = 0.05
"""Largest difference of a peer's number of parameters from the number asked for."""
FLOAT_BYTES = 4
MULTIPLE = 16
"""Hidden widths are multiples of this."""


class Peer(ABC):
    """A model and its cache. Call `start` for a batch, `prefill`, perhaps `seek` to a position, and
    `step` for each token. Raises UserError if no size has about `num_parameters`."""

    def __init__(self, shape: ModelConfig, num_parameters: int) -> None:
        self.shape = shape
        self.model: Any = self._build(num_parameters).eval().requires_grad_(False)
        self.num_parameters = _count(self.model)
        difference = self.num_parameters / num_parameters - 1
        if abs(difference) > LARGEST_DIFFERENCE:
            raise UserError(
                message=f"{type(self).__name__} comes to {self.num_parameters:,} parameters, "
                f"{difference:+.0%} of {num_parameters:,}: choose a wider or deeper model"
            )

    def pack(self) -> None:
        """Pack the matrices for oneDNN, as the engine does."""
        for module in list(self.model.modules()):
            for name, child in module.named_children():
                if isinstance(child, nn.Linear) and child.bias is None and packs(child.weight):
                    packed = PackedLinear(child.weight)
                    if name == "lm_head":  # Mamba-2 reads its dtype; the weight is the embedding's
                        packed.weight = child.weight
                    setattr(module, name, packed)
                elif isinstance(child, GatedMLP) and packs(child.gate.weight):
                    setattr(module, name, PackedGatedMLP(child))

    @abstractmethod
    def _build(self, num_parameters: int) -> Any:
        """Build the model."""

    @abstractmethod
    def start(self, batch: int, positions: int) -> None:
        """Begin with an empty cache for this number of positions of each sequence."""

    @abstractmethod
    def prefill(self, tokens: Tensor) -> Tensor:
        """Read prompts `[B, P]`; return the logits `[B, vocab_size]` of the next tokens."""

    @abstractmethod
    def step(self, tokens: Tensor) -> Tensor:
        """Read a token of each sequence, `[B]`; return the logits `[B, vocab_size]` of the next."""

    def seek(self, position: int) -> None:  # noqa: B027, a state is the same at any position
        """Move to the state after this number of tokens."""

    @abstractmethod
    def cache_bytes(self, batch: int, positions: int) -> int:
        """Return the bytes allocated at the end of a run of this number of positions."""


def fitted(build: Callable[[int], Any], num_parameters: int) -> Any:
    """Build the size nearest to `num_parameters`, which must be linear in the size."""
    with device("meta"):
        first, second = _count(build(1)), _count(build(2))
    size = 1 + round((num_parameters - first) / (second - first))
    return build(max(1, size))


def _count(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())
