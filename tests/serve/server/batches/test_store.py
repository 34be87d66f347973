"""The folder of files and batches, without a server."""

import asyncio
import os
import random
import sqlite3

import pytest

from serve.server.batches import rows as rows_module
from serve.server.batches.files import Files, NewFile
from serve.server.batches.lines import CHUNK_BYTES, read_chunk, read_lines
from serve.server.batches.progress import Place, Progress, Result, Tokens, batch_object
from serve.server.batches.rows import Rows
from serve.server.batches.store import Store
from serve.server.batches.table import BatchTable, NewBatch
from serve.server.batches.window import MOST_BYTES, Window
from serve.server.replicas.stream import Busy
from stu.common.errors import UserError

pytestmark = pytest.mark.anyio


@pytest.fixture
def store(tmp_path):
    store = Store(tmp_path / "b")
    yield store
    store.close()


async def add_batch(store, lines=()):
    """A batch in progress with an input file of some lines."""
    content = b"".join(line + b"\n" for line in lines)
    store.path("file-in").write_bytes(content)
    await Files(store, 2**40).add(NewFile("file-in", "", "batch", "a", len(content), 100))
    new = NewBatch("", "/v1/completions", "file-in", "24h", 100, 100, None)
    progress = Progress(store, (await BatchTable(store).add(new))["number"])
    await progress.begin(len(lines))
    return progress


def result(line, is_error=False):
    return Result(line, b"%d\n" % line, is_error, Tokens(line, 1, 2))


async def test_what_a_killed_server_wrote_beyond_its_last_commit_is_cut_off(store):
    """Whether or not more is written to the same file later."""
    progress = await add_batch(store, [b"x"] * 5)
    await progress.add([result(2), result(1, is_error=True)], Place(3, 4))
    row = await progress.row()
    for name in ("output_id", "error_id"):
        with store.path(row[name]).open("ab") as file:
            file.write(b"half of a li")
    await progress.add([result(5), result(3), result(4)], Place(6, 10))
    await progress.finalize("completed")
    await progress.end()
    row = await progress.row()
    assert store.path(row["output_id"]).read_bytes() == b"2\n5\n3\n4\n"
    assert store.path(row["error_id"]).read_bytes() == b"1\n"
    assert batch_object(row)["usage"]["total_tokens"] == 15 + 5 * 2


async def test_results_that_could_not_be_committed_are_not_there(store, monkeypatch):
    progress = await add_batch(store, [b"x"] * 3)
    await progress.add([result(2)], Place(1, 0))
    before = batch_object(await progress.row())
    with monkeypatch.context() as patch:
        patch.setattr(Progress, "_set", lambda *_: (_ for _ in ()).throw(OSError("disk is full")))
        with pytest.raises(OSError, match="full"):
            await progress.add([result(1), result(3)], Place(4, 6))
    assert batch_object(await progress.row()) == before
    assert await progress.done(1, 3) == {2}
    await progress.add([result(1)], Place(3, 4))
    await progress.add([result(3)], Place(4, 6))
    await progress.finalize("completed")
    await progress.end()
    row = await progress.row()
    assert store.path(row["output_id"]).read_bytes() == b"2\n1\n3\n"


async def test_no_row_has_two_results(store):
    progress = await add_batch(store, [b"x"] * 5)
    await progress.add([result(3)], Place(1, 0))
    with pytest.raises(sqlite3.IntegrityError):
        await progress.add([result(3)], Place(1, 0))
    await progress.add([result(1)], Place(2, 2))
    with pytest.raises(AssertionError):
        await progress.add([result(1)], Place(2, 2))
    assert (await progress.row())["completed"] == 2


@pytest.mark.parametrize("seed", range(4))
async def test_rows_end_in_any_order_and_readers_stop_at_any_moment(store, seed):
    """Every row is read until it has a result, and never again."""
    rng = random.Random(seed)
    lines = [b"" if rng.random() < 0.2 else b"x" * rng.randint(1, 9000) for _ in range(400)]
    wanted = {number for number, line in enumerate(lines, 1) if line}
    progress = await add_batch(store, lines)
    done = []
    for _ in range(1000):
        row = await progress.row()
        assert row["completed"] == len(done)
        place, waiting = Place(row["next_line"], row["next_offset"]), []
        async with Rows(progress, store.path("file-in"), place, 2**20) as rows:
            num_rows = rng.randint(1, 200)
            async for line in rows.read():
                assert line.content == lines[line.place.line - 1] + b"\n"
                waiting.append(line.place.line)
                while waiting and rng.random() < 0.5:
                    done.append(waiting.pop(rng.randrange(len(waiting))))
                    await rows.add(result(done[-1]))
                num_rows -= 1
                if num_rows == 0:
                    break
            if rng.random() < 0.5:
                await rows.written()
        if len(done) == len(wanted):
            break
    assert len(set(done)) == len(done)
    assert set(done) == wanted
    row = await progress.row()
    assert sorted(map(int, store.path(row["output_id"]).read_text().split())) == sorted(wanted)


async def test_results_are_written_once_the_disk_has_room(store, monkeypatch):
    progress = await add_batch(store, [b"x"] * 2)
    failures = [OSError("full"), sqlite3.OperationalError("full")]
    add = Progress.add

    async def fail(*arguments):
        if failures:
            raise failures.pop()
        await add(*arguments)

    monkeypatch.setattr(rows_module, "RETRY_SECONDS", 0.01)
    monkeypatch.setattr(Progress, "add", fail)
    async with Rows(progress, store.path("file-in"), Place(1, 0), 100) as rows:
        async for line in rows.read():
            await rows.add(result(line.place.line))
        await rows.written()
    assert not failures
    assert (await progress.row())["completed"] == 2


async def test_statuses_change_only_as_they_may(store):
    progress = await add_batch(store)
    await progress.fail([{"code": "x"}])
    assert (await progress.row())["status"] == "in_progress"
    assert (await progress.cancel())["status"] == "cancelling"
    await progress.finalize("completed")
    await progress.begin(5)
    row = await progress.row()
    assert (row["status"], row["total"], row["finalizing_at"]) == ("cancelling", 0, None)
    await progress.end()
    assert (await progress.cancel())["status"] == "cancelled"


async def test_a_folder_serves_one_server_and_one_version(store, tmp_path):
    with pytest.raises(UserError, match="another server uses it"):
        Store(tmp_path / "b")
    store.close()
    with sqlite3.connect(tmp_path / "b" / "batches.sqlite3") as connection:
        connection.execute("PRAGMA user_version=99")
    with pytest.raises(UserError, match="version 99"):
        Store(tmp_path / "b")
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="batch_dir"):
        Store(tmp_path / "file")


async def test_only_files_that_nobody_needs_are_removed(store):
    progress = await add_batch(store, [b"x"] * 2)
    await progress.add([result(1)], Place(2, 2))
    store.path("file-half").write_bytes(b"an upload that was not over")
    files, table = Files(store, 2**40), BatchTable(store)
    await table.recover()
    names = {"file-in", (await progress.row())["output_id"]}
    assert set(os.listdir(store.path(""))) == names
    assert await files.delete("", "file-in")
    assert set(os.listdir(store.path(""))) == names
    await progress.cancel()
    await progress.add([result(2, is_error=True)], Place(3, 4))
    await progress.end()
    await files.sweep()
    row = await progress.row()
    assert set(os.listdir(store.path(""))) == {row["output_id"], row["error_id"]}


async def test_an_owner_has_so_many_unfinished_batches(store, monkeypatch):
    monkeypatch.setattr("serve.server.batches.table.MOST_UNFINISHED", 2)
    progress = await add_batch(store)
    new = NewBatch("", "/v1/completions", "file-in", "24h", 100, 100, None)
    table = BatchTable(store)
    await table.add(new)
    with pytest.raises(Busy, match="2 of your batches"):
        await table.add(new)
    await progress.cancel()
    await progress.end()
    await table.add(new)


@pytest.mark.parametrize("most_bytes", [5, 6, 7, 1000])
def test_lines_are_read_in_parts(tmp_path, most_bytes):
    content = b"\n\nabcde\n  \n" + b" " * 3000 + b"\nlast"
    (tmp_path / "a").write_bytes(content)
    lines = list(read_lines(tmp_path / "a", Place(1, 0), most_bytes))
    assert [line.place.line for line in lines] == [1, 2, 3, 4, 5, 6]
    found = [line for line in lines if not line.is_blank]
    assert [line.place.line for line in found] == [3, 5, 6]
    assert [line.is_whole for line in found] == [most_bytes >= 6, False, True]
    assert found[1].following == Place(6, len(content) - 4)
    rest = list(read_lines(tmp_path / "a", found[0].following, most_bytes))
    assert rest == lines[3:]


def test_chunks_have_an_end(tmp_path):
    (tmp_path / "a").write_bytes(b"x" * CHUNK_BYTES + b"\n" + b"y\n" * 3)
    assert len(read_chunk(tmp_path / "a", Place(1, 0), 2**20)) == 1
    assert len(read_chunk(tmp_path / "a", Place(2, CHUNK_BYTES + 1), 2**20)) == 3


async def test_owners_take_turns_and_so_do_their_batches():
    window, entered = Window("", 1), asyncio.Queue()

    async def enter(owner, batch):
        for _ in range(3):
            await window.enter(owner, 1)
            entered.put_nowait((owner, batch))

    await window.enter("", 1)
    batches = [("a", 1), ("a", 2), ("b", 3)]
    tasks = [asyncio.create_task(enter(*batch)) for batch in batches]
    await asyncio.sleep(0)
    order = []
    for _ in range(9):
        window.leave(1)
        order.append(await entered.get())
    await asyncio.gather(*tasks)
    owners = "".join(owner for owner, _ in order)
    assert owners in ("abababaaa", "aababab" + "aa")
    assert [batch for owner, batch in order if owner == "a"] == [1, 2] * 3


async def test_a_row_enters_at_once_only_if_none_waits():
    window = Window("", 1)
    assert window.try_enter(1)
    assert not window.try_enter(1)
    waiting = asyncio.create_task(window.enter("", 1))
    await asyncio.sleep(0)
    window.leave(1)
    assert not window.try_enter(1), "the room is that of the row that waits"
    await waiting
    window.leave(1)
    assert window.try_enter(1)


async def test_large_rows_are_decoded_alone():
    window = Window("", 3)
    await window.enter("", 2 * MOST_BYTES)
    second = asyncio.create_task(window.enter("", 1))
    await asyncio.sleep(0.01)
    assert not second.done()
    window.leave(2 * MOST_BYTES)
    await second
