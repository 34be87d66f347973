"""`benchmarks train` compares what it says: one function by two ways, and causal attention."""

import json

import pytest
import torch

from benchmarks import cli
from benchmarks.train_ways import (
    WAYS,
    make_model,
    torch_attention,
    two_branches,
    whole_context,
)
from stu import attention as windowed
from stu.config import ModelConfig
from train.loss import next_token_loss

SMALL = ModelConfig(
    vocab_size=50, width=32, num_layers=2, num_filters=8, max_seq_len=64, num_heads=4,
    window_tokens=8,
)  # fmt: skip


@pytest.fixture(autouse=True)
def threads():
    """Benchmarks set them."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


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
    assert not torch.equal(branches, fused)  # by another way
    torch.testing.assert_close(other_loss, loss, rtol=1e-6, atol=1e-6)
    for name, gradient in gradients.items():
        largest = gradient.abs().max()
        assert (other_gradients[name] - gradient).abs().max() < 1e-5 * largest, name
    # Afterwards the model is what it was.
    with torch.no_grad():
        assert torch.equal(model(tokens[:, :-1]), fused)


@pytest.mark.parametrize("name", ["attention", "attention_sdpa", "attention_windowed"])
def test_attention_sees_all_that_it_should_and_nothing_to_come(make, name):
    model = make("attention")
    model.blocks = model.blocks[:1]  # more of them would reach beyond a window
    tokens = torch.randint(50, (1, 64))
    changed = tokens.clone()
    changed[0, 20] = (tokens[0, 20] + 1) % 50
    with WAYS[name].change(), torch.no_grad():
        difference = (model.hidden(tokens) - model.hidden(changed)).abs().amax(2)[0]
    last = 20 + SMALL.window_tokens if name == "attention_windowed" else 63
    assert (difference[:20] == 0).all()
    assert (difference[20 : last + 1] > 0).all()
    assert (difference[last + 1 :] == 0).all()


def test_torch_attention_is_ours_without_softcap_and_alibi():
    torch.manual_seed(0)
    queries, keys, values = torch.randn(3, 2, 300, 4, 8)
    with whole_context():
        arguments = queries, keys, values, torch.zeros(4), 1, 1e4
        ours = windowed.sliding_window_attention(*arguments)
    with torch_attention():
        torchs = windowed.sliding_window_attention(*arguments)
    torch.testing.assert_close(torchs, ours, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("width", [256, 512, 1024])
def test_attention_alone_has_the_size_of_an_stu_model(width):
    shape = ModelConfig(vocab_size=4096, width=width, num_heads=4)
    with torch.device("meta"):
        stu, attention = make_model("stu", shape), make_model("attention", shape)
    assert len(attention.blocks) == len(stu.blocks)
    assert all(
        isinstance(block.mixer, windowed.SlidingWindowAttention) for block in attention.blocks
    )
    assert attention.num_parameters() == pytest.approx(stu.num_parameters(), rel=0.01)


def test_train_reports_every_way_and_where_the_time_goes(capsys, tmp_path):
    picture = tmp_path / "train.png"
    size = ["--width", "32", "--layers", "2", "--window", "16", "--repeats", "2"]
    cli.main(["train", "--context", "64", "96", *size, "--plot", str(picture)])
    result = json.loads(capsys.readouterr().out)
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert [run["context"] for run in result["runs"]] == [64, 96]
    for run in result["runs"]:
        ways = run["ways"]
        assert list(ways) == list(WAYS)
        for way in ways.values():
            assert way["tokens_per_second"] == run["context"] / way["median_seconds"]["step"]
            assert len(way["step_seconds"]) == 2
        speeds = {name: way["tokens_per_second"] for name, way in ways.items()}
        assert run["ratios"]["stu_over_two_branch"] == speeds["stu"] / speeds["stu_two_branch"]
        fastest = max(speeds["attention"], speeds["attention_sdpa"])
        assert run["ratios"]["hybrid_over_fastest_whole_attention"] == speeds["hybrid"] / fastest
        flops = {name: way["flops_per_token"] for name, way in ways.items()}
        assert flops["attention"]["attention"] > flops["attention_windowed"]["attention"]
        # Of two blocks, a hybrid has attention in one.
        assert flops["attention_windowed"]["attention"] == 2 * flops["hybrid"]["attention"]
        assert flops["stu"]["convolution"] == 2 * flops["hybrid"]["convolution"]
    profiles = result["runs"][1]["profiles"]
    assert "profiles" not in result["runs"][0]
    for profile in profiles.values():
        assert list(profile["shares"]) == list(result["profile_groups"])
        assert sum(profile["shares"].values()) == pytest.approx(1)
        assert profile["sum_over_clock"] == pytest.approx(1, abs=0.05)
    assert all(share > 0 for share in profiles["hybrid"]["shares"].values())
    without = [group for group, share in profiles["stu"]["shares"].items() if share == 0]
    assert without == ["attention"]
