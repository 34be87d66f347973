"""What a run has saved."""

import torch

from train import report
from train.checkpoint.folder_io import FolderIO
from train.checkpoint.writer import CheckpointWriter


def load_checkpoint(path):
    """Return a whole checkpoint, as Lightning has it."""
    return FolderIO(CheckpointWriter()).load_checkpoint(path)


def checkpoint(run, step):
    """Return the path of a checkpoint."""
    return run / "checkpoints" / f"step-{step:08d}.ckpt"


def last_checkpoint(run):
    return load_checkpoint(run / "checkpoints" / "last.ckpt")


def losses(run):
    """Return the logged losses by step."""
    steps, values = report.read_curves(run)["train/loss"]
    return dict(zip(steps, values, strict=True))


def assert_same_state(actual, expected):
    """Compare two checkpoints: step, position in the data, weights and the optimizer's state."""
    for name in ("global_step", "optimizer_step", "TokenData"):
        assert actual[name] == expected[name], name
    assert actual["state_dict"].keys() == expected["state_dict"].keys()
    for name, weight in expected["state_dict"].items():
        assert torch.equal(actual["state_dict"][name], weight), name
    states = (saved["optimizer_states"][0]["state"] for saved in (actual, expected))
    for state, expected_state in zip(*(by_number.values() for by_number in states), strict=True):
        assert state.keys() == expected_state.keys()
        for name in expected_state:
            assert torch.equal(state[name], expected_state[name]), name


def assert_close(actual, expected):
    """Compare weights and moments, up to the order of float32 sums."""
    assert actual["TokenData"] == expected["TokenData"]
    assert actual["optimizer_step"] == expected["optimizer_step"]
    for name, weight in expected["state_dict"].items():
        torch.testing.assert_close(actual["state_dict"][name], weight, rtol=0, atol=1e-5)
    states = (saved["optimizer_states"][0]["state"] for saved in (actual, expected))
    for state, wanted in zip(*(by_number.values() for by_number in states), strict=True):
        for kind in ("exp_avg", "exp_avg_sq"):
            largest = wanted[kind].abs().max().item()
            torch.testing.assert_close(state[kind], wanted[kind], rtol=0, atol=1e-4 * largest)
