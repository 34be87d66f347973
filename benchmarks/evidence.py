"""`make evidence-quick`: measure the README's claims again, in minutes, and say which hold.

Small versions of the benchmarks run one after the other; nothing else should run beside them. Each
writes its result into the folder as soon as it has one. Peers that are not installed are left out,
as installing them takes long. Exits with 1 if a claim does not hold.
"""

import argparse
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from benchmarks.claims import BATCH, CLAIMS, COMPARED, LENGTH
from benchmarks.comparisons import COMPARISONS, CONTEXT, FASTEST, LABELS, PROGRAMS, SLOWER
from benchmarks.recorded import ROOT, recorded, shown

PROGRESS = "peers-measured.json"
PEERS = (
    f"--threads 2 --context [{CONTEXT}] --new-tokens 24 --requests 64 --rounds 1 --install false "
    f"--progress {PROGRESS}"
)
"""With fewer new tokens, the first step counts too much: it takes two to three times as long."""
ALONE = ",".join(name for name in PROGRAMS if name not in SLOWER)
"""Programs that decode a single sequence."""
QUICK: Sequence[tuple[str, str]] = (
    (
        "decode",
        f"--batch [{BATCH}] --new-tokens [{LENGTH}] --rounds 1 --peers [{','.join(COMPARED)}]",
    ),
    ("model", "--decode [decode.json]"),
    ("convolution", "--first 1"),
    ("train", "--context [2048] --repeats 1 --threads 2"),
    ("loss", "--first 1 --repeats 1 --threads 2"),
    ("memory", "--first 1"),
    ("load", "--requests 64 --rounds 1"),
    (
        "quality",
        "--texts [code] --contexts [512] --layouts [hybrid,hyena,rope] --optimizers [adamw] "
        "--rates [8e-3] --tasks [] --seeds 1 --tokens 40960 --folder quality",
    ),
    ("peers", f"{PEERS} --parts [decode] --batch [1] --programs [{ALONE}]"),
    ("peers", f"{PEERS} --parts [decode] --batch [32] --programs [ours_int8,{','.join(FASTEST)}]"),
    ("peers", f"{PEERS} --parts [serve] --programs [ours_int8,{','.join(FASTEST)}]"),
)
"""Benchmarks and their options. Calls of `peers` add to one result."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmarks and print the claims."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.evidence", description=__doc__)
    parser.add_argument(
        "--folder", type=Path, default=Path("runs/evidence"), help="Folder of the results."
    )
    folder: Path = parser.parse_args(argv).folder
    folder.mkdir(parents=True, exist_ok=True)
    start = time.monotonic()
    for earlier in (PROGRESS, *(f"{name}.log" for name, _ in QUICK)):
        (folder / earlier).unlink(missing_ok=True)
    shutil.rmtree(folder / "quality", ignore_errors=True)
    for number, (name, options) in enumerate(QUICK):
        minutes = (time.monotonic() - start) / 60
        print(f"{name}, {number + 1} of {len(QUICK)}, after {minutes:.1f} min", file=sys.stderr)
        measure(name, options.split(), folder)
    results = recorded(folder)
    lacking = {row.claim().text: row.missing(results[row.benchmark]) for row in COMPARISONS}
    if any(lacking.values()):
        print(
            f"`python -m benchmarks peers` installs peers; {folder / 'peers.log'} says what failed"
        )
    claims = [*(row.claim() for row in COMPARISONS), *CLAIMS]
    failed = unknown = 0
    for claim in claims:
        try:
            figure = claim.figure(results[claim.benchmark])
        except KeyError:  # it did not fit into memory
            figure = float("nan")
        except IndexError:  # without any peer
            figure = float("inf")
        # Ours may be behind a peer that is missing; one that is behind those there are fails.
        if (names := lacking.get(claim.text)) and claim.holds(figure):
            unknown += 1
            missing = ", ".join(LABELS[name] for name in names)
            print(f"not known: {claim.text}: {missing} was not measured")
            continue
        failed += not claim.holds(figure)
        verdict = "holds" if claim.holds(figure) else "DOES NOT HOLD"
        print(f"{verdict}: {claim.text}: {shown(figure)} ({claim.bound()})")
    held = len(claims) - failed - unknown
    print(f"{held} of {len(claims)} claims hold, {unknown} without peers", file=sys.stderr)
    return 1 if failed else 0


def measure(name: str, options: Sequence[str], folder: Path) -> None:
    """Run a benchmark in the folder and write its result into `NAME.json`."""
    command = [sys.executable, "-m", "benchmarks", name, *options]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    unfinished = folder / f"{name}.json.part"
    with unfinished.open("wb") as file, (folder / f"{name}.log").open("ab") as log:
        done = subprocess.run(command, cwd=folder, env=environment, stdout=file, stderr=log)
    if done.returncode:
        raise SystemExit(f"benchmark {name} failed: see {folder / name}.log")
    unfinished.rename(folder / f"{name}.json")


if __name__ == "__main__":
    sys.exit(main())
