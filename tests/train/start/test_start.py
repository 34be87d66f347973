"""If one rank refuses a start, all do. Ranks are started as by srun, on one machine."""

import os
import signal
import socket
import threading
from types import SimpleNamespace

import pytest

from stu.common.errors import UserError
from tests import forked
from tests.train.start.test_launch import step
from train.start import agreement as start_module
from train.start.agreement import RunFailed, Start, judge, wait_for_listener
from train.start.launch import Launch

SECONDS = 120
STORE = ("set", "get", "check")


@pytest.fixture
def address(monkeypatch):
    """Free ports where stu and torch meet."""
    with socket.socket() as first, socket.socket() as second:
        first.bind(("127.0.0.1", 0))
        second.bind(("127.0.0.1", 0))
        ports = first.getsockname()[1], second.getsockname()[1]
    monkeypatch.setattr(Launch, "address", lambda self: ("127.0.0.1", ports[0]))
    return ports


def run_ranks(*bodies):
    """Run functions on threads, a rank each, and return what they raised."""
    raised = [None] * len(bodies)
    count = len(bodies)

    def run(rank, body):
        try:
            body(Start(Launch("slurm step", rank, rank, count), 60))
        except BaseException as error:
            raised[rank] = error

    threads = [threading.Thread(target=run, args=rank) for rank in enumerate(bodies)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return raised


def succeed(start):
    with start.together():
        pass


def refuse(start):
    with start.together():
        raise UserError(message="data.dir=/nowhere: no such folder")


def fail(start):
    with start.together():
        raise RuntimeError("a driver is missing")


def with_facts(**facts):
    def body(start):
        with start.together() as filled:
            filled.update(facts)

    return body


def test_all_continue_if_none_refuses(address):
    assert run_ranks(*[with_facts(torch="2")] * 3) == [None] * 3


@pytest.mark.parametrize("bodies", [(succeed, refuse), (refuse, succeed)])
def test_refusal_of_one_rank_is_raised_on_all(address, bodies):
    host, rank = socket.gethostname(), bodies.index(refuse)
    for error in run_ranks(*bodies):
        assert isinstance(error, UserError)
        assert str(error) == f"rank {rank} on {host}: data.dir=/nowhere: no such folder"


def test_refusal_of_all_ranks_is_shown_once(address):
    for error in run_ranks(refuse, refuse):
        assert str(error) == "data.dir=/nowhere: no such folder (all 2 ranks)"


def test_failure_of_one_rank_ends_all(address):
    first, second = run_ranks(succeed, fail)
    assert isinstance(first, RunFailed)
    assert first.code == 1
    assert isinstance(second, RuntimeError)


def test_different_facts_are_named(address):
    host = socket.gethostname()
    for error in run_ranks(with_facts(torch="2.13.0"), with_facts(torch="2.12.1")):
        assert str(error).startswith(
            f"torch is 2.13.0 for rank 0 on {host}, and 2.12.1 for rank 1 on {host}"
        )


def test_folder_that_ranks_do_not_share_is_refused(address, tmp_path):
    for rank in range(2):
        (tmp_path / str(rank)).mkdir()
    for error in run_ranks(
        lambda start: start.check_folder(tmp_path / "0"),
        # It stands for the same path on another node.
        lambda start: _on_another_node(start).check_folder(tmp_path / "1"),
    ):
        assert "rank 1" in str(error)
        assert "does not show what the first rank wrote" in str(error)
    assert not list((tmp_path / "0").iterdir())


def test_folder_that_ranks_share_is_accepted(address, tmp_path):
    bodies = [lambda start: start.check_folder(tmp_path)] * 2
    assert run_ranks(*bodies) == [None] * 2
    assert not list(tmp_path.iterdir())


def _on_another_node(start):
    start._launch = Launch("slurm step", start._launch.rank, 0, 2)
    return start


def test_first_rank_that_is_at_work_may_exceed_the_patience_of_the_others(address, monkeypatch):
    """It may verify a checkpoint of hundreds of gigabytes."""
    monkeypatch.setattr(start_module, "BEAT_SECONDS", 0.01)
    waited = threading.Event()

    def work(start):
        with start.together():
            assert waited.wait(SECONDS)

    def wait(start):
        add = start._connect().add

        def look(*arguments):
            count = add(*arguments)
            if count > 2:
                waited.set()
            return count

        start._store = SimpleNamespace(**{name: getattr(start._store, name) for name in STORE})
        start._store.add = look
        start._patience = 1.0
        with start.together():
            pass

    assert run_ranks(work, wait) == [None] * 2


def test_first_rank_that_shows_no_work_is_not_waited_for(address, monkeypatch):
    waited = threading.Event()

    def work(start):
        start._patience = 0.5  # for the other rank, which has ended by then
        with start.together():
            waited.wait(SECONDS)

    def wait(start):
        start._patience = 0.1
        try:
            with start.together():
                pass
        finally:
            waited.set()

    _, second = run_ranks(work, wait)
    assert isinstance(second, RunFailed)


def test_rank_that_never_answers_is_named(address, capsys):
    def wait(start):
        start._patience = 0.1
        succeed(start)

    raised = run_ranks(wait, lambda start: None)
    assert isinstance(raised[0], RunFailed)
    assert f"rank 0 on {socket.gethostname()} had no word from rank 1" in capsys.readouterr().err


def test_long_list_of_messages_is_shortened():
    answers = [{"host": f"n{rank}", "refuses": f"problem {rank}"} for rank in range(9)]
    message = judge(answers)["refuses"]
    assert message.startswith("rank 0 on n0: problem 0; rank 1 on n1: problem 1")
    assert message.endswith("and 5 more")


def start_rank(rank, address, arguments, log):
    variables = step(2, 1, "2", SLURM_PROCID=str(rank), SLURM_LOCALID=str(rank), SLURM_NODEID="0")
    code = (
        "import sys; from train.start.launch import Launch; from train.cli import main; "
        f"Launch.address = lambda self: ('127.0.0.1', {address[0]}); sys.exit(main(sys.argv[1:]))"
    )
    more = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(address[1]), "OMP_NUM_THREADS": "1"}
    with log.open("w") as file:
        return forked.Popen(
            [forked.python(), "-c", code, *arguments],
            env={**os.environ, **variables, **more},
            stderr=file,
        )


def test_commands_whose_start_is_refused_end_with_the_same_code(address, settings, tmp_path):
    """The data of one rank is missing."""
    ranks = ["--trainer.devices=2", f"--run-dir={tmp_path / 'run'}"]
    logs = [tmp_path / "0.log", tmp_path / "1.log"]
    missing = f"--data.dir={tmp_path / 'none'}"
    processes = [
        start_rank(0, address, [*settings, *ranks], logs[0]),
        start_rank(1, address, [*settings, *ranks, missing], logs[1]),
    ]
    try:
        codes = [process.wait(SECONDS) for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert codes == [2, 2], [log.read_text() for log in logs]
    for log in logs:
        assert f"rank 1 on {socket.gethostname()}: {tmp_path / 'none'}" in log.read_text()
    assert not (tmp_path / "run").exists()


def test_signal_while_waiting_for_another_rank_has_its_exit_code(address, settings, tmp_path):
    log = tmp_path / "log"
    arguments = [*settings, "--trainer.devices=2", f"--run-dir={tmp_path / 'run'}"]
    process = start_rank(0, address, arguments, log)
    try:
        wait_for_listener("127.0.0.1", address[0], SECONDS)
        process.send_signal(signal.SIGUSR1)
        assert process.wait(SECONDS) == 75, log.read_text()
    finally:
        process.kill()
    assert "ended by SIGUSR1 outside of training" in log.read_text()
