"""The scripts in examples/ run as a reader would run them."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from stu.config import ModelConfig
from stu.model import FlashSTU
from stu.model_dir import save_model
from stu.tokenizer import train_bpe

EXAMPLES = Path(__file__).parents[1] / "examples"


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A model directory."""
    folder = tmp_path_factory.mktemp("example")
    tokenizer = train_bpe(["def f(x):\n\treturn x + 1\n" * 20], 280, folder / "tokenizer.model")
    config = ModelConfig(
        vocab_size=280, width=16, num_layers=2, num_filters=6, num_heads=2, max_seq_len=256
    )
    save_model(folder / "model", FlashSTU(config), tokenizer)
    return folder / "model"


@pytest.mark.parametrize(
    ("script", "printed"),
    [
        ("add_a_mixer.py", ""),
        ("decode.py MODEL", "'import os\\n'"),
        ("step_an_engine.py MODEL", " abort "),
    ],
)
def test_an_example_runs(script, printed, model, tmp_path):
    name, *arguments = script.replace("MODEL", str(model)).split(" ")
    done = subprocess.run(
        [sys.executable, EXAMPLES / name, *arguments],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    assert printed in done.stdout


@pytest.mark.parametrize("page", ["engine.md", "python.md"])
def test_snippets_of_a_page_run(page, model):
    text = (EXAMPLES.parent / "docs" / page).read_text(encoding="utf-8")
    blocks = [block.split("```")[0] for block in text.split("```python\n")[1:]]
    whole = [block for block in blocks if '"models/mine"' in block]
    assert whole
    for block in whole:
        exec(block.replace("models/mine", str(model)), {})
