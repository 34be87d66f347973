"""Check and measure stu on a GPU.

Parts run one after the other, each in a process of its own with a limit of time. After each of
them all figures so far are written as JSON; what fails leaves its traceback there.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.recorded import ROOT, Columns, Run, table
from stu.common.files import new_file


class Part(NamedTuple):
    """A part of the check."""

    measures: str
    """Its measures, `MODULE.FUNCTION`."""
    share: int
    """Its share of the time: seconds, if all parts run and take what they may."""
    does: str


PARTS = {
    "kernels": Part("correctness.kernel_measures", 60, "tests of kernels"),
    "captured": Part("decoding.captured_measures", 95, "captured steps at 2.7 B and 550 M"),
    "correctness": Part("correctness.cuda_measures", 75, "tests of CUDA"),
    "weights": Part("weights.measures", 60, "weights of 8 bits: quality, products, steps"),
    "sync": Part("decoding.sync_measures", 25, "captured steps that may not wait for the GPU"),
    "peer": Part("peer.decode_measures", 50, "steps of Llama-like models of equal size"),
    "training": Part("training.measures", 45, "training steps at 550 M and 2.7 B parameters"),
    "compiled": Part("compiled.measures", 25, "kernels against what torch.compile makes of twins"),
    "prefill": Part("prefill.measures", 25, "a prompt of 8,192 tokens"),
    "eager": Part("decoding.eager_measures", 20, "the same steps, launched from Python"),
}
"""Parts, the most important first. Each is a process of its own, as a fault on the GPU ends all
that a process has there."""
GRACE_SECONDS = 10
"""Time after its limit in which a process has to end by itself."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the parts and print the tables. Return 1 if anything failed, else 0."""
    options = parse(argv)
    result: Run = {"device": options.device, "sizes": options.sizes, "parts": {}}
    end = time.monotonic() + 60 * options.minutes
    for number, name in enumerate(options.only):
        part = PARTS[name]
        shares = sum(PARTS[other].share for other in options.only[number:])
        seconds = int((end - time.monotonic()) * part.share / shares)
        print(f"{name}: {part.does}, at most {seconds} s", file=sys.stderr, flush=True)
        done = run(part, options, seconds) if seconds > 0 else {"error": "no time was left"}
        if machine := done.pop("machine", None):
            result.setdefault("machine", machine)
        result["parts"][name] = done
        with new_file(options.output) as temporary:
            temporary.write_text(json.dumps(result, indent=1), encoding="utf-8")
    print(tables(result))
    failed = [text for part in result["parts"].values() for text in errors(part)]
    print(f"{len(failed)} failures; all figures are in {options.output}", file=sys.stderr)
    return 1 if failed else 0


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu_check", description=__doc__)
    known = "; ".join(f"{name}: {part.does}" for name, part in PARTS.items())
    parser.add_argument("--only", default=",".join(PARTS), help=f"Parts to run. {known}.")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="Device.")
    sizes = "Sizes of models and batches; tiny ones take seconds on a CPU."
    parser.add_argument("--sizes", choices=("full", "tiny"), default="full", help=sizes)
    minutes = "Limit of the whole check. Each part gets a share of what is left."
    parser.add_argument("--minutes", type=float, default=8.0, help=minutes)
    output = "File that all figures are written to."
    parser.add_argument("--output", type=Path, default=Path("gpu-check.json"), help=output)
    options = parser.parse_args(argv)
    options.only = options.only.split(",")
    if unknown := [name for name in options.only if name not in PARTS]:
        parser.error(f"--only: {', '.join(unknown)}: known are {', '.join(PARTS)}")
    return options


def run(part: Part, options: argparse.Namespace, seconds: int) -> dict[str, Any]:
    """Run a part in a process of its own, and return what it wrote."""
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    environment = {**os.environ, "PYTHONPATH": path}
    if options.device == "cpu":
        environment["CUDA_VISIBLE_DEVICES"] = ""
    start = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        file, trace = Path(folder) / "part.json", Path(folder) / "trace"
        where = [str(file), str(trace), str(seconds)]
        command = [sys.executable, "-m", "benchmarks.gpu_check.run_part", part.measures]
        process = subprocess.Popen(
            [*command, options.device, options.sizes, *where],
            env=environment,
            start_new_session=True,
        )
        try:
            process.wait(seconds + GRACE_SECONDS)
        except subprocess.TimeoutExpired:
            pass  # it is killed, and what it has written counts
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)  # with what it may have left behind
            code = process.wait()
        result: dict[str, Any] = {"measures": []}
        if file.exists():
            result = json.loads(file.read_text(encoding="utf-8"))
        if code:
            calls = trace.read_text(encoding="utf-8") if trace.exists() else ""
            result["error"] = f"ended with {code} after {time.monotonic() - start:.0f} s\n{calls}"
    return {**result, "seconds": time.monotonic() - start}


def errors(part: Run) -> list[str]:
    """Return the tracebacks of a part and of its measures."""
    found = [part, *part.get("measures", [])]
    return [own["error"] for own in found if "error" in own]


def tables(result: Run) -> str:
    """Return the figures of all parts, and where something failed the end of its traceback."""
    texts = []
    for name, part in result["parts"].items():
        rows = part.get("measures", [])
        keys = dict.fromkeys(key for row in rows for key in row if key != "setting")
        columns: Columns = {name: lambda row: row["setting"]}
        columns |= {key: partial(shown, key) for key in keys}
        texts.append(table(rows, columns))
        if "error" in part:
            texts.append(f"{name} FAILED: {part['error']}")
    return "\n\n".join(texts)


def shown(key: str, row: Run) -> str:
    """Return a figure of a measure, or nothing."""
    return cell(row.get(key, ""))


def cell(value: Any) -> str:
    """Return a figure with few digits, or the last line of a text."""
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, dict):
        return ", ".join(f"{key} {cell(own)}" for key, own in value.items())
    return f"{value:,}" if isinstance(value, int) else str(value).strip().split("\n")[-1]


if __name__ == "__main__":
    sys.exit(main())
