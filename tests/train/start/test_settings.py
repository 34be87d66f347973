"""Settings of a run: `stu-plan` and `stu-train` refuse the same, with code 2 and the name."""

import re

import hypothesis
import lightning as L
import pytest
from hypothesis import HealthCheck, given, strategies

from train import cli
from train.data.shards import Index
from train.plan import cli as plan

WRONG = [  # ranges of a group are tested where its class is
    ("--model.config.num_layers=0", "num_layers=0"),
    ("--model.config.width=0", "width=0"),
    ("--model.config.width=abc", "model.config.width"),
    ("--model.config.num_heads=3", "model.config.num_heads=3 .* divides width=16"),
    ("--model.config.num_filters=-1", "num_filters=-1"),
    ("--model.config.vocab_size=-1", "vocab_size=-1"),
    ("--model.optimizer.learning_rate=.nan", "learning_rate=NaN"),
    ("--model.optimizer.warmup_steps=-1", "warmup_steps=-1"),
    ("--model.guard.most_bad_steps=0", "most_bad_steps=0"),
    ("--model.guard.loss_jump=-1", "loss_jump=-1"),
    ("--model.guard.loss_jump=.nan", "loss_jump=NaN"),
    ("--model.z_loss=-1", "model.z_loss=-1"),
    ("--data.seq_len=0", "data.seq_len=0"),
    ("--data.seq_len=33", "data.seq_len=33 exceeds model.config.max_seq_len=32"),
    ("--data.micro_batch_size=0", "data.micro_batch_size=0"),
    ("--data.micro_batch_size=1.5", "data.micro_batch_size"),
    ("--data.max_validation_tokens=0", "data.max_validation_tokens=0"),
    ("--seed-everything=-1", "--seed-everything=-1"),
    ("--seed-everything=true", "seed_everything"),  # Lightning's random seed is always 0
    ("--trainer.max_steps=0", "trainer.max_steps=0"),
    ("--trainer.accumulate_grad_batches=0", "trainer.accumulate_grad_batches=0"),
    ("--trainer.val_check_interval=0.5", "trainer.val_check_interval=0.5"),
    ("--trainer.val_check_interval=null", "trainer.val_check_interval=null"),
    ("--trainer.log_every_n_steps=null", "trainer.log_every_n_steps=null"),
    ("--trainer.gradient_clip_val=-1", "trainer.gradient_clip_val=-1"),
    ("--trainer.gradient_clip_val=.nan", "trainer.gradient_clip_val=NaN"),
    ("--trainer.gradient_clip_algorithm=median", "trainer.gradient_clip_algorithm=median"),
    ("--trainer.num_sanity_val_steps=-2", "trainer.num_sanity_val_steps=-2"),
    ("--trainer.limit_val_batches=-1", "trainer.limit_val_batches=-1"),
    ("--trainer.limit_val_batches=1.5", "trainer.limit_val_batches=1.5"),
    ("--trainer.profiler=abacus", "trainer.profiler=abacus"),
    ("--trainer.max_time=00:00:00:00", "trainer.max_time=00:00:00:00"),
    ("--trainer.max_time=00:01", "trainer.max_time='00:01'"),
    ("--trainer.max_steps=3 --model.optimizer.warmup_steps=4", "warmup_steps=4 is longer than the"),
    ("--trainer.accelerator=abacus", "trainer.accelerator=abacus"),
    ("--trainer.devices=0", "trainer.devices=0"),
    ("--trainer.devices=-1", "trainer.devices=-1"),
    ("--trainer.devices=[0,1]", "trainer.devices"),
    ("--trainer.devices=two", "trainer.devices=two"),
    ("--trainer.num_nodes=0", "trainer.num_nodes=0"),
    ("--trainer.precision=16-mixed", "trainer.precision=16-mixed .*float16"),
    ("--trainer.precision=64-true", "trainer.precision=64-true"),
    ("--trainer.precision=transformer-engine", "trainer.precision=transformer-engine"),
    ("--parallel.zero_stage=4", "parallel.zero_stage"),
    ("--parallel.zero_stage=3", "parallel.zero_stage=3.*: it needs parallel.kind=zero"),
    ("--lora.lora_alpha=32", "lora.lora_alpha=32.*: it needs lora.r"),
    ("--lora.target_modules=[up]", "lora.target_modules=.*: it needs lora.r"),
    ("--parallel.offload_optimizer=true", "parallel.offload_optimizer"),
    ("--checkpoint-every-steps=0", "--checkpoint-every-steps=0"),
    ("--checkpoint-every-minutes=.nan", "--checkpoint-every-minutes=NaN"),
    ("--keep-checkpoints=0", "--keep-checkpoints=0"),
    ("--hang-minutes=0", "--hang-minutes=0"),
    (
        "--parallel.kind=zero --parallel.zero_stage=0 --trainer.precision=bf16-mixed",
        "parallel.zero_stage=0 trains in float32 alone",
    ),
    ("--parallel.kind=fsdp --trainer.precision=bf16-true", "trainer.precision=bf16-true"),
    (
        "--parallel.kind=zero --trainer.gradient_clip_algorithm=value",
        "trainer.gradient_clip_algorithm=value",
    ),
]


@pytest.fixture
def commands(settings, tmp_path, monkeypatch):
    """Both commands as functions that return the exit code, without training or counting."""
    monkeypatch.setattr(L.Trainer, "fit", lambda *_, **__: None)
    monkeypatch.setattr("train.plan.report.show_plan", lambda *_: 0)

    def code(main, arguments):
        try:
            return main(arguments)
        except SystemExit as stop:  # how a command-line parser stops
            return stop.code

    def train(*arguments):
        return code(cli.main, [*settings, f"--run-dir={tmp_path / 'run'}", *arguments])

    def plan_run(*arguments):
        return code(plan.main, [*settings, *arguments])

    return {"stu-train": train, "stu-plan": plan_run}


@pytest.mark.parametrize(("arguments", "message"), WRONG, ids=[wrong[0][2:] for wrong in WRONG])
def test_wrong_setting_is_refused_by_both(commands, tmp_path, capsys, arguments, message):
    for name, command in commands.items():
        assert command(*arguments.split()) == 2
        error = capsys.readouterr().err.replace('"', "")  # around strings
        assert re.search(rf"{name}: error: [\s\S]*{message}", error)
        assert "Traceback" not in error
    assert not (tmp_path / "run").exists()


def test_a_long_time_of_a_file_must_be_in_quotes(commands, tmp_path, capsys):
    for text, code in (("10:00:00:00", 2), ("'10:00:00:00'", 0)):
        (tmp_path / "run.yaml").write_text(f"trainer:\n  max_time: {text}\n")
        for command in commands.values():
            assert command(f"--config={tmp_path / 'run.yaml'}") == code
            assert ("write it in quotes" in capsys.readouterr().err) == (code == 2)


VALUES = {
    "model.config.num_layers": ["0", "1", "2"],
    "model.config.num_heads": ["2", "3"],
    "model.config.layout": ["hybrid", "stu", "hyena"],
    "data.seq_len": ["0", "8", "33"],
    "data.micro_batch_size": ["-1", "1", "3"],
    "trainer.max_steps": ["0", "5"],
    "trainer.accumulate_grad_batches": ["0", "2"],
    "trainer.val_check_interval": ["0.5", "3", "null"],
    "trainer.limit_val_batches": ["0", "0.5", "2.5", "null"],
    "trainer.gradient_clip_val": ["-1", "0", "1.0", ".nan", "null"],
    "trainer.gradient_clip_algorithm": ["norm", "value", "other"],
    "trainer.max_time": ["00:00:00:00", "00:00:05:00", "5 s"],
    "trainer.devices": ["auto", "0", "1", "2", "-1", "[0]"],
    "trainer.num_nodes": ["0", "1"],
    "trainer.precision": ["32-true", "bf16", "bf16-true", "bf16-mixed", "16-mixed", "64-true"],
    "parallel.kind": ["ddp", "fsdp"],
    "parallel.zero_stage": ["0", "1", "4"],
    "parallel.offload_optimizer": ["true", "false"],
    "model.optimizer.warmup_steps": ["-1", "0", "4"],
    "model.z_loss": ["-1", "0", ".nan"],
    "keep-checkpoints": ["0", "1"],
    "seed-everything": ["-1", "7", "true"],
}


@given(strategies.data())
@hypothesis.settings(
    max_examples=10,
    derandomize=True,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
def test_both_refuse_the_same_of_random_settings(commands, data):
    """Few settings are changed at once, so that many runs are valid."""
    names = data.draw(strategies.lists(strategies.sampled_from(sorted(VALUES)), max_size=3))
    chosen = [f"--{name}={data.draw(strategies.sampled_from(VALUES[name]))}" for name in names]
    codes = {name: command(*chosen) for name, command in commands.items()}
    assert codes["stu-train"] == codes["stu-plan"], chosen
    assert codes["stu-plan"] in (0, 2)


def test_both_warn_of_less_data_than_a_step_or_a_sample(commands, data, capsys):
    index = Index.load(data)
    samples = (index.splits["train"].num_tokens - 1) // 16
    validation = index.splits["validation"].num_tokens - 1
    large = [f"--data.micro_batch_size={samples + 1}", "--trainer.devices=1"]
    long = [f"--data.seq_len={validation + 1}", f"--model.config.max_seq_len={validation + 1}"]
    for command in commands.values():
        assert command("--trainer.devices=1") == 0
        assert "warning: " not in capsys.readouterr().err
        assert command(*large) == 0
        error = capsys.readouterr().err
        assert f"{samples:,} samples of data.seq_len=16, and a step reads {samples + 1:,}" in error
        assert "the validation split" not in error
        assert command(*long, "--trainer.devices=1", "--data.micro_batch_size=1") == 0
        error = capsys.readouterr().err
        assert f"the validation split has {validation:,} tokens to predict, fewer than" in error


@pytest.mark.parametrize("kind", ["zero", "fsdp"])
def test_both_accept_valid_settings(commands, kind):
    arguments = [f"--parallel.kind={kind}", "--trainer.precision=bf16-mixed"]
    assert [command(*arguments) for command in commands.values()] == [0, 0]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--gpus", "1.5"], "argument --gpus: 1.5 is not allowed: it must be a whole number >= 1"),
        (["--gpus", "0"], "argument --gpus: 0 is not allowed"),
        (["--nodes", "0"], "argument --nodes: 0 is not allowed"),
        (["--nodes=-1"], "argument --nodes: -1 is not allowed"),
        (["--tokens", "-1"], "argument --tokens: -1 is not allowed: it must be a positive number"),
        (["--tokens", "nan"], "argument --tokens: nan is not allowed"),
        (["--tokens", "0"], "argument --tokens: 0 is not allowed"),
        (["--gpu", "abacus"], 'gpu="abacus" is not allowed: it must be one of a100-40g'),
    ],
)
def test_wrong_option_of_plan_is_refused(commands, capsys, arguments, message):
    assert commands["stu-plan"](*arguments) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "ranks"),
    [
        ([], 8),
        (["--trainer.devices=2", "--trainer.num_nodes=3"], 6),
        (["--trainer.devices=2", "--trainer.num_nodes=3", "--nodes=1", "--gpus=4"], 4),
    ],
)
def test_number_of_ranks_follows_the_settings(commands, monkeypatch, arguments, ranks):
    monkeypatch.setattr(
        "train.plan.report.show_plan", lambda settings, gpu, num_ranks, *_: num_ranks
    )
    assert commands["stu-plan"](*arguments) == ranks
