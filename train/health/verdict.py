"""Decide from the answers of its nodes whether a job may start."""

import hashlib
import itertools
import os
import socket
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from train.start.agreement import versions

DEFAULT_RUN_DIR = "runs/train"
INDEX = "index.json"
PROBE_BYTES = 2**20


@dataclass
class Answer:
    """One node's."""

    node: str
    problems: list[str] = field(default_factory=list)
    """Faults of this node alone, such as too little memory."""
    folders: dict[str, str] = field(default_factory=dict)
    """Problems with folders that nodes must share."""
    facts: dict[str, str] = field(default_factory=dict)
    """Facts that must be the same on all nodes."""


@dataclass
class Verdict:
    """For all nodes."""

    code: int = 0
    """0: all are fit; 1: some are not; 2: it is not for a node, and would be the same on others."""
    told: list[str] = field(default_factory=list)
    bad: list[str] = field(default_factory=list)
    """Nodes."""


def judge(answers: Sequence[Answer], silent: Sequence[str] = ()) -> Verdict:
    """Return what follows from the nodes' answers. silent: nodes that gave none.

    A folder or a version that half of the nodes or more have otherwise is not a node's fault.
    """
    verdict = Verdict(bad=list(silent))
    refusals = []
    told = [f"{its.node}: {problem}" for its in answers for problem in its.problems]
    verdict.bad += [its.node for its in answers if its.problems]
    for folder in dict.fromkeys(name for its in answers for name in its.folders):
        lacking = {its.node: its.folders[folder] for its in answers if folder in its.folders}
        lines = [f"{node}: {problem}" for node, problem in lacking.items()]
        told += lines
        if 2 * len(lacking) >= len(answers):
            refusals += lines
        verdict.bad += lacking
    for name in dict.fromkeys(name for its in answers for name in its.facts):
        values = {its.node: its.facts.get(name, "none") for its in answers}
        usual, _ = Counter(values.values()).most_common(1)[0]
        others = {node: value for node, value in values.items() if value != usual}
        has_it = next(node for node, value in values.items() if value == usual)
        lines = [
            f"{node}: {name} is {value}, and {usual} on {has_it}" for node, value in others.items()
        ]
        told += lines
        if 2 * len(others) >= len(answers):
            refusals += lines
        verdict.bad += others
    verdict.told = told
    verdict.bad = list(dict.fromkeys(verdict.bad))
    if refusals:
        verdict.bad = []
        verdict.told.append(f"refused, as other nodes would not be better: {refusals[0]}")
    verdict.code = 2 if refusals else int(bool(verdict.bad))
    return verdict


def as_dict(value: Answer | Verdict) -> dict[str, Any]:
    """Return what the constructor takes."""
    return asdict(value)


def facts_of_node(data_dir: str | None) -> dict[str, str]:
    """Return what all nodes must have alike: versions, and the data's index."""
    facts = versions()
    if data_dir is not None:
        index = Path(data_dir) / INDEX
        try:
            facts[f"the hash of {index}"] = hashlib.sha256(index.read_bytes()).hexdigest()[:16]
        except OSError as error:
            facts[f"the hash of {index}"] = f"not there ({error.strerror})"
    return facts


def folder_problem(folder: Path, token: str, name: str) -> Iterator[str]:
    """Write into `folder` and see there what the first node wrote as `token`: what is wrong.

    name: of the file this node writes, which the first one leaves there.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / name
        with probe.open("wb") as file:
            file.write(bytes(PROBE_BYTES))
            file.flush()
            os.fsync(file.fileno())
        is_seen = not token or (folder / token).exists()
        if name != token:
            probe.unlink()
    except OSError as error:
        yield f"{folder} cannot be written ({error})"
        return
    if not is_seen:
        yield (
            f"{folder} does not show what the first node wrote there: it must be on a file system "
            "that all nodes share"
        )


def probe_name() -> str:
    """Return a name for this process's probe."""
    return f".stu-health-{socket.gethostname()}-{os.getpid()}"


def folders_of(settings: Sequence[str]) -> tuple[str, str | None]:
    """Return run_dir and data.dir of settings for stu-train, as far as they can be read without its
    parser: stu-plan finds what is wrong with them."""
    import yaml

    found: dict[str, str] = {"run_dir": DEFAULT_RUN_DIR}
    words = [part for setting in settings for part in _name_and_value(setting)]
    for name, value in itertools.pairwise(words):
        if name == "--run-dir":
            found["run_dir"] = value
        elif name == "--data.dir":
            found["data.dir"] = value
        elif name == "--config":
            try:
                contents = yaml.safe_load(Path(value).read_text(encoding="utf-8"))
            except (OSError, ValueError, yaml.YAMLError):
                continue
            contents = contents if isinstance(contents, dict) else {}
            data = contents.get("data")
            values = {
                "run_dir": contents.get("run_dir"),
                "data.dir": data.get("dir") if isinstance(data, dict) else None,
            }
            found |= {name: str(value) for name, value in values.items() if value is not None}
    return found["run_dir"], found.get("data.dir")


def _name_and_value(setting: str) -> list[str]:
    name, is_joined, value = setting.partition("=")
    return [name, value] if is_joined and setting.startswith("--") else [setting]
