"""Muon, which updates whole matrices, on ranks that hold parts of them."""

import functools

import pytest
import torch

from tests.train.conftest import slow
from tests.train.saved import checkpoint, load_checkpoint

FEW, MANY, SAMPLES = 16, 50, 16
"""Steps of runs in the quick tests and in slow ones; samples of a step."""
STAGES = [None, 0, 1, 2, 3, "fsdp"]


@pytest.fixture(scope="module")
def runs(run, tmp_path_factory):
    """Function that returns the run of some ranks, a stage, a number of micro-batches and of steps,
    which is made when first needed."""
    made = {}

    def get(ranks, stage, accumulated, steps):
        key = ranks, stage, accumulated, steps
        if key not in made:
            folder = tmp_path_factory.mktemp("-".join(map(str, key))) / "run"
            made[key] = run(folder, ranks, stage, *settings(ranks, accumulated, steps))
        return made[key]

    return get


def settings(ranks, accumulated, steps=MANY):
    values = {
        "model.optimizer.name": "muon",
        "model.optimizer.learning_rate": 5e-3,
        "trainer.accumulate_grad_batches": accumulated,
        "data.micro_batch_size": SAMPLES // (ranks * accumulated),
        "trainer.max_steps": steps,
        "trainer.limit_val_batches": 0,
        "checkpoint-every-steps": steps // 2,
    }
    return [f"--{name}={value}" for name, value in values.items()]


@pytest.fixture(scope="module")
def whole(run_alone, tmp_path_factory):
    """Function that returns the run of one process with a number of steps."""

    @functools.cache
    def get(steps):
        return run_alone(tmp_path_factory.mktemp("whole") / "run", *settings(1, 1, steps))

    return get


def assert_equal_end(folder, whole, steps=MANY):
    """Compare weights after the last step, up to the order of float32 sums."""
    actual, expected = (load_checkpoint(checkpoint(path, steps)) for path in (folder, whole))
    assert actual["optimizer_step"] == expected["optimizer_step"] == steps
    ours, theirs = (
        torch.cat([state["state_dict"][name].flatten() for name in expected["state_dict"]])
        for state in (actual, expected)
    )
    largest = (ours - theirs).abs().max().item()
    print(f"{folder.parent.name}: largest difference of a weight {largest:.1e}")
    assert largest <= 1e-5


@pytest.mark.parametrize(
    ("ranks", "stage", "accumulated", "steps"),
    [
        (2, 2, 1, FEW),
        *(
            slow(ranks, stage, accumulated, MANY)
            for ranks in (1, 2, 4)
            for stage in STAGES
            for accumulated in (1, 4)
        ),
    ],
)
def test_ranks_equal_one_process(whole, runs, ranks, stage, accumulated, steps):
    assert_equal_end(runs(ranks, stage, accumulated, steps), whole(steps), steps)


@pytest.mark.parametrize(
    ("saved", "resumed", "steps"),
    [
        ((2, 2, 1), (2, "fsdp", 2), FEW),
        slow((2, 2, 1), (1, None, 1), MANY),
        *(slow((2, STAGES[i - 1], 4), (4, STAGES[i], 1), MANY) for i in range(len(STAGES))),
        *(slow((4, STAGES[i - 2], 1), (2, STAGES[i], 4), MANY) for i in range(len(STAGES))),
    ],
)
def test_other_ranks_and_stages_continue_a_run(run, whole, runs, tmp_path, saved, resumed, steps):
    ranks, stage, accumulated = resumed
    begun = checkpoint(runs(*saved, steps), steps // 2)
    more = *settings(ranks, accumulated, steps), f"--resume={begun}"
    assert_equal_end(run(tmp_path / "run", ranks, stage, *more), whole(steps), steps)


@pytest.mark.slow
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_state_on_the_cpu_changes_no_result(run, whole, tmp_path, stage):
    more = *settings(2, 1), "--parallel.offload_optimizer=true"
    assert_equal_end(run(tmp_path / "run", 2, stage, *more), whole(MANY))


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["hyena", "attention", "stu"])
def test_matrices_of_all_mixers_equal_one_process(run, run_alone, tmp_path, layout):
    shape = f"--model.config.layout={layout}", "--model.config.stu_form=full"
    rate = "--model.optimizer.learning_rate=1e-3"
    whole = run_alone(tmp_path / "whole", *settings(1, 1), *shape, rate)
    for stage in (1, 3, "fsdp"):
        folder = tmp_path / str(stage) / "run"
        assert_equal_end(run(folder, 4, stage, *settings(4, 1), *shape, rate), whole)
