"""lm-eval's `local-completions` against a live server: a task's results are those of the model."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml

from serve.config import EngineConfig
from serve.engine.engine import Engine
from tests.serve.requests import make_request
from tests.serve.server_process import SECONDS, serving

DOCUMENTS = [
    {"query": "def f(x", "choices": ["):", " + 1", "\treturn"], "gold": 0},
    {"query": "\treturn x", "choices": [" +", "def", "\n"], "gold": 2},
    {"query": "größe =", "choices": [" 1", " x + 1"], "gold": 1},
    {"query": "x", "choices": ["\n\n", " f(", "0"], "gold": 1},
]
TASK = """
task: code_choices
dataset_path: json
dataset_kwargs:
  data_files:
    test: {data}
test_split: test
output_type: multiple_choice
doc_to_text: query
doc_to_choice: choices
doc_to_target: gold
target_delimiter: ""
metric_list:
  - metric: acc
  - metric: acc_norm
"""


GENERATION = """
task: code_lines
dataset_path: json
dataset_kwargs:
  data_files:
    test: {data}
test_split: test
output_type: generate_until
doc_to_text: query
doc_to_target: "{{{{choices[gold]}}}}"
metric_list:
  - metric: exact_match
generation_kwargs: {settings}
"""
NEW_TOKENS = 20


def humaneval_settings():
    """The generation settings of lm-eval's own task, but for its length; to the five strings that
    end its texts, lm-eval adds the name of EOS."""
    folder = Path(importlib.util.find_spec("lm_eval").origin).parent
    text = (folder / "tasks/humaneval/humaneval.yaml").read_text(encoding="utf-8")
    settings = yaml.safe_load(text.replace("!function ", ""))["generation_kwargs"]
    assert len(settings["until"]) == 5
    return {**settings, "max_gen_toks": NEW_TOKENS}


def greedy_text(model, tokenizer, prompt, stop_strings):
    engine = Engine(model, tokenizer, EngineConfig(cache_gib=0.01))
    stops = [tokenizer.eos_id]
    engine.add(
        make_request(tokenizer.encode(prompt), NEW_TOKENS, stop=stop_strings, stop_token_ids=stops)
    )
    outputs = []
    while engine.has_work:
        outputs += engine.step()
    return "".join(output.text for output in outputs)


def loglikelihood(model, tokenizer, context, continuation):
    """Of a continuation, and whether greedy decoding would give it."""
    context_tokens = tokenizer.encode(context)
    tokens = tokenizer.encode(context + continuation)
    with torch.no_grad():
        logprobs = model(torch.tensor([tokens]))[0].double().log_softmax(-1)
    rest = range(len(context_tokens), len(tokens))
    found = sum(logprobs[at - 1, tokens[at]].item() for at in rest)
    return found, all(logprobs[at - 1].argmax() == tokens[at] for at in rest)


@pytest.mark.parametrize("batch_size", [pytest.param(1, marks=pytest.mark.slow), 4])
def test_a_task_s_results_are_the_model_s(
    tmp_path, model_directory, code_model, code_tokenizer, batch_size
):
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(its) + "\n" for its in DOCUMENTS))
    task = TASK.format(data=tmp_path / "data.jsonl")
    (tmp_path / "code_choices.yaml").write_text(task)
    settings = humaneval_settings()
    generation = GENERATION.format(data=tmp_path / "data.jsonl", settings=json.dumps(settings))
    (tmp_path / "code_lines.yaml").write_text(generation)
    with serving(model_directory) as server:
        arguments = f"base_url={server.url}/v1/completions,model=model,tokenizer_backend=remote"
        command = [sys.executable, "-m", "lm_eval", "--model", "local-completions"]
        command += [
            "--model_args",
            arguments + ",tokenized_requests=True,num_concurrent=2,max_length=64",
        ]
        command += ["--tasks", "code_choices,code_lines", "--include_path", str(tmp_path)]
        command += ["--batch_size", str(batch_size), "--log_samples"]
        command += ["--output_path", str(tmp_path / "results")]
        offline = {
            "HF_HOME": str(tmp_path / "hf"),
            "HF_HUB_OFFLINE": "1",
            "HF_DATASETS_OFFLINE": "1",
        }
        done = subprocess.run(
            command,
            env={**os.environ, **offline},
            capture_output=True,
            text=True,
            timeout=3 * SECONDS,
        )
    assert done.returncode == 0, done.stderr[-3000:]
    (path,) = (tmp_path / "results").rglob("samples_code_choices_*.jsonl")
    samples = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    assert len(samples) == len(DOCUMENTS)
    num_right = 0
    for sample in samples:
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
    (path,) = (tmp_path / "results").rglob("samples_code_lines_*.jsonl")
    samples = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    assert len(samples) == len(DOCUMENTS)
    for sample in samples:
        stops = [*settings["until"], code_tokenizer.token_text(code_tokenizer.eos_id)]
        assert len(stops) == 6
        expected = greedy_text(code_model, code_tokenizer, sample["doc"]["query"], stops)
        assert sample["resps"] == [[expected]]
