"""Metrics of a validation against sums by hand, and where a run shows them."""

import math

import numpy as np
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from stu.config import ModelConfig
from stu.model import FlashSTU
from stu.tokenizer import read_tokenizer
from tests.train.conftest import MODEL
from train import report
from train.evaluation import (
    ValidationSums,
    mixture_metrics,
    plot_accuracy,
    sample_texts,
    validated_step,
    validation_metrics,
    write_results,
)
from train.flops import token_flops


def test_metrics_against_sums_by_hand():
    random = np.random.default_rng(0)
    batches, seq_len = 3, 13
    bytes_per_token = random.integers(0, 9, 50)
    shape = batches, 2, seq_len
    nats = torch.from_numpy(random.exponential(size=shape)).float()
    hits = torch.from_numpy(random.random(shape) < 0.4)
    targets = torch.from_numpy(random.integers(0, 50, shape))
    counted = torch.from_numpy(random.random(shape) < 0.7)
    # Two ranks' sums, added.
    sums = [ValidationSums(seq_len, torch.from_numpy(bytes_per_token)) for _ in range(2)]
    for number, batch in enumerate(zip(nats, hits, targets, counted, strict=True)):
        sums[number % 2].add(*batch)
    metrics = validation_metrics(sums[0].values + sums[1].values)

    places = list(zip(*np.nonzero(counted.numpy()), strict=True))
    loss = sum(float(nats[place]) for place in places) / len(places)
    num_bytes = sum(bytes_per_token[targets[place]] for place in places)
    assert metrics["val/loss"] == pytest.approx(loss, rel=1e-6)
    bits = loss * len(places) / math.log(2) / num_bytes
    assert metrics["val/bits_per_byte"] == pytest.approx(bits, rel=1e-6)
    for first, last in ((1, 1), (2, 3), (4, 7), (8, 13)):
        own = [bool(hits[place]) for place in places if first <= place[2] + 1 <= last]
        name = f"accuracy_by_context/from_{first:06d}_tokens"
        assert metrics[name] == pytest.approx(np.mean(own))
    assert metrics["val/accuracy"] == pytest.approx(np.mean([bool(hits[p]) for p in places]))
    assert len(metrics) == 7


def test_context_without_targets_is_left_out():
    sums = ValidationSums(8, torch.ones(5, dtype=torch.int64))
    first = torch.arange(8)[None] < 2
    zeros = torch.zeros(1, 8)
    sums.add(zeros, zeros.bool(), zeros.long(), first)
    names = [name for name in validation_metrics(sums.values) if "context" in name]
    assert names == [f"accuracy_by_context/from_{n:06d}_tokens" for n in (1, 2)]


def test_sources_without_targets_have_no_part_in_the_metrics(tmp_path):
    nothing, some = (ValidationSums(8, torch.tensor([0, 2])) for _ in range(2))
    place, nats = torch.arange(8)[None] == 3, torch.ones(1, 8)
    some.add(nats, place, torch.ones(1, 8).long(), place)
    metrics = mixture_metrics(torch.stack([nothing.values, some.values]), {"a": 0.9, "b": 0.1})
    alone = validation_metrics(some.values)
    losses = {f"val_{name}/b": alone[f"val/{name}"] for name in ("loss", "bits_per_byte")}
    assert metrics == pytest.approx({**alone, **losses})
    assert validation_metrics(nothing.values) == {}
    nothing.add(nats, place, torch.zeros(1, 8).long(), place)  # tokens without text
    found = validation_metrics(nothing.values)
    assert found["val/loss"] == 1
    assert "val/bits_per_byte" not in found
    write_results({}, 1, tmp_path)
    assert validated_step(tmp_path) == 1


def test_samples_follow_the_model(data):
    tokenizer = read_tokenizer(data / "tokenizer.model")
    torch.manual_seed(0)
    model = FlashSTU(ModelConfig(**MODEL))
    wanted = tokenizer.encode("return")[-1]
    with torch.no_grad():  # it predicts one token everywhere
        model.norm.weight.zero_()[0] = 1e4
        model.embedding.weight[:, 0] = -model.embedding.weight[:, 0].abs()
        model.embedding.weight[wanted, 0] *= -1
    tokens = torch.tensor([tokenizer.encode("def value self x return None ( ) :" * 4)[:17]] * 5)
    state = torch.random.get_rng_state()
    texts = sample_texts(model, tokens, tokenizer)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert len(texts) == 4
    # The stream's sign decides between that token and all others.
    hidden = model.hidden(tokens[:, :8])[0, -1, 0]
    continuation = texts[0].split("**continuation:**")[1]
    assert (continuation.count("return") == MODEL["max_seq_len"] - 8) == bool(hidden > 0)
    assert texts[0].startswith("    def value")


def test_curves_samples_and_picture_of_a_run(trained):
    curves = report.read_curves(trained)
    steps = [5, 10, 12]
    assert curves["val/accuracy"][0] == steps
    assert 0 < curves["val/accuracy"][1][-1] < 1
    contexts = [name for name in curves if name.startswith("accuracy_by_context")]
    assert len(contexts) == 5  # of 16 tokens: from 1, 2, 4, 8, and 16
    flops = token_flops(ModelConfig(**MODEL), 16, 2, recomputes=False)
    speeds, products, convolutions = (
        np.array(curves[f"train/{name}"][1])
        for name in ("tokens_per_second", "product_teraflops", "convolution_teraflops")
    )
    np.testing.assert_allclose(products, speeds * (flops.dense + flops.attention) / 1e12, rtol=1e-5)
    np.testing.assert_allclose(convolutions, speeds * flops.convolution / 1e12, rtol=1e-5)
    assert "train/mfu" not in curves  # nobody states a CPU's peak
    log = EventAccumulator(str(trained / "tensorboard"), size_guidance={"tensors": 0})
    log.Reload()
    for number in (0, 1):
        shown = log.Tensors(f"sample/{number}/text_summary")
        assert [event.step for event in shown] == steps
        assert b"continuation" in shown[0].tensor_proto.string_val[0]
    picture = (trained / "accuracy-by-context.png").read_bytes()
    assert picture[:8] == b"\x89PNG\r\n\x1a\n"


def test_picture_of_one_context(tmp_path):
    plot_accuracy({"accuracy_by_context/from_000001_tokens": 0.5, "val/loss": 1.0}, tmp_path / "a")
    assert (tmp_path / "a").stat().st_size > 1000
