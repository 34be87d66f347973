"""The packages' boundaries: who may import whom, and what a light command may load."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
MAY_IMPORT = {
    "stu": {
        "backports",
        "compression",
        "docstring_parser",
        "flash_attn",
        "jsonargparse",
        "numpy",
        "platformdirs",
    }
    | {"safetensors", "sentencepiece", "torch"},
    "train": {"stu"},
    "serve": {"stu"},
}
COMMANDS = {
    "stu-prepare": "train.data.cli",
    "stu-train": "train.cli",
    "stu-export": "train.checkpoint.export",
    "stu-import": "train.checkpoint.import_published",
    "stu-health": "train.health.cli",
    "stu-plan": "train.plan.cli",
    "stu-generate": "serve.batch.cli",
    "stu-serve": "serve.server.cli",
    "python -m benchmarks": "benchmarks.__main__",
}


def options_with_underscores(help_text):
    """Options but dotted settings, whose names are those of fields."""
    return {name for name in re.findall(r"--[\w.-]+", help_text) if "_" in name and "." not in name}


def imported(package):
    for file in sorted((ROOT / package).rglob("*.py")):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                names = [node.module or ""]
            else:
                continue
            for name in names:
                yield file.relative_to(ROOT), name.split(".")[0]


@pytest.mark.parametrize("package", MAY_IMPORT)
def test_arrows_go_one_way(package):
    others = set(MAY_IMPORT) - {package} - MAY_IMPORT[package]
    wrong = [(str(file), name) for file, name in imported(package) if name in others]
    assert wrong == []


def test_the_model_library_stands_on_few_packages():
    # Python 3.14 has `compression`.
    allowed = MAY_IMPORT["stu"] | sys.stdlib_module_names | {"stu", "compression"}
    assert [(str(file), name) for file, name in imported("stu") if name not in allowed] == []


def test_no_pickle():
    names = {name for package in MAY_IMPORT for _, name in imported(package)}
    assert "pickle" not in names


@pytest.mark.parametrize("command", COMMANDS)
def test_help_answers_without_heavy_imports(command):
    """They take seconds; what is left takes a third of one."""
    code = f"""
import sys
from {COMMANDS[command]} import main
try:
    main(["--help"])
finally:
    print(*sys.modules, file=sys.stderr)
"""
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60
    )
    assert result.returncode == 0, result.stderr
    assert f"usage: {command}" in result.stdout
    assert options_with_underscores(result.stdout) == set()
    assert not {"torch", "lightning", "deepspeed", "tensorboard"} & set(result.stderr.split())


WITH_THE_BASE_ALONE = """
import sys
sys.modules.update(dict.fromkeys(sys.argv[1].split()))  # not to be imported
"""
EXTRAS = (
    "fastapi starlette uvicorn h11 jinja2 pydantic prometheus_client msgpack pyarrow backports "
)
EXTRAS += "lightning deepspeed tensorboard matplotlib aiohttp transformers"


def test_public_names_need_no_extra():
    code = "import stu, serve\nfor m in (stu, serve): print(*(getattr(m, n) for n in m.__all__))"
    command = [sys.executable, "-c", WITH_THE_BASE_ALONE + code, EXTRAS]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("module", "arguments", "missing"),
    [
        ("serve.server.cli", ["model"], "serve"),
        ("train.cli", ["--run-dir=run"], "train"),
        ("train.plan.cli", ["--data.dir=data"], "train"),
    ],
)
def test_a_missing_extra_is_named(module, arguments, missing):
    code = f"import {module} as m\nsys.exit(m.main({arguments}))"
    command = [sys.executable, "-c", WITH_THE_BASE_ALONE + code, EXTRAS]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2, done.stderr
    (line,) = done.stderr.splitlines()
    assert line.endswith(f' is not installed: pip install "stu[{missing}]"')


def test_importing_the_model_library_loads_neither_lightning_nor_deepspeed():
    code = "import sys, stu.model, stu.model_dir; print(*sys.modules)"
    command = [sys.executable, "-c", code]
    modules = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
    assert not {"lightning", "deepspeed", "tensorboard"} & set(modules)
