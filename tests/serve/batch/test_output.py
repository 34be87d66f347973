"""The output of a batch: what is recovered, cut off, refused and locked."""

import errno
import fcntl
import json
import os

import pytest

from serve.batch.sink import OutputFile
from stu.common.errors import UserError

IDENTITY = {"seed": 0, "top_k": 5, "part": "0/1"}


def recognise(written):
    return int(written["row"]), "error" in written


def line(number, **fields):
    return json.dumps({"row": number, **fields})


def begin(path, identity=IDENTITY, **options):
    return OutputFile(path, identity, recognise, **options)


@pytest.fixture
def path(tmp_path):
    """An output with rows 4 and 2, of which 2 has an error."""
    path = tmp_path / "out.jsonl"
    with begin(path) as output:
        assert (output.done, output.num_failed) == (set(), 0)
        output.append([line(4, text="ö\u2028")])
        output.append([line(2, error="x")])
    return path


def test_rows_that_are_there_are_recovered(path):
    with begin(path) as output:
        assert (output.done, output.num_failed) == ({2, 4}, 1)
        output.append([line(0), line(1)])
    lines = path.read_text(encoding="utf-8").split("\n")
    assert [json.loads(line)["row"] for line in lines[:-1]] == [4, 2, 0, 1]


def test_a_line_that_was_cut_off_anywhere_is_removed(path):
    whole = path.read_bytes()
    last = (line(7, text="größe") + "\n").encode()
    for num_bytes in range(len(last)):
        path.write_bytes(whole + last[:num_bytes])
        with begin(path) as output:
            assert output.done == {2, 4}
        assert path.read_bytes() == whole


def test_appended_rows_are_on_disk(path, monkeypatch):
    synced = []

    def fsync(descriptor):
        synced.append(os.stat(descriptor).st_size)

    with begin(path) as output:
        monkeypatch.setattr(os, "fsync", fsync)
        output.append([line(0)])
        assert synced == [path.stat().st_size]


def test_a_full_disk(path, monkeypatch):
    write = os.write

    def write_a_byte_and_fail(descriptor, data):
        write(descriptor, data[:1])
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with begin(path) as output:
        monkeypatch.setattr(os, "write", write_a_byte_and_fail)
        with pytest.raises(OSError, match=r"output .*out.jsonl: No space left on device"):
            output.append([line(9)])
    monkeypatch.undo()
    with begin(path) as output:
        assert output.done == {2, 4}


def test_settings_that_differ_are_named_with_both_values(path):
    before = path.read_bytes()
    expected = (
        "was begun with seed=0, top_k=5, min_p=null, and this run has seed=1, top_k=null, "
        "min_p=0.5; run it as it was begun, choose another output, or start anew with --overwrite"
    )
    with (
        pytest.raises(UserError, match=expected),
        begin(path, {"seed": 1, "part": "0/1", "min_p": 0.5}),
    ):
        pass
    assert path.read_bytes() == before
    with begin(path) as output:
        assert output.done == {2, 4}


def test_values_that_json_has_no_word_for_are_compared_as_they_are_written(tmp_path):
    path = tmp_path / "out.jsonl"
    identity = {"stop": ("a", "b"), "logit_bias": {1: 2.0}}
    with begin(path, identity) as output:
        output.append([line(0)])
    with begin(path, identity) as output:
        assert output.done == {0}


def test_an_output_without_rows_may_be_begun_with_anything(tmp_path):
    path = tmp_path / "out.jsonl"
    path.touch()
    for seed in (1, 2):
        with begin(path, {"seed": seed}):
            assert json.loads((tmp_path / "out.jsonl.job.json").read_text()) == {"seed": seed}


def test_overwriting_begins_anew(path):
    with begin(path, {"seed": 3}, overwrite=True) as output:
        assert (output.done, output.num_failed) == (set(), 0)
        assert path.read_bytes() == b""
        output.append([line(9)])
    with begin(path, {"seed": 3}) as output:
        assert output.done == {9}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{}\n", "line 1 is not a row of this job"),
        ("[]\n", "line 1 is not a row of this job"),
        ('{"row": 1}\nnothing\n', "line 2 is not a row of this job; mend or delete it"),
        ('{"row": 1}\n\n{"row": 2}\n', "line 2 is not a row of this job"),
        ('{"row": 1}\n{"row": 2}\n{"row": 1}\n', "line 3 has row 1 a second time"),
    ],
)
def test_rows_that_are_not_of_the_job(path, content, message):
    path.write_text(content)
    with pytest.raises(UserError, match=message), begin(path):
        pass
    assert path.read_text() == content


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "exists, and there is no out.jsonl.job.json"),
        ("{", "out.jsonl.job.json: is not JSON"),
        ("[]", "out.jsonl.job.json: is not a JSON object"),
    ],
)
def test_a_job_file_that_cannot_be_read(path, content, message):
    job_file = path.with_name("out.jsonl.job.json")
    job_file.unlink()
    if content is not None:
        job_file.write_text(content)
    before = path.read_bytes()
    with pytest.raises(UserError, match=message), begin(path):
        pass
    assert path.read_bytes() == before


@pytest.mark.parametrize("overwrite", [False, True])
def test_one_run_at_a_time(path, overwrite):
    before = path.read_bytes()
    with (
        begin(path),
        pytest.raises(UserError, match="another run is writing it"),
        begin(path, overwrite=overwrite),
    ):
        pass
    assert path.read_bytes() == before
    with begin(path) as output:
        assert output.done == {2, 4}


def test_a_file_system_without_locks(path, monkeypatch, capsys):
    def flock(*_):
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))

    monkeypatch.setattr(fcntl, "flock", flock)
    with begin(path) as output:
        assert output.done == {2, 4}
    assert "its file system has no locks" in capsys.readouterr().err
