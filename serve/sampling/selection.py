"""Selection of the largest numbers of each row, without sorting it.

On devices no shape depends on a value, as a CUDA graph requires: numbers are compared as integers
in the same order, and sought digit by digit, each with a histogram of the tokens that agree with
the digits before it. A CPU takes one histogram, of logarithms, and sorts the few tokens of one bin.
"""

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

DIGIT_BITS = 11
MANTISSA_BITS = 52
BIN_BITS = 6
"""Bits of a number's mantissa that choose its bin, on a CPU: 64 bins from a number to its half."""
NUM_BINS = (50 << BIN_BITS) + 2
"""Bins from 1 to 2**-50, and for what is less."""


class Level(NamedTuple):
    """A key of each row of `[B, V]`, at which an amount is reached. Tensors `[B, 1]`, int64."""

    key: Tensor
    above: Tensor
    """Amount of all larger keys."""
    each: Tensor
    """Amount of each token with this key."""


def ordered(values: Tensor) -> Tensor:
    """Return int64 keys in the order of `values`, which are float32 or float64, and equal where
    these are."""
    is_short = values.element_size() == 4
    bits = (values + 0.0).view(torch.int32 if is_short else torch.int64)  # -0.0 becomes 0.0
    signs = bits >> (31 if is_short else 63)
    return bits.bitwise_xor_(signs.bitwise_and_(2**31 - 1 if is_short else 2**63 - 1)).long()


def reached(keys: Tensor, amounts: Tensor, target: Tensor, key_bits: int) -> Level:
    """Return the largest key of each row whose amount, with that of all larger keys, is at least
    `target`.

    Args:
        keys: Signed integers of `key_bits` bits, `[B, V]`.
        amounts: What each key counts for, `[B, V]`, int64: of equal keys the same, or 0. They are
            overwritten.
        target: From 1 to the sum of the amounts, `[B, 1]`, int64.
        key_bits: 32 or 64.
    """
    sign = -(1 << (key_bits - 1))  # added to the keys, it makes unsigned ones of them
    keys, digits = keys + sign, torch.empty_like(keys)
    key, above = torch.zeros_like(target), torch.zeros_like(target)
    left = key_bits
    while left:
        width = min(DIGIT_BITS, left)
        left -= width
        last = (1 << width) - 1
        torch.bitwise_right_shift(keys, left, out=digits).bitwise_and_(last)
        bins = amounts.new_zeros(len(keys), last + 1).scatter_add_(1, digits, amounts)
        # Amounts of each digit and all larger ones, [B, 2**width].
        sums = above + bins.flip(1).cumsum(1).flip(1)
        digit = ((sums >= target).sum(1, keepdim=True) - 1).clamp_(min=0)
        above = sums.gather(1, digit) - bins.gather(1, digit)
        amounts.mul_(digits == digit)
        key = (key << width) + digit
    return Level(key + sign, above, amounts.amax(1, keepdim=True))


def keep_first(weights: Tensor, logits: Tensor, amounts: Tensor, target: Tensor) -> None:
    """Set all weights of each row to 0, but for those of the most probable tokens whose amounts
    together are at least `target`. Of equal logits the lower ids are kept.

    Args:
        weights: Weights in the order of the logits, 1 at most, float64 `[B, V]`, contiguous.
        logits: Logits in float32 or float64, `[B, V]`.
        amounts: What each token counts for, `[B, V]`, int64: of equal logits the same, or 0.
        target: From 1 on, `[B, 1]`, int64. Beyond the sum of the amounts all tokens are kept.
    """
    run = keep_first_on_host if weights.device.type == "cpu" else keep_first_on_device
    run(weights, logits, amounts, target)


def keep_first_on_device(weights: Tensor, logits: Tensor, amounts: Tensor, target: Tensor) -> None:
    """Do as `keep_first`, with shapes that depend on no value."""
    keys = ordered(logits)
    key, above, unit = reached(keys, amounts.clone(), target, 8 * logits.element_size())
    weights.mul_(at_least(keys, key, (target - above + unit - 1) // unit.clamp(min=1)))


def keep_first_on_host(weights: Tensor, logits: Tensor, amounts: Tensor, target: Tensor) -> None:
    """Do as `keep_first`, with few passes."""
    # A positive number's bits are its exponent and mantissa, so these bins are of its logarithm.
    bins = (weights.view(torch.int64) >> (MANTISSA_BITS - BIN_BITS)).neg_()
    bins.add_(1023 << BIN_BITS).clamp_(0, NUM_BINS - 1)
    sums = amounts.new_zeros(len(bins), NUM_BINS + 2)  # with what is before the first bin
    sums[:, 1:-1].scatter_add_(1, bins, amounts)
    # The bin in which the target is reached; if none, a bin without tokens. [B, 1]
    last = torch.searchsorted(sums.cumsum_(1), target).clamp_(1, NUM_BINS + 1) - 1
    above, reached_sum = sums.gather(1, last), sums.gather(1, last + 1)
    left, in_bin = target - above, reached_sum - above
    # Of the tokens in this bin, the first ones are kept.
    rows, ids = np.divmod(np.flatnonzero(bins.numpy() == last.numpy()), bins.shape[1])
    order = np.lexsort((-logits.numpy()[rows, ids], rows))  # stable
    rows, ids = rows[order], ids[order]
    own = amounts.numpy()[rows, ids]
    before = own.cumsum() - own  # of all rows; less the rows before, it is that of a row
    before -= (in_bin.cumsum(0) - in_bin).numpy()[rows, 0]
    are_out = before >= left.numpy()[rows, 0]
    kept = weights.numpy()
    kept *= bins.numpy() <= last.numpy()
    kept[rows[are_out], ids[are_out]] = 0


def at_least(keys: Tensor, key: Tensor, room: Tensor) -> Tensor:
    """Return which of `keys [B, V]` are above `key [B, 1]`, or among the first `room [B, 1]` equal
    to it."""
    equal = keys == key
    return (keys > key) | (equal & (equal.cumsum(1) <= room))


def largest(values: Tensor, count: int) -> Tensor:
    """Return the places of the `count` largest of each row of `values [B, V]`, in descending order;
    of equal ones the lower place comes first."""
    if values.element_size() == 8:
        return values.sort(dim=1, descending=True, stable=True).indices[:, :count]
    # The places themselves are the low bits of keys that are all different.
    last = values.shape[1] - 1
    places = torch.arange(last, -1, -1, device=values.device)
    keys = ordered(values.float()).bitwise_left_shift_(32).add_(places)
    return last - (keys.topk(count, dim=1, sorted=True).values & 0xFFFFFFFF)
