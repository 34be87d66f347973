"""Bytes that caches take for what the layers of a model remember of a sequence.

`serve.cache` allocates them, and `stu-plan --serve` adds them up without a model's weights.
"""

from collections.abc import Sequence

import torch

from stu.filters import spectral_filters
from stu.mixers import KeyWindow, LastInputs, PastInputs
from stu.realisation import fitting_realisation

STATE_BYTES = 8
"""Bytes of a number of a state, in float64."""
SEED, RANDOM_CHANNELS = 0, 64


def state_bytes(past: PastInputs, rank: int) -> int:
    """Return the bytes of a layer's states of one sequence, with `rank` numbers for each channel
    and signal: phases of STU-T, and inputs and alternating inputs of the full form."""
    signals = past.lag_step * past.channels if past.basis == "mixed" else 2 * past.streams
    return STATE_BYTES * rank * signals


def state_page_bytes(past: PastInputs, rank: int, page_len: int, itemsize: int) -> int:
    """Return the bytes of a layer's page beside its states: of mixed filters its inputs and pending
    outputs, of alternating ones its inputs and the states in narrow coordinates."""
    if past.basis == "mixed":
        return past.channels * 2 * page_len * itemsize
    narrow = min(rank, page_len * past.channels // 2)
    return 2 * past.streams * (narrow + page_len) * itemsize


def pending_page_bytes(past: PastInputs, page_len: int, itemsize: int) -> int:
    """Return the bytes of `page_len` positions of a layer that FutureFill caches in pages."""
    return page_len * past.channels * past.streams * itemsize


def window_page_bytes(window: KeyWindow, page_len: int, itemsize: int) -> int:
    """Return the bytes of the keys and values of `page_len` positions of a layer."""
    return 2 * page_len * window.num_heads * window.head_dim * itemsize


def last_input_bytes(last: LastInputs, itemsize: int) -> int:
    """Return the bytes of the last inputs of a short convolution."""
    return (last.num_taps - 1) * last.channels * itemsize


def usual_rank(past: PastInputs, max_seq_len: int, num_filters: int) -> int | None:
    """Return the rank of the states of spectral filters that are weighted at random, as those of a
    new model; None for filters of another kind, which have no states. It takes seconds."""
    if past.basis is None:
        return None
    filters = torch.from_numpy(spectral_filters(max_seq_len, num_filters)).float().double()
    basis = past.lag_step * filters[:: past.lag_step]
    weights: Sequence[torch.Tensor | None] = [None]
    if past.basis == "mixed":
        random = torch.Generator().manual_seed(SEED)
        shape = num_filters, RANDOM_CHANNELS
        weights = [torch.randn(shape, generator=random, dtype=torch.float64)]
    return fitting_realisation(basis, weights, torch.float32)[0].rank
