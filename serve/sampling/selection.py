"""Selection of the largest numbers of each row, without sorting it and without any shape that
depends on a value, as a CUDA graph requires.

Numbers are compared as integers in the same order, and sought digit by digit: each digit takes one
histogram of the tokens that agree with the digits before it.
"""

from typing import NamedTuple

import torch
from torch import Tensor

DIGIT_BITS = 11


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
