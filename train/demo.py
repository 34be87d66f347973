"""`make demo`: from real text to a trained model and decoded prompts, in a few minutes on a laptop.

    python -m train.demo [--output runs/demo] [--config configs/train/demo.yaml]

It prints and runs the commands that a user would type, on the sources of Python's standard library.
At the end it shows completions of prompts that are not in the training set, and compares the
model's validation loss with the unigram entropy and with gzip.
"""

import argparse
import json
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

NUM_PROMPTS = 6
PROMPT_LINES = 8


def main(arguments: Sequence[str] | None = None) -> int:
    """Run all commands, and return the exit code of the first one that fails, or 0."""
    parser = argparse.ArgumentParser(
        prog="python -m train.demo", description=__doc__.split("\n")[0]
    )
    parser.add_argument("--output", type=Path, default=Path("runs/demo"), help="Folder to write")
    parser.add_argument(
        "--config", default="configs/train/demo.yaml", help="Settings of the training run"
    )
    options = parser.parse_args(arguments)
    output = options.output
    data, run, model = output / "data", output / "train", output / "model"
    prompts, completions = output / "prompts.jsonl", output / "completions.jsonl"
    start = time.monotonic()
    shutil.rmtree(output, ignore_errors=True)
    try:
        _run("stu-prepare", "stdlib:", "--output", data, "--validation-fraction", "0.02")
        _run("stu-train", "--config", options.config, "--data.dir", data, "--run-dir", run)
        _run("stu-export", run, "--output", model)
        _write_prompts(data, prompts)
        decoding = ["--max-new-tokens", 120, "--temperature", 0.7, "--top-p", 0.9]
        _run("stu-generate", model, "--input", prompts, "--output", completions, *decoding)
    except subprocess.CalledProcessError as error:
        return error.returncode
    _report(data, run, completions)
    print(f"Total: {time.monotonic() - start:.0f} s. Everything is in {output}.")
    return 0


def _run(program: str, *arguments: object) -> None:
    """Run one of the project's commands, of this installation."""
    command = [program, *map(str, arguments)]
    print(f"\n$ {shlex.join(command)}", flush=True)
    subprocess.run([Path(sys.executable).with_name(program), *command[1:]], check=True)


def _write_prompts(data: Path, path: Path) -> None:
    """Write prompts: some lines from the middle of the longest validation documents."""
    from train.report import validation_documents

    longest_first = sorted(validation_documents(data), key=len, reverse=True)
    rows: list[str] = []
    for document in longest_first[:NUM_PROMPTS]:
        lines = document.splitlines(keepends=True)
        middle = len(lines) // 2
        prompt = "".join(lines[middle : middle + PROMPT_LINES]).rstrip("\n")
        rows.append(json.dumps({"id": f"validation-{len(rows)}", "prompt": prompt}))
    path.write_text("\n".join(rows) + "\n", encoding="utf-8")


def _report(data: Path, run: Path, completions: Path) -> None:
    from rich.console import Console
    from rich.panel import Panel
    from rich.table import Table
    from rich.text import Text

    from train import report
    from train.data.shards import TokenShards

    console = Console()
    for line in completions.read_text(encoding="utf-8").split("\n")[:-1]:
        row = json.loads(line)
        text = Text(row["prompt"], style="dim") + Text(row["completion"], style="bold")
        console.print(Panel(text, title=row["id"], title_align="left"))
    curves = report.read_curves(run)
    baselines = {
        "unigram entropy": report.unigram_bits_per_byte(data),
        "gzip -9": report.gzip_bits_per_byte(data),
    }
    split = TokenShards(data, "train").split
    picture = run.parent / "loss.png"
    report.plot_bits_per_byte(curves, split.num_bytes / split.num_tokens, baselines, picture)
    table = Table(title="Validation text, bits per byte")
    table.add_column("")
    table.add_column("bits per byte", justify="right")
    table.add_row("this model", f"{curves['val/bits_per_byte'][1][-1]:.3f}")
    for name, value in baselines.items():
        table.add_row(name, f"{value:.3f}")
    console.print(table)
    tokens_per_second = curves["train/tokens_per_second"][1]
    console.print(
        f"Training: {sorted(tokens_per_second)[len(tokens_per_second) // 2]:,.0f} tokens/s"
    )
    console.print(f"Loss curve: {picture}")
    console.print(f"TensorBoard: .venv/bin/tensorboard --logdir {run}")


if __name__ == "__main__":
    sys.exit(main())
