"""Spectral filters against the dense eigendecomposition, and their cache on disk."""

import numpy as np
import pytest
from safetensors.numpy import load_file

from stu import filters


def hankel(length):
    n = np.add.outer(np.arange(1.0, length + 1), np.arange(1.0, length + 1))
    return 2 / (n**3 - n)


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path / "stu"


@pytest.mark.parametrize("length", [1, 2, 3, 24, 257, 1000])
def test_factor_reproduces_every_entry_of_the_matrix(length):
    factor = filters._hankel_factor(np.arange(length), length)
    np.testing.assert_allclose(factor @ factor.T, hankel(length), rtol=4e-15)


@pytest.mark.parametrize("length", [24, 257, 1024])
def test_eigenpairs_agree_with_dense_eigh(length):
    z = hankel(length)
    values, vectors = filters.hankel_eigenpairs(length, 24)
    dense_values, dense_vectors = np.linalg.eigh(z)
    dense_values, dense_vectors = dense_values[::-1][:24], dense_vectors[:, ::-1][:, :24]
    dense_vectors = dense_vectors * np.sign(dense_vectors[0])
    # Each next eigenvalue is smaller, and what dense eigh knows of its vector with it.
    np.testing.assert_allclose(vectors[:, 0], dense_vectors[:, 0], atol=2e-15)
    np.testing.assert_allclose(vectors[:, :8], dense_vectors[:, :8], atol=1e-11)
    np.testing.assert_allclose(values, dense_values, atol=1e-15)
    # Beyond eigh's noise floor, the definition itself.
    residuals = np.linalg.norm(z @ vectors - vectors * values, axis=0)
    assert residuals.max() < 2e-15
    np.testing.assert_allclose(vectors.T @ vectors, np.eye(24), atol=1e-14)
    assert (vectors[0] > 0).all()


def test_small_eigenpairs_are_accurate_relative_to_themselves():
    """eigh cannot show this: the 24th eigenvalue is 1e-14 of the first."""
    mpmath = pytest.importorskip("mpmath")
    mpmath.mp.dps = 50
    entry = [[mpmath.mpf(2) / ((i + j) ** 3 - (i + j)) for j in range(1, 33)] for i in range(1, 33)]
    exact = mpmath.eigsy(mpmath.matrix(entry), eigvals_only=True)
    exact = np.array([float(value) for value in exact])[::-1][:12]
    values, _ = filters.hankel_eigenpairs(32, 12)
    np.testing.assert_allclose(values, exact, rtol=1e-6)


def test_block_size_does_not_change_the_result(monkeypatch):
    whole = filters.hankel_eigenpairs(300, 24)
    monkeypatch.setattr(filters, "BLOCK_ROWS", 77)
    blocked = filters.hankel_eigenpairs(300, 24)
    # Singular values are exact to an eps of the largest, so their squares to this:
    bound = 2e-15 * np.sqrt(whole[0] * whole[0][0])
    assert (np.abs(blocked[0] - whole[0]) <= bound).all()
    np.testing.assert_allclose(blocked[1][:, :12], whole[1][:, :12], atol=1e-9)


def test_filters_are_scaled_eigenvectors():
    values, vectors = filters.hankel_eigenpairs(300, 24)
    np.testing.assert_array_equal(filters.spectral_filters(300, 24), values**0.25 * vectors)


def test_second_call_reads_the_cache(cache, monkeypatch):
    first = filters.spectral_filters(100, 8)
    assert [file.name for file in cache.iterdir()] == ["filters-v1-100x8.safetensors"]
    monkeypatch.setattr(filters, "hankel_eigenpairs", None)  # must not be needed again
    np.testing.assert_array_equal(filters.spectral_filters(100, 8), first)


def test_damaged_cache_is_replaced(cache):
    first = filters.spectral_filters(100, 8)
    file = cache / "filters-v1-100x8.safetensors"
    for damage in (file.read_bytes()[:200], b"", b"not safetensors"):
        file.write_bytes(damage)
        np.testing.assert_array_equal(filters.spectral_filters(100, 8), first)
        assert load_file(file)["filters"].shape == (100, 8)


def test_unwritable_cache_is_ignored(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert filters.spectral_filters(10, 2).shape == (10, 2)


@pytest.mark.parametrize(("length", "num_filters"), [(8, 9), (8, 0)])
def test_impossible_number_of_filters(length, num_filters):
    with pytest.raises(ValueError, match=f"num_filters={num_filters}.*choose 1..8"):
        filters.spectral_filters(length, num_filters)


@pytest.mark.parametrize(
    ("length", "most_bytes"), [(4500, 40e6), pytest.param(131072, 300e6, marks=pytest.mark.slow)]
)
def test_long_contexts_in_bounded_memory(length, most_bytes):
    """For 131,072 positions the dense matrix would take 137 GB, and the whole factor 400 MB."""
    import tracemalloc

    tracemalloc.start()
    values, vectors = filters.hankel_eigenpairs(length, 24)
    peak_bytes = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak_bytes < most_bytes
    np.testing.assert_allclose(vectors.T @ vectors, np.eye(24), atol=1e-12)
    # A random row of Z v = sigma v, from the entries themselves.
    n = 4242 + 1 + np.arange(1.0, length + 1)
    row = 2 / (n**3 - n)
    np.testing.assert_allclose(row @ vectors, values * vectors[4242], atol=1e-17)
