"""Attention of one token of each row to the window of its sequence, whose keys lie in pages."""

from __future__ import annotations  # annotations of kernels need Triton

from typing import NamedTuple

import torch
from torch import Tensor

from serve.kernels.dispatch import dense_rows, jit, power_of_two, tl, uses_triton
from serve.kernels.near_field import vectors
from stu.attention import Scores, attend

BLOCK_BYTES = 2**22
"""Bytes of keys that the torch code attends to at once: they should fit a processor's cache."""
SHORTEST_PART, MOST_PARTS = 128, 32
"""Keys that a program attends to, at least, and programs that share a window, at most. Neither
depends on the batch, so results do not."""
MOST_DIMS = 64
"""Dims of a head for which a program joins the parts of a window."""
TILE_BYTES = 2**13
"""Bytes of keys that a program has in registers, in the dtype of the sums."""


class RowWindows(NamedTuple):
    """The windows of all rows. Positions are counted in each sequence from 0."""

    pages: Tensor
    """Pages of each row in order, `[rows, n]`. Unused entries may have any value."""
    firsts: Tensor
    """Position of the first key in a row's first page, `[rows]`."""
    lengths: Tensor
    """Number of tokens before the new one, which is its position, `[rows]`."""


def window_attention(
    pool: Tensor,
    layer: int,
    windows: RowWindows,
    rows: Tensor,
    queries: Tensor,
    keys: Tensor,
    values: Tensor,
    scores: Scores,
) -> Tensor:
    """Write the new keys and values into their pages, and return the outputs of their tokens.

    Queries, keys, values and outputs are `[B, heads, head_dim]`. Scores are as in `stu.attention`;
    they and the sums are in float32 at least. Only keys that the window reaches are read.

    Args:
        pool: Pages of keys and values, `[pages, layers, 2, page_len, heads, head_dim]`.
        layer: Number of the layer.
        windows: Windows of all rows.
        rows: Row of each token, `[B]`.
        queries: Queries of the new tokens.
        keys: Their keys.
        values: Their values.
        scores: Scores of the keys in a window.
    """
    run = triton_window_attention if uses_triton(queries) else torch_window_attention
    return run(pool, layer, windows, rows, queries, keys, values, scores)


def torch_window_attention(
    pool: Tensor,
    layer: int,
    windows: RowWindows,
    rows: Tensor,
    queries: Tensor,
    keys: Tensor,
    values: Tensor,
    scores: Scores,
) -> Tensor:
    """Do as `window_attention`, in torch."""
    own, page_len = pool[:, layer], pool.shape[3]  # [pages, 2, page_len, heads, head_dim]
    tables, lengths = windows.pages[rows], windows.lengths[rows]
    new = lengths - windows.firsts[rows]
    pages = tables.gather(1, (new // page_len)[:, None])[:, 0]
    kept, (per_page, per_kind, per_slot) = vectors(own.flatten(3))
    places = pages * per_page + new % page_len * per_slot
    for kind, numbers in enumerate((keys, values)):
        kept.index_copy_(0, places + kind * per_kind, numbers.flatten(1).to(pool.dtype))
    dtype = torch.promote_types(queries.dtype, torch.float32)
    outputs = torch.empty_like(queries, memory_format=torch.contiguous_format)
    slots = torch.arange(tables.shape[1] * page_len, device=rows.device)
    at_once = max(BLOCK_BYTES // (len(slots) * own[0, 0, 0].nbytes), 1)
    for start in range(0, len(rows), at_once):
        block = slice(start, start + at_once)
        distances = new[block, None] - slots  # [b, S]
        seen = (distances >= 0) & (distances <= scores.window_tokens)
        # Other slots may hold anything: the new key and value are read in their place.
        read = torch.where(seen, slots, new[block, None])
        places = tables[block].gather(1, read // page_len) * per_page + read % page_len * per_slot
        past_keys, past_values = (
            kept.index_select(0, (places + kind * per_kind).flatten())
            .view(*places.shape, *keys.shape[1:])
            .to(dtype)
            .transpose(1, 2)  # [b, heads, S, head_dim]
            for kind in (0, 1)
        )
        attended = attend(
            queries[block, :, None].to(dtype),
            past_keys,
            past_values,
            distances[:, None, None],
            scores,
        )
        outputs[block] = attended[:, :, 0]
    return outputs


def triton_window_attention(
    pool: Tensor,
    layer: int,
    windows: RowWindows,
    rows: Tensor,
    queries: Tensor,
    keys: Tensor,
    values: Tensor,
    scores: Scores,
) -> Tensor:
    """Do as `window_attention`, in Triton: parts of the windows first, which are then joined."""
    batch, heads, head_dim = queries.shape
    queries, keys, values = (dense_rows(own) for own in (queries, keys, values))
    own, page_len = pool[:, layer], pool.shape[3]
    reach = min(scores.window_tokens, windows.pages.shape[1] * page_len)
    part = max(SHORTEST_PART, power_of_two(-(-reach // MOST_PARTS)))
    parts, block_head = -(-reach // part), power_of_two(head_dim)
    block_dims = min(block_head, MOST_DIMS)
    outputs = torch.empty(queries.shape, dtype=queries.dtype, device=queries.device)
    dtype = torch.promote_types(queries.dtype, torch.float32)
    sums = torch.empty(batch, heads, parts, head_dim, dtype=dtype, device=queries.device)
    scales = torch.empty(batch, heads, parts, 2, dtype=dtype, device=queries.device)
    with torch.cuda.device_of(queries):
        _attend_part[parts, heads, batch](
            own,
            windows.pages,
            windows.firsts,
            windows.lengths,
            rows,
            queries,
            keys,
            values,
            scores.slopes,
            sums,
            scales,
            own.stride(0),
            own.stride(1),
            windows.pages.stride(0),
            queries.stride(0),
            keys.stride(0),
            values.stride(0),
            WINDOW=scores.window_tokens,
            SOFTCAP=scores.softcap,
            PAGE_LEN=page_len,
            HEADS=heads,
            HEAD_DIM=head_dim,
            BLOCK_HEAD=block_head,
            BLOCK_KEYS=min(max(TILE_BYTES // dtype.itemsize // block_head, 1), part),
            PART=part,
            num_warps=4,
        )
        _join_parts[batch, heads, -(-head_dim // block_dims)](
            sums,
            scales,
            outputs,
            PARTS=parts,
            HEAD_DIM=head_dim,
            BLOCK_PARTS=power_of_two(parts),
            BLOCK_DIMS=block_dims,
            num_warps=2,
        )
    return outputs


@jit
def _attend_part(
    own,
    tables,
    firsts,
    lengths,
    rows,
    queries,
    keys,
    values,
    slopes,
    sums,
    scales,
    page_stride,
    kind_stride,
    table_row,
    query_row,
    key_row,
    value_row,
    WINDOW: tl.constexpr,
    SOFTCAP: tl.constexpr,
    PAGE_LEN: tl.constexpr,
    HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_HEAD: tl.constexpr,
    BLOCK_KEYS: tl.constexpr,
    PART: tl.constexpr,
):
    """Compute the weighted sum of a part's values for one head of a token, the largest score, and
    the sum of weights relative to it. The first part has the token itself."""
    part, head = tl.program_id(0), tl.program_id(1)
    token = tl.program_id(2).to(tl.int64)
    row = tl.load(rows + token)
    first, length = tl.load(firsts + row), tl.load(lengths + row)
    wide = sums.dtype.element_ty
    dims = tl.arange(0, BLOCK_HEAD)
    exists = dims < HEAD_DIM
    here = head * HEAD_DIM + dims
    query = tl.load(queries + token * query_row + here, mask=exists, other=0).to(wide)
    query *= HEAD_DIM**-0.5 / SOFTCAP
    stored = own.dtype.element_ty
    key = tl.load(keys + token * key_row + here, mask=exists, other=0).to(stored)
    value = tl.load(values + token * value_row + here, mask=exists, other=0).to(stored)
    is_first = part == 0
    slot = length - first
    page = tl.load(tables + row * table_row + slot // PAGE_LEN).to(tl.int64)
    place = own + page * page_stride + slot % PAGE_LEN * HEADS * HEAD_DIM + here
    tl.store(place, key, mask=exists & is_first)
    tl.store(place + kind_stride, value, mask=exists & is_first)
    score = SOFTCAP * _tanh(tl.sum(query * key.to(wide), 0))
    largest = tl.where(is_first, score, float("-inf"))
    total = tl.where(is_first, 1.0, 0.0).to(wide)
    attended = tl.where(is_first, value.to(wide), 0.0)
    slope = tl.load(slopes + head).to(wide)
    start = tl.maximum(length - WINDOW, first) + part * PART
    stop = tl.minimum(start + PART, length)
    for block in range(start, stop, BLOCK_KEYS):
        positions = block + tl.arange(0, BLOCK_KEYS)
        seen = positions < stop
        slots = positions - first
        table = tables + row * table_row + slots // PAGE_LEN
        pages = tl.load(table, mask=seen, other=0).to(tl.int64)
        places = pages * page_stride + slots % PAGE_LEN * HEADS * HEAD_DIM
        both = seen[:, None] & exists[None, :]
        past = own + places[:, None] + here[None, :]
        past_keys = tl.load(past, mask=both, other=0).to(wide)
        past_values = tl.load(past + kind_stride, mask=both, other=0).to(wide)
        scores = SOFTCAP * _tanh(tl.sum(query[None, :] * past_keys, 1))
        scores = tl.where(seen, scores - slope * (length - positions).to(wide), float("-inf"))
        above = tl.maximum(largest, tl.max(scores, 0))
        weights, kept = tl.exp(scores - above), tl.exp(largest - above)
        total = total * kept + tl.sum(weights, 0)
        attended = attended * kept + tl.sum(weights[:, None] * past_values, 0)
        largest = above
    result = (token * HEADS + head) * tl.num_programs(0) + part
    tl.store(sums + result * HEAD_DIM + dims, attended, mask=exists)
    tl.store(scales + result * 2, largest)
    tl.store(scales + result * 2 + 1, total)


@jit
def _join_parts(
    sums,
    scales,
    outputs,
    PARTS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_PARTS: tl.constexpr,
    BLOCK_DIMS: tl.constexpr,
):
    """Divide the sums of all parts of a window by the sum of all weights."""
    head = tl.program_id(0).to(tl.int64) * tl.num_programs(1) + tl.program_id(1)
    dims = tl.program_id(2) * BLOCK_DIMS + tl.arange(0, BLOCK_DIMS)
    parts = tl.arange(0, BLOCK_PARTS)
    exists, counts = dims < HEAD_DIM, parts < PARTS
    own = head * PARTS + parts
    largest = tl.load(scales + own * 2, mask=counts, other=float("-inf"))
    kept = tl.exp(largest - tl.max(largest, 0))
    total = tl.sum(kept * tl.load(scales + own * 2 + 1, mask=counts, other=0), 0)
    both = counts[:, None] & exists[None, :]
    attended = sums + own[:, None] * HEAD_DIM + dims[None, :]
    attended = tl.load(attended, mask=both, other=0)
    result = tl.sum(kept[:, None] * attended, 0) / total
    tl.store(outputs + head * HEAD_DIM + dims, result.to(outputs.dtype.element_ty), mask=exists)


@jit
def _tanh(x):
    """Return the hyperbolic tangent."""
    size = tl.abs(x)
    rest = tl.exp(-2 * size)
    bent = (1 - rest) / (1 + rest)
    if x.dtype == tl.float32:  # 1 - rest has few digits where it is small
        square = x * x
        series = -17 / 315 + square * (62 / 2835)
        series = 1 + square * (-1 / 3 + square * (2 / 15 + square * series))
        bent = tl.where(size < 0.25, size * series, bent)
    return tl.where(x < 0, -bent, bent)
