"""The wheel and the source distribution, and the commands of an environment that has the wheel."""

import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from pathlib import Path

import pytest

from train.checkpoint.transformers_folder import CODE_FILES

ROOT = Path(__file__).parents[1]

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """A folder with both distributions, made of what git tracks or would."""
    source, folder = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("built")
    listed = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    names = subprocess.run(listed, cwd=ROOT, capture_output=True, check=True).stdout
    for name in filter(None, names.decode().split("\0")):
        if (ROOT / name).is_file():
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            (source / name).write_bytes((ROOT / name).read_bytes())
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", folder, source]
    subprocess.run(command, check=True, capture_output=True)
    return folder


def test_wheel_and_sdist_hold_the_packages(built):
    (wheel,), (sdist,) = built.glob("*.whl"), built.glob("*.tar.gz")
    names = zipfile.ZipFile(wheel).namelist()
    with tarfile.open(sdist) as archive:
        sources = [name.partition("/")[2] for name in archive.getnames()]
    for held in (names, sources):
        for name in ("stu/py.typed", "train/py.typed", "serve/py.typed", "stu/model.py"):
            assert name in held
        assert any(name.startswith("serve/server/playground/") for name in held)
        for name in CODE_FILES:  # which exports copy
            assert f"train/checkpoint/hugging_face/{name}" in held
    tops = {name.partition("/")[0] for name in names}
    assert {top for top in tops if not top.endswith(".dist-info")} == {"stu", "train", "serve"}


def test_every_command_of_an_installed_wheel_has_help(built, tmp_path):
    (wheel,) = built.glob("*.whl")
    subprocess.run([sys.executable, "-m", "venv", tmp_path / "venv"], check=True)
    python = tmp_path / "venv" / "bin" / "python"
    install = [python, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", wheel]
    subprocess.run(install, check=True)
    # Dependencies come from this environment, as one cannot download them in a test.
    paths = [path for path in sys.path if path.endswith("site-packages")]
    purelib = sysconfig.get_path("purelib", vars={"base": str(tmp_path / "venv")})
    (Path(purelib) / "dependencies.pth").write_text("\n".join(paths) + "\n")
    commands = sorted(path for path in python.parent.glob("stu-*"))
    assert len(commands) >= 8
    for command in commands:
        done = subprocess.run([command, "--help"], cwd=tmp_path, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        assert f"usage: {command.name}" in done.stdout
    code = "import stu, serve; print(stu.__file__, serve.LLM)"
    done = subprocess.run(
        [python, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True
    )
    assert done.stdout.startswith(str(tmp_path))
