"""Parts of the pages that `make docs` writes: what commands print, and examples."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

PRINTED = re.compile(r"^<!-- output of (.+) -->$", re.MULTILINE)
WRITTEN = re.compile(r"^<!-- text of (.+\.py) -->$", re.MULTILINE)
ROOT = Path(__file__).parents[1]


def on_page_markdown(markdown: str, **_: object) -> str:
    """Replace each line `<!-- output of COMMAND -->` with what the command prints, and each line
    `<!-- text of FILE -->` with the file."""

    def text_of(match: re.Match[str]) -> str:
        return f"```python\n{(ROOT / match[1]).read_text(encoding='utf-8')}```"

    printed = PRINTED.sub(lambda match: f"```text\n{output_of(match[1])}```", markdown)
    return WRITTEN.sub(text_of, printed)


def output_of(command: str) -> str:
    """Return what a command of the package prints on lines of 80 characters."""
    program, *arguments = shlex.split(command)
    text = subprocess.run(
        [Path(sys.executable).with_name(program), *arguments],
        check=True,
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | {"COLUMNS": "80"},
    ).stdout
    return re.sub(".\x08", "", text)  # jsonargparse takes a space back on a terminal
