"""What `make docs` writes into the pages: what commands print."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

PRINTED = re.compile(r"^<!-- output of (.+) -->$", re.MULTILINE)


def on_page_markdown(markdown: str, **_: object) -> str:
    """Replace each line `<!-- output of COMMAND -->` with what the command prints."""
    return PRINTED.sub(lambda match: f"```text\n{output_of(match[1])}```", markdown)


def output_of(command: str) -> str:
    """Return what a command of the package prints on lines of 100 characters."""
    program, *arguments = shlex.split(command)
    text = subprocess.run(
        [Path(sys.executable).with_name(program), *arguments],
        check=True,
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | {"COLUMNS": "100"},
    ).stdout
    return re.sub(".\x08", "", text)  # jsonargparse takes a space back on a terminal
