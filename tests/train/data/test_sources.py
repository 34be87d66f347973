"""Documents from every kind of source, and clear errors about what is not text."""

import builtins
import csv
import gzip
import io
import json
import os
import tracemalloc

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from backports import zstd

from stu.common.errors import UserError
from train.data.reading.document import BadInput, Document
from train.data.reading.documents import read_documents
from train.data.reading.sources import find_files, kind_of

ROW = b'{"text": "a"}\n'
TEXTS = ["one\r\n", "zwei: Grüße", "", "三\n\tvier"]


def _texts(path, text_key="text"):
    return [document.text for document in _documents(path, text_key=text_key)]


def _documents(*sources, **settings):
    """Return the documents of sources. Raises the first BadInput."""
    documents = list(read_documents(find_files([*map(str, sources)]).documents, **settings))
    for document in documents:
        if isinstance(document, BadInput):
            raise document
    return documents


def _write_rows(path, texts, text_key="text"):
    if path.suffix.lower() == ".parquet":
        pq.write_table(pa.table({"id": range(len(texts)), text_key: texts}), path)
        return
    if ".csv" in path.name.lower():
        file = io.StringIO()
        csv.writer(file).writerows([("id", text_key), *enumerate(texts)])
        lines = file.getvalue()
    else:
        rows = [json.dumps({"id": i, text_key: text}) for i, text in enumerate(texts)]
        lines = "".join(row + "\n" for row in rows)
    _write(path, lines.encode())


def _write(path, data):
    """Write a file, compressed if its name says so."""
    compress = {".gz": gzip.compress, ".zst": zstd.compress}.get(path.suffix.lower(), bytes)
    path.write_bytes(compress(data))


ROWS = ["a.jsonl", "a.jsonl.gz", "a.JSONL.zst", "a.csv", "a.csv.gz", "A.CSV.ZST", "a.Parquet"]


@pytest.mark.parametrize("name", ROWS)
@pytest.mark.parametrize("text_key", ["text", "content"])
def test_rows_are_documents(tmp_path, name, text_key):
    _write_rows(tmp_path / name, [*TEXTS, None], text_key)
    assert _texts(tmp_path / name, text_key) == [*TEXTS, ""]


@pytest.mark.parametrize("name", ["a.txt", "a.md", "a.TXT.gz", "a.txt.zst", *ROWS])
def test_source_bytes_add_up_to_the_file(tmp_path, name):
    path = tmp_path / name
    if kind_of(path) == "text":
        _write(path, "Grüße\n\n".encode() * 5000)
    else:
        _write_rows(path, [f"document {i} " * 50 for i in range(333)])
    documents = _documents(path, piece_bytes=10_000)
    assert sum(document.source_bytes for document in documents) == path.stat().st_size
    assert min(document.source_bytes for document in documents) >= 0


def test_a_text_file_is_one_document_byte_for_byte(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfa\r\n\r\nb\xc3\xa9 ")
    assert _texts(tmp_path / "a.txt") == ["a\r\n\r\nbé "]  # only the byte order mark goes


@pytest.mark.parametrize("name", ["a.txt", "a.txt.gz", "a.md.zst"])
def test_a_large_text_file_comes_in_pieces(tmp_path, name):
    """Pieces end at blank lines, else at line ends, else between characters."""
    text = (
        "\ufeff" + "first\n\nsecond\nline\n\n" + "a line of words\n" * 9 + "é" * 40 + "\r\n\r\nend"
    )
    _write(tmp_path / name, text.encode())
    pieces = _documents(tmp_path / name, piece_bytes=32)
    assert "".join(piece.text for piece in pieces) == text[1:]
    assert max(len(piece.text.encode()) for piece in pieces) <= 32
    assert [piece.starts for piece in pieces] == [True] + [False] * (len(pieces) - 1)
    assert [piece.ends for piece in pieces] == [False] * (len(pieces) - 1) + [True]
    assert [piece.text for piece in pieces][:2] == [
        "first\n\nsecond\nline\n\n",
        "a line of words\n" * 2,
    ]
    assert "é" * 16 in [piece.text for piece in pieces]


@pytest.mark.parametrize("size", range(4, 12))
def test_pieces_of_any_size(tmp_path, size):
    """No character is cut, and the file may be exactly as long as a piece."""
    (tmp_path / "a.txt").write_text("añ€😀\n\n\nb")
    pieces = [piece.text for piece in _documents(tmp_path / "a.txt", piece_bytes=size)]
    assert "".join(pieces) == "añ€😀\n\n\nb"


def test_a_large_file_is_not_read_at_once(tmp_path):
    with gzip.open(tmp_path / "a.txt.gz", "wb", compresslevel=1) as file:
        for _ in range(30):
            file.write(b"words and words\n" * 2**16)  # 1 MiB
    tracemalloc.start()
    total = sum(len(piece[0]) for piece in read_documents([tmp_path / "a.txt.gz"]))
    most = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert total == 30 * 2**20
    assert most < 8 * 2**20


def test_pieces_are_small_in_a_small_corpus(tmp_path):
    for name, size in [("a.txt", 100), ("b.txt", 2**19), ("c.txt", 2**28)]:
        with (tmp_path / name).open("wb") as file:
            file.truncate(size)
    assert find_files([str(tmp_path / "a.txt")]).piece_bytes == 2**12
    assert find_files([str(tmp_path / "[ab].txt")]).piece_bytes == 2**12
    assert find_files([str(tmp_path)]).piece_bytes == 2**20


def test_reading_continues_after_bad_rows(tmp_path):
    rows = [ROW, b"{", b'{"b": 1}\n', b"\xff\n", b'{"text": 1}\n', ROW]
    (tmp_path / "a.jsonl").write_bytes(rows[0] + rows[1] + b"\n" + b"".join(rows[2:]))
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(ROW * 50, mtime=0)[:-9])
    (tmp_path / "c.txt").write_bytes(b"good\n\n" + b"\xff" * 9 + b"\n\nmore")
    (tmp_path / "d.parquet").write_bytes(b"")
    _write_rows(tmp_path / "e.csv", ["last"])
    found = list(read_documents(find_files([str(tmp_path)]).documents, piece_bytes=12))
    bad = [item for item in found if isinstance(item, BadInput)]
    documents = [item for item in found if isinstance(item, Document)]
    assert [d.text for d in documents] == ["a"] * 52 + ["good\n\n", "more", "last"]
    marks = [(d.starts, d.ends) for d in documents[52:]]
    assert marks == [(True, False), (True, True), (True, True)]
    assert [(b.path.name, b.place, b.kind) for b in bad] == [
        ("a.jsonl", "line 2", "not JSON"),
        ("a.jsonl", "line 3", "no field"),
        ("a.jsonl", "line 4", "not UTF-8"),
        ("a.jsonl", "line 5", "not a string"),
        ("b.jsonl.gz", "line 51", "damaged archive"),
        ("c.txt", "", "not UTF-8"),
        ("d.parquet", "", "not Parquet"),
    ]


def test_a_quote_that_is_not_closed_is_an_error(tmp_path, monkeypatch):
    monkeypatch.setattr("train.data.reading.rows.MOST_FIELD_CHARS", 1000)
    (tmp_path / "a.csv").write_text('text\n"never closed\n' + "and more\n" * 200)
    with pytest.raises(BadInput, match=r"a\.csv line 2: not CSV \(field larger"):
        _texts(tmp_path / "a.csv")


def test_a_folder_that_cannot_be_read_is_an_error(tmp_path, monkeypatch):
    (tmp_path / "b").mkdir()
    (tmp_path / "a.txt").write_text("a")
    scan = os.scandir

    def refusing(path):
        if str(path).endswith("b"):
            raise PermissionError(13, "Permission denied", str(path))
        return scan(path)

    monkeypatch.setattr(os, "scandir", refusing)
    with pytest.raises(PermissionError, match="Permission denied"):
        find_files([str(tmp_path)])


def test_one_file_by_several_paths_is_read_once(tmp_path):
    (tmp_path / "a" / "b").mkdir(parents=True)
    (tmp_path / "a" / "one.txt").write_text("one")
    (tmp_path / "a" / "two.txt").symlink_to("one.txt")
    (tmp_path / "a" / "gone.txt").symlink_to("nothing.txt")
    (tmp_path / "a" / "b" / "again").symlink_to(tmp_path / "a")  # round in a circle
    (tmp_path / "c").symlink_to(tmp_path / "a")
    sources = [tmp_path / "a", tmp_path / "c", tmp_path / "a/../a/o*.txt"]
    files = find_files([str(source) for source in sources])
    assert files.documents == [tmp_path / "a" / "one.txt"]
    assert files.num_repeated == 4
    assert [path.name for path in files.skipped] == ["gone.txt", "gone.txt"]


def _make_files(folder, *names):
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(name)


def test_a_folder_is_searched_and_sorted(tmp_path):
    """Hidden files and files of another kind are left out; a hidden folder can be a source."""
    hidden = ".b.txt", ".git/c.txt", "d/.ipynb_checkpoints/e.txt"
    _make_files(tmp_path, "b.txt", "a/z.txt", "a/b/c.txt", "notes.rst", "a/picture.png", *hidden)
    files = find_files([str(tmp_path)])
    assert [path.name for path in files.documents] == ["c.txt", "z.txt", "b.txt"]
    assert {path.name for path in files.skipped} == {"notes.rst", "picture.png"}
    assert files.num_hidden == 3
    assert _texts(tmp_path / ".git") == [".git/c.txt"]


def test_a_glob_names_each_file_once(tmp_path):
    """A file whose name looks like a glob is that file."""
    _make_files(tmp_path, "b.txt", "a.txt", "c.jsonl", "d/e.txt")
    found = find_files([f"{tmp_path}/**/*.txt", f"{tmp_path}/a.txt"]).documents
    assert found == [tmp_path / "a.txt", tmp_path / "b.txt", tmp_path / "d" / "e.txt"]
    _make_files(tmp_path, "a[1].txt", "a1.txt")
    assert _texts(tmp_path / "a[1].txt") == ["a[1].txt"]


def test_stdlib():
    paths = {path.name: path for path in find_files(["stdlib:"]).documents}
    assert len(paths) > 400
    parts = {part for path in paths.values() for part in path.parts[-3:-1]}
    assert not {"test", "tests", "site-packages"} & parts
    (document,) = read_documents([paths["heapq.py"]])
    assert "François Pinard" in document.text


def test_python_sources_have_the_encoding_they_declare(tmp_path, monkeypatch):
    """PEP 263. Files that cannot be decoded are skipped."""
    _make_files(tmp_path, "test/left_out.py")
    (tmp_path / "good.py").write_bytes("# -*- coding: latin-1 -*-\n'é'\n".encode("latin-1"))
    (tmp_path / "bad.py").write_bytes(b"x = '\xff'\n")
    (tmp_path / "odd.py").write_bytes(b"# coding: no-such-thing\n")
    monkeypatch.setattr("sysconfig.get_path", lambda name: str(tmp_path))
    files = find_files(["stdlib:"])
    assert files.skipped == [tmp_path / "bad.py", tmp_path / "odd.py"]
    (document,) = read_documents(files.documents)
    assert document.text.endswith("'é'\n")


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("missing.txt", "no such file or folder"),
        ("none-*.txt", "no such file or folder"),
        ("empty", r"no .txt, .md, .jsonl, .csv \(each also as .gz or .zst\), .parquet or .arrow f"),
        ("picture.png", "not a .txt, .md, .jsonl, .csv .*, .parquet or .arrow file"),
        ("*.png", "not a .txt, .md, .jsonl, .csv .*, .parquet or .arrow file"),
        ("link.txt", "link.txt: a broken link"),
        ("l*.txt", "link.txt: a broken link"),
        ("pipe.txt", "pipe.txt: neither a file nor a folder"),
        ("rows.json", "file; write its objects to a .jsonl file, each on a line of its own"),
    ],
)
def test_sources_without_files_are_refused(tmp_path, source, message):
    (tmp_path / "empty").mkdir()
    (tmp_path / "picture.png").write_bytes(b"")
    (tmp_path / "rows.json").write_bytes(b"[]")
    (tmp_path / "link.txt").symlink_to("nothing.txt")
    os.mkfifo(tmp_path / "pipe.txt")
    with pytest.raises(UserError, match=message):
        find_files([f"{tmp_path}/{source}"])


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", b"abc\xe9def", r"a\.txt: not UTF-8 at byte 3.*iconv -f LATIN1"),
        ("a.txt", "abc".encode("utf-16"), r"a\.txt: not UTF-8 at byte 0.*iconv -f UTF-16"),
        ("a.jsonl", b'{"text": "a"}\n{"text": "\xff"}\n', r"a\.jsonl line 2: not UTF-8 at byte 24"),
        ("a.jsonl", b'{"text": "a"}\n{"text": \n', r"a\.jsonl line 2: not JSON"),
        ("a.jsonl", b"[" * 100_000, r"a\.jsonl line 1: not JSON"),
        ("a.jsonl", b'{"body": "a", "id": 1}\n', "no field 'text', only body, id; .*--text-key"),
        ("a.jsonl", b'["text"]\n', "line 1: no field 'text'"),
        ("a.jsonl", b'{"text": 5}\n', "line 1: field 'text' is int, not a string"),
        ("a.jsonl", b'{"text": "\\ud800"}\n', "line 1: .* surrogate"),
        ("a.jsonl.gz", gzip.compress(ROW * 99, mtime=0)[:-9], "line 100: damaged gzip file"),
        ("a.jsonl.zst", zstd.compress(ROW * 99)[:-9], "damaged zstd file"),
        ("a.txt.gz", gzip.compress(b"text" * 99, mtime=0)[:-9], "damaged gzip file"),
        ("a.parquet", b"not parquet at all", r"a\.parquet: damaged, or not Parquet"),
        (
            "a.csv",
            b"id,words\n1,a\n",
            "line 1: 0 fields 'text' in the header, which has id, words; .*text-key",
        ),
        ("a.csv", b"text,text\n1,a\n", "line 1: 2 fields 'text' in the header"),
        ("a.csv", b"id,text\n1,a\n\n2\n", "line 4: 1 fields, but 'text' is number 2"),
        ("a.csv", b"text\na\n\xff\n", r"a\.csv line 3: not UTF-8"),
        ("a.csv", "text\na\n".encode("utf-16"), r"a\.csv line 1: not (UTF-8|CSV)"),
        ("a.csv", b"text\nHello, world\n", "line 2: 2 fields, and the header has 1: put texts"),
        ("a.csv", b'id,text\n1,"never closed\n2,b\n', "line 2: not CSV .unexpected end"),
    ],
)
def test_errors_name_file_and_line(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(BadInput, match=message):
        _texts(tmp_path / name)


def test_a_row_of_a_csv_file_that_cannot_be_read_costs_no_other(tmp_path):
    rows = [b"%d,row %d,b" % (i, i) for i in range(5000)]
    rows[7] = b"7,caf\xe9,b"
    rows[8] = b"8,row 8,caf\xe9"  # in a column that is not read
    rows[9] = b"9,row, 9,b"
    rows[10] = b"10,row 10,b,,"  # nothing follows
    rows[11] = b'11,"He said "hi" to me",b'
    (tmp_path / "a.csv").write_bytes(b"\n".join([b"id,text,other", *rows]))
    found = list(read_documents(find_files([str(tmp_path)]).documents))
    bad = [(one.place, one.kind) for one in found if isinstance(one, BadInput)]
    assert bad == [
        ("line 9", "not UTF-8"),
        ("line 11", "too many fields"),
        ("line 13", "not CSV"),
    ]
    texts = [one.text for one in found if isinstance(one, Document)]
    assert texts == [f"row {i}" for i in range(5000) if i not in (7, 9, 11)]


def test_parquet_columns_are_checked(tmp_path):
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"body": ["a"], "text": [1]}), path)
    with pytest.raises(BadInput, match=r"a\.parquet: column 'text' is int64, not a string"):
        _texts(path)
    with pytest.raises(BadInput, match="no column 'words', only body, text; name it with"):
        _texts(path, "words")
    assert _texts(path, "body") == ["a"]


def test_parquet_without_pyarrow(tmp_path, monkeypatch):
    _write_rows(tmp_path / "a.parquet", TEXTS)
    original = builtins.__import__

    def without_pyarrow(name, *args, **kwargs):
        if name.startswith("pyarrow"):
            raise ImportError(name)
        return original(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without_pyarrow)
    with pytest.raises(UserError, match=r"pip install '\.\[data\]'"):
        _texts(tmp_path / "a.parquet")
