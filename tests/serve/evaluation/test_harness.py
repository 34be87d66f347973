"""lm-eval's tasks have the results of the model itself."""

import json
import math
from types import SimpleNamespace

import pytest

from serve.config import EngineConfig
from serve.evaluation.config import EvaluationConfig
from serve.evaluation.evaluation import Evaluation
from serve.evaluation.results import Cell, TaskResult, write_report
from serve.evaluation.text_model import EngineModel
from stu.common.errors import UserError
from tests.reference.evaluation import FormulaModel
from tests.serve.conftest import MAX_SEQ_LEN

DOCUMENTS = [
    {"query": "def f(x", "choices": ["):", " + 1", "\treturn"], "gold": 0},
    {"query": "\treturn x ", "choices": [" +", "def", "\n"], "gold": 2},
    {"query": "größe =", "choices": [" 1", " x + 1"], "gold": 1},
    {"query": "", "choices": ["\n\n", " f(", "0"], "gold": 1},
    {"query": "x + 1\n" * 40, "choices": ["def", "x"], "gold": 1},
]
TASK = """
task: {name}
dataset_path: json
dataset_kwargs:
  data_files:
    test: {data}
test_split: test
doc_to_text: query
output_type: {kind}
"""
CHOICES = """
doc_to_choice: choices
doc_to_target: gold
target_delimiter: ""
metric_list:
  - metric: acc
  - metric: acc_norm
"""
ROLLING = """
doc_to_text: ""
doc_to_target: "{{query}}def f(x): return x"
metric_list:
  - metric: word_perplexity
  - metric: bits_per_byte
"""
GENERATION = """
doc_to_target: "{{choices[gold]}}"
generation_kwargs: {until: ["\\n", "("], max_gen_toks: 9, do_sample: false, top_p: null}
metric_list:
  - metric: exact_match
"""
KINDS = {
    "code_choices": ("multiple_choice", CHOICES),
    "code_rolling": ("loglikelihood_rolling", ROLLING),
    "code_lines": ("generate_until", GENERATION),
}


@pytest.fixture(scope="module")
def tasks(tmp_path_factory):
    """A folder of tasks, which read local files alone."""
    folder = tmp_path_factory.mktemp("tasks")
    data = folder / "data.jsonl"
    data.write_text("".join(json.dumps(document) + "\n" for document in DOCUMENTS))
    for name, (kind, text) in KINDS.items():
        (folder / f"{name}.yaml").write_text(TASK.format(name=name, data=data, kind=kind) + text)
    return folder


@pytest.fixture(scope="module", autouse=True)
def _no_home(tmp_path_factory):
    """Let the data sets' library keep its copies in a folder of this test."""
    import datasets

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("datasets"))
        yield


@pytest.fixture(scope="module")
def models(code_model, code_tokenizer):
    engine = EngineModel(code_model, code_tokenizer, EngineConfig(cache_gib=0.1))
    return engine, FormulaModel(code_model, code_tokenizer)


def likelihood(formula, context, continuation):
    """The log probability of a continuation, by lm-eval's rule for spaces, after BOS."""
    stripped = context.rstrip()
    tokenizer, continuation = formula.tokenizer, context[len(stripped) :] + continuation
    tokens = tokenizer.encode_prompt(stripped + continuation)
    first = max(1, min(len(tokenizer.encode_prompt(stripped)), len(tokens) - 1))
    left_out = max(0, len(tokens) - MAX_SEQ_LEN)
    return formula._score(tokens[left_out:], first - left_out).logprob


def test_tasks_have_the_results_of_the_model(tasks, models, code_tokenizer):
    from serve.evaluation.harness import HarnessModel  # takes seconds

    config = EvaluationConfig(",".join(KINDS), include_path=tasks)
    evaluation = Evaluation(config, code_tokenizer, MAX_SEQ_LEN)
    engine, formula = models
    found, again, expected = (evaluation.run(model) for model in (engine, engine, formula))
    assert list(found) == list(KINDS)
    for name, result in expected.items():
        assert found[name].metrics == pytest.approx(result.metrics, rel=1e-5), name
        # Remembered beginnings are rounded otherwise.
        assert again[name].metrics == pytest.approx(found[name].metrics, rel=1e-6)
        assert found[name].num_examples == len(DOCUMENTS)
    best, best_norm = 0, 0
    for document in DOCUMENTS:
        pairs = [(document["query"], choice) for choice in document["choices"]]
        sums = [likelihood(formula, *pair) for pair in pairs]
        answers = HarnessModel(engine).loglikelihood([SimpleNamespace(args=pair) for pair in pairs])
        assert [logprob for logprob, _ in answers] == pytest.approx(sums, rel=1e-5, abs=1e-5)
        normed = [s / len(c) for s, c in zip(sums, document["choices"], strict=True)]
        best += sums.index(max(sums)) == document["gold"]
        best_norm += normed.index(max(normed)) == document["gold"]
    metrics = found["code_choices"].metrics
    assert metrics["acc"] == pytest.approx(best / len(DOCUMENTS))
    assert metrics["acc_norm"] == pytest.approx(best_norm / len(DOCUMENTS))
    nats, num_bytes = 0.0, 0
    for document in DOCUMENTS:
        text = document["query"] + "def f(x): return x"
        tokens = code_tokenizer.encode_prompt(text)
        for first in range(1, len(tokens)):  # a token of each piece, with the piece's context
            last_piece = (len(tokens) - 2) // (MAX_SEQ_LEN - 1)
            piece = (first - 1) // (MAX_SEQ_LEN - 1)
            begin = piece * (MAX_SEQ_LEN - 1)
            if piece == last_piece:
                begin = max(0, len(tokens) - MAX_SEQ_LEN)
            nats -= formula._score(tokens[begin : first + 1], first - begin).logprob
        num_bytes += len(text.encode())
    bits = nats / math.log(2) / num_bytes
    assert found["code_rolling"].metrics["bits_per_byte"] == pytest.approx(bits, rel=1e-5)


def test_a_continuation_within_the_last_token_is_scored(models, code_tokenizer):
    from serve.evaluation.harness import HarnessModel  # takes seconds

    texts = map(code_tokenizer.token_text, range(code_tokenizer.vocab_size))
    count = lambda text: len(code_tokenizer.encode(text))  # noqa: E731
    text = next(t for t in texts if len(t) > 1 and t.isalpha() and count(t) == count(t[:-1]))
    pair = text[:-1], text[-1]
    engine, formula = models
    ((logprob, _),) = HarnessModel(engine).loglikelihood([SimpleNamespace(args=pair)])
    assert logprob == pytest.approx(likelihood(formula, *pair), rel=1e-5)
    assert logprob < -0.01


def test_a_perplexity_may_be_infinite(tasks, models, code_tokenizer, tmp_path):
    """It is that of whole words, which a text without spaces has one of."""
    data = tmp_path / "long.jsonl"
    data.write_text(json.dumps({"query": "ACGTq" * 300, "choices": [], "gold": 0}) + "\n")
    text = (tasks / "code_rolling.yaml").read_text()
    (tmp_path / "own.yaml").write_text(text.replace(str(tasks / "data.jsonl"), str(data)))
    config = EvaluationConfig("code_rolling", include_path=tmp_path)
    results = Evaluation(config, code_tokenizer, MAX_SEQ_LEN).run(models[0])
    metrics = results["code_rolling"].metrics
    assert metrics["word_perplexity"] == math.inf
    assert 1 < metrics["bits_per_byte"] < 20
    write_report(tmp_path / "results.json", results)
    written = json.loads((tmp_path / "results.json").read_text())["results"]["code_rolling"]
    assert written["metrics"] == {**metrics, "word_perplexity": None}


def test_limit_and_names_of_files(tasks, models, code_tokenizer):
    config = EvaluationConfig(str(tasks / "code_choices.yaml"), limit=2)
    (result,) = Evaluation(config, code_tokenizer, MAX_SEQ_LEN, 10).run(models[0]).values()
    assert result.num_examples == 2
    assert "acc_stderr" in result.metrics


@pytest.mark.parametrize(
    ("task", "change", "message"),
    [
        ("code_choices", ("data.jsonl", "missing.jsonl"), "lm-eval cannot load code_choices"),
        ("code_lines", ("do_sample: false", "num_beams: 3"), "num_beams of a task are not known"),
        ("code_lines", ("max_gen_toks: 9", "max_gen_toks: 64"), "generates 64 tokens"),
        ("code_choices", ("test_split: test", "test_split: test\nunsafe_code: true"), "runs code"),
    ],
)
def test_tasks_that_cannot_run_are_refused(tasks, code_tokenizer, tmp_path, task, change, message):
    text = (tasks / f"{task}.yaml").read_text()
    assert change[0] in text
    (tmp_path / "own.yaml").write_text(text.replace(*change))
    config = EvaluationConfig(task, include_path=tmp_path)
    with pytest.raises(UserError, match=message):
        Evaluation(config, code_tokenizer, MAX_SEQ_LEN)


def test_a_data_set_of_the_hub_is_not_downloaded(tasks, code_tokenizer, tmp_path):
    text = (
        (tasks / "code_choices.yaml").read_text().replace("dataset_path: json", "dataset_path: a/b")
    )
    (tmp_path / "own.yaml").write_text(text)
    config = EvaluationConfig("code_choices", include_path=tmp_path)
    with pytest.raises(UserError, match="lm-eval cannot load code_choices"):
        Evaluation(config, code_tokenizer, MAX_SEQ_LEN)


@pytest.mark.parametrize(
    ("name", "picture"),
    [("a.json", "a.needle.png"), ("a.step10", "a.step10.needle.png"), ("a", "a.needle.png")],
)
def test_pictures_are_named_as_the_file_of_results(tmp_path, name, picture):
    cells = [Cell(16, 0.5, {"acc": 0.5})]
    results = {"needle": TaskResult({"acc": 0.5}, 2, cells)}
    assert write_report(tmp_path / name, results) == [tmp_path / name, tmp_path / picture]
    assert (tmp_path / picture).exists()
