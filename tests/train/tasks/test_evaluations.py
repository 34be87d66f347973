"""Evaluations during a run: of the weights at their step, on all ranks, and harmless to the run."""

import json
import signal
from pathlib import Path

import pytest

from serve.evaluation.config import EvaluationConfig
from serve.evaluation.evaluation import Evaluation
from stu.model_dir import load_model, load_tokenizer
from tests import forked
from tests.reference.evaluation import FormulaModel
from tests.train.conftest import parallel, slow
from tests.train.saved import assert_same_state, checkpoint, last_checkpoint, load_checkpoint
from train import cli, report
from train.checkpoint.export import export
from train.start.signals import EXIT_CODES

LONGEST, STEPS = 160, 4
TASKS = {"tasks": "recall", "lengths": [130, LONGEST], "depths": 2, "samples": 3}
SHAPE = f"--model.config.max_seq_len={LONGEST}", "--trainer.val_check_interval=100"


def arguments(every=2):
    settings = {**TASKS, "every_steps": every}
    return [*SHAPE, *(f"--evaluation.{name}={value}" for name, value in settings.items())]


def results(run, step):
    return json.loads((run / "evaluation" / f"step-{step:08d}.json").read_text())


def assert_results_of_the_model(run, step, folder):
    """Compare the results of a step with those of its checkpoint, computed from the formula."""
    export(checkpoint(run, step), folder)
    model, tokenizer = load_model(folder), load_tokenizer(folder)
    evaluation = Evaluation(EvaluationConfig(**TASKS), tokenizer, LONGEST)
    expected = evaluation.run(FormulaModel(model, tokenizer))
    found = results(run, step)
    assert found["step"] == step
    for name, result in expected.items():
        metrics = found["results"][name]["metrics"]
        assert metrics == pytest.approx(result.metrics, rel=1e-5), name
        for cell, wanted in zip(found["results"][name]["cells"], result.cells, strict=True):
            assert (cell["length"], cell["depth"]) == (wanted.length, wanted.depth)
            assert cell["metrics"] == pytest.approx(wanted.metrics, rel=1e-5)


@pytest.mark.slow
def test_a_run_logs_results_of_its_weights_and_stays_the_same(train, tmp_path):
    needle = "--evaluation.tasks=needle,recall"
    steps = (
        f"--trainer.max_steps={STEPS}",
        "--checkpoint-every-steps=2",
        "--logger=[csv,tensorboard]",
    )
    run = train(tmp_path / "run", *steps, *arguments(), needle)
    for step in (2, STEPS):
        assert_results_of_the_model(run, step, tmp_path / f"model-{step}")
    curves = report.read_curves(run)
    for name in ("needle", "recall"):
        at, values = curves[f"eval/{name}/nats_per_token"]
        assert at == [2, STEPS]
        wanted = [results(run, step)["results"][name]["metrics"] for step in at]
        assert values == pytest.approx([metrics["nats_per_token"] for metrics in wanted])
        assert (run / "evaluation" / f"step-{STEPS:08d}.{name}.png").exists()
    table = (run / "csv" / "version_0" / "metrics.csv").read_text()
    assert "eval/needle/acc_by_length/000130_tokens" in table
    without = train(tmp_path / "without", *steps, *SHAPE)
    assert_same_state(last_checkpoint(run), last_checkpoint(without))


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        slow("tasks=none", 'evaluation.tasks="none" is not allowed: no task of lm-eval'),
        ("lengths=[161]", "evaluation.lengths=[161] is not allowed: it must be at most"),
        ("every_steps=0", "evaluation.every_steps=0 is not allowed"),
        ("include_path=missing", "evaluation.include_path="),
    ],
)
def test_mistakes_end_a_run_before_its_first_step(train, tmp_path, capsys, setting, message):
    train(tmp_path / "run", *arguments(), f"--evaluation.{setting}", code=2)
    assert message in capsys.readouterr().err


@pytest.fixture(scope="module")
def start(settings):
    """Function that runs `stu-train` in processes of its own."""

    def start(folder, ranks, stage, *more, command=None, **environment):
        values = {"trainer.devices": ranks, "run-dir": folder, "trainer.max_steps": STEPS}
        values |= {"checkpoint-every-steps": 2, **parallel(stage)}
        command = [*(command or [forked.program("stu-train")]), *settings, *arguments()]
        command += [f"--{name}={value}" for name, value in values.items()]
        environment |= {"PYTHONPATH": str(Path.cwd())}
        return forked.run(*command, *more, **environment)

    return start


@pytest.mark.parametrize(
    ("ranks", "stage", "more"),
    [
        *(slow(2, stage, []) for stage in (None, 0, 1, 2, 3, "fsdp")),
        *(slow(2, stage, ["--parallel.context=2"]) for stage in (None, 1, 3, "fsdp")),
        slow(3, "fsdp", []),
        # Evaluated in float32 on a CPU, from weights in float32.
        *(slow(2, stage, ["--trainer.precision=bf16-mixed"]) for stage in (None, "fsdp")),
        *(slow(2, stage, ["--parallel.compile=true"]) for stage in (None, 3)),
        slow(2, 3, ["--model.config.layout=hyena", "--model.optimizer.learning_rate=1e-3"]),
    ],
)
def test_every_strategy_evaluates_the_whole_model(start, tmp_path, ranks, stage, more):
    done = start(tmp_path / "run", ranks, stage, *more)
    assert done.returncode == 0, done.stderr[-3000:]
    for step in (2, STEPS):
        assert_results_of_the_model(tmp_path / "run", step, tmp_path / f"model-{step}")


HARMED = """
import os, signal, sys
from {module} import {kind}
from train import cli
name, rank, harm = {name!r}, {rank!r}, {harm!r}
method, calls = getattr({kind}, name), []
def harmed(*arguments):
    calls.append(name)
    if os.environ.get("LOCAL_RANK", "0") == rank and len(calls) == 1:
        if harm:
            raise MemoryError(harm)
        os.kill(os.getpid(), signal.SIGTERM)
    return method(*arguments)
setattr({kind}, name, harmed)
sys.exit(cli.main(sys.argv[1:]))
"""
ENGINE, TASK = "serve.evaluation.text_model:EngineModel", "serve.evaluation.retrieval:Recall"


def harmed(folder, path, name, rank, harm=""):
    """Write a script of `stu-train` in which a method fails, or a signal comes, at its first call
    on a rank; return the command that runs it."""
    module, _, kind = path.partition(":")
    script = folder / "harmed.py"
    script.write_text(HARMED.format(module=module, kind=kind, name=name, rank=rank, harm=harm))
    return [forked.python(), str(script)]


@pytest.mark.parametrize(
    ("stage", "path", "name", "rank"),
    [
        (None, ENGINE, "score", "1"),
        *(slow(stage, ENGINE, "score", "1") for stage in (1, 3, "fsdp")),
        slow(3, ENGINE, "score", "0"),
        *(slow(3, ENGINE, "__init__", rank) for rank in "01"),
        slow("fsdp", TASK, "run", "0"),
    ],
)
def test_an_evaluation_that_a_rank_gives_up_harms_nothing(start, tmp_path, stage, path, name, rank):
    """The next one succeeds, with each sequence divided in training."""
    command = harmed(tmp_path, path, name, rank, "no room")
    done = start(tmp_path / "run", 2, stage, "--parallel.context=2", command=command)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "the evaluation at step 2 failed (" in done.stderr
    assert ("rank " + rank in done.stderr) == (path == ENGINE)
    assert "no room" in done.stderr
    files = {file.name for file in (tmp_path / "run" / "evaluation").glob("*.json")}
    assert files == {f"step-{STEPS:08d}.json"}
    assert report.read_curves(tmp_path / "run")["eval/recall/acc"][0] == [STEPS]
    assert_results_of_the_model(tmp_path / "run", STEPS, tmp_path / "model")


@pytest.mark.slow
@pytest.mark.parametrize("rank", "01")
def test_a_signal_cuts_an_evaluation_short(start, tmp_path, rank):
    command = harmed(tmp_path, ENGINE, "score", rank)
    done = start(tmp_path / "run", 2, None, command=command)
    assert "the evaluation at step 2 was cut short" in done.stderr
    assert done.returncode == EXIT_CODES[signal.SIGTERM]
    assert not (tmp_path / "run" / "evaluation").exists()
    assert load_checkpoint(tmp_path / "run" / "checkpoints" / "last.ckpt")["global_step"] == 2
    done = start(tmp_path / "run", 2, None, "--resume=last")
    assert done.returncode == 0, done.stderr[-3000:]
    assert_results_of_the_model(tmp_path / "run", STEPS, tmp_path / "model")


@pytest.mark.slow
def test_adapters_are_merged(train, settings, tmp_path):
    origin = train(tmp_path / "origin", "--trainer.max_steps=2", *SHAPE)
    export(origin, tmp_path / "model")
    own = [text for text in (*settings, *arguments()) if not text.startswith("--model.config.")]
    own += [f"--init-from={tmp_path / 'model'}", "--lora.r=3", f"--trainer.max_steps={STEPS}"]
    run = tmp_path / "run"
    assert cli.main([*own, f"--run-dir={run}", "--checkpoint-every-steps=2"]) == 0
    for step in (2, STEPS):
        assert_results_of_the_model(run, step, tmp_path / f"model-{step}")
    found = [results(run, step)["results"]["recall"]["metrics"] for step in (2, STEPS)]
    assert found[0] != found[1]


CHOICES = """
task: own
dataset_path: json
dataset_kwargs:
  data_files:
    test: {data}
test_split: test
output_type: multiple_choice
doc_to_text: query
doc_to_choice: choices
doc_to_target: gold
metric_list:
  - metric: acc
"""


@pytest.mark.slow
@pytest.mark.parametrize("stage", [None, "fsdp"])
def test_lm_evals_tasks_run_on_all_ranks(start, tmp_path, stage):
    rows = [
        {"query": "def value", "choices": ["self", "import x", "None"], "gold": number % 3}
        for number in range(5)
    ]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "own.yaml").write_text(CHOICES.format(data=tmp_path / "rows.jsonl"))
    more = "--evaluation.tasks=own,needle", f"--evaluation.include_path={tmp_path}"
    done = start(tmp_path / "run", 2, stage, *more, HF_HOME=str(tmp_path / "hf"))
    assert done.returncode == 0, done.stderr[-3000:]
    for step in (2, STEPS):
        found = results(tmp_path / "run", step)["results"]
        assert list(found) == ["needle", "own"]
        folder = tmp_path / f"model-{step}"
        export(checkpoint(tmp_path / "run", step), folder)
        formula = FormulaModel(load_model(folder), load_tokenizer(folder))
        config = EvaluationConfig("own", include_path=tmp_path)
        expected = Evaluation(config, formula.tokenizer, LONGEST).run(formula)["own"]
        assert found["own"]["metrics"] == pytest.approx(expected.metrics)
        assert found["own"]["num_examples"] == 5
