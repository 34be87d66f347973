"""Nested fields, Arrow files, saved Hugging Face datasets, and sources with URLs."""

import gzip
import json
import re

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from backports import zstd
from fsspec.implementations.memory import MemoryFile, MemoryFileSystem

from stu.common.errors import UserError
from train.data.cli import main
from train.data.mixture import open_sources
from train.data.reading.document import BadInput
from train.data.reading.documents import read_documents
from train.data.reading.remote import RemoteFile
from train.data.reading.sources import find_files
from train.data.shards import Index

TEXTS = ["one\r\n", "zwei: Grüße", "", "三\n\tvier", None]


def texts(*sources, text_key="text", kind=None, **settings):
    """Return the texts of sources. Raises the first BadInput."""
    found = find_files([*map(str, sources)], kind, **settings)
    documents = list(read_documents(found.documents, text_key, found.piece_bytes, kind))
    for document in documents:
        if isinstance(document, BadInput):
            raise document
    return [document.text for document in documents]


def write_arrow(path, table, is_file, **options):
    new = pa.ipc.new_file if is_file else pa.ipc.new_stream
    with new(str(path), table.schema, **options) as writer:
        writer.write_table(table, max_chunksize=3)


def write(path, table):
    if path.suffix == ".parquet":
        pq.write_table(table, path, row_group_size=2)
    else:
        write_arrow(path, table, path.name.startswith("file"))


COLUMNS = ["a.parquet", "file.arrow", "file.FEATHER", "stream.arrow"]


@pytest.mark.parametrize("name", COLUMNS)
@pytest.mark.parametrize(
    "kind", [pa.string(), pa.large_string(), pa.dictionary(pa.int8(), pa.string())]
)
def test_rows_of_columns_are_documents(tmp_path, name, kind):
    column = pa.array(TEXTS * 30).cast(kind)
    table = pa.table({"id": range(150), "text": column})
    write(tmp_path / name, table)
    assert texts(tmp_path / name) == [text or "" for text in TEXTS] * 30
    found = list(read_documents([tmp_path / name]))
    assert (found[149].path, found[149].place) == (tmp_path / name, "row 150")
    assert 0 < sum(document.source_bytes for document in found) <= (tmp_path / name).stat().st_size


NESTED = [{"a": {"b": {"c": text, "x": 1}, "d": 2}} for text in TEXTS] + [{"a": {"b": None}}]


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.jsonl.zst", *COLUMNS])
def test_fields_in_fields(tmp_path, name):
    path = tmp_path / name
    if "jsonl" in name:
        lines = "".join(json.dumps(row) + "\n" for row in NESTED).encode()
        path.write_bytes(
            {".gz": gzip.compress, ".zst": zstd.compress}.get(path.suffix, bytes)(lines)
        )
        where, whole = rf"{name} line 1", "only b, d"
    else:
        write(path, pa.Table.from_pylist([*NESTED, {"a": None}]))
        where, whole = name, "only b, d"
    expected = [text or "" for text in TEXTS] + ([""] if "jsonl" in name else ["", ""])
    assert texts(path, text_key="a.b.c") == expected
    for key, message in [
        ("a.b.z", "no field 'z' in 'a.b', only c, x; name it with --text-key"),
        ("a.z.c", f"no field 'z' in 'a', {whole}; name it with"),
        ("a.d.c", "no field 'c' in 'a.d', as it is"),
        ("a.b", "'a.b' is"),
        ("z.b", "'z', only a; name it with"),
    ]:
        with pytest.raises(BadInput, match=rf"{where}: .*{re.escape(message)}"):
            texts(path, text_key=key)


@pytest.mark.parametrize("name", ["a.jsonl", *COLUMNS])
def test_a_name_with_dots_comes_before_fields_in_fields(tmp_path, name):
    rows = [{"a.b": "flat", "a": {"b": "nested"}}]
    if name == "a.jsonl":
        (tmp_path / name).write_text(json.dumps(rows[0]))
    else:
        write(tmp_path / name, pa.Table.from_pylist(rows))
    if name == "a.parquet":  # the names of its columns are alike
        rows = [{"a.b": "flat"}]
        write(tmp_path / name, pa.Table.from_pylist(rows))
    assert texts(tmp_path / name, text_key="a.b") == ["flat"]


@pytest.mark.parametrize("name", COLUMNS)
@pytest.mark.parametrize("damage", ["empty", "cut", "other"])
def test_damaged_files_are_named(tmp_path, name, damage):
    path = tmp_path / name
    write(path, pa.table({"text": ["words " * 100] * 20}))
    data = path.read_bytes()
    path.write_bytes({"empty": b"", "cut": data[: len(data) // 2], "other": b"x" * 500}[damage])
    with pytest.raises(BadInput, match=rf"{name}: damaged, or not (Parquet|Arrow)") as caught:
        texts(path)
    assert caught.value.kind in ("not Parquet", "not Arrow")


@pytest.mark.parametrize("name", COLUMNS)
def test_columns_that_cannot_be_text(tmp_path, name):
    path = tmp_path / name
    table = pa.table({"text": [1], "words": ["a"], "list": [["a"]]})
    write(path, table)
    for key, message in [
        ("text", f"{name}: column 'text' is int64, not a string"),
        ("list", f"{name}: column 'list' is list"),
        ("none", f"{name}: no column 'none', only text, words, list"),
        ("list.a", f"{name}: no field 'a' in 'list', as it is list"),
    ]:
        with pytest.raises(BadInput, match=re.escape(message)):
            texts(path, text_key=key)
    assert texts(path, text_key="words") == ["a"]


def save_dataset(folder, rows, num_files=2):
    """Write what `datasets.Dataset.save_to_disk` writes."""
    folder.mkdir(parents=True)
    names = [f"data-{i:05d}-of-{num_files:05d}.arrow" for i in range(num_files)]
    size = -(-len(rows) // num_files)
    for number, name in enumerate(names):
        table = pa.Table.from_pylist(rows[number * size : (number + 1) * size])
        write_arrow(folder / name, table, is_file=False)
    state = {"_data_files": [{"filename": name} for name in names], "_split": "train"}
    (folder / "state.json").write_text(json.dumps(state))
    (folder / "dataset_info.json").write_text("{}")


def test_saved_datasets(tmp_path):
    rows = [{"meta": {"text": text}, "label": 1} for text in TEXTS]
    save_dataset(tmp_path / "d" / "train", rows)
    write_arrow(tmp_path / "d" / "train" / "cache-1.arrow", pa.table({"text": ["no"]}), False)
    expected = [text or "" for text in TEXTS]
    assert texts(tmp_path / "d" / "train", text_key="meta.text") == expected
    assert texts(tmp_path / "d", text_key="meta.text") == expected  # a folder like any other
    save_dataset(tmp_path / "d" / "test", rows)
    (tmp_path / "d" / "dataset_dict.json").write_text('{"splits": ["train", "test"]}')
    with pytest.raises(UserError, match=r"splits test, train: name .*d/test or .*d/train"):
        texts(tmp_path / "d")
    state = tmp_path / "d" / "test" / "state.json"
    (tmp_path / "d" / "test" / "data-00001-of-00002.arrow").unlink()
    with pytest.raises(UserError, match=r"data-00001-of-00002\.arrow of the dataset is missing"):
        texts(tmp_path / "d" / "test")
    state.write_text('{"_data_files": [], "_indices_data_files": [{"filename": "i.arrow"}]}')
    with pytest.raises(UserError, match=r"d/test: it selects rows by indices.*save it again"):
        texts(tmp_path / "d" / "test")
    state.write_text("{}")
    with pytest.raises(UserError, match=r"d/test: state\.json is not that of a saved dataset"):
        texts(tmp_path / "d" / "test")


def test_a_dataset_of_the_library(tmp_path):
    """What it writes, as the test above imitates it, without its own reading."""
    datasets = pytest.importorskip("datasets")
    rows = [{"meta": {"text": text}} for text in TEXTS]
    dataset = datasets.Dataset.from_list(rows).select([3, 1, 0])
    datasets.DatasetDict({"train": dataset}).save_to_disk(tmp_path / "d", num_shards={"train": 2})
    found = texts(tmp_path / "d" / "train", text_key="meta.text")
    assert found == [TEXTS[3], TEXTS[1], TEXTS[0]]
    with pytest.raises(UserError, match=r"a dataset with splits train: name .*d/train"):
        texts(tmp_path / "d")


def test_a_kind_by_name(tmp_path):
    (tmp_path / "a.log").write_text("a log\n")
    (tmp_path / "b.py").write_text("b = 1\n")
    assert texts(tmp_path, kind="text") == ["a log\n", "b = 1\n"]
    (tmp_path / "rows.json").write_text('{"text": "row"}\n')
    assert texts(tmp_path / "rows.json", kind="jsonl") == ["row"]
    assert texts(f"{tmp_path}/*.py", kind="text") == ["b = 1\n"]
    with pytest.raises(UserError, match=r"a\.log: not a "):
        texts(tmp_path / "a.log")


@pytest.mark.parametrize("name", COLUMNS)
def test_a_row_that_is_not_utf8_costs_no_other(tmp_path, name):
    raw = pa.array([b"a", b"\xff", None, b"b"], pa.binary())
    table = pa.table({"text": pa.Array.from_buffers(pa.string(), 4, raw.buffers())})
    write(tmp_path / name, table)
    found = list(read_documents(find_files([str(tmp_path / name)]).documents))
    assert [getattr(one, "text", one) for one in found[:1] + found[2:]] == ["a", "", "b"]
    assert (found[1].place, found[1].kind) == ("row 2", "not UTF-8")


@pytest.fixture
def memory():
    """A file system in memory that is empty afterwards."""
    system = fsspec.filesystem("memory")
    yield system
    system.store.clear()
    system.pseudo_dirs[:] = [""]


def fill(system, folder):
    rows = "".join(json.dumps({"text": text}) + "\n" for text in TEXTS).encode()
    system.pipe(f"{folder}/b/rows.jsonl", rows)
    system.pipe(f"{folder}/b/rows.jsonl.gz", gzip.compress(rows))
    system.pipe(f"{folder}/a.txt.zst", zstd.compress(b"text"))
    system.pipe(f"{folder}/.hidden.txt", b"hidden")
    system.pipe(f"{folder}/.git/c.txt", b"hidden")
    system.pipe(f"{folder}/picture.png", b"")
    with system.open(f"{folder}/c.parquet", "wb") as file:
        pq.write_table(pa.table({"text": TEXTS}), file)
    with system.open(f"{folder}/d.arrow", "wb") as file:
        table = pa.table({"text": TEXTS})
        with pa.ipc.new_file(file, table.schema) as writer:
            writer.write_table(table)


@pytest.mark.parametrize("scheme", ["memory", "file"])
def test_urls(memory, tmp_path, scheme):
    base = "/data" if scheme == "memory" else str(tmp_path / "data")
    system = fsspec.filesystem(scheme, auto_mkdir=True)
    fill(system, base)
    url, rows = f"{scheme}://{base}", [text or "" for text in TEXTS]
    expected = ["text", *rows, *rows, *rows, *rows]
    for source in (url, f"{url}/"):
        assert texts(source) == expected
        files = find_files([source])
        assert (files.num_hidden, [file.name for file in files.skipped]) == (2, ["picture.png"])
    assert texts(f"{url}/b/rows.jsonl") == rows
    assert texts(f"{url}/**/*.jsonl*") == rows * 2
    assert texts(f"{url}/b/rows.jsonl", f"{url}/b") == rows * 2  # each file once
    sizes = [system.size(f"{base}/b/{name}") for name in ("rows.jsonl", "rows.jsonl.gz")]
    assert [file.size for file in find_files([f"{url}/b"]).documents] == sizes
    system.pipe(f"{base}/b/rows.jsonl", b'{"text": "a"}\n{"body": 1}\n')
    with pytest.raises(BadInput, match=r"rows\.jsonl line 2: no field 'text', only body") as caught:
        texts(f"{url}/b/rows.jsonl")
    assert f"{scheme}://" in str(caught.value)
    for missing in ("none.txt", "none-*.txt"):
        with pytest.raises(UserError, match=rf"source {scheme}://.*{re.escape(missing)}: no such"):
            texts(f"{url}/{missing}")
    with pytest.raises(UserError, match=r"picture\.png: no \.txt, "):
        texts(f"{url}/picture.png")


def test_urls_that_cannot_be_opened():
    with pytest.raises(UserError, match=r"^source nonsense://a/b: .*[Pp]rotocol not known"):
        texts("nonsense://a/b")
    with pytest.raises(UserError, match=r"^source memory:///none: cannot be read \(FileNotFound"):
        RemoteFile("memory:///none", 3).open()


@pytest.mark.parametrize("name", ["c.parquet", "d.arrow", "b/rows.jsonl", "b/rows.jsonl.gz"])
def test_errors_of_the_network_are_no_faults_of_a_file(memory, monkeypatch, name):
    """They would leave out the rest of the file where faults are skipped."""
    fill(memory, "/data")

    def fail(*_):
        raise TimeoutError  # without an errno, as fsspec's

    monkeypatch.setattr(MemoryFile, "read", fail)
    message = rf"cannot be read \(TimeoutError: \).*memory:///data/{re.escape(name)}"
    with pytest.raises(OSError, match=message):
        texts(f"memory:///data/{name}")


def test_the_hub_is_read_where_that_is_allowed(monkeypatch):
    class Hub(MemoryFileSystem):
        protocol = ("hf",)
        store, pseudo_dirs = {}, [""]

        @classmethod
        def _strip_protocol(cls, path):
            return "/" + path.removeprefix("hf://").strip("/")

        def unstrip_protocol(self, name):
            return "hf:/" + name

    fsspec.register_implementation("hf", Hub, clobber=True)
    try:
        for name in ("HF_DATASETS_OFFLINE", "HF_HUB_OFFLINE"):
            monkeypatch.delenv(name, raising=False)
        Hub().pipe("/datasets/org/name/a.jsonl", b'{"text": "from the hub"}\n')
        source = "hf://datasets/org/name/*.jsonl"
        with pytest.raises(UserError, match=r"source hf://.* needs --allow-hub"):
            texts(source)
        assert texts(source, allow_hub=True) == ["from the hub"]
        for name in ("HF_DATASETS_OFFLINE", "HF_HUB_OFFLINE"):
            monkeypatch.setenv(name, "1")
            with pytest.raises(UserError, match=f"{name} is set, so the Hugging Face Hub is not"):
                texts(source, allow_hub=True)
            monkeypatch.setenv(name, "0")
        assert texts(source, allow_hub=True) == ["from the hub"]
    finally:
        from fsspec.registry import _registry

        _registry.pop("hf")


def test_a_mixture_of_every_kind(memory, tmp_path, capsys):
    lines = [f"a line of text, number {i}" for i in range(40)]
    save_dataset(tmp_path / "saved", [{"a": {"b": line}} for line in lines])
    pq.write_table(pa.table({"text": lines}), tmp_path / "rows.parquet")
    (tmp_path / "notes.log").write_text("\n\n".join(lines * 30))
    rows = "".join(json.dumps({"text": line}) + "\n" for line in lines).encode()
    memory.pipe("/bucket/rows.jsonl.zst", zstd.compress(rows))
    (tmp_path / "sources.yaml").write_text(f"""
- {{name: saved, path: {tmp_path}/saved, text_key: a.b, weight: 2}}
- {{name: parquet, path: {tmp_path}/rows.parquet}}
- {{name: notes, path: {tmp_path}/notes.log, kind: text}}
- {{name: bucket, path: 'memory://bucket/*.jsonl.zst'}}
""")
    arguments = [str(tmp_path / "sources.yaml"), "--workers=1", "--tokenizer=bytes"]
    arguments.append("--validation-fraction=0.2")
    assert main([*arguments, f"--output={tmp_path / 'data'}"]) == 0
    documents = {s.name: s.train.index.num_read for s in open_sources(tmp_path / "data")}
    assert documents["saved"] == documents["parquet"] == documents["bucket"] == 40
    for part in ("0/2", "1/2"):
        assert main([*arguments, f"--output={tmp_path / 'parts'}", f"--part={part}"]) == 0
    for name in documents:
        index, other = (Index.load(tmp_path / made / name) for made in ("data", "parts"))
        assert index.num_documents == other.num_documents
    capsys.readouterr()
    wrong = (tmp_path / "sources.yaml").read_text().replace("a.b", "a.c")
    (tmp_path / "sources.yaml").write_text(wrong)
    assert main([*arguments, f"--output={tmp_path / 'x'}"]) == 2
    error = capsys.readouterr().err
    assert re.search(r"source saved: .*/data-00000-of-00002\.arrow: no field 'c' in 'a'", error)
