"""Inputs of `stu-generate`: compressed files, Parquet, folders, pipes, and inputs that change."""

import gzip
import json
import os
import shutil
import signal
import subprocess
import threading
from itertools import count

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from backports import zstd

from serve.batch import checked_file
from serve.batch.checked_file import Changed
from serve.batch.source import InputDigest, open_input
from serve.engine.engine import Engine
from stu.common.errors import UserError
from stu.model import FlashSTU
from stu.model_dir import load_model, save_model
from tests import forked
from tests.serve.conftest import generate, read_rows, rows_in_order

ROWS = [{"id": f"r{number}", "prompt": "def f(x)"[: number % 9]} for number in range(40)]
LINES = [json.dumps(row).encode() + b"\n" for row in ROWS]
TWO_AT_ONCE = ["--max-running", "2"]


@pytest.fixture
def before_step(monkeypatch):
    """Return a function of a step's number and what to call before that step."""

    def patch(number, act):
        step, steps = Engine.step, count(1)

        def act_and_step(self):
            if next(steps) == number:
                act()
            return step(self)

        monkeypatch.setattr(Engine, "step", act_and_step)

    return patch


@pytest.fixture
def model_copy(tmp_path, model_directory):
    return shutil.copytree(model_directory, tmp_path / "model")


def replaced(path):
    other = path.with_name("other")
    other.write_bytes(path.read_bytes().replace(b"r39", b"r99"))
    os.replace(other, path)


def truncated(path):
    os.truncate(path, path.stat().st_size - 40)


def appended(path):
    with path.open("ab") as file:
        file.write(b'{"id": "r40", "prompt": "x"}\n')


def same_size_and_time(path):
    before = path.stat()
    with path.open("r+b") as file:
        file.write(path.read_bytes().replace(b"r39", b"r99"))
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


@pytest.mark.parametrize(
    "change",
    [
        *[truncated, same_size_and_time, os.unlink],
        *(pytest.param(change, marks=pytest.mark.slow) for change in (replaced, appended)),
    ],
)
def test_input_that_changes_while_it_is_read_is_refused(
    model_directory, source, target, before_step, expected, monkeypatch, capsys, change
):
    old = source.read_bytes()
    monkeypatch.setattr(checked_file, "MIN_BLOCK_BYTES", 256)
    before_step(12, lambda: change(source))
    assert generate(model_directory, source, target, *TWO_AT_ONCE) == 2
    assert f"input {source}: has changed since this run began" in capsys.readouterr().err
    monkeypatch.undo()
    written = rows_in_order(target)
    assert written
    assert all(row == expected[row["row"]] for row in written)
    if source.exists():
        assert generate(model_directory, source, target) == 2
        assert "was begun with input=" in capsys.readouterr().err
    source.write_bytes(old)
    assert generate(model_directory, source, target) == 0
    assert rows_in_order(target) == expected


def test_input_that_is_written_while_it_is_hashed_is_refused(source, monkeypatch):
    hashed = checked_file._hash

    def append_and_hash(block):
        appended(source)
        return hashed(block)

    monkeypatch.setattr(checked_file, "_hash", append_and_hash)
    with pytest.raises(UserError, match="is being written; give the command again when it is"):
        InputDigest.of(source)


def export_another(path, code_model, tokenizer):
    torch.manual_seed(5)
    save_model(path, FlashSTU(code_model.config), tokenizer, {"max_new_tokens": 9}, overwrite=True)


def test_model_that_is_replaced_before_it_is_loaded_is_refused(
    model_copy, source, target, code_model, code_tokenizer, monkeypatch, capsys
):
    def export_and_load(*arguments):
        export_another(model_copy, code_model, code_tokenizer)
        return load_model(*arguments)

    monkeypatch.setattr("serve.parallel.loading.load_model", export_and_load)
    assert generate(model_copy, source, target) == 2
    assert "model.safetensors changed while this run loaded it" in capsys.readouterr().err
    assert read_rows(target) == []


def test_model_that_is_replaced_after_loading_changes_no_row(
    model_copy, source, target, code_model, code_tokenizer, before_step, expected
):
    before_step(12, lambda: export_another(model_copy, code_model, code_tokenizer))
    assert generate(model_copy, source, target) == 0
    assert rows_in_order(target) == expected


def test_run_whose_model_was_overwritten_in_place_cannot_resume(
    model_copy, source, target, before_step, monkeypatch, capsys
):
    weights = model_copy / "model.safetensors"
    old = weights.read_bytes()

    def overwrite():
        with weights.open("r+b") as file:
            file.seek(-400, os.SEEK_END)
            file.write(bytes(400))

    before_step(12, overwrite)
    assert generate(model_copy, source, target) == 2
    assert "was overwritten during this run" in capsys.readouterr().err
    monkeypatch.undo()
    weights.write_bytes(old)
    assert generate(model_copy, source, target) == 2
    assert "rows may be of either model; start anew with --overwrite" in capsys.readouterr().err
    assert generate(model_copy, source, target, "--overwrite") == 0


def test_parts_of_different_inputs_are_refused(model_directory, source, target, capsys):
    assert generate(model_directory, source, target, "--part", "0/2") == 0
    appended(source)
    assert generate(model_directory, source, target, "--part", "1/2") == 2
    assert "out.0-of-2.jsonl: was begun with input=" in capsys.readouterr().err
    assert generate(model_directory, source, target, "--part", "1/2", "--overwrite") == 0


@pytest.mark.parametrize("compress", [gzip.compress, zstd.compress])
def test_compressed_input_is_decoded_and_resumed(
    model_directory, source, target, expected, compress
):
    half = len(LINES) // 2
    source.write_bytes(compress(b"".join(LINES[:half])) + compress(b"".join(LINES[half:])))
    assert generate(model_directory, source, target) == 0
    assert rows_in_order(target) == expected
    lines = target.read_bytes().splitlines(keepends=True)
    target.write_bytes(b"".join(lines[:20]) + lines[20][:10])
    assert generate(model_directory, source, target) == 0
    assert rows_in_order(target) == expected


@pytest.mark.parametrize("devices", ["cpu", "cpu,cpu"])
def test_rows_before_damage_are_written(
    model_directory, source, target, expected, monkeypatch, capsys, devices
):
    monkeypatch.setattr("sys.executable", forked.python())  # of workers
    compressed = gzip.compress(b"".join(LINES))
    source.write_bytes(compressed[:-30])
    assert generate(model_directory, source, target, "--devices", devices) == 2
    written = rows_in_order(target)
    assert written == expected[: len(written)]
    assert len(written) > 10
    error = capsys.readouterr().err
    assert f"input {source}: damaged gzip file (" in error
    assert f"copy or write it again; {target} has {len(written)} rows" in error


def test_parquet_inside_a_compressed_file_is_refused(tmp_path, model_directory, target, capsys):
    pq.write_table(pa.table({"prompt": ["x"]}), tmp_path / "a.parquet")
    source = tmp_path / "a.parquet.gz"
    source.write_bytes(gzip.compress((tmp_path / "a.parquet").read_bytes()))
    assert generate(model_directory, source, target) == 2
    assert "Parquet inside a compressed file; decompress it" in capsys.readouterr().err


def test_spooled_pipe_is_kept_until_its_rows_are_written(
    tmp_path, model_directory, target, before_step, expected, monkeypatch, capsys
):
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)

    def decode(lines=LINES, stops=False):
        if stops:
            before_step(12, lambda: signal.raise_signal(signal.SIGINT))
        writer = threading.Thread(target=pipe.write_bytes, args=[b"".join(lines)])
        writer.start()
        code = generate(model_directory, pipe, target, *TWO_AT_ONCE)
        writer.join()
        monkeypatch.undo()
        return code

    assert decode(stops=True) == 130
    (kept,) = tmp_path.glob("out.jsonl.input-*")
    assert f"the same command with --input {kept}" in capsys.readouterr().err
    assert kept.read_bytes() == b"".join(LINES)
    assert decode(LINES[1:]) == 2
    assert "was begun with input=" in capsys.readouterr().err
    assert 0 < len(read_rows(target)) < len(ROWS)
    other = tmp_path / "out.jsonl.input-of-mine"
    other.touch()
    assert generate(model_directory, kept, target) == 0
    assert rows_in_order(target) == expected
    assert list(tmp_path.glob("*input-*")) == [other]
    assert decode() == 0
    assert rows_in_order(target) == expected
    assert list(tmp_path.glob("*input-*")) == [other]


def test_standard_input_and_output(model_directory, expected):
    command = [forked.python(), "-m", "serve.batch.cli", model_directory, "--input", "-"]
    command += ["--output", "-", "--cache-gib", "0.01"]
    data = zstd.compress(b"".join(LINES))
    result = subprocess.run(list(map(str, command)), input=data, capture_output=True)
    assert result.returncode == 0, result.stderr
    rows = [json.loads(line) for line in result.stdout.splitlines()]
    assert sorted(rows, key=lambda row: row["row"]) == expected
    assert b"40 rows, " in result.stderr


def read_fields(path, column=None, id_column=None):
    return [fields for _, fields in open_input(path, InputDigest.of(path), column, id_column)]


def test_folder_is_read_in_the_order_of_its_names(tmp_path):
    folder = tmp_path / "in"
    (folder / "part=1").mkdir(parents=True)
    texts = {"b.parquet": ["b0", "b1"], "part=1/a.parquet": ["c"], "a.parquet": [], "_c": None}
    for name, values in texts.items():
        table = pa.table({"prompt": pa.array(values or [], pa.string())})
        pq.write_table(table, folder / name)
    (folder / "_SUCCESS").touch()
    (folder / ".hidden").write_text("x")
    assert [row["prompt"] for row in read_fields(folder)] == ["b0", "b1", "c"]
    digest = InputDigest.of(folder)
    source = open_input(folder, digest, None, None)
    assert [number for number, _ in source] == [0, 1, 2]
    assert [source.place(n) for n in range(3)] == [
        "b.parquet row 0",
        "b.parquet row 1",
        "part=1/a.parquet row 0",
    ]
    assert str(digest).startswith("3 files, ")
    assert InputDigest.from_json(json.loads(json.dumps(digest.to_json()))) == digest
    digest.check(folder)
    pq.write_table(pa.table({"prompt": ["d"]}), folder / "d.parquet")
    with pytest.raises(Changed):
        digest.check(folder)
    (folder / "e.parquet").touch()
    with pytest.raises(UserError, match=r"e\.parquet: is not a Parquet file; copy it again"):
        read_fields(folder)


def test_output_inside_the_input_and_empty_folder_are_refused(tmp_path, model_directory, capsys):
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.jsonl").write_bytes(LINES[0])
    assert generate(model_directory, tmp_path / "in", tmp_path / "in" / "out.jsonl") == 2
    assert "is inside the input" in capsys.readouterr().err
    (tmp_path / "none").mkdir()
    assert generate(model_directory, tmp_path / "none", tmp_path / "out.jsonl") == 2
    assert "the folder has no files to read" in capsys.readouterr().err


@pytest.fixture
def parquet(tmp_path):
    """Return a function that writes columns (a dict, or arrays and names) and reads the rows."""

    def call(columns, *options, names=None, **settings):
        table = pa.Table.from_arrays(columns, names) if names else pa.table(columns)
        pq.write_table(table, tmp_path / "in.parquet", **settings)
        return read_fields(tmp_path / "in.parquet", *options)

    return call


def test_parquet_strings_of_all_types(parquet):
    texts = ["a", None, "größe"]
    arrays = [pa.array(texts, kind) for kind in (pa.string(), pa.large_string(), pa.string_view())]
    for array in [*arrays, pa.array(texts).dictionary_encode()]:
        assert [row["prompt"] for row in parquet({"prompt": array})] == texts
    assert parquet({"prompt": pa.array([], pa.string())}) == []
    assert parquet({"prompt": [[1, 2], None]})[0] == {"prompt": [1, 2]}
    many = [str(number) for number in range(1000)]
    rows = parquet({"prompt": many}, row_group_size=7)
    assert [row["prompt"] for row in rows] == many


def test_parquet_string_that_is_not_utf8_is_an_error_of_its_row(parquet):
    good = pa.array(["a", "bc", "d"])
    buffers = [good.buffers()[0], good.buffers()[1], pa.py_buffer(b"a\xffcd")]
    rows = parquet([pa.Array.from_buffers(pa.string(), 3, buffers)], names=["prompt"])
    assert [rows[0], rows[2]] == [{"prompt": "a"}, {"prompt": "d"}]
    assert str(rows[1]) == "is not UTF-8; convert the file"


def test_parquet_columns_of_one_name_are_ambiguous(parquet):
    arrays = [pa.array(["x"]), pa.array(["y"]), pa.array(["z"])]
    with pytest.raises(UserError, match=r"2 columns are named 'prompt'; rename all but one"):
        parquet(arrays, names=["prompt", "prompt", "other"])
    with pytest.raises(UserError, match=r"2 columns are named 'key'.* with --id-column"):
        parquet(arrays, "other", "key", names=["key", "key", "other"])
    assert parquet(arrays, "other", names=["key", "key", "other"]) == [{"prompt": "z"}]
    assert parquet({"k": ["x"]}, "k", "k") == [{"prompt": "x", "id": "x"}]


def test_parquet_column_names_with_dots_and_columns_in_structs(parquet):
    nested = pa.array([{"b": "nested", "c": {"d": 5}}, None])
    columns = {"a.b": ["top", "level"], "a": nested}
    assert [row["prompt"] for row in parquet(columns, "a.b")] == ["top", "level"]
    rows = parquet({"a": nested}, "a.b", "a.c.d")
    assert rows == [{"prompt": "nested", "id": 5}, {"prompt": None, "id": None}]
    assert parquet(columns, "a")[0]["prompt"]["b"] == "nested"
    for name in ("a.x", "a.b.c", "x.b"):
        with pytest.raises(UserError, match=f"no column '{name}', only a; name one with --column"):
            parquet({"a": nested}, name)


def test_damaged_or_changed_parquet_file_is_refused(tmp_path, parquet, monkeypatch):
    path = tmp_path / "in.parquet"
    columns = {"prompt": [f"{number:09}" for number in range(20_000)]}
    parquet(columns, row_group_size=1000, use_dictionary=False, compression="none")
    data = path.read_bytes()
    damaged = bytearray(data)
    damaged[len(data) // 2 : len(data) // 2 + 9000] = b"\xff" * 9000
    path.write_bytes(damaged)
    rows = []
    with pytest.raises(UserError, match=r"in.parquet: is damaged after row \d{4} \("):
        rows.extend(open_input(path, InputDigest.of(path), None, None))
    assert len(rows) >= 8000
    path.write_bytes(data[:-100])
    with pytest.raises(UserError, match=r"in.parquet: .*magic bytes"):
        read_fields(path)
    path.write_bytes(data)
    monkeypatch.setattr(checked_file, "MIN_BLOCK_BYTES", 4096)
    digest = InputDigest.of(path)
    path.write_bytes(data.replace(b"000015000", b"999999999"))
    with pytest.raises(Changed):
        list(open_input(path, digest, None, None))
