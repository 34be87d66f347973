"""Errors that the user can mend, and how commands end with them."""

import multiprocessing
import signal
from concurrent.futures import ProcessPoolExecutor
from contextlib import suppress

import pytest

from serve.batch.checked_file import Changed
from serve.batch.config import BatchConfig
from stu.common.cli import run_command
from stu.common.errors import UserError, setting_name


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (UserError("top_p", 3, "in (0, 1]"), "top_p=3 is not allowed: it must be in (0, 1]"),
        (
            UserError("top_p", 3, "in (0, 1]", "leave it out"),
            "top_p=3 is not allowed: it must be in (0, 1]; leave it out",
        ),
        (UserError("tools", fix="leave it out"), "tools is not allowed: leave it out"),
        (UserError("prompt", "x" * 100), f'prompt="{"x" * 59}... is not allowed'),
        (UserError("input", message="input a: no such file"), "input a: no such file"),
    ],
)
def test_messages(error, message):
    assert str(error) == message


def test_a_renamed_error_says_the_new_name():
    error = UserError("max_new_tokens", -1, "a whole number >= 0", code="c").renamed("max_tokens")
    assert str(error) == "max_tokens=-1 is not allowed: it must be a whole number >= 0"
    assert (error.field, error.value, error.code) == ("max_tokens", -1, "c")


def test_logs_leave_the_value_out():
    assert "secret" not in UserError("prompt", "secret", "a list").without_value()


def _raise(error):
    raise error


def test_errors_keep_their_parts_between_processes(tmp_path):
    errors = [
        UserError("top_p", 3, "in (0, 1]"),
        UserError("input", message="input a: no such file"),
        Changed(tmp_path),
    ]
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        for error in errors:
            with pytest.raises(type(error)) as raised:
                pool.submit(_raise, error).result()
            assert str(raised.value) == str(error)
            assert raised.value.__dict__ == error.__dict__


@pytest.mark.parametrize("error", [ValueError("our own"), KeyError("our own"), AssertionError()])
def test_a_fault_has_a_traceback_and_a_code_of_its_own(error, capsys):
    assert run_command("stu-test", lambda: _raise(error)) == 3
    assert "Traceback" in capsys.readouterr().err


def test_a_command_names_settings_as_options(capsys):
    names = {"max_running": "--max-running", "top_k": "--top-k", "other": "other"}
    for name, shown in names.items():
        error = UserError(name, 0, "a whole number >= 1")
        assert run_command("stu-test", lambda error=error: _raise(error), settings=BatchConfig) == 2
        expected = f"stu-test: error: {shown}=0 is not allowed: it must be a whole number >= 1\n"
        assert capsys.readouterr().err == expected


def test_messages_name_settings_as_options_only_in_a_command(capsys):
    def refuse():
        raise UserError("devices", message=f"lower {setting_name('cache_gib')}, not {other}")

    other = setting_name("other")
    with pytest.raises(UserError, match="lower cache_gib, not other"):
        refuse()
    assert run_command("stu-test", refuse, settings=BatchConfig) == 2
    assert capsys.readouterr().err == "stu-test: error: lower --cache-gib, not other\n"
    assert setting_name("cache_gib") == "cache_gib"


@pytest.mark.parametrize("error", [UserError("a", 1, "2"), FileNotFoundError(2, "gone", "x")])
def test_an_error_that_can_be_mended_is_one_line(error, capsys):
    assert run_command("stu-test", lambda: _raise(error)) == 2
    assert capsys.readouterr().err == f"stu-test: error: {error}\n"


@pytest.mark.parametrize(
    "after", [lambda: 0, lambda: _raise(ImportError("broken")), lambda: _raise(OSError())]
)
def test_sigterm_ends_a_command_whose_library_catches_its_exception(after, capsys):
    def body():
        with suppress(SystemExit):
            signal.raise_signal(signal.SIGTERM)
        return after()

    with pytest.raises(SystemExit, match="143"):
        run_command("stu-test", body)
    assert capsys.readouterr().err == ""
    assert run_command("stu-test", lambda: 0) == 0
