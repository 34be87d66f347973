"""The pages of docs/: what they contain, and where their links lead."""

import importlib.util
import re
import shlex
from pathlib import Path

import pytest
import yaml

import serve
import stu
from stu.config import ModelConfig
from stu.model import FlashSTU
from stu.model_dir import save_model

ROOT = Path(__file__).parents[1]
PAGES = sorted((ROOT / "docs").glob("*.md"))
SHOWN = [*PAGES, ROOT / "README.md"]
LINK = re.compile(r"\]\(([^)\s]+)\)")
HEADING = re.compile(r"^#+ (.+)$", re.MULTILINE)


def test_every_page_is_in_the_navigation():
    navigation = yaml.safe_load((ROOT / "mkdocs.yml").read_text())["nav"]
    listed = [page for part in navigation for pages in part.values() for page in pages]
    assert sorted(name for page in listed for name in page.values()) == [p.name for p in PAGES]


@pytest.mark.parametrize("page", [*SHOWN, ROOT / "CHANGELOG.md"], ids=lambda path: path.name)
def test_links_lead_somewhere(page):
    for link in LINK.findall(page.read_text()):
        if not link.startswith(("https://", "http://")):
            name, _, anchor = link.partition("#")
            target = page.parent / name if name else page
            assert target.exists(), link
            assert not anchor or anchor in anchors(target.read_text()), link


def anchors(text):
    """Return the anchors of a page's headings, as MkDocs and GitHub name them."""
    headings = [re.sub(r"[^\w\s-]", "", heading).strip() for heading in HEADING.findall(text)]
    return [re.sub(r"\s", "-", heading.lower()) for heading in headings]


def test_nothing_installs_the_package_of_another_project():
    """`stu` on PyPI is not this project: extras are installed from the checkout."""
    packages = ("stu", "train", "serve", "benchmarks", "docs", "examples", "slurm")
    paths = [path for name in packages for path in (ROOT / name).rglob("*") if path.is_file()]
    texts = {p: p.read_bytes() for p in (*paths, ROOT / "README.md") if p.suffix != ".pyc"}
    wrong = re.compile(rb"stu\[[a-z]|pip install (-\S+ )*[\"']?stu\b")
    assert [str(path) for path, text in texts.items() if wrong.search(text)] == []


def commands(page):
    """Yield the words of each command that a page shows on lines of its own, without comments."""
    text = re.sub(r"\\\n\s+", " ", page.read_text(encoding="utf-8"))
    for line in re.findall(r"^    ((?:stu-|sbatch |python |make )[^#\n]*)", text, re.MULTILINE):
        yield shlex.split(line)


def test_the_unit_for_systemd_has_the_folders_that_it_writes_to():
    page = (ROOT / "docs" / "serving.md").read_text(encoding="utf-8")
    unit = dict(re.findall(r"^    (\w+)=(.+)$", page, re.MULTILINE))
    cache = f"/var/cache/{unit['CacheDirectory']}"
    environment = f"XDG_CACHE_HOME={cache} TRITON_CACHE_DIR={cache}/triton"
    assert unit["Environment"] == environment
    batches = (ROOT / "docs" / "batches.md").read_text(encoding="utf-8")
    assert f"--batch-dir /var/lib/{unit['StateDirectory']}/" in batches
    assert f"--uds /run/{unit['RuntimeDirectory']}/" in page


@pytest.mark.parametrize("page", SHOWN, ids=lambda path: path.name)
def test_lists_on_command_lines_are_quoted(page):
    """zsh takes brackets for a pattern, and refuses one that matches no file."""
    assert re.findall(r"--[\w.-]+[ =]\[.*", page.read_text(encoding="utf-8")) == []


def option(words, name, default):
    return words[words.index(name) + 1] if name in words else default


@pytest.mark.parametrize("page", SHOWN, ids=lambda path: path.name)
def test_models_have_the_vocabulary_of_the_data_before_them(page):
    data = None
    for words in commands(page):
        config = option(words, "--config", "")
        if "stu-prepare" in words or "slurm/prepare.sbatch" in words:
            data = None if "--tokenizer" in words else option(words, "--vocab-size", 4096)
        elif data is not None and config.startswith("configs/train"):
            named = yaml.safe_load((ROOT / config).read_text())["model"]["config"]
            shape = yaml.safe_load((ROOT / config).parent.joinpath(named).read_text())
            size = option(words, "--model.config.vocab_size", shape.get("vocab_size", data))
            assert int(size) == int(data), words


def test_files_of_a_model_directory_are_named(tmp_path, code_tokenizer):
    shape = {"width": 16, "num_layers": 2, "num_heads": 2, "max_seq_len": 32}
    model = FlashSTU(ModelConfig(vocab_size=code_tokenizer.vocab_size, **shape))
    save_model(tmp_path / "model", model, code_tokenizer)
    text = "".join(page.read_text() for page in PAGES)
    assert [p.name for p in (tmp_path / "model").iterdir() if f"`{p.name}`" not in text] == []


def test_statuses_of_errors_are_documented():
    text = "".join(path.read_text() for path in (ROOT / "serve" / "server").rglob("*.py"))
    sent = set(re.findall(r"(?:HTTPException|refuse)\((4\d\d)", text)) - {"499"}  # nobody reads it
    page = (ROOT / "docs" / "http-api.md").read_text(encoding="utf-8")
    assert {"403", "409", "413", "431"} <= sent
    assert sent <= set(re.findall(r"4\d\d", page.partition("## Errors")[2]))


def test_variables_that_job_files_read_are_documented():
    files = sorted((ROOT / "slurm").glob("*.sbatch"))
    names = set(re.findall(r"\$\{(STU_\w+):-", "".join(file.read_text() for file in files)))
    page = (ROOT / "docs" / "slurm.md").read_text(encoding="utf-8")
    assert {name for name in names if f"`{name}`" not in page} == set()


def test_public_names_are_in_the_reference():
    text = (ROOT / "docs" / "reference.md").read_text(encoding="utf-8")
    found = set(re.findall(r"^::: .*\.(\w+)$", text, re.MULTILINE))
    assert {*stu.__all__, *serve.__all__} - found == {"__version__"}


@pytest.fixture(scope="module")
def hooks():
    spec = importlib.util.spec_from_file_location("hooks", ROOT / "docs" / "hooks.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_pages_show_examples(hooks):
    page = (ROOT / "docs" / "add-a-mixer.md").read_text(encoding="utf-8")
    assert "class GatedShortConvolution" not in page
    shown = hooks.on_page_markdown(page)
    example = (ROOT / "examples" / "add_a_mixer.py").read_text(encoding="utf-8")
    assert f"```python\n{example}```\n" in shown


def test_pages_show_what_commands_print(hooks):
    before, text, after = hooks.on_page_markdown(
        "before\n<!-- output of stu-health --help -->\nafter <!-- output of it -->"
    ).split("```")
    assert before == "before\n"
    assert after == "\nafter <!-- output of it -->"
    assert text.startswith("text\nusage: stu-health")
    assert "--min-free-gib" in text
    assert text.replace("\n", "").isprintable()
    assert max(map(len, text.splitlines())) <= 80  # what a page of 1,280 pixels has room for
