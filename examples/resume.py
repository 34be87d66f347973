"""Continue the run of examples/train.py to 30 steps, from its last checkpoint.

python examples/resume.py /tmp/example
"""

import sys
from pathlib import Path

from train.report import read_curves
from train.run import run

folder = Path(sys.argv[1])
# A run records its settings; give them again, followed by those that change.
run(
    [
        *("--config", str(folder / "run" / "config.yaml")),
        *("--trainer.max_steps", "30", "--resume", "last"),
    ]
)
steps, losses = read_curves(folder / "run")["train/loss"]
print(f"step {steps[-1]}: loss {losses[-1]:.2f}")
