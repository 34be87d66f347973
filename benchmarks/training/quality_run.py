"""One training run of `python -m benchmarks quality`, in a process of its own.

    python -m benchmarks.training.quality_run RUN DATA FOLDER

RUN is the `Run` as JSON. stu-train trains in FOLDER; the last line on standard output is the
result.
"""

import dataclasses
import hashlib
import json
import shutil
import sys
from contextlib import redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from benchmarks.peers.rope_attention import RopeAttention
from stu.config import ModelConfig
from stu.layouts import MIXERS, register_mixer
from stu.model import FlashSTU
from stu.model_dir import load_model
from train import cli
from train.checkpoint.export import export
from train.data.shards import TokenShards
from train.report import read_curves

VOCAB_SIZE, NUM_LAYERS, NUM_HEADS = 2048, 6, 4
STU_WIDTH, STU_MLP_RATIO = 128, 4
TOKENS_PER_STEP = 4096
LEAST_WINDOW = 128
VALIDATION_TOKENS = 262_144


@dataclass(frozen=True)
class Run:
    """Settings of a run."""

    text: str
    """Text that is learned: `code` or `prose`."""
    context: int
    """Tokens of a sample."""
    layout: str
    """Mixers of the model; `rope` is the peer."""
    optimizer: str
    learning_rate: float
    seed: int
    tokens: int
    """Tokens to train on."""

    @property
    def name(self) -> str:
        """A name for files."""
        return "-".join(str(value) for value in dataclasses.astuple(self))


def register_peer() -> None:
    """Make the layout `rope` known in this process."""
    if "rope" not in MIXERS:
        register_mixer("rope", RopeAttention)


def sized(layout: str, context: int) -> ModelConfig:
    """Return the configuration of a layout whose number of weights is nearest to the STU's."""

    def config(name: str, width: int, mlp_ratio: int) -> ModelConfig:
        return ModelConfig(
            VOCAB_SIZE,
            width=width,
            num_layers=NUM_LAYERS,
            layout=name,
            max_seq_len=context,
            mlp_ratio=mlp_ratio,
            num_heads=NUM_HEADS,
            window_tokens=max(LEAST_WINDOW, context // 4),
        )

    def weights(config: ModelConfig) -> int:
        with torch.device("meta"):
            return FlashSTU(config).num_parameters()

    goal = weights(config("stu", STU_WIDTH, STU_MLP_RATIO))
    tried = [config(layout, width, ratio) for width in range(96, 161, 8) for ratio in (3, 4)]
    return min(tried, key=lambda one: abs(weights(one) - goal))


def train(run: Run, data: Path, folder: Path) -> dict[str, Any]:
    """Train, and return the result. What the run wrote is deleted, also that of an earlier one that
    was interrupted."""
    shutil.rmtree(folder, ignore_errors=True)
    register_peer()
    config = sized(run.layout, run.context)
    steps = run.tokens // TOKENS_PER_STEP
    settings: dict[str, Any] = {f"model.config.{key}": v for key, v in config.to_dict().items()}
    settings |= {
        "data.dir": data,
        "data.seq_len": run.context,
        "data.micro_batch_size": TOKENS_PER_STEP // run.context,
        "data.seed": run.seed,
        "data.max_validation_tokens": VALIDATION_TOKENS,
        "seed-everything": run.seed,
        "model.optimizer.name": run.optimizer,
        "model.optimizer.learning_rate": run.learning_rate,
        "model.optimizer.warmup_steps": max(1, steps // 10),
        "model.optimizer.final_lr_fraction": 0.05,
        "trainer.accelerator": "cpu",
        "trainer.devices": 1,
        "trainer.precision": "bf16-mixed",
        "trainer.max_steps": steps,
        "trainer.val_check_interval": steps,
        "trainer.num_sanity_val_steps": 0,
        "trainer.log_every_n_steps": 10,
        "run-dir": folder,
    }
    if code := cli.main([f"--{key}={value}" for key, value in settings.items()]):
        raise RuntimeError(f"{run.name} ended with code {code}")
    curves = read_curves(folder)
    export(folder, folder / "model", "float32", overwrite=False)
    model = load_model(folder / "model")
    result = dataclasses.asdict(run) | {
        "data": digest(data),
        "parameters": model.num_parameters(),
        "bits_per_byte": curves["val/bits_per_byte"][1][-1],
        "loss": curves["val/loss"][1][-1],
        "loss_by_position": losses_by_position(model, data, run.context),
    }
    shutil.rmtree(folder)
    return result


def digest(data: Path) -> str:
    """Return a hash of the tokens of prepared data."""
    hashed = hashlib.sha256()
    for path in sorted(data.glob("*.bin")):
        hashed.update(path.read_bytes())
    return hashed.hexdigest()[:16]


@torch.inference_mode()
def losses_by_position(model: FlashSTU, data: Path, context: int) -> dict[int, float]:
    """Return the mean nats of targets with 1, 2 to 3, 4 to 7, .. tokens before them, by the first
    number. Sums are in float64."""
    shards = TokenShards(data, "validation")
    count = min(VALIDATION_TOKENS, len(shards) - 1) // context
    nats = np.zeros(context)
    for number in range(count):
        tokens = torch.from_numpy(shards.read(number * context, (number + 1) * context + 1))
        logits: Tensor = model(tokens[None, :-1])[0]
        nats += cross_entropy(logits, tokens[1:], reduction="none").double().numpy()
    groups = np.log2(np.arange(1, context + 1)).astype(int)
    return {2 ** int(group): nats[groups == group].mean() / count for group in np.unique(groups)}


if __name__ == "__main__":
    torch.set_num_threads(1)
    with redirect_stdout(sys.stderr):
        made = train(Run(**json.loads(sys.argv[1])), Path(sys.argv[2]), Path(sys.argv[3]))
    print(json.dumps(made))
