"""Which packages may import which, and what a light command may load."""

import ast
import functools
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = "stu", "train", "serve"
EVALUATING = "train/tasks/"
"""The one folder of `train` that imports `serve`: the engine evaluates the model of a run."""
LIBRARIES_OF_STU = {
    *("backports", "compression", "docstring_parser", "flash_attn", "jinja2", "jsonargparse"),
    *("numpy", "safetensors", "sentencepiece", "tiktoken", "tokenizers", "torch"),
}  # Python 3.14 has `compression`
COMMANDS = {
    "stu-prepare": "train.data.cli",
    "stu-train": "train.cli",
    "stu-export": "train.checkpoint.export",
    "stu-import": "train.checkpoint.import_published",
    "stu-health": "train.health.cli",
    "stu-plan": "train.plan.cli",
    "stu-generate": "serve.batch.cli",
    "stu-serve": "serve.server.cli",
    "stu-eval": "serve.evaluation.cli",
    "python -m benchmarks": "benchmarks.__main__",
}


def options_with_underscores(help_text):
    """Return the options with underscores, except dotted settings, which are named as fields."""
    return {name for name in re.findall(r"--[\w.-]+", help_text) if "_" in name and "." not in name}


@functools.cache
def imported(package):
    """Return the files of a package, each with a package that it imports."""
    found = []
    for file in sorted((ROOT / package).rglob("*.py")):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                names = [node.module or ""]
            else:
                continue
            found += [(file.relative_to(ROOT), name.split(".")[0]) for name in names]
    return found


@pytest.mark.parametrize("package", PACKAGES)
def test_packages_import_only_stu(package):
    others = {"train", "serve"} - {package}
    found = {(str(file), name) for file, name in imported(package) if name in others}
    assert {(file, name) for file, name in found if not file.startswith(EVALUATING)} == set()


def test_training_imports_of_serving_its_evaluation_alone():
    """The model of a run is evaluated in the engine that serves."""
    modules = {
        name
        for file in sorted((ROOT / EVALUATING).glob("*.py"))
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8")))
        if isinstance(node, ast.ImportFrom) and (name := node.module or "").startswith("serve")
    }
    assert {name for name in modules if not name.startswith("serve.evaluation.")} == {
        "serve.config"  # of the engine
    }


def test_stu_imports_few_packages():
    allowed = LIBRARIES_OF_STU | sys.stdlib_module_names | {"stu"}
    assert [(str(file), name) for file, name in imported("stu") if name not in allowed] == []


def test_no_pickle():
    names = {name for package in PACKAGES for _, name in imported(package)}
    assert not {"pickle", "dill", "cloudpickle", "shelve", "marshal", "joblib"} & names
    for package in PACKAGES:
        for file in (ROOT / package).rglob("*.py"):
            lines = file.read_text(encoding="utf-8").splitlines()
            assert all("weights_only=True" in line for line in lines if "torch.load(" in line), file


@pytest.mark.parametrize("command", COMMANDS)
def test_help_needs_no_heavy_imports(command):
    """They would take seconds."""
    result = run_python(f"""
import sys
from {COMMANDS[command]} import main
try:
    main(["--help"])
finally:
    print(*sys.modules, file=sys.stderr)
""")
    assert result.returncode == 0, result.stderr
    assert f"usage: {command}" in result.stdout
    assert "<class" not in result.stdout
    assert options_with_underscores(result.stdout) == set()
    heavy = {"torch", "lightning", "deepspeed", "tensorboard", "matplotlib", "transformers"}
    assert not heavy & set(result.stderr.split())


EXTRAS = (
    "fastapi starlette uvicorn h11 jinja2 pydantic prometheus_client msgpack pyarrow backports "
    "lightning deepspeed tensorboard matplotlib aiohttp transformers"
)
HIDE_EXTRAS = f"""
import sys
sys.modules.update(dict.fromkeys({EXTRAS!r}.split()))  # importing them raises ImportError
"""


def run_python(code):
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)


def test_public_names_of_stu_and_serve_import_no_extra():
    """They do not even try to."""
    done = run_python(f"""
import sys
class NoExtras:
    def find_spec(name, *_):
        assert name.split(".")[0] not in {EXTRAS.split()!r}, name
sys.meta_path.insert(0, NoExtras)
import serve, stu
for module in (stu, serve):
    print(*(getattr(module, name) for name in module.__all__))
""")
    assert done.returncode == 0, done.stderr


def test_a_missing_extra_is_named():
    commands = {"serve.server.cli": "model", "train.cli": "--run-dir=run"}
    commands |= {"train.plan.cli": "--data.dir=data"}
    done = run_python(f"""{HIDE_EXTRAS}
from importlib import import_module
print(*(import_module(name).main([argument]) for name, argument in {commands}.items()))
""")
    assert done.stdout == "2 2 2\n", done.stderr
    for line, extra in zip(done.stderr.splitlines(), ("serve", "train", "train"), strict=True):
        assert line.endswith(
            f" is not installed: run pip install '.[{extra}]' in the checkout of stu"
        )
