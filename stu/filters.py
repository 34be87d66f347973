"""Spectral filters: the top eigenvectors of a Hankel matrix, found without building the matrix.

The matrix is `Z[i, j] = 2 / ((i + j)^3 - (i + j))`, `i, j = 1..L` (Hazan, Singh, Zhang, "Learning
Linear Dynamical Systems via Spectral Filtering", 2017). It equals an integral,

    Z[i, j] = integral_0^1 (1 - a)^2 a^(i + j - 2) da,

so with `a = exp(-x)` and a quadrature rule in `x` it factors as `Z = G G^T` with `G` of shape
`[L, n]`, n a few hundred. The eigenvectors of `Z` are the left singular vectors of `G`:
`O(L n^2)` time and `O(L n)` memory instead of `O(L^3)` and `O(L^2)`.
"""

import numpy as np
from numpy.typing import NDArray

from stu.common.array_cache import Arrays, cached_arrays

NODES_PER_PANEL = 14
BLOCK_ROWS = 8192
LARGEST_X = 40.0  # exp(-40) is below float64's resolution of Z[1, 1]


def spectral_filters(length: int, num_filters: int) -> NDArray[np.float64]:
    """Return the filters `sigma_k^(1/4) phi_k`, `[length, num_filters]` in float64.

    The largest eigenvalue comes first. The first entry of each filter is positive, so two machines
    agree on the signs. Results are cached on disk. Raises ValueError unless
    `1 <= num_filters <= length`.
    """

    def compute() -> Arrays:
        eigenvalues, eigenvectors = hankel_eigenpairs(length, num_filters)
        return {"filters": eigenvalues**0.25 * eigenvectors}

    return cached_arrays(f"filters-v1-{length}x{num_filters}", compute)["filters"]


def hankel_eigenpairs(
    length: int, num_pairs: int
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return the largest eigenvalues `[num_pairs]` and their eigenvectors `[length, num_pairs]`."""
    if not 1 <= num_pairs <= length:
        raise ValueError(
            f"num_filters={num_pairs} is not allowed for length {length}: choose 1..{length}"
        )
    # QR of blocks of rows, then of their stacked triangles, never holds the whole factor.
    blocks = [np.arange(i, min(i + BLOCK_ROWS, length)) for i in range(0, length, BLOCK_ROWS)]
    triangles = [np.linalg.qr(_hankel_factor(rows, length), mode="r") for rows in blocks]
    splits = np.cumsum([len(triangle) for triangle in triangles])[:-1]
    stacked, triangle = np.linalg.qr(np.concatenate(triangles))
    left, singular, _ = np.linalg.svd(triangle)
    coordinates = np.split(stacked @ left[:, :num_pairs], splits)
    vectors = np.concatenate(
        [
            np.linalg.qr(_hankel_factor(rows, length)).Q @ block  # [rows, n] @ [n, K] -> [rows, K]
            for rows, block in zip(blocks, coordinates, strict=True)
        ]
    )
    return singular[:num_pairs] ** 2, vectors * np.where(vectors[0] < 0, -1.0, 1.0)


def _hankel_factor(rows: NDArray[np.int64], length: int) -> NDArray[np.float64]:
    """Return rows of `G [length, n]`, `G G^T = Z`: Gauss-Legendre rules on dyadic panels in `x`.

    exp(-2 L x) varies on the scale 1 / (2 L), the width of the first panel; each next one doubles.
    """
    num_doublings = int(np.ceil(np.log2(LARGEST_X * 2 * length)))
    edges = np.concatenate([[0.0], 2.0 ** np.arange(num_doublings + 1) / (2 * length)])
    half = np.diff(edges)[:, None] / 2
    unit_nodes, unit_weights = np.polynomial.legendre.leggauss(NODES_PER_PANEL)
    x = ((edges[:-1, None] + half) + half * unit_nodes).ravel()
    weights = (half * unit_weights).ravel()
    # da = exp(-x) dx, and 1 - exp(-x) without cancellation at small x.
    scale: NDArray[np.float64] = np.sqrt(weights * np.exp(-x)) * -np.expm1(-x)
    factor = np.exp(np.multiply.outer(rows, -x))
    factor *= scale
    return factor
