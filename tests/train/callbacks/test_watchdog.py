"""A run that hangs, and one that does not."""

import json
import os
import re
import subprocess
import time
from pathlib import Path

from tests import forked
from train import cli

HANGS = """
import sys, time
from train import cli
from train import module
real, calls = module.next_token_loss, 0
def next_token_loss(*arguments):
    global calls
    calls += 1
    from torch import distributed
    if calls == 4 and distributed.get_rank() == 1:
        waits_for_what_never_comes()
    return real(*arguments)
def waits_for_what_never_comes():
    time.sleep(600)
module.next_token_loss = next_token_loss
sys.exit(cli.main(sys.argv[1:]))
"""


def test_where_one_rank_hangs_all_end_and_tell(settings, tmp_path):
    script = tmp_path / "hangs.py"
    script.write_text(HANGS)
    run_dir = tmp_path / "run"
    more = ["--trainer.devices=2", "--trainer.max_steps=9", "--hang-minutes=0.1"]
    command = [forked.python(), script, *settings, *more, f"--run-dir={run_dir}"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path.cwd())}
    began = time.monotonic()
    done = subprocess.run(command, capture_output=True, text=True, timeout=200, env=environment)
    assert done.returncode != 0
    assert time.monotonic() - began < 120
    assert re.search(r"rank \d on \S+ has done nothing for 0.1 minutes", done.stderr)
    stacks = [path.read_text() for path in (run_dir / "stacks").iterdir()]
    assert any("waits_for_what_never_comes" in its or "backward" in its for its in stacks)


def test_a_heartbeat(settings, tmp_path):
    before = time.time()
    arguments = [*settings, f"--run-dir={tmp_path / 'run'}", "--trainer.max_steps=3"]
    assert cli.main(arguments) == 0
    beat = json.loads((tmp_path / "run" / "heartbeat.json").read_text())
    assert beat["step"] == 1
    assert before < beat["time"] < time.time()
    assert beat["pid"] == os.getpid()
