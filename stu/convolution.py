"""Causal convolution of a whole sequence by FFT, for training and for prefill.

Transforms are in float32 (float64 for float64 inputs) in models of any dtype, and along a
contiguous time axis, which is two to three times faster than a strided one. On a CPU they run over
blocks of channels that fit the cache: temporaries of the whole width cost more in page faults than
the FFTs themselves.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.functional import pad

CPU_BLOCK_ELEMENTS = 2**18  # 1 MiB of float32: the best of 2^14..2^19 with 1 MiB of L2 per core


def causal_convolution(
    inputs: Tensor, taps: Tensor, lag_step: int = 1, num_outputs: int | None = None
) -> Tensor:
    """Compute `y[t] = sum_j taps[j] * inputs[t - lag_step * j]`, with a filter per channel.

    inputs: `[B, T, D]`, any T >= 1; taps: `[N, D]`, tap j at lag `lag_step * j`. Returns
    `[B, num_outputs, D]` in the dtype of `inputs`; outputs beyond T are what the inputs add to the
    future. Differentiable in both; the backward pass transforms the inputs again, so that only the
    arguments are kept for it.

    The two branches of an STU layer, filters `psi[i]` and `(-1)^i psi[i]`, share their weights and
    sum to `2 psi[i]` at even lags and 0 at odd ones: `lag_step=2` with `taps = 2 psi[0::2]`. Even
    and odd positions then never mix and are transformed as separate sequences of half the length.
    """
    num_outputs = inputs.shape[1] if num_outputs is None else num_outputs
    _check(inputs, taps, lag_step, num_outputs)
    dtype = torch.promote_types(inputs.dtype, torch.float32)
    outputs: Tensor = _CausalConvolution.apply(  # type: ignore[no-untyped-call]
        inputs.to(dtype), taps[: -(-num_outputs // lag_step)].to(dtype), lag_step, num_outputs
    )
    return outputs.to(inputs.dtype)


def short_convolution(inputs: Tensor, taps: Tensor, positions: Tensor | None = None) -> Tensor:
    """Compute `y[t] = sum_j taps[j] * inputs[t - j]` by direct sums, with few taps per channel.

    inputs: `[B, J - 1 + T, C]`, beginning with those before the first output; taps: `[J, C]`.
    Returns `[B, T, C]` in the dtype of `inputs`.

    positions: position of each output in its document, `[B, T]`; documents that share a row see
    nothing of one another. None: a row is one sequence.
    """
    taps = taps.to(inputs.dtype)  # autocast leaves parameters in float32
    length, last = inputs.shape[1] - len(taps) + 1, len(taps) - 1
    outputs = taps[0] * inputs[:, last:]
    for lag in range(1, len(taps)):
        earlier = inputs[:, last - lag : last - lag + length]
        if positions is not None:
            earlier = earlier.masked_fill((positions < lag)[..., None], 0.0)
        outputs = outputs + taps[lag] * earlier
    return outputs


def after_zeros(inputs: Tensor, num_taps: int) -> Tensor:
    """Pad whole sequences for a short convolution: `[B, T, C] -> [B, J - 1 + T, C]`."""
    return pad(inputs, (0, 0, num_taps - 1, 0))


def fast_fft_length(at_least: int) -> int:
    """Return the smallest `2^a * {1, 3, 5, 9, 15}` from `at_least` on: FFTs are fast at those."""
    return min(odd << max(0, (-(-at_least // odd) - 1).bit_length()) for odd in (1, 3, 5, 9, 15))


def _check(inputs: Tensor, taps: Tensor, lag_step: int, num_outputs: int) -> None:
    if inputs.ndim != 3 or taps.ndim != 2 or inputs.shape[2] != taps.shape[1]:
        raise ValueError(
            f"inputs {list(inputs.shape)} and taps {list(taps.shape)} do not fit: "
            "[B, T, D] and [N, D] are needed"
        )
    if not (inputs.is_floating_point() and taps.is_floating_point()):
        raise ValueError(f"inputs are {inputs.dtype} and taps {taps.dtype}: give floating point")
    if min(*inputs.shape, *taps.shape, lag_step, num_outputs) < 1:
        raise ValueError(
            f"inputs {list(inputs.shape)}, taps {list(taps.shape)}, lag_step={lag_step} and "
            f"num_outputs={num_outputs}: none may be 0"
        )


class _CausalConvolution(torch.autograd.Function):
    """Has its own backward pass, because autograd through `rfft` runs full complex transforms."""

    @staticmethod
    def forward(ctx: Any, inputs: Tensor, taps: Tensor, lag_step: int, num_outputs: int) -> Tensor:
        ctx.save_for_backward(inputs, taps)
        ctx.lag_step, ctx.num_outputs = lag_step, num_outputs
        batch, length, width = inputs.shape
        outputs = inputs.new_empty(batch, num_outputs, width)
        n = _fft_length(length, len(taps), lag_step, num_outputs)
        for block in _channel_blocks(inputs, n):
            spectrum = _spectrum(inputs[..., block], lag_step, n)
            spectrum *= _spectrum(taps[None, :, block], 1, n)
            _store(torch.fft.irfft(spectrum, n=n), outputs[..., block], lag_step)
        return outputs

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        inputs, taps = ctx.saved_tensors
        lag_step = ctx.lag_step
        needs_inputs, needs_taps, _, _ = ctx.needs_input_grad
        inputs_grad = torch.empty_like(inputs) if needs_inputs else None
        taps_grad = torch.empty_like(taps) if needs_taps else None
        n = _fft_length(inputs.shape[1], len(taps), lag_step, ctx.num_outputs)
        for block in _channel_blocks(inputs, n):
            grad_spectrum = _spectrum(grad[..., block], lag_step, n)
            if taps_grad is not None:
                spectrum = _spectrum(inputs[..., block], lag_step, n).conj_physical_()
                spectrum = spectrum.mul_(grad_spectrum).sum((1, 2), keepdim=True)
                _store(torch.fft.irfft(spectrum, n=n), taps_grad[None, :, block], 1)
            if inputs_grad is not None:
                grad_spectrum *= _spectrum(taps[None, :, block], 1, n).conj_physical_()
                _store(torch.fft.irfft(grad_spectrum, n=n), inputs_grad[..., block], lag_step)
        return inputs_grad, taps_grad, None, None


def _fft_length(length: int, num_taps: int, lag_step: int, num_outputs: int) -> int:
    """Return a length at which the circular wrap-around reaches no wanted value."""
    per_phase = -(-length // lag_step)
    return fast_fft_length(max(per_phase + num_taps - 1, -(-num_outputs // lag_step)))


def _channel_blocks(inputs: Tensor, fft_length: int) -> Iterator[slice]:
    batch, _, width = inputs.shape
    step = width
    if inputs.device.type == "cpu":
        step = min(width, max(1, CPU_BLOCK_ELEMENTS // (2 * batch * fft_length)))
    return (slice(start, start + step) for start in range(0, width, step))


def _spectrum(sequence: Tensor, lag_step: int, fft_length: int) -> Tensor:
    """Transform zero-padded phases: `[B, T, C] -> [C, B, lag_step, fft_length // 2 + 1]`."""
    batch, _, width = sequence.shape
    sequence = sequence.contiguous()  # a block of columns lies scattered over memory
    padded = sequence.new_zeros(width, batch, lag_step, fft_length)
    for phase in range(lag_step):
        part = sequence[:, phase::lag_step]  # [B, T/g, C] -> [C, B, T/g]
        padded[:, :, phase, : part.shape[1]].copy_(part.permute(2, 0, 1))
    spectrum: Tensor = torch.fft.rfft(padded)
    return spectrum


def _store(phases: Tensor, sequence: Tensor, lag_step: int) -> None:
    """Write `[C, B, lag_step, fft_length]` into `sequence [B, T, C]`, dropping the padding."""
    for phase in range(lag_step):
        part = sequence[:, phase::lag_step]
        part.copy_(phases[:, :, phase, : part.shape[1]].permute(1, 2, 0))
