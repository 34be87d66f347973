"""The watchdog ends a run that hangs, and writes the heartbeat of one that does not."""

import json
import os
import re
import time
from pathlib import Path

from tests import forked

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
        wait_for_nothing()
    return real(*arguments)
def wait_for_nothing():
    time.sleep(600)
module.next_token_loss = next_token_loss
sys.exit(cli.main(sys.argv[1:]))
"""


def test_all_ranks_end_if_one_hangs(settings, tmp_path):
    script = tmp_path / "hangs.py"
    script.write_text(HANGS)
    run_dir = tmp_path / "run"
    more = ["--trainer.devices=2", "--trainer.max_steps=9", "--hang-minutes=0.1"]
    command = [forked.python(), script, *settings, *more, f"--run-dir={run_dir}"]
    began = time.monotonic()
    done = forked.run(*command, PYTHONPATH=str(Path.cwd()))
    assert done.returncode != 0
    assert time.monotonic() - began < 120
    assert re.search(r"rank \d on \S+ has done nothing for 0.1 minutes", done.stderr)
    stacks = [path.read_text() for path in (run_dir / "stacks").iterdir()]
    assert any("wait_for_nothing" in stack or "backward" in stack for stack in stacks)


def test_heartbeat(trained):
    beat = json.loads((trained / "heartbeat.json").read_text())
    assert 1 <= beat["step"] <= 12
    assert 0 < time.time() - beat["time"] < 3600
    assert beat["pid"] == os.getpid()
