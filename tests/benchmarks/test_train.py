"""The training benchmarks: their variants of the model, and the memory of one call."""

import json

import pytest
import torch

from benchmarks.__main__ import main
from benchmarks.process_memory import peak_gib
from benchmarks.training import convolution, loss
from benchmarks.training.variants import VARIANTS, make_model, torch_attention, two_branches
from stu import attention
from stu.config import ModelConfig
from train.loss import next_token_loss

SMALL = ModelConfig(
    vocab_size=50, width=32, num_layers=2, num_filters=8, max_seq_len=64, num_heads=4,
    window_tokens=8,
)  # fmt: skip


@pytest.fixture
def make():
    def seeded(layout, shape=SMALL):
        torch.manual_seed(0)
        return make_model(layout, shape)

    return seeded


def loss_and_gradients(model, tokens):
    model.zero_grad()
    hidden = model.hidden(tokens[:, :-1]).flatten(0, 1)
    loss, _ = next_token_loss(hidden, model.embedding.weight, tokens[:, 1:].flatten())
    loss.backward()
    return loss, {name: p.grad.clone() for name, p in model.named_parameters()}


@pytest.mark.parametrize("layout", ["stu", "hybrid"])
@pytest.mark.parametrize("length", [64, 37])
def test_two_branches_are_the_same_function_with_the_same_gradients(make, layout, length):
    model = make(layout)
    tokens = torch.randint(50, (2, length + 1))
    with torch.no_grad():
        fused = model(tokens[:, :-1])
    loss, gradients = loss_and_gradients(model, tokens)
    with two_branches():
        with torch.no_grad():
            branches = model(tokens[:, :-1])
        other_loss, other_gradients = loss_and_gradients(model, tokens)
    torch.testing.assert_close(branches, fused, rtol=1e-5, atol=1e-5)
    assert not torch.equal(branches, fused), "computed differently"
    torch.testing.assert_close(other_loss, loss, rtol=1e-6, atol=1e-6)
    for name, gradient in gradients.items():
        largest = gradient.abs().max()
        assert (other_gradients[name] - gradient).abs().max() < 1e-5 * largest, name
    # Afterwards the model is what it was.
    with torch.no_grad():
        assert torch.equal(model(tokens[:, :-1]), fused)


@pytest.mark.parametrize("name", ["attention_sdpa", "attention_windowed"])
def test_attention_sees_its_window_and_no_later_token(make, name):
    model = make("attention")
    model.blocks = model.blocks[:1]  # more of them would reach beyond a window
    tokens = torch.randint(50, (1, 64))
    changed = tokens.clone()
    changed[0, 20] = (tokens[0, 20] + 1) % 50
    with VARIANTS[name].change(), torch.no_grad():
        difference = (model.hidden(tokens) - model.hidden(changed)).abs().amax(2)[0]
    last = 20 + SMALL.window_tokens if name == "attention_windowed" else 63
    assert (difference[:20] == 0).all()
    assert (difference[20 : last + 1] > 0).all()
    assert (difference[last + 1 :] == 0).all()


def test_torch_attention_is_ours_without_softcap_and_alibi():
    torch.manual_seed(0)
    queries, keys, values = torch.randn(3, 2, 300, 4, 8)
    arguments = queries, keys, values, attention.Scores(torch.zeros(4), 300, 1e4)
    ours = attention.sliding_window_attention(*arguments)
    with torch_attention():
        torchs = attention.sliding_window_attention(*arguments)
    torch.testing.assert_close(torchs, ours, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("width", [256, 512, 1024])
def test_attention_alone_has_the_size_of_an_stu_model(width):
    shape = ModelConfig(vocab_size=4096, width=width, num_heads=4)
    with torch.device("meta"):
        models = [make_model(layout, shape) for layout in ("stu", "attention")]
    assert models[1].num_parameters() == pytest.approx(models[0].num_parameters(), rel=0.01)


def test_train_reports_every_variant(capsys):
    size = ["--width", "32", "--layers", "2", "--window", "16", "--repeats", "2"]
    assert main(["train", "--context", "[64,96]", *size]) == 0
    runs = json.loads(capsys.readouterr().out)["runs"]
    assert [run["context"] for run in runs] == [64, 96]
    for run in runs:
        assert list(run["ways"]) == list(VARIANTS)
        speeds = {name: variant["tokens_per_second"] for name, variant in run["ways"].items()}
        assert run["ratios"]["stu_over_two_branch"] == speeds["stu"] / speeds["stu_two_branch"]
        ratio = speeds["hybrid"] / speeds["attention_sdpa"]
        assert run["ratios"]["hybrid_over_attention_sdpa"] == ratio


def test_both_forms_of_a_convolution_are_one_function(monkeypatch):
    monkeypatch.setattr(convolution, "LENGTHS", (33,))
    (run,) = convolution.measure(convolution.Options())["runs"]
    (training,) = run["training"]
    assert training["max_difference"] < 1e-5
    assert training["ratio"] == training["two_branch_ms"] / training["fused_ms"]


def test_both_losses_are_one_function(monkeypatch):
    torch.manual_seed(0)
    arguments = torch.randn(9, 8), torch.randn(50, 8), torch.randint(50, (9,))
    torch.testing.assert_close(loss.plain(*arguments), loss.chunked(*arguments))
    monkeypatch.setattr(loss, "VOCAB_SIZE", 5000)
    (run,) = loss.measure(loss.Options(first=1, repeats=1))["runs"]
    assert run["memory_ratio"] == run["plain_gib"] / run["chunked_gib"]
    assert run["speed_ratio"] == run["plain_seconds"] / run["chunked_seconds"]


def test_peak_memory_is_measured_per_call():
    result, gib = peak_gib(lambda: float(torch.ones(60 * 2**20).sum()))
    assert result == 60 * 2**20
    assert 1024 * gib == pytest.approx(240, rel=0.1)
    assert 1024 * peak_gib(lambda: None)[1] < 24  # and is forgotten
