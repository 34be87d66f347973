"""The engine's scores and continuations are those of the model's own logits."""

import random

import pytest

from serve.config import EngineConfig
from serve.evaluation.text_model import EngineModel, Prompt, ScoredText
from tests.reference.evaluation import FormulaModel
from tests.serve.conftest import MAX_SEQ_LEN


@pytest.fixture(scope="module")
def engine_model(code_model, code_tokenizer):
    return EngineModel(code_model, code_tokenizer, EngineConfig(cache_gib=0.1))


def test_scores_equal_the_formula(engine_model, code_model, code_tokenizer):
    source = random.Random(0)
    texts = []
    for length in (1, 2, 3, 17, MAX_SEQ_LEN - 1, MAX_SEQ_LEN):
        tokens = source.choices(range(code_tokenizer.vocab_size), k=length)
        texts += [ScoredText(tokens, first) for first in {1, 2, length // 2, length - 1, length}]
    texts = [text for text in texts if 1 <= text.first <= len(text.tokens)]
    # Texts that begin alike, whose beginnings the engine remembers.
    texts += [ScoredText([*texts[-1].tokens[:40], token], 40) for token in (5, 6, 7)]
    formula = FormulaModel(code_model, code_tokenizer)
    tokens = code_tokenizer.encode_prompt("def f(x")
    likely = [*tokens, *formula.likeliest(tokens, 3)]
    texts += [ScoredText(likely, len(tokens)), ScoredText(likely, len(tokens) - 1)]
    expected = formula.score(texts)
    for _ in range(2):
        found = engine_model.score(texts)
        for score, wanted, text in zip(found, expected, texts, strict=True):
            assert score.logprob == pytest.approx(wanted.logprob, rel=1e-5, abs=1e-5), text
            assert (score.num_hits, score.num_tokens) == (wanted.num_hits, wanted.num_tokens)
            assert score.num_tokens == len(text.tokens) - text.first
    assert [score.num_hits for score in expected[-2:]] == [3, 3]
    assert [score.is_greedy for score in found[-2:]] == [True, False]


def test_continuations_equal_the_formula(engine_model, code_model, code_tokenizer):
    start = code_tokenizer.encode_prompt("def f(x")
    prompts = [Prompt(start, 20), Prompt(start[:2], 9)]
    free, _ = texts = FormulaModel(code_model, code_tokenizer).generate(prompts)
    prompts.append(Prompt(start, 20, [free[3:5], "not in the text"]))
    texts.append(free[: free.index(free[3:5])])
    assert engine_model.generate(prompts) == texts
