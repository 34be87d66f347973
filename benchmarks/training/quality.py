"""`python -m benchmarks quality`: what mixers learn from the same tokens with as many weights.

Each run trains with stu-train in a process of one thread, with bfloat16 products as users train.
The first seed tries learning rates with each text and context, more until the best one is not the
highest or lowest; the other seeds have the best one, and so have the runs of Muon. Tasks of recall
have the best of three of the first seed. A run that has ended is kept in a folder, and `minutes`
limits how long runs are begun, so a whole result may come from several calls; with `recorded`, also
from several machines. Each run names its commit; runs of a text whose tokens differ are refused.
"""

import ast
import dataclasses
import itertools
import json
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from importlib.metadata import files
from pathlib import Path
from threading import Lock, Semaphore
from typing import Any, Literal, get_args

from jsonargparse.typing import PositiveFloat, PositiveInt

from benchmarks.machine import commit, describe
from benchmarks.quality_tables import T_95
from benchmarks.recorded import ROOT
from benchmarks.training.quality_run import TOKENS_PER_STEP, VOCAB_SIZE, Run, register_peer
from benchmarks.training.recall import Task, Trial
from stu.common.errors import UserError
from stu.common.files import new_file, read_json_object
from stu.layouts import layout_names

PROSE = "torch", "numpy", "networkx"
"""Packages whose documentation strings are the text `prose`."""
LEAST_CHARS = 200
"""Shorter documentation strings are left out."""
MOST_RATES = 6
RECALL_RATES = 1e-3, 3e-3, 1e-2
Result = dict[str, Any]
Setting = tuple[str, int]  # text and context


@dataclass(frozen=True)
class Options:
    """Settings of the benchmark."""

    folder: Path = Path("runs/quality")
    """Folder of the prepared texts and of the runs that have ended."""
    recorded: Path | None = None
    """Result of an earlier call, whose runs and trials are not made again."""
    minutes: PositiveFloat | None = None
    """Minutes after which no run is begun. null: no limit."""
    processes: PositiveInt = 2
    """Runs at a time, of one thread each."""
    tokens: PositiveInt = 1_495_040
    """Tokens that each model trains on."""
    steps: PositiveInt = 2000
    """Optimizer steps of each model that learns to recall."""
    seeds: PositiveInt = 3
    """Number of seeds, of the initial weights and of the data's order."""
    texts: tuple[Literal["code", "prose"], ...] = ("code", "prose")
    """Texts to learn: the sources of Python's standard library, and English of documentation."""
    contexts: tuple[PositiveInt, ...] = (512, 4096)
    """Tokens of a sample."""
    layouts: tuple[str, ...] = ("stu", "hybrid", "hyena", "rope")
    """Mixers; `rope` is attention to the whole context with rotary positions."""
    optimizers: tuple[Literal["adamw", "muon"], ...] = ("adamw", "muon")
    """Optimizers; all but the first one learn the first text with the first context alone."""
    rates: tuple[PositiveFloat, ...] = (2e-3, 4e-3, 8e-3)
    """Learning rates to try first with the first text and context; one is not changed. With others
    the best of the first, its half and its double are tried first."""
    tasks: tuple[Task, ...] = get_args(Task)
    """Tasks of recall."""


def measure(options: Options) -> dict[str, Any]:
    """Return the results of all runs that have ended, and how many have not."""
    for name in ("texts", "contexts", "layouts", "optimizers", "rates"):
        if not getattr(options, name):
            raise UserError(name, "[]", "one value or more")
    for context in options.contexts:
        if TOKENS_PER_STEP % context:
            raise UserError("contexts", context, f"a divisor of {TOKENS_PER_STEP}")
    if options.tokens % TOKENS_PER_STEP:
        raise UserError("tokens", options.tokens, f"a multiple of {TOKENS_PER_STEP}")
    if options.seeds > max(T_95):
        raise UserError("seeds", options.seeds, f"at most {max(T_95)}")
    register_peer()
    for layout in options.layouts:
        if layout not in layout_names():
            raise UserError("layouts", layout, f"one of {', '.join(layout_names())}")
    work = _Work(options)
    with ThreadPoolExecutor() as pool:
        best = pool.map(lambda layout: best_rates(work, layout, options), options.layouts)
        rates = dict(zip(options.layouts, best, strict=True))
    first = settings(options)[0]
    runs = [
        run
        for seed in range(options.seeds)
        for run in (
            *(
                Run(*setting, layout, options.optimizers[0], rate, seed, options.tokens)
                for layout, best in rates.items()
                for setting, rate in best.items()
            ),
            *(
                Run(*first, layout, optimizer, best[first], seed, options.tokens)
                for optimizer in options.optimizers[1:]
                for layout, best in rates.items()
            ),
        )
    ]
    learned = work.done(runs)
    trials = [
        Trial(task, layout, rate, 0, options.steps)
        for task in options.tasks
        for layout in options.layouts
        for rate in RECALL_RATES
    ]
    found = work.done(trials)
    trials += [
        Trial(task, layout, best_recall_rate(found, task, layout), seed, options.steps)
        for seed in range(1, options.seeds)
        for task in options.tasks
        for layout in options.layouts
    ]
    recalled = work.done(trials)
    missing = len(runs) + len(trials) - len(learned) - len(recalled)
    return {
        "machine": describe(),
        "earlier_machines": work.machines,
        "tried": work.done(tried(work, options)),
        "runs": learned,
        "recall": recalled,
        "missing": missing,
    }


def settings(options: Options) -> list[Setting]:
    """Return the settings that models learn in."""
    return list(itertools.product(options.texts, options.contexts))


def best_rates(work: "_Work", layout: str, options: Options) -> dict[Setting, float]:
    """Return the best learning rate in each setting."""
    first, *others = settings(options)
    best = {first: best_rate(work, layout, first, options.rates, options)}
    factors = (1,) if len(options.rates) == 1 else (0.5, 1, 2)
    around = [factor * best[first] for factor in factors]
    return best | {other: best_rate(work, layout, other, around, options) for other in others}


def best_rate(
    work: "_Work", layout: str, setting: Setting, rates: Iterable[float], options: Options
) -> float:
    """Return the learning rate with the least loss of the first seed: of those given, and of lower
    or higher ones as long as the best one is the last on its side. One rate alone is the best."""
    rates = sorted(rates)
    while True:
        found = work.done(first_runs(layout, setting, rates, options))
        if len(found) < len(rates):  # time was up
            return rates[len(rates) // 2]
        best = min(found, key=lambda result: float(result["loss"]))["learning_rate"]
        if rates[0] < best < rates[-1] or len(rates) in (1, MOST_RATES):
            return float(best)
        rates = [best / 2, *rates] if best == rates[0] else [*rates, 2 * best]


def best_recall_rate(results: Iterable[Result], task: Task, layout: str) -> float:
    """Return the learning rate with the most right answers of a task."""
    mine = [one for one in results if one["task"] == task and one["layout"] == layout]
    if len(mine) < len(RECALL_RATES):  # time was up
        return RECALL_RATES[1]
    return float(max(mine, key=lambda one: float(one["right"]))["learning_rate"])


def first_runs(
    layout: str, setting: Setting, rates: Iterable[float], options: Options
) -> list[Run]:
    """Return the runs of the first seed with several learning rates."""
    first = options.optimizers[0]
    return [Run(*setting, layout, first, rate, 0, options.tokens) for rate in rates]


def tried(work: "_Work", options: Options) -> list[Run]:
    """Return the runs of `first_runs` that have ended."""
    powers = range(-MOST_RATES, MOST_RATES + 1)
    every = sorted({rate * 2.0**power for rate in options.rates for power in powers})
    return [
        run
        for setting in settings(options)
        for layout in options.layouts
        for run in first_runs(layout, setting, every, options)
        if work.path(run).exists()
    ]


class _Work:
    """Runs that have ended, in a folder, and those that are begun until time is up."""

    def __init__(self, options: Options) -> None:
        self._options = options
        self.machines: list[dict[str, Any]] = []
        """Machines of the results that were recorded before."""
        seconds = float("inf") if options.minutes is None else 60 * options.minutes
        self._deadline = time.monotonic() + seconds
        self._free, self._preparing = Semaphore(options.processes), Lock()
        if options.recorded is not None:
            earlier = read_json_object(options.recorded)
            self.machines += [*earlier["earlier_machines"], earlier["machine"]]
            for result in (*earlier["tried"], *earlier["runs"], *earlier["recall"]):
                self._keep(result)

    def _keep(self, result: Result) -> None:
        """Write the result of a run that ended elsewhere."""
        kind = Trial if "task" in result else Run
        run = kind(**{field.name: result[field.name] for field in dataclasses.fields(kind)})
        if not self.path(run).exists():
            self._options.folder.mkdir(parents=True, exist_ok=True)
            with new_file(self.path(run)) as path:
                path.write_text(json.dumps(result), encoding="utf-8")

    def path(self, run: Run | Trial) -> Path:
        """Return the file of a run that has ended."""
        return self._options.folder / f"{run.name}.json"

    def done(self, runs: Sequence[Run | Trial]) -> list[Result]:
        """Make the runs that are missing while there is time. Return the results there are."""
        with ThreadPoolExecutor(self._options.processes) as pool:
            list(pool.map(self._make, runs))
        paths = [self.path(run) for run in runs]
        results = [json.loads(path.read_text()) for path in paths if path.exists()]
        for text in self._options.texts:
            found = {result.get("data") for result in results if result.get("text") == text}
            if len(found - {None}) > 1:
                raise UserError(
                    "folder", str(self._options.folder), f"runs that learned the same {text}"
                )
        return results

    def _make(self, run: Run | Trial) -> None:
        with self._free:
            self._make_now(run)

    def _make_now(self, run: Run | Trial) -> None:
        path = self.path(run)
        if path.exists() or time.monotonic() > self._deadline:
            return
        arguments = [json.dumps(dataclasses.asdict(run))]
        if isinstance(run, Run):
            with self._preparing:
                data = prepared(run.text, self._options.folder)
            arguments += [str(data), str(path.with_suffix(""))]
        path.parent.mkdir(parents=True, exist_ok=True)
        program = "quality_run" if isinstance(run, Run) else "recall"
        command = [sys.executable, "-m", f"benchmarks.training.{program}", *arguments]
        with open(path.with_suffix(".log"), "w") as log:
            made = subprocess.run(command, check=True, stdout=subprocess.PIPE, stderr=log)
        part = path.with_suffix(".part")
        result = json.loads(made.stdout.splitlines()[-1]) | {"commit": commit(ROOT)}
        part.write_text(json.dumps(result), encoding="utf-8")
        part.rename(path)
        print(path.name, json.dumps(result)[-200:], file=sys.stderr, flush=True)


def prepared(text: str, folder: Path) -> Path:
    """Return the token shards of a text, which are made if they are not there."""
    data = folder / f"data-{text}"
    if not data.exists():
        folder.mkdir(parents=True, exist_ok=True)
        source = "stdlib:"
        if text == "prose":
            source = str(folder / "prose.jsonl")
            with open(source, "w") as output:
                output.writelines(json.dumps({"text": own}) + "\n" for own in documentation())
        command = [sys.executable, "-m", "train.data.cli", source, "--output", str(data)]
        command += ["--vocab-size", str(VOCAB_SIZE), "--validation-fraction", "0.03"]
        subprocess.run(command, check=True, stdout=sys.stderr)
    return data


def documentation() -> Iterator[str]:
    """Yield the documentation of each module of some packages: its longer strings, in order."""
    for package in PROSE:
        for path in sorted(files(package) or [], key=str):
            if path.suffix == ".py" and path.parts[0] == package:
                source = Path(str(path.locate())).read_text(encoding="utf-8")
                try:
                    tree = ast.parse(source)
                except SyntaxError:  # made for a newer Python
                    continue
                kinds = ast.Module, ast.ClassDef, ast.FunctionDef
                nodes = [node for node in ast.walk(tree) if isinstance(node, kinds)]
                found = [ast.get_docstring(node) or "" for node in nodes]
                if texts := [own for own in found if len(own) >= LEAST_CHARS]:
                    yield "\n\n".join(texts)
