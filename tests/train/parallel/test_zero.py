"""DeepSpeed's stages on several ranks equal one process, and continue from one another."""

import hashlib
import os
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests import forked
from tests.train.saved import load_checkpoint
from train import cli, report

STEPS, SAVED = 8, 4
SAMPLES = 8
STAGES = [0, 1, 2, 3, "fsdp"]
"""Of a step, over all ranks and micro-batches."""


def arguments(settings, folder, ranks, stage, steps=STEPS):
    """Two micro-batches in a step, whatever the ranks; the first steps' gradients are clipped."""
    values = {
        "trainer.devices": ranks,
        "trainer.accumulate_grad_batches": 2,
        "data.micro_batch_size": SAMPLES // (2 * ranks),
        "trainer.gradient_clip_val": 1.5,
        "trainer.val_check_interval": 8,
        "trainer.max_steps": steps,
        "checkpoint-every-steps": SAVED,
        "run-dir": folder,
    }
    if stage == "fsdp":
        values |= {"parallel.kind": "fsdp"}
    elif stage is not None:
        values |= {"parallel.kind": "zero", "parallel.zero_stage": stage}
    replaced = {f"--{name}" for name in values}
    kept = [its for its in settings if its.split("=")[0] not in replaced]
    return [*kept, *(f"--{name}={value}" for name, value in values.items())]


def run(settings, folder, ranks, stage, *more):
    command = [forked.program("stu-train"), *arguments(settings, folder, ranks, stage), *more]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    return folder


def checkpoint(folder, step):
    return folder / "checkpoints" / f"step-{step:08d}.ckpt"


def assert_close(actual, expected):
    """Weights and moments within 1e-5 of their largest; the order of sums differs."""
    assert actual["TokenData"] == expected["TokenData"]
    assert actual["optimizer_step"] == expected["optimizer_step"]
    for name, weight in expected["state_dict"].items():
        torch.testing.assert_close(actual["state_dict"][name], weight, rtol=0, atol=1e-5)
    for before, after in zip(
        expected["optimizer_states"][0]["state"].values(),
        actual["optimizer_states"][0]["state"].values(),
        strict=True,
    ):
        for kind in ("exp_avg", "exp_avg_sq"):
            largest = before[kind].abs().max().item()
            torch.testing.assert_close(after[kind], before[kind], rtol=0, atol=1e-4 * largest)


@pytest.fixture(scope="module")
def settings(module_settings):
    return module_settings


@pytest.fixture(scope="module")
def whole(settings, tmp_path_factory):
    """One process, without DeepSpeed."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    assert cli.main(arguments(settings, folder, 1, None)) == 0
    return folder


@pytest.fixture(scope="module")
def runs(settings, tmp_path_factory):
    """By ranks and stage, made when first asked for."""
    made = {}

    def of(ranks, stage):
        if (ranks, stage) not in made:
            folder = tmp_path_factory.mktemp(f"{ranks}-{stage}") / "run"
            made[ranks, stage] = run(settings, folder, ranks, stage)
        return made[ranks, stage]

    return of


@pytest.mark.parametrize(
    ("ranks", "stage"),
    [
        *((2, stage) for stage in (0, 2, 3, "fsdp")),
        pytest.param(2, 1, marks=pytest.mark.slow),
        *(pytest.param(1, stage, marks=pytest.mark.slow) for stage in STAGES),
        *(pytest.param(4, stage, marks=pytest.mark.slow) for stage in STAGES),
    ],
)
def test_equals_one_process(whole, runs, ranks, stage):
    folder = runs(ranks, stage)
    for step in (SAVED, STEPS):
        actual = load_checkpoint(checkpoint(folder, step))
        assert_close(actual, load_checkpoint(checkpoint(whole, step)))
    for name in ("train/loss", "train/grad_norm", "train/lr", "val/bits_per_byte"):
        expected, actual = report.read_curves(whole)[name], report.read_curves(folder)[name]
        assert actual[0] == expected[0]
        assert actual[1] == pytest.approx(expected[1], rel=1e-5, abs=1e-9)


@pytest.mark.parametrize(
    ("layout", "stage"),
    [
        ("hyena", 3),
        pytest.param("attention", 3, marks=pytest.mark.slow),
        pytest.param("hyena", 1, marks=pytest.mark.slow),
        pytest.param("hyena", "fsdp", marks=pytest.mark.slow),
    ],
)
def test_other_mixers_equal_one_process(settings, tmp_path, layout, stage):
    # At the rate of the others, eight steps would take the weights of Hyena's filters to four times
    # their size, and the differences of rounding with them.
    kept = [its for its in settings if "learning_rate" not in its]
    given = [*kept, "--model.optimizer.learning_rate=1e-3", f"--model.config.layout={layout}"]
    whole = tmp_path / "whole"
    assert cli.main(arguments(given, whole, 1, None)) == 0
    folder = run(given, tmp_path / "run", 2, stage)
    assert_close(
        load_checkpoint(checkpoint(folder, STEPS)), load_checkpoint(checkpoint(whole, STEPS))
    )


@pytest.mark.parametrize(
    ("saved", "resumed"),
    [
        ((2, 3), (1, None)),
        ((1, None), (2, 3)),
        ((2, "fsdp"), (1, None)),
        ((2, 3), (2, "fsdp")),
        pytest.param((4, 3), (2, "fsdp"), marks=pytest.mark.slow),
        pytest.param((2, 1), (4, 2), marks=pytest.mark.slow),
        pytest.param((2, "fsdp"), (4, 1), marks=pytest.mark.slow),
        pytest.param((4, 3), (2, 1), marks=pytest.mark.slow),
        pytest.param((2, 2), (1, 3), marks=pytest.mark.slow),
        pytest.param((2, 0), (4, 3), marks=pytest.mark.slow),
        pytest.param((4, 2), (2, 0), marks=pytest.mark.slow),
        pytest.param((1, None), (4, "fsdp"), marks=pytest.mark.slow),
    ],
)
def test_goes_on_as_another(settings, whole, runs, tmp_path, saved, resumed):
    """From a checkpoint of other ranks and another stage, to where the whole run ends."""
    source = whole if saved[1] is None else runs(*saved)
    folder = run(settings, tmp_path / "run", *resumed, f"--resume={checkpoint(source, SAVED)}")
    assert_close(
        load_checkpoint(checkpoint(folder, STEPS)), load_checkpoint(checkpoint(whole, STEPS))
    )
    steps, losses = report.read_curves(folder)["train/loss"]
    expected = dict(zip(*report.read_curves(whole)["train/loss"], strict=True))
    assert steps == list(range(SAVED + 1, STEPS + 1))
    assert losses == pytest.approx([expected[step] for step in steps], rel=1e-5)


@pytest.mark.parametrize(
    "stage",
    [3, *(pytest.param(stage, marks=pytest.mark.slow) for stage in (None, 0, 1, 2, "fsdp"))],
)
def test_lion_trains_and_resumes_bit_for_bit(settings, tmp_path, stage):
    """Divided ranks nearly agree with one: rounding turns the signs of few gradients near 0."""
    kept = [its for its in settings if "learning_rate" not in its]
    given = [*kept, "--model.optimizer.learning_rate=3e-4", "--model.optimizer.name=lion"]
    alone = tmp_path / "alone"
    assert cli.main(arguments(given, alone, 1, None)) == 0
    expected = load_checkpoint(checkpoint(alone, STEPS))
    ranks = 1 if stage is None else 2
    run(given, whole := tmp_path / "whole", ranks, stage)
    saved = load_checkpoint(checkpoint(whole, STEPS))
    weights = torch.cat([weight.flatten() for weight in saved["state_dict"].values()])
    others = torch.cat([weight.flatten() for weight in expected["state_dict"].values()])
    assert ((weights - others).abs() > 1e-5).float().mean() < 0.002
    run(
        given, resumed := tmp_path / "resumed", ranks, stage, f"--resume={checkpoint(whole, SAVED)}"
    )
    again = load_checkpoint(checkpoint(resumed, STEPS))
    for name, weight in saved["state_dict"].items():
        assert torch.equal(weight, again["state_dict"][name])
    for kept, states in zip(
        *(its["optimizer_states"][0]["state"].values() for its in (saved, again)), strict=True
    ):
        assert kept.keys() == {"step", "exp_avg"}
        assert all(torch.equal(kept[name], states[name]) for name in kept)


@pytest.mark.parametrize("stage", [None, 1, pytest.param("fsdp", marks=pytest.mark.slow)])
def test_goes_on_with_other_micro_batches(settings, whole, tmp_path, stage):
    """More of them in a step, and smaller ones: the same samples."""
    given = arguments(settings, tmp_path / "run", 1, stage)
    given = [its for its in given if "accumulate" not in its and "micro_batch_size" not in its]
    given += ["--trainer.accumulate_grad_batches=4", f"--data.micro_batch_size={SAMPLES // 4}"]
    given.append(f"--resume={checkpoint(whole, SAVED)}")
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    subprocess.run([forked.program("stu-train"), *given], check=True, timeout=300, env=environment)
    actual = load_checkpoint(checkpoint(tmp_path / "run", STEPS))
    assert_close(actual, load_checkpoint(checkpoint(whole, STEPS)))
    steps, _ = report.read_curves(tmp_path / "run")["train/loss"]
    assert steps == list(range(SAVED + 1, STEPS + 1))


@pytest.mark.slow
@pytest.mark.parametrize("resumed", STAGES)
@pytest.mark.parametrize("saved", STAGES)
def test_two_ranks_go_on_as_four_and_four_as_two(settings, whole, runs, tmp_path, saved, resumed):
    """At every stage from every other."""
    for before, after in ((2, 4), (4, 2)):
        folder, source = tmp_path / f"{after}", checkpoint(runs(before, saved), SAVED)
        run(settings, folder, after, resumed, f"--resume={source}")
        assert_close(
            load_checkpoint(checkpoint(folder, STEPS)), load_checkpoint(checkpoint(whole, STEPS))
        )


LOOKS_AT_TYPES = """
import sys
import torch
from safetensors.torch import load_file, save_file
from stu import mixers
from train import cli
real, seen = mixers.causal_convolution, set()
def causal_convolution(inputs, taps, *others):
    seen.add((inputs.dtype, taps.dtype))
    return real(inputs, taps, *others)
mixers.causal_convolution = causal_convolution
rfft, transformed = torch.fft.rfft, set()
def seeing_rfft(its, *arguments, **settings):
    transformed.add(its.dtype)
    return rfft(its, *arguments, **settings)
torch.fft.rfft = seeing_rfft
code = cli.main(sys.argv[1:])
assert seen == {(torch.bfloat16, torch.float32)}, seen
assert transformed == {torch.float32}, transformed
sys.exit(code)
"""


@pytest.mark.parametrize(
    "stage",
    [3, *(pytest.param(stage, marks=pytest.mark.slow) for stage in (1, 2, "fsdp"))],
)
def test_filters_and_ffts_are_float32_in_bfloat16_training(settings, whole, tmp_path, stage):
    script, folder = tmp_path / "looks.py", tmp_path / "run"
    script.write_text(LOOKS_AT_TYPES)
    given = [*arguments(settings, folder, 2, stage), "--trainer.precision=bf16-mixed"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path.cwd())}
    command = [forked.python(), script, *given]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    saved = load_checkpoint(checkpoint(folder, STEPS))
    assert {weight.dtype for weight in saved["state_dict"].values()} == {torch.float32}
    filters = load_checkpoint(checkpoint(whole, STEPS))["state_dict"]["model.filters"]
    assert torch.equal(saved["state_dict"]["model.filters"], filters)
    losses = report.read_curves(folder)["train/loss"][1]
    assert losses == pytest.approx(report.read_curves(whole)["train/loss"][1], rel=0.02)
    # It continues from the float32 weights, not from those that it computes with.
    resumed = tmp_path / "resumed"
    given = [*arguments(settings, resumed, 2, stage), "--trainer.precision=bf16-mixed"]
    given.append(f"--resume={checkpoint(folder, SAVED)}")
    subprocess.run([forked.program("stu-train"), *given], check=True, timeout=300, env=environment)
    assert_close(load_checkpoint(checkpoint(resumed, STEPS)), saved)


def test_stage_0_is_for_float32(settings, tmp_path, capsys):
    given = [*arguments(settings, tmp_path / "run", 1, 0), "--trainer.precision=bf16-mixed"]
    assert cli.main(given) == 2
    assert "zero_stage=0 trains in float32 alone" in capsys.readouterr().err


@pytest.mark.parametrize("ranks", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_the_filters_of_a_checkpoint_are_used(settings, runs, tmp_path, ranks):
    """Not ones computed anew, which another machine may round differently."""
    source = tmp_path / "changed.ckpt"
    shutil.copytree(checkpoint(runs(2, 2), SAVED), source)
    file = source / "rank-00000.safetensors"
    tensors = load_file(file)
    tensors["weight/filters"] *= 1.5
    former = hashlib.sha256(file.read_bytes()).hexdigest()
    save_file(tensors, file)
    sums = source / "SHA256SUMS"
    now = hashlib.sha256(file.read_bytes()).hexdigest()
    sums.write_text(sums.read_text().replace(former, now))
    folder = run(settings, tmp_path / "run", ranks, 2, f"--resume={source}")
    saved = load_checkpoint(checkpoint(folder, STEPS))["state_dict"]["model.filters"]
    assert torch.equal(saved, tensors["weight/filters"])


@pytest.mark.parametrize(
    ("stage", "more"),
    [
        (2, ["checkpoint_activations", "offload_optimizer"]),
        pytest.param(2, ["checkpoint_activations"], marks=pytest.mark.slow),
        pytest.param("fsdp", ["checkpoint_activations"], marks=pytest.mark.slow),
        pytest.param(2, ["offload_optimizer"], marks=pytest.mark.slow),
    ],
)
def test_what_saves_memory_changes_nothing(settings, whole, tmp_path, stage, more):
    folder = run(
        settings, tmp_path / "run", 2, stage, *(f"--parallel.{name}=true" for name in more)
    )
    assert_close(
        load_checkpoint(checkpoint(folder, STEPS)), load_checkpoint(checkpoint(whole, STEPS))
    )


@pytest.mark.slow
@pytest.mark.parametrize("stage", [None, 2, 3, "fsdp"])
@pytest.mark.parametrize("recomputes", [False, True])
def test_compiled_blocks_compute_the_same(settings, whole, tmp_path, stage, recomputes):
    more = "--parallel.compile=true", f"--parallel.checkpoint_activations={str(recomputes).lower()}"
    folder = run(settings, tmp_path / "run", 2, stage, *more)
    assert_close(
        load_checkpoint(checkpoint(folder, STEPS)), load_checkpoint(checkpoint(whole, STEPS))
    )
