"""Muon, which updates whole matrices, on ranks that hold parts of them."""

import pytest
import torch

from tests.train.conftest import slow
from tests.train.saved import checkpoint, load_checkpoint

STEPS, SAVED, SAMPLES = 16, 8, 16
STAGES = [None, 0, 1, 2, 3, "fsdp"]


@pytest.fixture(scope="module")
def runs(run, tmp_path_factory):
    """Function that returns the run of some ranks, a stage and a number of micro-batches, which is
    made when first needed."""
    made = {}

    def get(ranks, stage, accumulated):
        key = ranks, stage, accumulated
        if key not in made:
            folder = tmp_path_factory.mktemp("-".join(map(str, key))) / "run"
            made[key] = run(folder, ranks, stage, *settings(ranks, accumulated))
        return made[key]

    return get


def settings(ranks, accumulated):
    values = {
        "model.optimizer.name": "muon",
        "model.optimizer.learning_rate": 5e-3,
        "trainer.accumulate_grad_batches": accumulated,
        "data.micro_batch_size": SAMPLES // (ranks * accumulated),
        "trainer.max_steps": STEPS,
        "trainer.limit_val_batches": 0,
        "checkpoint-every-steps": SAVED,
    }
    return [f"--{name}={value}" for name, value in values.items()]


@pytest.fixture(scope="module")
def whole(run_alone, tmp_path_factory):
    return run_alone(tmp_path_factory.mktemp("whole") / "run", *settings(1, 1))


def assert_equal_end(folder, whole):
    """Compare weights after the last step, up to the order of float32 sums."""
    actual, expected = (load_checkpoint(checkpoint(path, STEPS)) for path in (folder, whole))
    assert actual["optimizer_step"] == expected["optimizer_step"] == STEPS
    ours, theirs = (
        torch.cat([state["state_dict"][name].flatten() for name in expected["state_dict"]])
        for state in (actual, expected)
    )
    largest = (ours - theirs).abs().max().item()
    print(f"{folder.parent.name}: largest difference of a weight {largest:.1e}")
    assert largest <= 1e-5


@pytest.mark.parametrize(
    ("ranks", "stage", "accumulated"),
    [
        (2, 2, 1),
        *(
            slow(ranks, stage, accumulated)
            for ranks in (1, 2, 4)
            for stage in STAGES
            for accumulated in (1, 4)
            if (ranks, stage, accumulated) != (2, 2, 1)
        ),
    ],
)
def test_ranks_equal_one_process(whole, runs, ranks, stage, accumulated):
    assert_equal_end(runs(ranks, stage, accumulated), whole)


@pytest.mark.parametrize(
    ("saved", "resumed"),
    [
        ((2, 2, 1), (2, "fsdp", 2)),
        slow((2, 2, 1), (1, None, 1)),
        *(slow((2, STAGES[i - 1], 4), (4, STAGES[i], 1)) for i in range(len(STAGES))),
        *(slow((4, STAGES[i - 2], 1), (2, STAGES[i], 4)) for i in range(len(STAGES))),
    ],
)
def test_other_ranks_and_stages_continue_a_run(run, whole, runs, tmp_path, saved, resumed):
    ranks, stage, accumulated = resumed
    more = *settings(ranks, accumulated), f"--resume={checkpoint(runs(*saved), SAVED)}"
    assert_equal_end(run(tmp_path / "run", ranks, stage, *more), whole)


@pytest.mark.slow
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_state_on_the_cpu_changes_no_result(run, whole, tmp_path, stage):
    more = *settings(2, 1), "--parallel.offload_optimizer=true"
    assert_equal_end(run(tmp_path / "run", 2, stage, *more), whole)


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["hyena", "attention", "stu"])
def test_matrices_of_all_mixers_equal_one_process(run, run_alone, tmp_path, layout):
    shape = f"--model.config.layout={layout}", "--model.config.stu_form=full"
    rate = "--model.optimizer.learning_rate=1e-3"
    whole = run_alone(tmp_path / "whole", *settings(1, 1), *shape, rate)
    for stage in (1, 3, "fsdp"):
        folder = tmp_path / str(stage) / "run"
        assert_equal_end(run(folder, 4, stage, *settings(4, 1), *shape, rate), whole)
