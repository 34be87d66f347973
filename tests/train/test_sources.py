"""Documents from every kind of source, and a clear error for what is not text."""

import builtins
import gzip
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from train.sources import find_files, read_documents

TEXTS = ["one\r\n", "zwei: Grüße", "", "三\n\tvier"]


def _texts(path: Path, text_key: str = "text") -> list[str]:
    files = find_files([str(path)]).documents
    return [document.text for document in read_documents(files, text_key)]


def _write_rows(path: Path, texts: list[Any], text_key: str = "text") -> None:
    if path.suffix == ".parquet":
        pq.write_table(pa.table({"id": range(len(texts)), text_key: texts}), path)
        return
    lines = "".join(json.dumps({"id": i, text_key: text}) + "\n" for i, text in enumerate(texts))
    path.write_bytes(gzip.compress(lines.encode()) if path.suffix == ".gz" else lines.encode())


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.parquet"])
@pytest.mark.parametrize("text_key", ["text", "content"])
def test_rows_are_documents(tmp_path: Path, name: str, text_key: str) -> None:
    _write_rows(tmp_path / name, [*TEXTS, None], text_key)
    assert _texts(tmp_path / name, text_key) == [*TEXTS, ""]


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl", "a.jsonl.gz", "a.parquet"])
def test_source_bytes_add_up_to_the_file(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    if name == "a.txt":
        path.write_bytes("Grüße".encode())
    else:
        _write_rows(path, [f"document {i} " * 50 for i in range(333)])
    documents = list(read_documents([path]))
    assert sum(document.source_bytes for document in documents) == path.stat().st_size
    assert min(document.source_bytes for document in documents) >= 0


def test_a_text_file_is_one_document_byte_for_byte(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfa\r\n\r\nb\xc3\xa9 ")
    assert _texts(tmp_path / "a.txt") == ["a\r\n\r\nbé "]  # only the byte order mark goes


def test_folder_is_searched_and_sorted(tmp_path: Path) -> None:
    for name in ["b.txt", "a/z.txt", "a/b/c.txt", "notes.md", "a/picture.png"]:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(name)
    files = find_files([str(tmp_path)])
    assert [d.text for d in read_documents(files.documents)] == ["a/b/c.txt", "a/z.txt", "b.txt"]
    assert {path.name for path in files.skipped} == {"notes.md", "picture.png"}


def test_glob_and_repeated_sources_give_each_file_once(tmp_path: Path) -> None:
    for name in ["b.txt", "a.txt", "c.jsonl", "d/e.txt"]:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("x")
    found = find_files([f"{tmp_path}/**/*.txt", f"{tmp_path}/a.txt"]).documents
    assert found == [tmp_path / "a.txt", tmp_path / "b.txt", tmp_path / "d" / "e.txt"]


def test_a_file_whose_name_looks_like_a_glob_is_that_file(tmp_path: Path) -> None:
    (tmp_path / "a[1].txt").write_text("bracket")
    (tmp_path / "a1.txt").write_text("other")
    assert _texts(tmp_path / "a[1].txt") == ["bracket"]


def test_stdlib() -> None:
    files = find_files(["stdlib:"])
    names = [path.name for path in files.documents]
    assert len(names) > 400
    assert "argparse.py" in names
    assert not {"test", "tests", "site-packages"} & {
        part for path in files.documents for part in path.parts[-3:-1]
    }
    some = [path for path in files.documents if path.name in ("argparse.py", "heapq.py")]
    texts = [document.text for document in read_documents(some)]
    assert "class ArgumentParser" in texts[0]
    assert "François Pinard" in texts[1]


def test_python_sources_are_read_as_pep_263_says(tmp_path: Path) -> None:
    (tmp_path / "a.py").write_bytes("# -*- coding: latin-1 -*-\n'é'\n".encode("latin-1"))
    (document,) = read_documents([tmp_path / "a.py"])
    assert document.text.endswith("'é'\n")


def test_python_sources_that_cannot_be_decoded_are_skipped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "test").mkdir()
    (tmp_path / "test" / "left_out.py").write_text("pass")
    (tmp_path / "good.py").write_text("pass")
    (tmp_path / "bad.py").write_bytes(b"x = '\xff'\n")
    (tmp_path / "odd.py").write_bytes(b"# coding: no-such-thing\n")
    monkeypatch.setattr("sysconfig.get_path", lambda name: str(tmp_path))
    files = find_files(["stdlib:"])
    assert files.documents == [tmp_path / "good.py"]
    assert files.skipped == [tmp_path / "bad.py", tmp_path / "odd.py"]


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("missing.txt", "no such file or folder"),
        ("none-*.txt", "no such file or folder"),
        ("empty", "no .txt, .jsonl, .jsonl.gz or .parquet file in this folder"),
        ("picture.png", "not a .txt, .jsonl, .jsonl.gz or .parquet file"),
        ("*.png", "not a .txt, .jsonl, .jsonl.gz or .parquet file"),
    ],
)
def test_sources_that_name_nothing(tmp_path: Path, source: str, message: str) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "picture.png").write_bytes(b"")
    with pytest.raises(ValueError, match=message):
        find_files([f"{tmp_path}/{source}"])


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", b"abc\xe9def", r"a\.txt: not UTF-8 at byte 3"),
        ("a.jsonl", b'{"text": "a"}\n{"text": "\xff"}\n', r"a\.jsonl: not UTF-8 at byte 24"),
        ("a.jsonl", b'{"text": "a"}\n{"text": \n', r"a\.jsonl line 2: not JSON"),
        ("a.jsonl", b"[" * 100_000, r"a\.jsonl line 1: not JSON"),
        ("a.jsonl", b'{"body": "a", "id": 1}\n', "no field 'text', only body, id; .*--text-key"),
        ("a.jsonl", b'["text"]\n', "line 1: no field 'text'"),
        ("a.jsonl", b'{"text": 5}\n', "line 1: field 'text' is int, not a string"),
        ("a.jsonl", b'{"text": "\\ud800"}\n', "line 1: .* surrogate"),
        ("a.jsonl.gz", b'{"text": "a"}\n', r"a\.jsonl\.gz: broken gzip file"),
        ("a.jsonl.gz", gzip.compress(b'{"text": "a"}\n' * 99, mtime=0)[:-9], "broken gzip file"),
        ("a.parquet", b"not parquet at all", r"a\.parquet: "),
    ],
)
def test_what_is_not_readable_text_is_named(
    tmp_path: Path, name: str, content: bytes, message: str
) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        _texts(tmp_path / name)


def test_parquet_columns_are_checked(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"body": ["a"], "text": [1]}), path)
    with pytest.raises(ValueError, match=r"a\.parquet: column 'text' is int64, not a string"):
        _texts(path)
    with pytest.raises(ValueError, match="no column 'words', only body, text; name it with"):
        _texts(path, "words")
    assert _texts(path, "body") == ["a"]


def test_parquet_without_pyarrow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _write_rows(tmp_path / "a.parquet", TEXTS)
    original = builtins.__import__

    def without_pyarrow(name: str, *args: Any, **kwargs: Any) -> Any:
        if name.startswith("pyarrow"):
            raise ImportError(name)
        return original(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without_pyarrow)
    with pytest.raises(ValueError, match=r"pip install 'stu\[data\]'"):
        _texts(tmp_path / "a.parquet")
