"""Baselines of a report, each computed in another way."""

import gzip
import math
import struct
import zlib
from collections import Counter

import pytest

from train import report
from train.data.config import PrepareConfig
from train.data.prepare import prepare
from train.data.shards import TokenShards

DOCUMENTS = [f"def f{i}(x):\n\treturn x + {i * i}\n" * (1 + i % 3) for i in range(60)]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("corpus")
    for i, document in enumerate(DOCUMENTS):
        (folder / f"{i:02d}.txt").write_text(document)
    out = tmp_path_factory.mktemp("report") / "shards"
    prepare(PrepareConfig([str(folder)], out, vocab_size=300, validation_fraction=0.2, workers=1))
    return out


def test_validation_documents_are_the_original_ones(data):
    documents = report.validation_documents(data)
    assert len(documents) == TokenShards(data, "validation").split.num_documents > 3
    assert set(documents) <= set(DOCUMENTS)


def test_unigram_entropy(data):
    train, validation = TokenShards(data, "train"), TokenShards(data, "validation")
    counts = Counter(train.read(0, len(train)).tolist())
    total = len(train) + train.index.vocab_size
    tokens = validation.read(0, len(validation)).tolist()
    bits = -sum(math.log2((counts[token] + 1) / total) for token in tokens)
    expected = bits / sum(len(text.encode()) for text in report.validation_documents(data))
    assert report.unigram_bits_per_byte(data) == pytest.approx(expected, rel=1e-12)


def test_gzip(data):
    text = "".join(report.validation_documents(data)).encode()
    bits = report.gzip_bits_per_byte(data)
    compressed = gzip.compress(text, 9)
    assert zlib.decompress(compressed, 31) == text
    assert bits == 8 * len(compressed) / len(text)


def test_curves_and_picture(tmp_path):
    from torch.utils.tensorboard import SummaryWriter

    log = SummaryWriter(str(tmp_path / "run" / "version_0"))
    for step in range(0, 50, 10):
        log.add_scalar("train/loss", 8 - step / 10, step)
    log.add_scalar("val/bits_per_byte", 2.5, 40)
    log.close()
    curves = report.read_curves(tmp_path / "run")
    assert curves["train/loss"] == ([0, 10, 20, 30, 40], [8, 7, 6, 5, 4])
    picture = tmp_path / "loss.png"
    report.plot_bits_per_byte(curves, 3.0, {"unigram": 3.0, "gzip": 2.0}, picture)
    header = picture.read_bytes()[:24]
    assert header[:8] == b"\x89PNG\r\n\x1a\n"
    assert struct.unpack(">II", header[16:24]) == (960, 540)
