"""Settings of all tests."""

import os
import signal

import pytest
import torch

from stu.layouts import LAYOUTS, MIXERS
from stu.tokenizers.sentence_piece import train_bpe
from tests import forked

torch.set_num_threads(1)  # such small tensors are slower on more
# Workers ignore Ctrl-C, and so would every process that a test starts.
signal.signal(signal.SIGINT, signal.default_int_handler)

LONGEST = ["test_train_job.py", "test_zero.py", "test_resume.py", "test_server_faults.py"]
"""Files that take longest, which begin first."""


def pytest_configure(config):
    if not hasattr(config, "workerinput"):  # workers use the folder of their controller
        forked.make_folder()


def pytest_unconfigure(config):
    if not hasattr(config, "workerinput"):
        forked.remove_folder()


def pytest_collection_modifyitems(items):
    """Put the tests of the longest files first, and keep the order of the others."""
    order = {name: place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: order.get(item.path.name, len(order)))


def of_this_process():
    """Settings of the process that a test could change for those after it."""
    return {
        "mixers": dict(MIXERS),
        "layouts": dict(LAYOUTS),
        "folder": os.getcwd(),
        "threads": torch.get_num_threads(),
        "dtype": torch.get_default_dtype(),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "gradients": torch.is_grad_enabled(),
        "process group": torch.distributed.is_initialized(),
        "ranks": {name: os.environ.get(name) for name in ("MASTER_PORT", "RANK", "WORLD_SIZE")},
    }


@pytest.fixture(autouse=True)
def nothing_is_left_behind():
    before = of_this_process()
    yield
    assert of_this_process() == before


@pytest.fixture
def folder_of_namesakes(tmp_path, monkeypatch):
    """Change to a folder with modules named as the packages, which must not be imported."""
    folder = tmp_path / "namesakes"
    folder.mkdir()
    for name in ("stu", "train", "serve"):
        (folder / f"{name}.py").write_text("raise SystemExit(f'{__file__} was imported')")
    monkeypatch.chdir(folder)
    return folder


@pytest.fixture(scope="session")
def code_tokenizer(tmp_path_factory):
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.model"
    return train_bpe(["def f(x):\n\treturn x + 1\n" * 20], 280, path)
