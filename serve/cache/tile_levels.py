"""Factors of all tile sizes, laid out for pages.

Small tiles are read from and written to their pages directly. A large tile is replaced by a
summary, which is computed from the summaries of its halves and fits in a few pages; what it adds
also reaches the pages by way of the halves.
"""

from dataclasses import dataclass, replace
from itertools import islice

import torch
from torch import Tensor
from torch.nn.functional import pad

from serve.cache.low_rank import TileFactors, filter_basis, nested, tile_factors
from serve.cache.page_pool import pages_for

CORE_BYTES = 2**30
"""Bytes of cores kept between flushes; those of larger tiles are computed in each flush."""


@dataclass(frozen=True)
class TileLevel:
    """Factors of one tile size, in float64 between halves and else in the dtype of the pages."""

    inwards: Tensor
    """Maps to the summary: from each page of the tile, `[pages, p, rows]`, or from the summary of
    each half, older first, `[2, p, p of a half]`."""
    outwards: Tensor
    """Maps from coordinates of outputs: to each page, `[pages, rows, r]`, or to the coordinates of
    each half, nearer first, `[2, r of a half, r]`."""
    writes_pages: bool
    """Whether `outwards` maps to pages."""
    basis_cores: Tensor
    """Cores of the basis filters, `[K, r, p]`, float64."""
    weights: Tensor
    """Weights `[K, layers, C]`, float64, of the basis cores in each channel's core."""
    cores: Tensor | None = None
    """Cores of all layers, `[layers, p, r, 1, C]`, if there is room to keep them."""

    def cores_of(self, layers: slice) -> Tensor:
        """Compute the cores `[layers, p, r, 1, C]` of these layers in float64."""
        cores = torch.einsum("krp,klc->lprc", self.basis_cores, self.weights[:, layers])
        return cores[:, :, :, None]


@dataclass(frozen=True)
class TileLevels:
    """Factors of tiles of 1, 2, 4 .. pages."""

    levels: list[TileLevel]
    summary_pages: int
    """Number of pages that a summary takes, the same for all tiles."""
    smallest_summary: int
    """Level of the smallest tiles with summaries. A summary takes at most half of their pages, and
    what is kept for a second half fits in the rest."""


def make_levels(taps: Tensor, rows: int, num_levels: int, dtype: torch.dtype) -> TileLevels:
    """Factorize `taps [layers, N, C]` for pages of `rows` rows: seconds for 16,384 positions.

    Raises NotLowRank.
    """
    filters = filter_basis(taps.transpose(0, 1).flatten(1), dtype)
    factors = list(islice(tile_factors(filters, rows), num_levels))
    summary_pages = pages_for(max(tile.transfer.shape[1] for tile in factors), rows)
    smallest = (2 * summary_pages - 1).bit_length()
    weights = filters.weights.view(-1, len(taps), taps.shape[2])
    levels: list[TileLevel] = []
    bytes_left, basis = CORE_BYTES, factors[0].transfer
    for number, tile in enumerate(factors):
        if 0 < number <= smallest:
            basis = nested(basis, tile.transfer)
        level = _level(tile, basis if number <= smallest else None, rows, weights, dtype)
        num_bytes = taps[:, 0].numel() * tile.cores[0].numel() * dtype.itemsize
        if num_bytes <= bytes_left:
            bytes_left -= num_bytes
            # Layer by layer: float64 takes twice the room.
            cores = [level.cores_of(slice(i, i + 1)).to(dtype) for i in range(len(taps))]
            level = replace(level, cores=torch.cat(cores))
        levels.append(level)
    return TileLevels(levels, summary_pages, smallest)


def _level(
    factors: TileFactors, basis: Tensor | None, rows: int, weights: Tensor, dtype: torch.dtype
) -> TileLevel:
    """Return the level of these factors.

    basis: `V` of a tile that is read from its pages; None for one that has a summary.
    """
    rank = factors.transfer.shape[1]
    parts = factors.transfer.view(2, -1, rank) if basis is None else basis.view(-1, rows, rank)
    outwards = (parts if basis is None else parts.flip(1)).flip(0)
    if factors.outwards is not None:
        num_outputs, columns = factors.outwards.shape
        padded = pad(factors.outwards, (0, 0, 0, -num_outputs % rows))
        outwards = padded.view(-1, rows, columns)
    writes_pages = basis is not None or factors.outwards is not None
    return TileLevel(
        parts.transpose(1, 2).contiguous().to(dtype if basis is not None else torch.float64),
        outwards.contiguous().to(dtype if writes_pages else torch.float64),
        writes_pages,
        factors.cores,
        weights,
    )
