"""lm-eval's `local-completions` against a live server has the results of the model itself."""

import importlib.util
import json
import sys
from pathlib import Path

import pytest
import torch
import yaml

from tests import forked
from tests.serve.requests import decode, make_request
from tests.serve.server_process import serving

DOCUMENTS = [
    {"query": "def f(x", "choices": ["):", " + 1", "\treturn"], "gold": 0},
    {"query": "\treturn x", "choices": [" +", "def", "\n"], "gold": 2},
    {"query": "größe =", "choices": [" 1", " x + 1"], "gold": 1},
    {"query": "x", "choices": ["\n\n", " f(", "0"], "gold": 1},
]
TASK = """
task: {name}
dataset_path: json
dataset_kwargs:
  data_files:
    test: {data}
test_split: test
doc_to_text: query
"""
CHOICES = """
output_type: multiple_choice
doc_to_choice: choices
doc_to_target: gold
target_delimiter: ""
metric_list:
  - metric: acc
  - metric: acc_norm
"""
GENERATION = """
output_type: generate_until
doc_to_target: "{{{{choices[gold]}}}}"
metric_list:
  - metric: exact_match
generation_kwargs: {settings}
"""
NEW_TOKENS = 20
LM_EVAL = """
from functools import partial
import lm_eval.tasks
from lm_eval.__main__ import cli_evaluate
# Its own tasks are thousands of files, which take 10 s to read.
lm_eval.tasks.TaskManager = partial(lm_eval.tasks.TaskManager, include_defaults=False)
cli_evaluate()
"""


def humaneval_settings():
    """The generation settings of lm-eval's own task, except for the number of new tokens."""
    folder = Path(importlib.util.find_spec("lm_eval").origin).parent
    text = (folder / "tasks/humaneval/humaneval.yaml").read_text(encoding="utf-8")
    settings = yaml.safe_load(text.replace("!function ", ""))["generation_kwargs"]
    assert len(settings["until"]) == 5
    return {**settings, "max_gen_toks": NEW_TOKENS}


def loglikelihood(model, tokenizer, context, continuation):
    """Log probability of a continuation, and whether greedy decoding would give it."""
    context_tokens = tokenizer.encode(context)
    tokens = tokenizer.encode(context + continuation)
    with torch.no_grad():
        logprobs = model(torch.tensor([tokens]))[0].double().log_softmax(-1)
    rest = range(len(context_tokens), len(tokens))
    total = sum(logprobs[at - 1, tokens[at]].item() for at in rest)
    return total, all(logprobs[at - 1].argmax() == tokens[at] for at in rest)


def samples_of(folder, task):
    (path,) = folder.rglob(f"samples_{task}_*.jsonl")
    samples = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    assert len(samples) == len(DOCUMENTS)
    return samples


@pytest.mark.slow  # importing lm-eval takes 8 s
@pytest.mark.parametrize("batch_size", [1, 4])
def test_tasks_have_the_results_of_the_model(
    tmp_path, model_directory, code_model, code_tokenizer, batch_size
):
    data, settings = tmp_path / "data.jsonl", humaneval_settings()
    data.write_text("".join(json.dumps(document) + "\n" for document in DOCUMENTS))
    generation = GENERATION.format(settings=json.dumps(settings))
    for name, kind in {"code_choices": CHOICES, "code_lines": generation}.items():
        (tmp_path / f"{name}.yaml").write_text(TASK.format(name=name, data=data) + kind)
    with serving(model_directory) as server:
        arguments = f"base_url={server.url}/v1/completions,model=model,tokenizer_backend=remote"
        arguments += ",tokenized_requests=True,num_concurrent=2,max_length=64"
        command = [sys.executable, "-c", LM_EVAL, "--model", "local-completions"]
        command += ["--model_args", arguments]
        command += ["--tasks", "code_choices,code_lines", "--include_path", str(tmp_path)]
        command += ["--batch_size", str(batch_size), "--log_samples"]
        command += ["--output_path", str(tmp_path / "results")]
        offline = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}
        done = forked.run(*command, HF_HOME=str(tmp_path / "hf"), **offline)
    assert done.returncode == 0, done.stderr[-3000:]
    num_right = 0
    for sample in samples_of(tmp_path, "code_choices"):
        document = sample["doc"]
        expected = [
            loglikelihood(code_model, code_tokenizer, document["query"], choice)
            for choice in document["choices"]
        ]
        for (found,), (value, is_greedy) in zip(sample["resps"], expected, strict=True):
            assert float(found[0]) == pytest.approx(value, abs=1e-4)
            assert str(found[1]) == str(is_greedy)
        best = max(range(len(expected)), key=lambda at: expected[at][0])
        num_right += best == document["gold"]
        assert sample["acc"] == (best == document["gold"])
    (path,) = (tmp_path / "results").rglob("results_*.json")
    accuracy = json.loads(path.read_text())["results"]["code_choices"]["acc,none"]
    assert accuracy == pytest.approx(num_right / len(DOCUMENTS))
    eos = code_tokenizer.eos_id
    stops = [*settings["until"], code_tokenizer.token_text(eos)]  # lm-eval adds the name of EOS
    for sample in samples_of(tmp_path, "code_lines"):
        prompt = code_tokenizer.encode(sample["doc"]["query"])
        request = make_request(prompt, NEW_TOKENS, stop=stops, stop_token_ids=[eos])
        (expected,) = decode(code_model, code_tokenizer, [request])
        assert sample["resps"] == [[expected.text]]
