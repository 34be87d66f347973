"""Correctness: the project's own tests of CUDA, and those of the kernels against their twins.

Tests are run one function after the other, so that what is known is kept if time runs out.
"""

import ast
import sys
from contextlib import redirect_stdout
from dataclasses import dataclass, field
from functools import partial

import pytest

from benchmarks.gpu_check.measuring import Figures, Measures
from benchmarks.gpu_check.sizes import Sizes
from benchmarks.recorded import ROOT

KERNEL_TESTS, CUDA_TESTS = "tests/serve/kernels/test_kernels.py", "tests/test_cuda.py"
OPTIONS = ["-p", "no:cacheprovider", "--tb=short", f"--rootdir={ROOT}"]
OPTIONS += ["-p", "no:faulthandler"]  # which would disarm the limit of the part at a failure


@dataclass(eq=False)
class Outcomes:
    """A plugin of pytest that counts how tests end, and prints and keeps tracebacks of failures."""

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
        if report.failed:
            print(report.longreprtext, file=sys.stderr, flush=True)

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        """Keep the traceback of a file that cannot be imported."""
        if report.failed:
            self.failures[report.nodeid] = report.longreprtext


def kernel_measures(device: str, sizes: Sizes) -> Measures:
    """Yield each test function of the kernels."""
    for name in test_functions(KERNEL_TESTS):  # whose conftest would import the server
        yield name, partial(run_tests, f"{KERNEL_TESTS}::{name}", "--noconftest")


def cuda_measures(device: str, sizes: Sizes) -> Measures:
    """Yield each test function of CUDA."""
    for name in test_functions(CUDA_TESTS):
        yield name, partial(run_tests, f"{CUDA_TESTS}::{name}")


def test_functions(file: str) -> list[str]:
    """Return the names of a file's test functions, in their order."""
    tree = ast.parse((ROOT / file).read_text(encoding="utf-8"))
    functions = [node.name for node in tree.body if isinstance(node, ast.FunctionDef)]
    return [name for name in functions if name.startswith("test_")]


def run_tests(test: str, *own_options: str) -> Figures:
    """Return how many tests passed, were skipped or failed, with tracebacks. test: Id of pytest,
    relative to the root."""
    outcomes = Outcomes()
    with redirect_stdout(sys.stderr):
        code = pytest.main([*OPTIONS, *own_options, str(ROOT / test)], plugins=[outcomes])
    figures: Figures = {"passed": outcomes.passed, "skipped": outcomes.skipped}
    if outcomes.failures or code not in (pytest.ExitCode.OK, pytest.ExitCode.NO_TESTS_COLLECTED):
        failures = "\n\n".join(f"{test}\n{text}" for test, text in outcomes.failures.items())
        figures |= {"failed": len(outcomes.failures), "error": failures or f"pytest: {code!r}"}
    return figures
