"""Rounds of an evaluation, on one rank."""

import pytest
import torch

from serve.evaluation.text_model import Prompt, ScoredText, TextModel, TextScore
from stu.common.errors import UserError
from train.tasks import ranks
from train.tasks.ranks import EvaluationCutShort, EvaluationFailed, Ranks, SharedModel


class Counting(TextModel):
    """Model whose answers show what it was asked; it fails on a text of one token."""

    tokenizer, max_length = None, 100

    def __init__(self):
        self.asked = []

    def score(self, texts):
        self.asked.append(len(texts))
        if any(len(text.tokens) == 1 for text in texts):
            raise UserError("model", message="too short")
        return [TextScore(-sum(text.tokens), text.first, len(text.tokens)) for text in texts]

    def generate(self, prompts):
        self.asked.append(len(prompts))
        return [f"{prompt.tokens} {prompt.max_new_tokens} {prompt.stop}" for prompt in prompts]


@pytest.fixture(autouse=True)
def _small_rounds(monkeypatch):
    monkeypatch.setattr(ranks, "TEXTS_AT_ONCE", 4)
    monkeypatch.setattr(ranks, "TOKENS_AT_ONCE", 50)


def test_answers_are_those_of_the_model_in_order():
    model, after = Counting(), []
    shared = SharedModel(Ranks(torch.device("cpu"), lambda: bool(after.append(1))), model)
    texts = [ScoredText([5] * (2 + number), 1) for number in range(9)]
    texts += [ScoredText([7] * 60, 3), ScoredText([8, 9], 1)]
    assert shared.score(texts) == Counting().score(texts)
    # Of at most 4 texts, and 50 tokens unless a text alone has more.
    assert model.asked == [4, 4, 1, 1, 1]
    assert len(after) == 5
    prompts = [Prompt([1, 2], 20, ["\n", "é"]), Prompt([3], 30)]
    assert shared.generate(prompts) == Counting().generate(prompts)
    assert model.asked[5:] == [1, 1]


def test_a_round_of_several_ranks_is_as_many_times_larger():
    texts = [ScoredText([0] * 5, 1)] * 30
    assert [len(chunk) for chunk in ranks.rounds(texts, 3)] == [12, 12, 6]
    assert [len(chunk) for chunk in ranks.rounds([ScoredText([0] * 40, 1)] * 5, 3)] == [3, 2]
    assert list(ranks.rounds([], 2)) == []


def test_failures_and_the_end_of_the_run_stop_it(capsys):
    failing = SharedModel(Ranks(torch.device("cpu"), lambda: False), Counting())
    with pytest.raises(EvaluationFailed, match=r"rank 0 on .*: UserError: too short"):
        failing.score([ScoredText([1], 1)])
    assert "Traceback" in capsys.readouterr().err
    model = Counting()
    ending = SharedModel(Ranks(torch.device("cpu"), lambda: True), model)
    with pytest.raises(EvaluationCutShort):
        ending.score([ScoredText([1, 2], 1)] * 9)
    assert model.asked == [4]
