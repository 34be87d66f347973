"""Files of API keys."""

import hashlib

import pytest

from serve.server.access.keys import Keys
from stu.common.errors import UserError

SECRET = "sk-verysecret"


@pytest.fixture(autouse=True)
def no_variable(monkeypatch):
    monkeypatch.delenv("STU_API_KEYS", raising=False)


@pytest.fixture
def path(tmp_path):
    return tmp_path / "keys"


def found(keys, key):
    return keys.find(f"Bearer {key}".encode())


def test_lines_say_what_a_key_may(path):
    path.write_text(
        "# keys of 2026\n\nfirst\n"
        "second name=search requests-per-minute=60   tokens-per-minute=1000\n"
        "\tthird  admin name=ops@x \n"
    )
    keys = Keys(path)
    assert len(keys) == 3
    first, second, third = (found(keys, key) for key in ("first", "second", "third"))
    assert (first.name, first.is_admin, first.requests_per_minute) == ("key 1", False, None)
    assert (second.name, second.requests_per_minute, second.tokens_per_minute) == (
        "search",
        60,
        1000,
    )
    assert (third.name, third.is_admin, third.tokens_per_minute) == ("ops@x", True, None)
    assert first.digest == hashlib.sha256(b"first").digest()
    assert [found(keys, key) for key in ("fourth", "#", "name=search", "", "firs")] == [None] * 5
    assert keys.find(b"Basic first") is None
    assert keys.find(b"") is None


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "has no key"),
        ("# only\n \n", "has no key"),
        ("größe\n", "beyond printable ASCII"),
        ("a,b\n", "a comma"),
        (f"x\n{SECRET} {SECRET}\n", "line 2: what follows the key is not allowed"),
        (f"{SECRET} name=\n", "line 1: what follows"),
        (f"{SECRET} name=a/b\n", "line 1: what follows"),
        (f"{SECRET} admin=no\n", "line 1: what follows"),
        (f"{SECRET} tokens-per-minute=0\n", "line 1: what follows"),
        (f"{SECRET} requests-per-minute=1.5\n", "line 1: what follows"),
        (f"{SECRET} rpm=1\n", "line 1: what follows"),
        (f"{SECRET}\n\n{SECRET} name=b\n", "line 3: has the key of key 1 again"),
        ("x name=a\ny name=a\n", "line 2: has the name of key 1 again"),
    ],
)
def test_files_that_are_not_allowed_are_refused_without_quoting_a_key(path, text, message):
    path.write_text(text, encoding="utf-8")
    with pytest.raises(UserError, match=message) as error:
        Keys(path)
    assert SECRET not in str(error.value)


def test_old_keys_stay_valid_while_the_file_cannot_be_used(path):
    path.write_text("old\n")
    keys = Keys(path)
    for spoil in (lambda: path.write_text(""), lambda: path.write_bytes(b"\xff"), path.unlink):
        spoil()
        with pytest.raises((UserError, OSError)):
            keys.read()
        assert found(keys, "old")
    path.write_text("new\n")
    keys.read()
    assert found(keys, "new")
    assert not found(keys, "old")


def test_keys_are_in_the_environment_or_in_a_file(path, monkeypatch):
    path.write_text("a-key\n\nb-key\n")
    assert len(Keys()) == 0
    monkeypatch.setenv("STU_API_KEYS", "a-key, b-key")
    assert found(Keys(), "b-key").name == "key 2"
    with pytest.raises(UserError, match="are both set"):
        Keys(path)
    for without in ("", " ", ",", " , ,"):  # it does not open the server
        monkeypatch.setenv("STU_API_KEYS", without)
        with pytest.raises(UserError, match="STU_API_KEYS is set and has no key"):
            Keys()
