"""DeepSpeed's stages and FSDP on several ranks equal one process, and continue from one another."""

import hashlib
import os
import shutil
import sys
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests import forked
from tests.train.conftest import slow
from tests.train.parallel.conftest import SAMPLES, SAVED, STEPS
from tests.train.saved import assert_close, assert_same_state, checkpoint, load_checkpoint, losses
from train import report
from train.checkpoint.folder import CheckpointFolder
from train.parallel.config import ParallelConfig, make_strategy

STAGES = [0, 1, 2, 3, "fsdp"]


def end(folder):
    return load_checkpoint(checkpoint(folder, STEPS))


@pytest.fixture(scope="module")
def whole(run_alone, tmp_path_factory):
    return run_alone(tmp_path_factory.mktemp("whole") / "run")


@pytest.fixture(scope="module")
def runs(run, tmp_path_factory):
    """Function that returns the run of some ranks and a stage, which is made when first needed."""
    made = {}

    def get(ranks, stage):
        if (ranks, stage) not in made:
            folder = tmp_path_factory.mktemp(f"{ranks}-{stage}") / "run"
            made[ranks, stage] = run(folder, ranks, stage)
        return made[ranks, stage]

    return get


@pytest.mark.parametrize(
    ("ranks", "stage"),
    [
        *((2, stage) for stage in (3, "fsdp")),
        *(slow(2, stage) for stage in (0, 1, 2)),
        *(slow(1, stage) for stage in STAGES),
        *(slow(4, stage) for stage in STAGES),
    ],
)
def test_ranks_equal_one_process(whole, runs, ranks, stage):
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
    [slow("hyena", 3), slow("attention", 3), slow("hyena", 1), slow("hyena", "fsdp")],
)
def test_other_mixers_equal_one_process(run, run_alone, tmp_path, layout, stage):
    # At the rate of the others, eight steps would take the weights of Hyena's filters to four times
    # their size, and the differences of rounding with them.
    more = "--model.optimizer.learning_rate=1e-3", f"--model.config.layout={layout}"
    alone = run_alone(tmp_path / "alone", *more)
    assert_close(end(run(tmp_path / "run", 2, stage, *more)), end(alone))


@pytest.mark.parametrize(
    ("saved", "resumed"),
    [
        slow((2, 3), (1, None)),
        ((1, None), (2, 3)),
        slow((2, "fsdp"), (1, None)),
        ((2, 3), (2, "fsdp")),
        slow((2, 2), (1, 3)),
        slow((1, None), (4, "fsdp")),
    ],
)
def test_other_ranks_and_stages_continue_a_run(run, whole, runs, tmp_path, saved, resumed):
    source = whole if saved[1] is None else runs(*saved)
    folder = run(tmp_path / "run", *resumed, f"--resume={checkpoint(source, SAVED)}")
    assert_close(end(folder), end(whole))
    expected = {step: loss for step, loss in losses(whole).items() if step > SAVED}
    assert losses(folder) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("stage", [slow(stage) for stage in (None, 1, 3, "fsdp")])
def test_documents_apart_and_packed_equal_one_process(run, run_alone, tmp_path, stage):
    """Though ranks have other numbers of targets that count."""
    more = "--data.documents=apart", "--data.packing=best_fit", "--data.seq_len=24"
    alone, folder = run_alone(tmp_path / "alone", *more), run(tmp_path / "run", 2, stage, *more)
    assert_close(end(folder), end(alone))
    for name in ("train/loss", "train/grad_norm", "val/bits_per_byte"):
        expected, actual = report.read_curves(alone)[name], report.read_curves(folder)[name]
        assert actual[1] == pytest.approx(expected[1], rel=1e-5, abs=1e-9)


@pytest.mark.parametrize("stage", [*map(slow, (None, 0, 1, 2, 3, "fsdp"))])
def test_lion_trains_and_resumes_bit_for_bit(run, run_alone, tmp_path, stage):
    """Ranks nearly agree with one process: rounding changes the signs of few gradients near 0."""
    more = "--model.optimizer.learning_rate=3e-4", "--model.optimizer.name=lion"
    expected = end(run_alone(tmp_path / "alone", *more))
    ranks = 1 if stage is None else 2
    whole = run(tmp_path / "whole", ranks, stage, *more)
    saved = end(whole)
    weights, expected_weights = (
        torch.cat([weight.flatten() for weight in state["state_dict"].values()])
        for state in (saved, expected)
    )
    assert ((weights - expected_weights).abs() > 1e-5).float().mean() < 0.002
    resumed = run(tmp_path / "resumed", ranks, stage, *more, f"--resume={checkpoint(whole, SAVED)}")
    assert_same_state(end(resumed), saved)
    for state in saved["optimizer_states"][0]["state"].values():
        assert state.keys() == {"step", "exp_avg"}


@pytest.mark.parametrize("stage", [1, slow(None), slow("fsdp")])
def test_smaller_micro_batches_continue_a_run(run, whole, tmp_path, stage):
    """A step has more of them, and the same samples."""
    more = "--trainer.accumulate_grad_batches=4", f"--data.micro_batch_size={SAMPLES // 4}"
    folder = run(tmp_path / "run", 1, stage, *more, f"--resume={checkpoint(whole, SAVED)}")
    assert_close(end(folder), end(whole))
    assert list(losses(folder)) == list(range(SAVED + 1, STEPS + 1))


@pytest.mark.slow
@pytest.mark.parametrize("resumed", STAGES)
@pytest.mark.parametrize("saved", STAGES)
def test_every_stage_continues_every_other_on_more_and_fewer_ranks(
    run, whole, runs, tmp_path, saved, resumed
):
    for before, after in ((2, 4), (4, 2)):
        source = checkpoint(runs(before, saved), SAVED)
        folder = run(tmp_path / f"{after}", after, resumed, f"--resume={source}")
        assert_close(end(folder), end(whole))


CHECKS_TYPES = """
import sys
import torch
from stu import mixers
from train import cli
causal_convolution, convolved = mixers.causal_convolution, set()
def recording_convolution(inputs, taps, *others):
    convolved.add((inputs.dtype, taps.dtype))
    return causal_convolution(inputs, taps, *others)
mixers.causal_convolution = recording_convolution
rfft, transformed = torch.fft.rfft, set()
def recording_rfft(tensor, *arguments, **settings):
    transformed.add(tensor.dtype)
    return rfft(tensor, *arguments, **settings)
torch.fft.rfft = recording_rfft
code = cli.main(sys.argv[1:])
assert convolved == {(torch.bfloat16, torch.float32)}, convolved
assert transformed == {torch.float32}, transformed
sys.exit(code)
"""


@pytest.mark.parametrize("stage", [3, *map(slow, (1, 2, "fsdp"))])
def test_filters_and_ffts_are_float32_in_bfloat16_training(run, whole, tmp_path, stage):
    script = tmp_path / "train.py"
    script.write_text(CHECKS_TYPES)
    half, command = "--trainer.precision=bf16-mixed", [forked.python(), script]
    folder = run(tmp_path / "run", 2, stage, half, command=command)
    saved = end(folder)
    assert {weight.dtype for weight in saved["state_dict"].values()} == {torch.float32}
    filters = end(whole)["state_dict"]["model.filters"]
    assert torch.equal(saved["state_dict"]["model.filters"], filters)
    assert losses(folder) == pytest.approx(losses(whole), rel=0.02)
    # It continues from the float32 weights, not from those that it computes with.
    source = checkpoint(folder, SAVED)
    resumed = run(tmp_path / "resumed", 2, stage, half, f"--resume={source}")
    assert_close(end(resumed), saved)


SEES_A_GPU = """
import sys
import torch
from train import cli
torch.cuda.is_available, torch.cuda.device_count = lambda: True, lambda: 1
code = cli.main(sys.argv[1:])
from deepspeed.accelerator import get_accelerator
assert get_accelerator().device_name() == "cpu"
sys.exit(code)
"""


@pytest.mark.parametrize(("accelerator", "found"), [("cpu", "cpu"), ("gpu", None)])
def test_deepspeed_is_told_of_the_cpu_before_it_is_imported(monkeypatch, accelerator, found):
    def strategy(*_):
        return os.environ.get("DS_ACCELERATOR")

    monkeypatch.setitem(sys.modules, "train.parallel.zero", SimpleNamespace(ZeroStrategy=strategy))
    monkeypatch.setenv("DS_ACCELERATOR", "")  # is put back afterwards
    monkeypatch.delenv("DS_ACCELERATOR")
    assert make_strategy(ParallelConfig(kind="zero"), None, accelerator) == found


@pytest.mark.slow
def test_a_run_on_the_cpu_leaves_a_gpu_alone(run, whole, tmp_path):
    # A process that is forked has imported DeepSpeed.
    folder = run(tmp_path / "run", 1, 2, command=[sys.executable, "-c", SEES_A_GPU])
    assert_close(end(folder), end(whole))


FUSES_FLAT_TENSORS = """
import sys
from train import cli
from train.optimizer import adamw
adamw.is_fused = lambda tensors: all(tensor.dim() == 1 for tensor in tensors)
sys.exit(cli.main(sys.argv[1:]))
"""
"""On a CPU. Tensors that DeepSpeed updates are flat; parameters, with which an optimizer is made,
are not."""


@pytest.mark.parametrize(
    ("stage", "optimizer"), [(1, "adamw"), slow(2, "adamw"), slow(3, "adamw"), slow(1, "muon")]
)
def test_adamw_is_fused_if_the_tensors_that_it_updates_are_on_gpus(
    run, whole, tmp_path, stage, optimizer
):
    script = tmp_path / "train.py"
    script.write_text(FUSES_FLAT_TENSORS)
    name = f"--model.optimizer.name={optimizer}"
    source = whole if optimizer == "adamw" else run(tmp_path / "source", 2, stage, name)
    command = [forked.python(), script]
    resume = f"--resume={checkpoint(source, SAVED)}"
    folder = run(tmp_path / "run", 2, stage, name, resume, command=command)
    groups = CheckpointFolder(checkpoint(folder, STEPS)).training["optimizer_groups"]
    assert {group["fused"] for group in groups} == {True}
    weights = end(folder)["state_dict"]
    for name, weight in end(source)["state_dict"].items():
        torch.testing.assert_close(weights[name], weight, rtol=0, atol=1e-5)


@pytest.mark.parametrize("ranks", [1, slow(2)])
def test_filters_of_a_checkpoint_are_used(run, whole, tmp_path, ranks):
    """Filters that are computed again might be rounded differently on another machine."""
    source = shutil.copytree(checkpoint(whole, SAVED), tmp_path / "changed.ckpt")
    file, sums = source / "rank-00000.safetensors", source / "SHA256SUMS"
    tensors = load_file(file)
    tensors["weight/filters"] *= 1.5
    before = hashlib.sha256(file.read_bytes()).hexdigest()
    save_file(tensors, file)
    now = hashlib.sha256(file.read_bytes()).hexdigest()
    sums.write_text(sums.read_text().replace(before, now))
    steps = f"--trainer.max_steps={SAVED + 1}", "--trainer.limit_val_batches=0"
    folder = run(tmp_path / "run", ranks, 2, f"--resume={source}", *steps)
    assert torch.equal(
        load_checkpoint(checkpoint(folder, SAVED + 1))["state_dict"]["model.filters"],
        tensors["weight/filters"],
    )


@pytest.mark.parametrize(
    ("stage", "names"),
    [
        (2, ["checkpoint_activations", "offload_optimizer"]),
        slow(2, ["checkpoint_activations"]),
        slow("fsdp", ["checkpoint_activations"]),
        slow(2, ["offload_optimizer"]),
    ],
)
def test_saving_memory_changes_no_result(run, whole, tmp_path, stage, names):
    folder = run(tmp_path / "run", 2, stage, *(f"--parallel.{name}=true" for name in names))
    assert_close(end(folder), end(whole))


@pytest.mark.slow
@pytest.mark.parametrize("stage", [None, 2, 3, "fsdp"])
@pytest.mark.parametrize("recomputes", [False, True])
def test_compiled_blocks_compute_the_same(run, whole, tmp_path, stage, recomputes):
    more = "--parallel.compile=true", f"--parallel.checkpoint_activations={str(recomputes).lower()}"
    assert_close(end(run(tmp_path / "run", 2, stage, *more)), end(whole))
