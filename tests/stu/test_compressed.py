"""Compressed files are recognised by their first bytes, and damage is reported."""

import bz2
import gzip
import io
import lzma

import pytest
from backports import zstd

from stu.common.compressed import open_decompressed
from stu.common.errors import UserError

LINES = [b"row %d\n" % number for number in range(40_000)]
TEXT = b"".join(LINES)
COMPRESS = {"gzip": gzip.compress, "zstd": zstd.compress}


def read(data):
    """Return the lines of `data`, and the error after them."""
    lines = []
    try:
        lines.extend(open_decompressed(io.BytesIO(data), "f.jsonl"))
    except UserError as error:
        return lines, str(error)
    return lines, None


def test_uncompressed_data_is_read_unchanged():
    assert read(TEXT) == (LINES, None)
    assert read(b"") == ([], None)
    assert read(b"\x1f") == ([b"\x1f"], None)


@pytest.mark.parametrize("kind", COMPRESS)
def test_concatenated_members_and_frames_are_read(kind):
    compress = COMPRESS[kind]
    assert read(compress(TEXT) + compress(b"") + compress(b"more\n")) == ([*LINES, b"more\n"], None)
    assert read(compress(b"")) == ([], None)


def test_frames_without_data_and_the_largest_window():
    skippable = b"\x50\x2a\x4d\x18\x04\x00\x00\x00\x01\x02\x03\x04"
    assert read(skippable + zstd.compress(TEXT)) == (LINES, None)
    window = {zstd.CompressionParameter.window_log: 31}
    compressor = zstd.ZstdCompressor(options=window)
    assert read(compressor.compress(b"a\n") + compressor.flush()) == ([b"a\n"], None)


@pytest.mark.parametrize("kind", COMPRESS)
def test_lines_before_damage_are_read(kind):
    data = COMPRESS[kind](TEXT)
    for damaged in (data[: len(data) // 2], data[:-1], data + b"tail", data[:-9] + b"\0" * 9):
        lines, error = read(damaged)
        assert lines == LINES[: len(lines)]
        assert error.startswith(f"f.jsonl: damaged {kind} file (")
        assert error.endswith("copy or write it again")
    assert len(read(data[: len(data) // 2])[0]) > len(LINES) // 10
    if kind == "gzip":  # Zstandard gives a block whole or not at all
        assert len(read(data[:-1])[0]) == len(LINES)


def test_other_compressions_are_named():
    for data, kind in ((bz2.compress(TEXT), "bzip2"), (lzma.compress(TEXT), "xz")):
        assert read(data) == (
            [],
            f"f.jsonl: {kind} is not supported: decompress it, or compress it with gzip or zstd",
        )
    twice = gzip.compress(zstd.compress(TEXT))
    assert read(twice) == ([], "f.jsonl: zstd inside gzip: decompress it once")
