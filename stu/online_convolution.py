"""Online convolution: one output per token, while the inputs are still being generated.

Tests and benchmarks decode with these classes, and compare them with those of `stu.futurefill`; the
engine in `serve` has its own caches.

Filters are `taps [layers, N, D]`, tap j at lag `lag_step * j`. They may be any causal filters;
those of an STU-T are zero at odd lags, so `lag_step=2` skips half of the taps. As in
`stu.convolution`, position t is column `t // lag_step` of phase `t % lag_step`, and phases never
mix. Sums have the dtype of the taps, float32 or float64.
"""

from abc import ABC, abstractmethod

from torch import Tensor
from torch.nn.functional import pad

from stu.convolution import causal_convolution


class OnlineConvolution(ABC):
    """Convolutions of several layers, for a batch of sequences that are decoded in step.

    Call `prefill` for each layer (and for each row, if prompts differ in length), then for every
    token `step` for each layer and `advance` once.
    """

    def __init__(self, taps: Tensor, batch: int, max_new_tokens: int, lag_step: int = 1) -> None:
        if max_new_tokens < 1:
            raise ValueError(f"max_new_tokens={max_new_tokens} is not allowed: it must be >= 1")
        self.taps, self.batch = taps, batch
        self.max_new_tokens, self.lag_step = max_new_tokens, lag_step
        self.num_columns = -(-max_new_tokens // lag_step)
        self.position = 0
        """Number of tokens since the prompt."""
        self.multiply_adds = 0
        """Number of real multiply-adds of all steps. A real FFT of length n counts as `n log2 n`, a
        complex product as 4."""

    @property
    @abstractmethod
    def cache_bytes(self) -> int:
        """Bytes of all sequences' inputs and pending outputs, without filters."""

    @abstractmethod
    def prefill(self, layer: int, inputs: Tensor, rows: slice = slice(None)) -> Tensor:
        """Read prompts `[rows, P, D]` and return their outputs `[rows, P, D]`."""

    @abstractmethod
    def step(self, layer: int, inputs: Tensor) -> Tensor:
        """Read one token's inputs `[B, D]` and return its outputs `[B, D]`."""

    def advance(self) -> None:
        """Go to the next token, after `step` for every layer."""
        self.position += 1

    def _check_room(self) -> None:
        if self.position >= self.max_new_tokens:
            raise ValueError(
                f"all max_new_tokens={self.max_new_tokens} tokens are decoded; raise max_new_tokens"
            )


class Naive(OnlineConvolution):
    """Direct sums over the whole past: `O(L)` per token, and a cache as long as the context.

    The latest inputs stay in a separate, time-major buffer until they fill a cache line per
    channel: channels are far apart in the cache, so writing every single input there would wait for
    memory.

    max_prompt_tokens: Length of the longest prompt to make room for. None: as many tokens as the
    filters reach.
    """

    LINE_COLUMNS = 16

    def __init__(
        self,
        taps: Tensor,
        batch: int,
        max_new_tokens: int,
        lag_step: int = 1,
        max_prompt_tokens: int | None = None,
    ) -> None:
        super().__init__(taps, batch, max_new_tokens, lag_step)
        layers, num_taps, width = taps.shape
        self._reversed_taps = taps.flip(1).transpose(1, 2).contiguous()[:, :, None]  # [.., D, 1, N]
        self._latest_taps = taps[:, : self.LINE_COLUMNS].flip(1)[:, :, None]  # [layers, n, 1, D]
        self._max_prompt_tokens = max_prompt_tokens
        self._origin = num_taps
        """Column of the first new token; prompts end just before it."""
        if max_prompt_tokens is not None:
            self._origin = min(num_taps, -(-max_prompt_tokens // lag_step))
        columns = self._origin + self.num_columns + self.LINE_COLUMNS
        self._inputs = taps.new_zeros(layers, lag_step, width, batch, columns)
        self._latest = taps.new_zeros(layers, lag_step, self.LINE_COLUMNS, batch, width)
        self._prompt_columns = 0

    @property
    def cache_bytes(self) -> int:
        columns = self._prompt_columns + self.num_columns
        elements = self._inputs[..., :columns].numel() + self._latest.numel()
        return elements * self._inputs.element_size()

    def prefill(self, layer: int, inputs: Tensor, rows: slice = slice(None)) -> Tensor:
        most = self._max_prompt_tokens
        if most is not None and inputs.shape[1] > most:
            raise ValueError(
                f"the prompt has {inputs.shape[1]} tokens, and there is room for {most}; raise "
                "max_prompt_tokens"
            )
        origin, step, width = self._origin, self.lag_step, self.taps.shape[2]
        reached = inputs[:, -origin * step :]
        columns = -(-reached.shape[1] // step)
        phases = pad(reached, (0, 0, columns * step - reached.shape[1], 0))
        phases = phases.view(-1, columns, step, width).permute(2, 3, 0, 1)  # -> [g, D, B, columns]
        self._inputs[layer, :, :, rows, origin - columns : origin] = phases
        self._prompt_columns = max(self._prompt_columns, columns)
        return causal_convolution(inputs, self.taps[layer], step)

    def step(self, layer: int, inputs: Tensor) -> Tensor:
        self._check_room()
        num_taps, width = self.taps.shape[1:]
        column, phase = divmod(self.position, self.lag_step)
        count = min(num_taps, self._prompt_columns + column + 1)
        latest = self._latest[layer, phase]  # [columns, B, D]
        place = column % self.LINE_COLUMNS
        latest[place] = inputs
        near = min(place + 1, count)
        near_taps = self._latest_taps[layer, -near:]
        outputs = (latest[place + 1 - near : place + 1] * near_taps).sum(0)
        if count > near:
            # [D, 1, n] @ [D, n, B] is the fastest of einsum, matmul and vecdot in any layout.
            end = self._origin + column - place
            past = self._inputs[layer, phase, :, :, end - (count - near) : end]
            far_taps = self._reversed_taps[layer, :, :, num_taps - count : num_taps - near]
            outputs += (far_taps @ past.transpose(1, 2))[:, 0].t()
        self.multiply_adds += count * self.batch * width
        return outputs.to(inputs.dtype)

    def advance(self) -> None:
        super().advance()
        column, phase = divmod(self.position, self.lag_step)
        if phase == 0 and column % self.LINE_COLUMNS == 0:
            end = self._origin + column
            lines = self._inputs[..., end - self.LINE_COLUMNS : end]
            lines.copy_(self._latest.permute(0, 1, 4, 3, 2))
