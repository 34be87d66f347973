"""The scripts in examples/ and the snippets in docs/ run."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from serve import LLM, SamplingParams
from stu.config import ModelConfig
from stu.model import FlashSTU
from stu.model_dir import load_model, save_model
from tests import forked
from tests.serve.server_process import eventually, serving

EXAMPLES = Path(__file__).parents[1] / "examples"


@pytest.fixture(scope="module")
def model(tmp_path_factory, code_tokenizer):
    """Return a model directory."""
    folder = tmp_path_factory.mktemp("example")
    config = ModelConfig(
        vocab_size=280, width=16, num_layers=2, num_filters=6, num_heads=2, max_seq_len=256
    )
    torch.manual_seed(0)
    save_model(folder / "model", FlashSTU(config), code_tokenizer)
    return folder / "model"


@pytest.mark.parametrize(
    ("script", "expected"),
    [
        ("add_a_mixer.py", ""),
        ("decode.py MODEL", "'import os\\n'"),
        ("step_an_engine.py MODEL", " abort "),
    ],
)
def test_example(script, expected, model, tmp_path):
    python = sys.executable if "decode" in script else forked.python()
    assert expected in run(python, tmp_path, *script.replace("MODEL", str(model)).split(" "))


def test_examples_of_training(tmp_path):
    pages, folder = EXAMPLES.parent / "docs", tmp_path / "example"
    assert "wrote" in run(forked.python(), tmp_path, "train.py", str(pages), str(folder))
    load_model(folder / "model")
    assert "step 30: loss" in run(forked.python(), tmp_path, "resume.py", str(folder))


@pytest.mark.slow
def test_example_of_fine_tuning(model, tmp_path):
    few = "--trainer.max_steps", "3", "--trainer.devices", "1", "--data.micro_batch_size", "1"
    few += "--model.optimizer.warmup_steps", "1"
    text = run(sys.executable, tmp_path, "fine_tune.py", str(model), str(tmp_path / "chat"), *few)
    assert "> Write a " in text
    assert (tmp_path / "chat" / "model" / "chat_template.jinja").exists()


def test_example_of_a_client(model, tmp_path):
    with serving(model) as server:
        text = run(forked.python(), tmp_path, "stream.py", f"{server.url}/v1")
    assert text.endswith(("[length]\n", "[stop]\n"))


@pytest.mark.slow
def test_example_of_datatrove(model, tmp_path):
    """Each document has its completion once, though a first run is killed."""
    pytest.importorskip("datatrove", reason="needs pip install '.[datatrove]'")
    texts = {f"document {number}": f"x = {number}\n" * (number % 40) for number in range(100)}
    source, target = tmp_path / "prompts", tmp_path / "out"
    source.mkdir()
    lines = [json.dumps({"id": name, "text": text or "größe"}) for name, text in texts.items()]
    (source / "in.jsonl").write_text("\n".join(lines), encoding="utf-8")
    with serving(model, "--batch-invariant") as server:
        script = EXAMPLES / "decode_with_datatrove.py"
        command = [sys.executable, str(script), server.url, str(source), str(target)]
        with subprocess.Popen(
            command, stderr=subprocess.DEVNULL, start_new_session=True
        ) as process:
            finished = tmp_path / "out-checkpoints" / "00000" / "chunk_00000.jsonl"
            eventually(lambda: finished.exists() and finished.stat().st_size > 0)
            os.killpg(process.pid, signal.SIGKILL)  # and the processes that it has started
        done = forked.run(*command)
        assert done.returncode == 0, done.stderr[-3000:]
    (path,) = target.glob("*.jsonl")
    with path.open(
        encoding="utf-8"
    ) as lines:  # texts may have U+2028, at which str.splitlines cuts
        rows = [json.loads(line) for line in lines]
    assert sorted(row["id"] for row in rows) == sorted(texts)
    params = SamplingParams(temperature=0.8, seed=1, max_new_tokens=32, truncate_prompt_tokens=224)
    llm = LLM(model, "cpu", cache_gib=0.01, batch_invariant=True)
    prompts = [texts[row["id"]] or "größe" for row in rows]
    found = llm.generate(prompts, [params] * len(rows), use_tqdm=False)
    for row, result in zip(rows, found, strict=True):
        (expected,) = result.outputs
        written = {"text": expected.text, "finish_reason": expected.finish_reason}
        assert row["metadata"]["rollout_results"] == [written]


def run(python, folder, name, *arguments):
    done = forked.run(python, EXAMPLES / name, *arguments, folder=folder)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("page", ["engine.md", "python.md"])
def test_snippets_of_a_page(page, model):
    text = (EXAMPLES.parent / "docs" / page).read_text(encoding="utf-8")
    blocks = [block.split("```")[0] for block in text.split("```python\n")[1:]]
    whole = [block for block in blocks if '"models/mine"' in block]
    assert whole
    for block in whole:
        exec(block.replace("models/mine", str(model)), {})
