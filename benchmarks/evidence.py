"""`make evidence-quick`: measure the README's claims again, in minutes, and say which hold.

Small versions of the benchmarks run one after the other; nothing else should run beside them. Each
writes its result into the folder as soon as it has one. Peers that are not installed are left out,
as installing them takes long. Exits with 1 if a claim does not hold.
"""

import argparse
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from benchmarks.claims import (
    BATCH,
    CLAIMS,
    COMPARED,
    COMPARISONS,
    CONTEXT,
    EIGHT_BITS,
    FLOATS,
    LENGTH,
    shown,
)
from benchmarks.recorded import ROOT, recorded

PROGRESS = "peers-measured.json"
QUICK: dict[str, str] = {
    "decode": f"--batch [{BATCH}] --new-tokens [{LENGTH}] --rounds 2 "
    f"--peers [{','.join(COMPARED)}]",
    "model": "--decode [decode.json]",
    "convolution": "--first 1",
    "train": "--context [2048] --repeats 1",
    "loss": "--first 1 --repeats 1",
    "memory": "--first 1",
    "load": "--requests 128",
    "peers": f"--context [{CONTEXT}] --batch [1,32] --new-tokens 16 --requests 64 --rounds 1 "
    f"--programs [{','.join(dict.fromkeys((*FLOATS, *EIGHT_BITS)))}] --install false "
    f"--progress {PROGRESS}",
}
"""Options of each benchmark."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmarks and print the claims."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.evidence", description=__doc__)
    parser.add_argument(
        "--folder", type=Path, default=Path("runs/evidence"), help="Folder of the results."
    )
    folder: Path = parser.parse_args(argv).folder
    folder.mkdir(parents=True, exist_ok=True)
    start = time.monotonic()
    (folder / PROGRESS).unlink(missing_ok=True)
    for number, (name, options) in enumerate(QUICK.items()):
        minutes = (time.monotonic() - start) / 60
        print(f"{name}, {number + 1} of {len(QUICK)}, after {minutes:.1f} min", file=sys.stderr)
        measure(name, options.split(), folder)
    results = recorded(folder)
    left_out = [row for row in COMPARISONS if not row.peers(results[row.benchmark])]
    for row in left_out:
        print(f"not measured: {row.text}: the peers are not installed")
    measured = [row.claim() for row in COMPARISONS if row not in left_out] + CLAIMS
    failed = 0
    for claim in measured:
        try:
            figure = claim.figure(results[claim.benchmark])
        except KeyError:  # it did not fit into memory
            figure = float("nan")
        failed += not claim.holds(figure)
        verdict = "holds" if claim.holds(figure) else "DOES NOT HOLD"
        print(f"{verdict}: {claim.text}: {shown(figure)} ({claim.bound()})")
    print(f"{len(measured) - failed} of {len(measured)} claims hold", file=sys.stderr)
    if left_out:
        print("`python -m benchmarks peers` installs the peers", file=sys.stderr)
    return 1 if failed else 0


def measure(name: str, options: Sequence[str], folder: Path) -> None:
    """Run a benchmark in the folder and write its result into `NAME.json`."""
    command = [sys.executable, "-m", "benchmarks", name, *options]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    unfinished = folder / f"{name}.json.part"
    with unfinished.open("wb") as file, (folder / f"{name}.log").open("wb") as log:
        done = subprocess.run(command, cwd=folder, env=environment, stdout=file, stderr=log)
    if done.returncode:
        raise SystemExit(f"benchmark {name} failed: see {folder / name}.log")
    unfinished.rename(folder / f"{name}.json")


if __name__ == "__main__":
    sys.exit(main())
