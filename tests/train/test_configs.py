"""The configuration files: published sizes, and runs that refer to them."""

from pathlib import Path

import pytest
import torch
import yaml

from stu.config import ModelConfig
from stu.model import FlashSTU

CONFIGS = Path(__file__).parents[2] / "configs"
MILLIONS = {
    "stu-515m": 515.46,
    "stu-670m": 670.75,
    "stu-826m": 826.05,
    "hybrid-689m": 689.48,
    "hybrid-550m": 550.31,
    "hybrid-2.7b": 2669.5,
    # Not published; shapes between and beyond.
    "hybrid-340m": 335.40,
    "hybrid-7b": 7073.3,
    "hybrid-13b": 12969.3,
}


@pytest.mark.parametrize("name", MILLIONS)
def test_parameter_counts(name):
    config = yaml.safe_load((CONFIGS / "model" / f"{name}.yaml").read_text())
    with torch.device("meta"):
        model = FlashSTU(ModelConfig.from_dict(config))
    digits = len(str(MILLIONS[name]).split(".")[1])
    assert round(model.num_parameters() / 1e6, digits) == MILLIONS[name]


def test_every_size_is_tested():
    files = {file.stem for file in (CONFIGS / "model").glob("*.yaml")}
    assert files == {*MILLIONS, "demo"}


@pytest.mark.parametrize("file", sorted((CONFIGS / "train").glob("*.yaml")), ids=lambda f: f.stem)
def test_training_configurations_are_valid(file, capsys):
    from train import cli

    with pytest.raises(SystemExit) as stop:
        cli.main(["--config", str(file), "--data.dir", "somewhere", "--print-config"])
    assert stop.value.code == 0
    printed = yaml.safe_load(capsys.readouterr().out)
    shape = yaml.safe_load(file.read_text())["model"]["config"]
    expected = yaml.safe_load((file.parent / shape).read_text())
    assert expected.items() <= printed["model"]["config"].items()
