"""Where documents begin is known, and packing puts each into a row, whole if it fits."""

import itertools
import random
import shutil

import numpy as np
import pytest

from stu.common.errors import UserError
from tests.train.token_shards import write_token_shards
from train.data.rows.packing import (
    PackedRows,
    all_bounds,
    best_fit,
    context_of_tokens,
    shares_of_cutting,
    shares_of_packing,
)
from train.data.rows.starts import DocumentStarts
from train.data.shards import TokenShards


def starts_of(lengths, cuts=()):
    """Documents of these lengths, in shards that end before the documents `cuts`."""
    bounds = np.cumsum([0, *lengths])
    edges = [0, *cuts, len(lengths)]
    offsets = bounds[edges[:-1]]
    parts = [bounds[a:b] - bounds[a] for a, b in itertools.pairwise(edges)]
    return DocumentStarts(parts, offsets, int(bounds[-1]))


def plain_rooms(lengths, row_tokens):
    """Rooms that best-fit decreasing leaves, one document at a time."""
    rooms = []
    for length in sorted(lengths, reverse=True):
        fitting = [room for room in rooms if room >= length]
        if fitting:
            rooms.remove(min(fitting))
        rooms.append(min(fitting, default=row_tokens) - length)
    return sorted(rooms)


@pytest.mark.parametrize("seed", range(30))
def test_packing_is_best_fit_decreasing(seed):
    source = random.Random(seed)
    row_tokens = source.randint(1, 40)
    lengths = [source.randint(1, row_tokens) for _ in range(source.randint(1, 120))]
    patterns = best_fit(np.bincount(lengths), row_tokens)
    rows = [sum(length * n for length, n in p.parts) for p in patterns for _ in range(p.num_rows)]
    assert sorted(row_tokens - tokens for tokens in rows) == plain_rooms(lengths, row_tokens)
    packed = [length for p in patterns for length, n in p.parts for _ in range(n * p.num_rows)]
    assert sorted(packed) == sorted(lengths)


@pytest.mark.parametrize("seed", range(20))
def test_every_token_is_in_one_row_and_documents_are_whole(seed):
    source = random.Random(seed)
    row_tokens = source.randint(1, 30)
    lengths = [source.randint(1, 3 * row_tokens) for _ in range(60)]
    starts = starts_of(lengths, sorted(source.sample(range(60), 3)))
    bounds = all_bounds(starts).tolist()
    assert bounds == np.cumsum([0, *lengths]).tolist()
    rows = PackedRows(starts, row_tokens)
    seen = np.zeros(bounds[-1], dtype=int)
    cut = 0
    for number in range(len(rows)):
        assert sum(count for _, count in rows[number]) <= row_tokens
        for start, count in rows[number]:
            seen[start : start + count] += 1
            is_whole = start in bounds and start + count in bounds
            assert is_whole or count == row_tokens or start + count in bounds
            cut += not is_whole and start in bounds
    assert (seen == 1).all()
    assert cut == sum(length > row_tokens for length in lengths)
    shares = shares_of_packing(all_bounds(starts), row_tokens)
    assert shares.cut == cut / 60
    behind = sum(max(0, length - row_tokens) for length in lengths)
    assert shares.without_beginning == behind / bounds[-1]
    assert shares.padding == pytest.approx(1 - bounds[-1] / (len(rows) * row_tokens))


def test_shares_of_cutting():
    starts = starts_of([3, 7, 25, 1, 4])  # in rows of 10: 0-2, 3-9, 10-34, 35, 36-39
    shares = shares_of_cutting(all_bounds(starts), 10)
    assert shares.cut == 1 / 5
    assert shares.without_beginning == 15 / 40
    assert str(shares) == (
        "20.0% of the documents are cut, 37.5% of the tokens follow a cut, 0.0% of the rows are "
        "padding"
    )


def test_context_of_an_average_token():
    starts = starts_of([3, 7, 25, 1, 4])  # in rows of 10: 3, 7, 10, 10, 5, 1, 4
    assert context_of_tokens(starts, 10) == round((9 + 49 + 100 + 100 + 25 + 1 + 16) / 40)
    assert context_of_tokens(starts, 100) == round((9 + 49 + 625 + 1 + 16) / 40)


def test_lengths_between_two_places():
    starts = starts_of([3, 7, 25, 1, 4], [2, 4])
    assert starts.lengths(0, 40) == [3, 7, 25, 1, 4]
    assert starts.lengths(2, 36) == [1, 7, 25, 1]
    assert starts.lengths(12, 20) == [8]
    assert starts.lengths(10, 11) == [1]
    assert starts.between(3, 36).tolist() == [3, 10, 35]
    assert starts.between(3, 37).tolist() == [3, 10, 35, 36]


def test_a_shard_may_begin_with_the_rest_of_a_document():
    starts = DocumentStarts([np.array([0, 4]), np.array([5, 6])], [0, 10], 20)
    assert all_bounds(starts).tolist() == [0, 4, 15, 16, 20]
    assert starts.lengths(0, 20) == [4, 11, 1, 4]


def test_starts_are_written_beside_the_tokens(tmp_path):
    write_token_shards(tmp_path / "data", num_train=1000, shard_tokens=300, document_tokens=7)
    shards = TokenShards(tmp_path / "data", "train")
    assert len(shards.documents) == shards.split.num_documents
    assert all_bounds(shards.documents).tolist() == [*range(0, 1000, 7), 1000]
    path = tmp_path / "data" / "train-00001.starts"
    path.write_bytes(path.read_bytes()[:-8])
    with pytest.raises(UserError, match=r"train-00001\.starts: 328 bytes, expected 336; copy it"):
        TokenShards(tmp_path / "data", "train").documents  # noqa: B018


@pytest.mark.parametrize("split", ["train", "validation"])
def test_older_shards_are_searched_for_the_marks_of_documents(data, tmp_path, split):
    older = shutil.copytree(data, tmp_path / "older")
    for path in older.glob("*.starts"):
        path.unlink()
    expected = all_bounds(TokenShards(data, split).documents)
    assert all_bounds(TokenShards(older, split).documents).tolist() == expected.tolist()
    assert len(expected) > 5
    index = older / "index.json"
    number = TokenShards(older, split).split.num_documents
    index.write_text(index.read_text().replace(f'"num_documents": {number}', '"num_documents": 3'))
    with pytest.raises(UserError, match=r"its tokens mark .* and it has 3; run stu-prepare again"):
        TokenShards(older, split).documents  # noqa: B018
