"""Child processes."""

import subprocess
import sys

import pytest

from stu.common.processes import child_command


@pytest.mark.parametrize("version", [(3, 10), (3, 11)])
def test_a_child_imports_nothing_from_the_current_folder(version, tmp_path, monkeypatch):
    if version > sys.version_info:
        pytest.skip("this Python has no -P")
    monkeypatch.setattr(sys, "version_info", version)
    (tmp_path / "calendar.py").write_text("raise SystemExit('the wrong one')")
    command = child_command("calendar", "2024", "2")
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "February 2024" in done.stdout
