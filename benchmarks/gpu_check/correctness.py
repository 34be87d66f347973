"""Correctness: the project's own tests of CUDA, and those of the kernels against their twins."""

import sys
from contextlib import redirect_stdout
from dataclasses import dataclass, field
from functools import partial

import pytest

from benchmarks.gpu_check.measuring import Figures, Measures
from benchmarks.gpu_check.sizes import Sizes
from benchmarks.recorded import ROOT

TESTS: dict[str, list[str]] = {
    "tests/test_cuda.py": [],
    "tests/serve/kernels/test_kernels.py": ["--noconftest"],  # which would import the server
}
"""Files of tests that a GPU runs, and the options of pytest for them."""


@dataclass(eq=False)
class Outcomes:
    """A plugin of pytest that counts how tests end, and keeps the tracebacks of failures."""

    passed: int = 0
    skipped: int = 0
    failures: dict[str, str] = field(default_factory=dict)
    """Tracebacks by test."""

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Count a report, and say how the test ended."""
        self.skipped += report.skipped
        self.passed += report.when == "call" and report.passed
        if report.failed:
            self.failures[report.nodeid] = report.longreprtext
        if report.when == "call" or not report.passed:
            print(f"    {report.outcome} {report.nodeid}", file=sys.stderr, flush=True)

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        """Keep the traceback of a file that cannot be imported."""
        if report.failed:
            self.failures[report.nodeid] = report.longreprtext


def measures(device: str, sizes: Sizes) -> Measures:
    """Yield the tests of each file."""
    for name, options in TESTS.items():
        yield name, partial(run_tests, name, options)


def run_tests(name: str, own_options: list[str]) -> Figures:
    """Return how many tests passed, were skipped or failed, with tracebacks."""
    outcomes = Outcomes()
    options = ["-p", "no:cacheprovider", "--tb=short", f"--rootdir={ROOT}", *own_options]
    with redirect_stdout(sys.stderr):
        code = pytest.main([*options, str(ROOT / name)], plugins=[outcomes])
    figures: Figures = {"passed": outcomes.passed, "skipped": outcomes.skipped}
    if outcomes.failures or code not in (pytest.ExitCode.OK, pytest.ExitCode.NO_TESTS_COLLECTED):
        failures = "\n\n".join(f"{test}\n{text}" for test, text in outcomes.failures.items())
        figures |= {"failed": len(outcomes.failures), "error": failures or f"pytest: {code!r}"}
    return figures
