"""Another language model, decoded token by token with its own cache, as a benchmark sees it."""

from abc import ABC, abstractmethod
from collections.abc import Callable

from torch import Tensor, device, nn

from benchmarks.costs import Costs
from serve.engine.packing import PackedGatedMLP, PackedLinear, packs
from stu.config import ModelConfig
from stu.layers import GatedMLP

LARGEST_DIFFERENCE = 0.05
"""Of a peer's number of parameters from the number asked for."""
MULTIPLE = 16
"""Hidden widths are multiples of it."""


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


def fitted(build: Callable[[int], nn.Module], num_parameters: int) -> nn.Module:
    """Of the sizes, in which the number of parameters is linear, the one that comes nearest."""
    with device("meta"):
        first, second = _count(build(1)), _count(build(2))
    size = 1 + round((num_parameters - first) / (second - first))
    return build(max(1, size))


def _count(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())
