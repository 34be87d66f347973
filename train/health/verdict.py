"""Decide from the reports of its nodes whether a job may start."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field


@dataclass
class Report:
    """Report of one node."""

    node: str
    problems: list[str] = field(default_factory=list)
    """Problems of this node alone, such as too little memory."""
    folders: dict[str, str] = field(default_factory=dict)
    """Problems with folders that nodes must share, by folder."""
    facts: dict[str, str] = field(default_factory=dict)
    """Facts that must be the same on all nodes, by name."""


@dataclass
class Verdict:
    """Decision about all nodes."""

    problems: list[str] = field(default_factory=list)
    """Problems, one per line."""
    bad_nodes: list[str] = field(default_factory=list)
    """Nodes to exclude."""
    is_refused: bool = False
    """Whether other nodes would not help."""

    @property
    def code(self) -> int:
        """Exit code: 0 if all nodes are fit, 1 if some are not, 2 if other nodes would not help."""
        return 2 if self.is_refused else int(bool(self.bad_nodes))


def judge(reports: Sequence[Report], silent: Sequence[str] = ()) -> Verdict:
    """Return the verdict on the reports, and on the nodes that sent none (`silent`).

    If half of the nodes or more have a problem with a folder, or differ in a fact, no node is at
    fault, and none is excluded. If more than half are silent, it is the first node that they cannot
    reach, which is then the one to exclude.
    """
    problems = {report.node: report.problems for report in reports if report.problems}
    verdict = Verdict([], [*silent, *problems])
    verdict.problems += [f"{node}: {text}" for node, texts in problems.items() for text in texts]
    if len(silent) > len(reports):
        first = reports[0].node
        verdict.bad_nodes = [first, *problems]
        verdict.problems.append(
            f"{first}: {len(silent)} of {len(silent) + len(reports)} nodes did not reach it"
        )
    refusals = []
    for found in [*_folder_problems(reports), *_differences(reports)]:
        lines = [f"{node}: {problem}" for node, problem in found.items()]
        verdict.problems += lines
        verdict.bad_nodes += found
        if 2 * len(found) >= len(reports):
            refusals += lines
    verdict.bad_nodes = list(dict.fromkeys(verdict.bad_nodes))
    if refusals:
        verdict.bad_nodes, verdict.is_refused = [], True
        verdict.problems.append(f"refused, as other nodes would not help: {refusals[0]}")
    return verdict


def _folder_problems(reports: Sequence[Report]) -> list[dict[str, str]]:
    """Return, for each folder, the problems by node."""
    folders = dict.fromkeys(folder for report in reports for folder in report.folders)
    return [
        {report.node: report.folders[folder] for report in reports if folder in report.folders}
        for folder in folders
    ]


def _differences(reports: Sequence[Report]) -> list[dict[str, str]]:
    """Return, for each fact, how nodes differ from most others."""
    differences = []
    for name in dict.fromkeys(name for report in reports for name in report.facts):
        values = {report.node: report.facts.get(name, "none") for report in reports}
        usual, _ = Counter(values.values()).most_common(1)[0]
        usual_node = next(node for node, value in values.items() if value == usual)
        differences.append(
            {
                node: f"{name} is {value}, but {usual} on {usual_node}"
                for node, value in values.items()
                if value != usual
            }
        )
    return differences
