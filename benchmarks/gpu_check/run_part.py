"""One part of the check, in a process of its own. Figures are written as soon as they are there."""

import faulthandler
import importlib
import json
import sys
import time
import traceback
from pathlib import Path
from typing import Any

from stu.common.files import new_file


def main(function: str, device: str, sizes: str, file: str, trace: str, seconds: str) -> int:
    """Run the measures of `function`, given as MODULE.FUNCTION, and write them to `file`.

    After `seconds` the process ends, with the calls that it was in written to `trace`.
    """
    with open(trace, "w", encoding="utf-8") as where:
        faulthandler.dump_traceback_later(float(seconds), exit=True, file=where)
        result: dict[str, Any] = {"measures": []}
        module, name = function.split(".")
        try:
            from benchmarks.gpu_check.sizes import SIZES  # a package may be missing
            from benchmarks.machine import describe

            result["machine"] = describe()
            write(Path(file), result)
            measures = getattr(importlib.import_module(f"benchmarks.gpu_check.{module}"), name)
            for setting, measure in measures(device, SIZES[sizes]()):
                result["measures"].append({"setting": setting, **measured(setting, measure)})
                write(Path(file), result)
                del measure  # and with it its model, before the next is made
        except Exception:  # of any kind: the figures so far are kept
            result["error"] = traceback.format_exc()
            write(Path(file), result)
        faulthandler.cancel_dump_traceback_later()
    return 0


def measured(setting: str, measure: Any) -> dict[str, Any]:
    """Return the figures of a measure, or the traceback of its failure."""
    say(f"  {setting} ..")
    start = time.monotonic()
    try:
        figures: dict[str, Any] = measure()
    except Exception:  # of any kind: the next settings are measured all the same
        figures = {"error": traceback.format_exc()}
    shown = [f"{key}={value:.4g}" for key, value in figures.items() if isinstance(value, float)]
    shown += [figures[key].splitlines()[-1] for key in ("not_run", "error") if key in figures]
    seconds = time.monotonic() - start
    say(f"  {setting}: {', '.join(shown)} ({seconds:.1f} s)")
    return {**figures, "seconds": seconds}


def say(text: str) -> None:
    """Print what happens, at once."""
    print(text, file=sys.stderr, flush=True)


def write(file: Path, result: dict[str, Any]) -> None:
    """Write a result, so that a reader sees all of it."""
    with new_file(file) as temporary:
        temporary.write_text(json.dumps(result, indent=1), encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
