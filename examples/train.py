"""Prepare text, train a small model on it, and export it: what the commands do, from Python.

python examples/train.py docs /tmp/example
"""

import sys
from pathlib import Path

from train.checkpoint.export import export
from train.data.config import PrepareConfig
from train.data.prepare import prepare
from train.run import run

if __name__ == "__main__":  # preparation starts processes, which import this file
    text, folder = sys.argv[1], Path(sys.argv[2])
    prepare(
        PrepareConfig([text], folder / "data", vocab_size=512, validation_fraction=0.1, workers=1)
    )
    settings = {
        "model.config.width": 64,
        "model.config.num_layers": 2,
        "model.config.max_seq_len": 128,
        "model.config.window_tokens": 32,
        "model.optimizer.warmup_steps": 5,
        "data.dir": folder / "data",
        "data.seq_len": 128,
        "data.micro_batch_size": 4,
        "trainer.accelerator": "cpu",
        "trainer.devices": 1,
        "trainer.max_steps": 20,
        "trainer.val_check_interval": 20,
        "run-dir": folder / "run",
    }
    run([f"--{name}={value}" for name, value in settings.items()])
    export(folder / "run", folder / "model")
    print(f"wrote {folder / 'model'}")
