"""The output file of a batch: recovery, refusals and the lock."""

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


def test_written_rows_are_recovered_and_an_incomplete_last_line_removed(path):
    whole = path.read_bytes()
    last = (line(7, text="größe") + "\n").encode()
    for num_bytes in range(len(last)):
        path.write_bytes(whole + last[:num_bytes])
        with begin(path) as output:
            assert (output.done, output.num_failed) == ({2, 4}, 1)
        assert path.read_bytes() == whole
    with begin(path) as output:
        output.append([line(0), line(1)])
    lines = path.read_text(encoding="utf-8").split("\n")
    assert [json.loads(line)["row"] for line in lines[:-1]] == [4, 2, 0, 1]


def test_appended_rows_are_on_disk(path, monkeypatch):
    synced = []
    with begin(path) as output:
        monkeypatch.setattr(os, "fsync", lambda file: synced.append(os.stat(file).st_size))
        output.append([line(0)])
        assert synced == [path.stat().st_size]


def test_full_disk_is_an_error_and_loses_no_row(path, monkeypatch):
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


def test_other_settings_are_named_with_both_values(path):
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


def test_values_are_compared_as_json(tmp_path):
    path = tmp_path / "out.jsonl"
    identity = {"stop": ("a", "b"), "logit_bias": {1: 2.0}}
    with begin(path, identity) as output:
        output.append([line(0)])
    with begin(path, identity) as output:
        assert output.done == {0}


def test_empty_output_may_have_any_settings(tmp_path):
    path = tmp_path / "out.jsonl"
    path.touch()
    for seed in (1, 2):
        with begin(path, {"seed": seed}):
            assert json.loads((tmp_path / "out.jsonl.job.json").read_text()) == {"seed": seed}


def test_overwrite_starts_anew(path):
    with begin(path, {"seed": 3}, overwrite=True) as output:
        assert (output.done, output.num_failed) == (set(), 0)
        assert path.read_bytes() == b""
        output.append([line(9)])
    with begin(path, {"seed": 3}) as output:
        assert output.done == {9}


@pytest.mark.parametrize(
    ("restarts", "job", "done"), [(0, "7", set()), (1, "7", {9}), (1, "8", set())]
)
def test_overwrite_keeps_what_earlier_starts_of_its_slurm_job_wrote(
    path, monkeypatch, restarts, job, done
):
    monkeypatch.setenv("SLURM_JOB_ID", "12")
    monkeypatch.setenv("SLURM_ARRAY_JOB_ID", "7")
    with begin(path, overwrite=True) as output:
        output.append([line(9)])
    monkeypatch.setenv("SLURM_ARRAY_JOB_ID", job)
    monkeypatch.setenv("SLURM_RESTART_COUNT", str(restarts))
    with begin(path, overwrite=True) as output:
        assert output.done == done
    monkeypatch.delenv("SLURM_RESTART_COUNT")
    with begin(path) as output:  # of any job
        assert output.done == done


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
def test_lines_that_are_no_rows_of_the_job_are_refused(path, content, message):
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
def test_unreadable_job_file_is_refused(path, content, message):
    job_file = path.with_name("out.jsonl.job.json")
    job_file.unlink()
    if content is not None:
        job_file.write_text(content)
    before = path.read_bytes()
    with pytest.raises(UserError, match=message), begin(path):
        pass
    assert path.read_bytes() == before


@pytest.mark.parametrize("overwrite", [False, True])
def test_output_is_locked_while_a_run_writes_it(path, overwrite):
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


def test_file_system_without_locks_is_a_warning(path, monkeypatch, capsys):
    def flock(*_):
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))

    monkeypatch.setattr(fcntl, "flock", flock)
    with begin(path) as output:
        assert output.done == {2, 4}
    assert "its file system has no locks" in capsys.readouterr().err
