"""The cache of Stu models for `generate`: the memories of all layers."""

from collections.abc import Callable
from typing import Any

from torch import Tensor
from transformers.cache_utils import Cache

from .memory_stu import LayerMemory, Realisation


class StuCache(Cache):  # type: ignore[misc]
    """The memory of all layers. `generate` makes one itself.

    Args:
        num_layers: Number of blocks.
        realisation: Filters in the form that states need; None: layers remember their inputs.
    """

    def __init__(self, num_layers: int, realisation: "Realisation | None" = None) -> None:
        super().__init__(layers=[LayerMemory() for _ in range(num_layers)])
        self.realisation = realisation
        self.num_tokens = 0
        self.ends_in_padding = False
        """Whether padding followed a token."""

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Return the number of positions read, padding included."""
        return self.num_tokens

    def get_max_length(self, layer_idx: int | None = None) -> int:
        """Return -1: the model limits the length, not the cache."""
        return -1

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Let each sequence continue the one that `beam_idx [B]` names."""
        self._change(lambda tensor: tensor.index_select(0, beam_idx.to(tensor.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Let `repeats` sequences continue each one."""
        self._change(lambda tensor: tensor.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep the sequences `indices`."""
        self._change(lambda tensor: tensor[indices.to(tensor.device)])

    def reset(self) -> None:
        """Forget everything."""
        for layer in self.layers:
            layer.tensors, layer.taps = {}, None
        self.num_tokens, self.ends_in_padding = 0, False

    def crop(self, *_: Any) -> None:
        """Raise ValueError: a state cannot go back to an earlier token."""
        raise ValueError("a StuCache cannot go back to an earlier token")

    def activate_past_recording(self) -> None:
        """Raise ValueError, as `crop`."""
        self.crop()

    @property
    def is_compileable(self) -> bool:
        """Whether the shapes of its tensors stay the same."""
        return False

    @property
    def is_croppable(self) -> bool:
        """Whether it can go back to an earlier token."""
        return False

    @property
    def is_initialized(self) -> bool:
        """Whether it has read tokens."""
        return self.num_tokens > 0

    @property
    def is_sliding(self) -> list[bool]:
        """Whether each layer is one of transformers' own windows."""
        return [False] * len(self.layers)

    def _change(self, change: Callable[[Tensor], Tensor]) -> None:
        for layer in self.layers:
            layer.tensors = {name: change(tensor) for name, tensor in layer.tensors.items()}
