"""Texts of needle and recall, for every kind of tokenizer, and what is counted as right."""

import math
import re

import pytest

from serve.evaluation.config import EvaluationConfig
from serve.evaluation.results import logged_metrics, table
from serve.evaluation.retrieval import Needle, Recall
from serve.evaluation.text_model import TextModel, TextScore
from stu.common.errors import UserError
from stu.tokenizer import make_tokenizer
from stu.tokenizers.alphabet import alphabet_files, bytes_files

TASKS = {"needle": Needle, "recall": Recall}
FACT = re.compile(r"\nThe number of ([a-z]{6}) is (\d{5})\.")
QUESTION = re.compile(r"\nThe number of ([a-z]{6}) is (\d{5})$")


@pytest.fixture(scope="module", params=["bytes", "dna", "sentencepiece"])
def tokenizer(request, code_tokenizer, tmp_path_factory):
    files = {"bytes": bytes_files(), "dna": alphabet_files("ACGTN")}
    if request.param == "sentencepiece":
        return code_tokenizer
    return make_tokenizer(files[request.param], tmp_path_factory.mktemp("tokenizer"))


@pytest.mark.parametrize("name", TASKS)
def test_texts_have_their_length_and_the_fact_at_its_place(tokenizer, name):
    lengths = [211, 512]
    config = EvaluationConfig(name, lengths=lengths, depths=3, samples=2, seed=5)
    examples = TASKS[name](name, config, tokenizer, 512).examples
    assert len(examples) == 2 * 3 * 2
    places = []
    for example in examples:
        tokens, first = list(example.text.tokens), example.text.first
        length, depth = example.place
        assert len(tokens) == length
        assert tokens[: len(tokenizer.start_ids)] == tokenizer.start_ids
        answer = tokens[first:]
        if tokenizer.vocab_size < 10:  # symbols: the key is as long as its strings must be
            key = tokens[first - math.ceil(30 / math.log2(5)) : first]
        else:
            text = tokenizer.decode(tokens)
            question = QUESTION.search(text)
            assert tokenizer.decode(answer) == f" {question[2]}"
            facts = FACT.findall(text)
            assert question.groups() in facts
            assert len(dict(facts)) == len(facts)
            assert (len(facts) == 1) == (name == "needle")
            key = tokenizer.encode(f"\nThe number of {question[1]} is")
        found = [
            place
            for place in range(first - len(key))
            if tokens[place : place + len(key) + len(answer)] == key + answer
        ]
        assert len(found) == 1, "the fact is in the text once, before it is asked for"
        places.append((length, depth, found[0]))
        if name == "needle":
            room = length - 2 * len(key + answer) - len(tokenizer.start_ids)
            assert found[0] == pytest.approx(depth * room, abs=2)
    by_depth = {depth: place for length, depth, place in places if length == 512}
    assert by_depth[0.0] < by_depth[0.5] < by_depth[1.0]


def test_texts_follow_from_seed_length_place_and_number_alone(tokenizer):
    def texts(**settings):
        config = EvaluationConfig("needle", **settings)
        found = Needle("needle", config, tokenizer, 400).examples
        return {(example.place, tuple(example.text.tokens)) for example in found}

    few = texts(lengths=[300], depths=2, samples=2)
    assert len(few) == 4
    assert few < texts(lengths=[250, 300], depths=3, samples=3)
    assert not few & texts(lengths=[300], depths=2, samples=2, seed=1)


class Reader(TextModel):
    """Model that knows what it has read in the last `reach` tokens."""

    def __init__(self, tokenizer, reach):
        self.tokenizer, self.max_length, self._reach = tokenizer, 512, reach

    def score(self, texts):
        return [self._score(list(text.tokens), text.first) for text in texts]

    def _score(self, tokens, first):
        answer = tokens[first:]
        seen = tokens[max(0, first - self._reach) : first]
        width = len(answer)
        is_known = any(seen[at : at + width] == answer for at in range(len(seen)))
        return TextScore(-0.5 if is_known else -7.0, width if is_known else 1, width)

    def generate(self, prompts):
        raise NotImplementedError


@pytest.mark.parametrize("name", TASKS)
def test_results_show_how_far_a_model_reads(tokenizer, name):
    config = EvaluationConfig(name, lengths=[250, 500], depths=3, samples=2)
    task = TASKS[name](name, config, tokenizer, 512)
    result = task.run(Reader(tokenizer, 200))
    assert result.num_examples == 12
    found = {(cell.length, cell.depth): cell.metrics for cell in result.cells}
    for (length, depth), metrics in found.items():
        is_right = depth == 1 or (depth == 0.5 and length == 250)
        assert metrics["acc"] == is_right, (length, depth)
        assert (metrics["token_acc"] == 1) == is_right
    means = [metrics["acc"] for metrics in found.values()]
    assert result.metrics["acc"] == sum(means) / len(means) == 0.5
    assert result.metrics["acc_by_length/000250_tokens"] == pytest.approx(2 / 3)
    assert logged_metrics({name: result})[f"eval/{name}/acc"] == 0.5
    assert "acc_by_length/000500_tokens" in table({name: result})


def test_lengths_without_room_are_refused(tokenizer):
    for name, kind in TASKS.items():
        with pytest.raises(UserError, match=f"lengths=7 .*{name} has no room"):
            kind(name, EvaluationConfig(name, lengths=[7]), tokenizer, 512)
        with pytest.raises(UserError, match="at most the model's max_seq_len=512"):
            kind(name, EvaluationConfig(name, lengths=[513]), tokenizer, 512)
        by_default = kind(name, EvaluationConfig(name, depths=1, samples=1), tokenizer, 256)
        lengths = [example.place.length for example in by_default.examples]
        assert lengths == [length for length in (32, 64, 128, 256) if length >= lengths[0]]
        assert lengths[-1] == 256
        assert lengths[0] > 32 or tokenizer.vocab_size < 10


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"limit": 0}, "limit=0 .* >= 1"),
        ({"samples": 0}, "samples=0"),
        ({"lengths": []}, "lengths"),
        ({"lengths": [64, 64]}, "different"),
        ({"tasks": "needle, needle"}, "different names"),
        ({"seed": -1}, "seed=-1"),
    ],
)
def test_settings_are_checked(settings, message):
    with pytest.raises(UserError, match=message):
        EvaluationConfig(**settings)


def test_lengths_and_depths_by_default():
    config = EvaluationConfig("needle")
    assert config.chosen_lengths(4096) == [512, 1024, 2048, 4096]
    assert config.chosen_depths() == [0, 0.25, 0.5, 0.75, 1]
    assert EvaluationConfig("needle", depths=1).chosen_depths() == [0]
