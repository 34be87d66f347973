"""Token shards are read back as written, and refused when they are not what the index says."""

import json

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from stu.common.errors import UserError
from tests.train.token_shards import write_token_shards
from train.data.shards import Index, TokenShards


@pytest.fixture(scope="module")
def thousand(tmp_path_factory):
    folder = tmp_path_factory.mktemp("shards") / "data"
    write_token_shards(folder, num_train=1000, shard_tokens=300, document_tokens=7)
    return TokenShards(folder, "train")


def test_shards_hold_whole_documents(thousand):
    split = thousand.split
    assert [shard.file for shard in split.shards] == [f"train-0000{i}.bin" for i in range(4)]
    assert [shard.num_tokens for shard in split.shards] == [294, 294, 294, 118]
    assert [shard.num_documents for shard in split.shards] == [42, 42, 42, 17]
    assert (split.num_tokens, split.num_documents, split.num_bytes) == (1000, 143, 1430)
    assert len(thousand) == 1000


def test_a_document_longer_than_a_shard_has_its_own(tmp_path):
    index = write_token_shards(tmp_path / "data", num_train=20, shard_tokens=3, document_tokens=9)
    assert [shard.num_tokens for shard in index.splits["train"].shards] == [9, 9, 2]


@pytest.mark.parametrize(("dtype", "num_bytes"), [(np.uint16, 2), (np.uint32, 4)])
def test_files_are_little_endian(tmp_path, dtype, num_bytes):
    write_token_shards(tmp_path / "data", num_train=300, shard_tokens=1000, dtype=dtype)
    contents = (tmp_path / "data" / "train-00000.bin").read_bytes()
    assert contents == b"".join(i.to_bytes(num_bytes, "little") for i in range(300))
    assert TokenShards(tmp_path / "data", "train").read(0, 300).tolist() == list(range(300))


@given(ends=st.tuples(st.integers(0, 1000), st.integers(0, 1000)))
@example(ends=(0, 1000))
@example(ends=(294, 588))
def test_any_range_is_read_across_shards(thousand, ends):
    start, stop = sorted(ends)
    tokens = thousand.read(start, stop)
    assert tokens.dtype == np.int64
    assert tokens.tolist() == list(range(start, stop))


@pytest.mark.parametrize(("start", "stop"), [(-1, 5), (5, 1001), (6, 5)])
def test_a_range_outside_is_an_index_error(thousand, start, stop):
    with pytest.raises(IndexError):
        thousand.read(start, stop)


@pytest.mark.parametrize("size", [None, 586, 587, 590])
def test_a_shard_of_another_size_is_refused(tmp_path, size):
    write_token_shards(tmp_path / "data")
    path = tmp_path / "data" / "train-00001.bin"
    path.unlink()
    if size is not None:
        path.write_bytes(bytes(size))
    with pytest.raises(UserError, match=rf"train-00001\.bin: {size or 0} bytes, expected 588"):
        TokenShards(tmp_path / "data", "train")


def test_another_tokenizer_is_refused(tmp_path):
    write_token_shards(tmp_path / "data")
    model = tmp_path / "data" / "tokenizer.model"
    model.write_bytes(b"another tokenizer")
    with pytest.raises(UserError, match="not the tokenizer that made these shards"):
        TokenShards(tmp_path / "data", "train")
    model.unlink()
    with pytest.raises(UserError, match=r"has none of tokenizer\.model.*run stu-prepare again"):
        TokenShards(tmp_path / "data", "train")


def test_an_index_from_before_bad_rows_were_counted_is_read(tmp_path):
    index = write_token_shards(tmp_path / "data")
    path = tmp_path / "data" / "index.json"
    values = json.loads(path.read_text())
    for name in ("num_hidden_files", "num_repeated_files", "num_bad_rows"):
        del values[name]
    path.write_text(json.dumps(values))
    assert Index.load(tmp_path / "data") == index


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format_version": 2}, "format_version 2, this program reads 1"),
        ({"dtype": "object"}, "dtype 'object', expected uint16 or uint32"),
        ({"splits": 5}, "not an index of token shards"),
        ({"surprise": 5}, "not an index of token shards.*surprise"),
    ],
)
def test_an_index_that_is_not_ours_is_refused(tmp_path, change, message):
    write_token_shards(tmp_path / "data")
    path = tmp_path / "data" / "index.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(UserError, match=message):
        TokenShards(tmp_path / "data", "train")


def test_a_folder_without_index_or_split(tmp_path):
    with pytest.raises(UserError, match=r"no index\.json; make token shards with stu-prepare"):
        TokenShards(tmp_path, "train")
    (tmp_path / "index.json").write_text("{")
    with pytest.raises(UserError, match="not an index of token shards"):
        TokenShards(tmp_path, "train")
    write_token_shards(tmp_path / "data")
    with pytest.raises(UserError, match="no split 'test', only train, validation"):
        TokenShards(tmp_path / "data", "test")
