"""Batches that run in a folder, without a server: what one owner cannot do to the others."""

import asyncio
import contextlib
import json
import sys
import threading
from dataclasses import replace

import pytest

from serve.server.batches.batch_routes import BatchBody, _new_batch
from serve.server.batches.batches import Batches, Limits
from serve.server.batches.files import MOST_UPLOADS, MOST_UPLOADS_OF_OWNER, Files, NewFile
from serve.server.batches.lines import Line
from serve.server.batches.progress import Place
from serve.server.batches.table import NewBatch
from serve.server.batches.upload import Form
from serve.server.batches.validation import validate
from serve.server.replicas.stream import Busy
from stu.common.errors import UserError
from tests.serve.server.batches.views import URL, make_row

pytestmark = pytest.mark.anyio
LIMITS = Limits(2**30, 2**31, rows=100, line_bytes=2**20, rows_at_once={"": 4})


async def answered(request):
    return 200, b"{}"


@pytest.fixture
async def batches(tmp_path):
    batches = Batches(tmp_path / "b", LIMITS, lambda model: "")
    await batches.start(answered)
    yield batches
    await batches.stop()


async def add(batches, content, owner=""):
    """The number of a batch of a file."""
    file_id = f"file-{owner}-{len(content)}"
    batches.files.path(file_id).write_bytes(content)
    await batches.files.add(NewFile(file_id, owner, "batch", "a", len(content), 100))
    row = await batches.create(NewBatch(owner, URL, file_id, "24h", 100, 100, None))
    return row["number"]


async def until(batches, number, holds):
    """The row of a batch once it is as wanted."""

    async def wait():
        while not holds(row := await batches.table.get(number)):
            await asyncio.sleep(0.01)
        return row

    return await asyncio.wait_for(wait(), 10)


async def ended(batches, number):
    ends = "completed", "failed", "expired", "cancelled"
    return await until(batches, number, lambda row: row["status"] in ends)


def line_of(text):
    return Line(Place(1, 0), text.encode(), Place(2, len(text)))


def nested(levels):
    """A row with so many levels."""
    row = json.dumps({**make_row(0), "body": {"x": None}})
    return row.replace("null", "[" * (levels - 2) + "]" * (levels - 2))


def test_rows_have_a_limit_of_levels(tmp_path):
    assert line_of(nested(200)).row()["custom_id"] == "row 0"
    for levels in (201, 900, 100_000):
        (tmp_path / "a").write_text(nested(levels))
        (error,) = validate(tmp_path / "a", URL, 5, 2**20, lambda: True)[1]
        assert error["code"] == "invalid_json_line", levels
    flat = json.dumps({**make_row(0), "body": {"x": [[1]] * 300}})
    assert len(line_of(flat).row()["body"]["x"]) == 300


@pytest.mark.parametrize("text", ["[", "[1]", '{"custom_id": 3, "body": {}}', '{"custom_id": "a"}'])
def test_a_line_that_has_changed_is_no_row(text):
    with pytest.raises(UserError):
        line_of(text).row()


async def test_a_row_that_cannot_be_read_has_an_error(batches, monkeypatch):
    """As one had that was checked before rows had a limit of levels."""
    monkeypatch.setattr("serve.server.batches.batches.validate", lambda *_: (2, []))
    deep = nested(sys.getrecursionlimit() * 2)
    content = f"{deep}\n{json.dumps(make_row(1))}\n".encode()
    row = await ended(batches, await add(batches, content))
    assert (row["status"], row["completed"], row["failed"]) == ("completed", 1, 1)
    error = json.loads(batches.files.path(row["error_id"]).read_text())
    assert (error["custom_id"], error["error"]["code"]) == ("", "invalid_json_line")


async def test_blank_lines_have_a_limit_and_checks_end_among_them(tmp_path):
    (tmp_path / "a").write_bytes(b"\n" * 100_000)
    asked = []
    _, (error,) = validate(tmp_path / "a", URL, 100, 2**20, lambda: asked.append(1) or True)
    assert (error["code"], error["line"], len(asked)) == ("too_many_rows", 101, 101)
    row = json.dumps(make_row(0)).encode()
    (tmp_path / "a").write_bytes(b"\n" * 100 + row)
    assert validate(tmp_path / "a", URL, 100, 2**20, lambda: True) == (1, [])
    _, errors = validate(tmp_path / "a", URL, 100, 2**20, lambda: False)
    assert [error["code"] for error in errors] == ["empty_file"]


async def test_checks_take_no_threads_of_others_and_owners_take_turns(batches, monkeypatch):
    go_on, checked = threading.Event(), []

    def check(path, *_):
        assert go_on.wait(10)
        checked.append(path.name)
        return 0, [{}]

    monkeypatch.setattr("serve.server.batches.batches.validate", check)
    numbers = [await add(batches, b"\n" * size, "many") for size in range(1, 11)]
    numbers.append(await add(batches, b"\n", "one"))
    numbers += [await add(batches, b"\n", f"other {number}") for number in range(40)]
    assert await asyncio.wait_for(asyncio.to_thread(lambda: 3), 5) == 3
    go_on.set()
    for number in numbers:
        assert (await ended(batches, number))["status"] == "failed"
    assert checked.index("file-one-1") <= 2


async def test_rows_of_a_model_do_not_wait_for_another_batch_of_another_model(tmp_path):
    models = {"first": "first", "tuned": "first", "second": "second"}
    limits = replace(LIMITS, rows_at_once={"first": 2, "second": 2})
    batches, asked = Batches(tmp_path / "b", limits, models.get), []

    async def answering(request):
        asked.append(json.loads(request.body)["model"])
        if asked[-1] in unknown:
            return 404, b"{}"
        if asked[-1] != "second":
            await asyncio.Event().wait()  # as if no replica of it could be started
        return 200, b"{}"

    await batches.start(answering)
    names, unknown = [None, "tuned", "first"], ["", "third", ["second"]]
    rows = [make_row(number, model=name) for number, name in enumerate(names)]
    await add(batches, b"".join(json.dumps(row).encode() + b"\n" for row in rows))
    rows = [make_row(number, model=name) for number, name in enumerate(["second"] * 9 + unknown)]
    content = b"".join(json.dumps(row).encode() + b"\n" for row in rows)
    row = await ended(batches, await add(batches, content, "another"))
    assert (row["status"], row["completed"], row["failed"]) == ("completed", 9, 3)
    assert sorted(asked, key=str) == ["", None, ["second"], *["second"] * 9, "third", "tuned"]
    assert batches.num_results == {("second", False): 9, ("", True): 3}
    await batches.stop()


@pytest.mark.parametrize("has_one_model", [False, True])
async def test_rows_of_a_model_do_not_wait_for_those_of_another_in_their_file(
    tmp_path, monkeypatch, has_one_model
):
    monkeypatch.setattr("serve.server.batches.lines.CHUNK_BYTES", 700)  # a few rows
    names = {"dead": "dead", "alive": "alive"}
    limits = replace(LIMITS, rows_at_once=dict.fromkeys(names, 2))
    if has_one_model:
        names, limits = {"dead": "all", "alive": "all"}, replace(LIMITS, rows_at_once={"all": 2})
    models = ["alive", *["dead"] * 20, *["alive", "third", "dead"] * 9, *["alive"] * 20]
    rows = [make_row(number, model=model) for number, model in enumerate(models)]
    rows.insert(15, None)
    content = b"".join(json.dumps(row).encode() + b"\n" for row in rows)
    monkeypatch.setattr("serve.server.batches.batches.validate", lambda *_: (len(rows), []))
    asked, is_dead = [], True

    async def answering(request):
        body = json.loads(request.body)
        if body["model"] == "third":
            return 404, b"{}"
        asked.append((body["model"], body["seed"]))
        if is_dead and body["model"] == "dead" and body["seed"] > 2:
            await asyncio.Event().wait()  # as if no replica of it could be started
        return 200, b"{}"

    batches = Batches(tmp_path / "b", limits, names.get)
    await batches.start(answering)
    number = await add(batches, content)
    num_alive = 1 if has_one_model else models.count("alive")
    row = await until(batches, number, lambda row: row["completed"] == num_alive + 2)
    assert (row["status"], row["next_line"]) == ("in_progress", 4)
    expected = [("alive", seed) for seed, own in enumerate(models) if own == "alive"]
    assert [own for own in asked if own[0] == "alive"] == expected[:num_alive]
    assert [own for own in asked if own[0] == "dead"] == [("dead", seed) for seed in range(1, 5)]
    await batches.stop()

    asked, is_dead = [], False  # the next server has replicas of it
    batches = Batches(tmp_path / "b", limits, names.get)
    await batches.start(answering)
    row = await ended(batches, number)
    num_failed = models.count("third") + 1
    assert (row["completed"], row["failed"]) == (len(rows) - num_failed, num_failed)
    expected = [(own, seed) for seed, own in enumerate(models) if own != "third"]
    has_ended = (
        [("alive", 0), ("dead", 1), ("dead", 2)]
        if has_one_model
        else [own for own in expected if own[0] == "alive" or own[1] < 3]
    )
    assert sorted(asked) == sorted(set(expected) - {*has_ended})
    lines = [*map(json.loads, batches.files.path(row["output_id"]).read_text().splitlines())]
    assert sorted(line["custom_id"] for line in lines) == sorted(
        f"row {seed}" for _, seed in expected
    )
    await batches.stop()


@pytest.mark.parametrize("owner", ["same", "another"])
async def test_a_batch_is_cancelled_before_its_turn_to_be_checked(batches, monkeypatch, owner):
    go_on, checked = threading.Event(), []

    def check(path, *_):
        checked.append(path.name)
        assert go_on.wait(10)
        return 0, [{}]

    monkeypatch.setattr("serve.server.batches.batches.validate", check)
    waiting, begin = [], batches._check
    batches._check = lambda row: waiting.append(row["number"]) or begin(row)
    first, second = await add(batches, b"\n", "same"), await add(batches, b"\n\n", owner)
    while not checked or second not in waiting:
        await asyncio.sleep(0.01)
    await batches.cancel(second)
    assert (await ended(batches, second))["status"] == "cancelled"
    assert (await batches.table.get(first))["status"] == "validating"
    go_on.set()
    assert (await ended(batches, first))["status"] == "failed"
    assert checked == ["file-same-1"]


@pytest.mark.parametrize(
    ("status", "completed", "ends_as"),
    [
        ("validating", 0, "failed"),
        ("in_progress", 0, "failed"),
        ("finalizing", 2, "failed"),
        ("finalizing", 3, "expired"),  # whose rows all have results
    ],
)
async def test_a_batch_whose_input_was_removed_fails(tmp_path, status, completed, ends_as):
    batches = Batches(tmp_path / "b", LIMITS, lambda model: "")
    content = b"".join(json.dumps(make_row(number)).encode() + b"\n" for number in range(3))
    batches._begin = lambda number: None  # as if the server had ended at once
    number = await add(batches, content)
    with batches._store._connection as db:
        times = {"validating": None}.get(status, 1)
        query = (
            "UPDATE batches SET status = ?, in_progress_at = ?, ends_as = 'expired', total = 3, "
        )
        db.execute(query + "completed = ?", [status, times, completed])
    del batches._begin
    (tmp_path / "b" / "files" / f"file--{len(content)}").unlink()
    await batches.start(answered)
    row = await ended(batches, number)
    errors = json.loads(row["errors"] or "[]")
    codes = ["input_file_lost"] if ends_as == "failed" else []
    assert (row["status"], [error["code"] for error in errors]) == (ends_as, codes)
    while batches.num_unfinished:  # the task ends after the batch has
        await asyncio.sleep(0.01)
    await batches.stop()


async def test_uploads_count_for_the_bytes_of_their_owner_while_they_arrive(batches):
    files = Files(batches._store, 2 * 2**20)
    head = b'--x\r\nContent-Disposition: form-data; name="file"\r\n\r\n'

    async def parts():
        yield head
        for _ in range(4):
            yield bytes(2**20)

    with files.receiving("a", "file-1") as other:
        await other.reserve(2**20 - 1)
        await other.reserve(2**19)  # of the same file, so these are among the others
        with contextlib.suppress(UserError), files.receiving("a", "file-2") as own:
            with own.path.open("xb", buffering=0) as file:
                form = Form("multipart/form-data; boundary=x", file, own.reserve)
                with pytest.raises(UserError, match="1048575 bytes of"):
                    await form.read(parts())
                assert file.tell() == 2**20
            await own.reserve(2**21)
        assert not own.path.exists()
        with files.receiving("b", "file-3") as theirs:
            await theirs.reserve(2 * 2**20)
    assert not files.arriving_bytes
    with files.receiving("a", "file-4") as later:
        await later.reserve(2 * 2**20)


async def test_uploads_at_once_have_a_limit(batches):
    with contextlib.ExitStack() as stack:
        for number in range(MOST_UPLOADS):
            owner = f"owner {number // MOST_UPLOADS_OF_OWNER}"
            stack.enter_context(batches.files.receiving(owner, f"file-{number}"))
            if number == MOST_UPLOADS_OF_OWNER - 1:
                with pytest.raises(Busy, match="16 of them yours"):
                    stack.enter_context(batches.files.receiving(owner, "file-x"))
        with pytest.raises(Busy, match="0 of them yours"):
            stack.enter_context(batches.files.receiving("another", "file-x"))
    with batches.files.receiving("another", "file-x"):
        pass


def test_an_id_that_utf_8_cannot_hold_is_refused():
    body = BatchBody.model_construct(
        input_file_id="\ud800",
        endpoint=URL,
        completion_window="24h",
        metadata=None,
        output_expires_after=None,
    )
    with pytest.raises(UserError, match="surrogate") as error:
        _new_batch(body, "", [URL])
    assert error.value.field == "input_file_id"
