"""The serving benchmarks, their prompts and the head of a result."""

from datetime import datetime

import pytest

from benchmarks.machine import commit, describe
from benchmarks.serving import invariance, load, prefixes, speculation, step
from stu.common.errors import UserError
from stu.tokenizer import read_tokenizer
from stu.tokenizers.sentence_piece import train_bpe
from tests.train.conftest import data  # noqa: F401
from train.data.shards import TokenShards


def test_prompts_of_invariance_are_pieces_of_the_validation_split(data, tmp_path):  # noqa: F811
    tokenizer = read_tokenizer(data / "tokenizer.model")
    prompts = invariance.read_prompts(data, tokenizer, 9, 4)
    assert [len(prompt) for prompt in prompts] == [1, 2, 3, 4, 1, 2, 3, 4, 1]
    split = TokenShards(data, "validation")
    assert prompts[0] == split.read(0, 1).tolist()
    start = 7 * len(split) // 9
    assert prompts[7] == split.read(start, start + 4).tolist()
    with pytest.raises(UserError, match="do not make 1000 prompts of up to 40; lower --prompts"):
        invariance.read_prompts(data, tokenizer, 1000, 40)
    other = train_bpe(["the end of the beginning\n"] * 20, 280, tmp_path / "other.model")
    with pytest.raises(UserError, match="made by the model's tokenizer"):
        invariance.read_prompts(data, other, 9, 4)


@pytest.mark.slow
def test_a_server_is_compared_with_its_engine(monkeypatch):
    monkeypatch.setattr(load, "WIDTH", 64)
    options = load.Options(clients=2, requests=4, new_tokens=8, rounds=2)
    (run,) = load.measure(options)["runs"]
    closed, opened = run["closed_loop"], run["open_loop"]
    assert closed["completed"] == opened["completed"] == 4
    share = 1 - closed["output_throughput"] / run["engine_only_tokens_per_second"]
    assert run["overhead_share"] == share == min(run["overhead_shares"])
    assert len(run["overhead_shares"]) == 2
    for loop in (closed, opened):
        for name in ("ttft", "itl"):
            assert 0 < loop[f"p50_{name}_ms"] <= loop[f"p99_{name}_ms"] <= loop[f"max_{name}_ms"]
    assert run["resident_mib"] > 100


def test_the_head_of_a_result_names_the_commit_and_the_time(tmp_path):
    head = describe()
    assert head["commit"] == "unknown" or len(head["commit"].removesuffix("-dirty")) == 40
    assert datetime.fromisoformat(head["date"]).tzinfo is not None
    assert commit(tmp_path) == "unknown"


def test_parts_of_a_step_add_up():
    """Each is there, for each format of weights and each way to choose tokens."""
    runs = step.measure(step.Options(batch=2, steps=3, width=32, layers=2))["runs"]
    assert [(run["weights"], run["choice"]) for run in runs] == [
        (weights, choice) for weights in ("float", "int8") for choice in step.CHOICES
    ]
    for run in runs:
        parts = [run[f"{name}_ms"] for name in ("model", "caches", "rest")]
        assert min(parts) > 0
        assert run["rest_share"] == pytest.approx(parts[-1] / sum(parts))


def test_remembered_prefixes_are_compared_with_none():
    """A turn computes its own tokens and the last one of the answer before it, which no step
    took."""
    options = prefixes.Options(
        32, 2, history_tokens=300, turns=3, requests=6, system_tokens=200, rows=2,
        prompt_tokens=300, tokens_per_step=64,
    )  # fmt: skip
    (run,) = prefixes.measure(options)["runs"]
    turns = run["chat"]["turns"]
    own, answer = prefixes.OWN_TOKENS, prefixes.NEW_TOKENS
    assert [turn["computed_tokens"] for turn in turns] == [300 + own, own + 1, own + 1]
    assert [turn["prompt_tokens"] for turn in turns] == [
        300 + own + turn * (own + answer) for turn in range(3)
    ]
    assert run["chat"]["speedup"] == run["chat"]["plain_seconds"] / turns[-1]["seconds"]
    system, long = run["system"], run["long"]
    speeds = system["requests_per_second"], system["plain_requests_per_second"]
    assert min(speeds) > 0
    assert system["speedup"] == speeds[0] / speeds[1]
    assert 0 < long["step_ms"] <= long["longest_gap_ms"]
    assert long["steps_beyond_chunk"] == pytest.approx(
        (long["longest_gap_ms"] - long["chunk_ms"]) / long["step_ms"]
    )
    assert long["chunked_over_whole"] == long["chunked_seconds"] / long["whole_seconds"]


@pytest.mark.slow
def test_guesses_are_right_where_an_answer_repeats_its_prompt():
    """Answers are those that are given, in both engines; none is guessed in random ones."""
    options = speculation.Options((2,), new_tokens=40, width=32, layers=2, vocab_size=512)
    runs = {run["text"]: run for run in speculation.measure(options)["runs"]}
    edited, random = runs["code, edited"], runs["random"]
    assert edited["accepted_tokens"] > 20
    assert random["drafts"] == 0
    assert edited["speedup"] == pytest.approx(
        edited["speculate_tokens_per_second"] / edited["plain_tokens_per_second"]
    )
    assert random["median_speedup_of_a_turn"] > 0
    assert 0 < random["vain_share"] < 1
