"""`stu-eval` as a user types it: its files, and what it refuses."""

import json

import pytest

from serve.evaluation.cli import main
from serve.evaluation.config import EvaluationConfig
from serve.evaluation.evaluation import Evaluation
from stu.model_dir import load_model, save_model
from tests.reference.evaluation import FormulaModel
from tests.serve.conftest import make_model

LONGEST = 512
SMALL = ["--cache-gib=0.2", "--device=cpu"]
TEXTS = ["--tasks=needle,recall", "--lengths=[150,300]", "--depths=2", "--samples=2"]


@pytest.fixture(scope="module")
def folder(code_tokenizer, tmp_path_factory):
    """A model directory with room for facts."""
    folder = tmp_path_factory.mktemp("facts") / "model"
    save_model(folder, make_model(code_tokenizer, LONGEST), code_tokenizer)
    return folder


def test_results_and_pictures(folder, code_tokenizer, tmp_path, capsys):
    output = tmp_path / "results.json"
    assert main([str(folder), *TEXTS, *SMALL, f"--output={output}"]) == 0
    names = {"results.json", "results.needle.png", "results.recall.png"}
    assert {path.name for path in tmp_path.iterdir()} == names
    assert (tmp_path / "results.recall.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    found = json.loads(output.read_text())
    assert found["model"] == str(folder)
    assert found["settings"]["lengths"] == [150, 300]
    config = EvaluationConfig("needle,recall", lengths=[150, 300], depths=2, samples=2)
    formula = FormulaModel(load_model(folder), code_tokenizer)
    expected = Evaluation(config, code_tokenizer, LONGEST).run(formula)
    assert list(found["results"]) == list(expected)
    for name, result in expected.items():
        assert found["results"][name]["metrics"] == pytest.approx(result.metrics, rel=1e-5)
        assert len(found["results"][name]["cells"]) == 4
    assert "nats_per_token" in capsys.readouterr().err


def test_results_are_printed_without_an_output(folder, capsys):
    settings = ["--tasks=needle", "--lengths=[150]", "--depths=1", "--samples=1"]
    assert main([str(folder), *settings, *SMALL]) == 0
    printed = capsys.readouterr()
    assert json.loads(printed.out)["results"]["needle"]["num_examples"] == 1
    assert "wrote" not in printed.err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], '--tasks="" is not allowed: it must be names separated by commas'),
        (["--tasks=needle", "--output=missing/results.json"], "there is no folder missing"),
        (["--tasks=needle", "--output=."], "a file, and there is a folder with this name"),
        (["--tasks=needle", "--lengths=[65]"], "--lengths=[65] is not allowed: it must be at most"),
        (["--tasks=needle", "--limit=0"], "--limit=0 is not allowed"),
        (["--tasks=needle", "--device=tpu"], "device"),
        (["--tasks=needle", "--include-path=missing"], "it must be a folder"),
    ],
)
def test_mistakes_are_named(model_directory, arguments, message, capsys):
    assert main([str(model_directory), *arguments]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line
