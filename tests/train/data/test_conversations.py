"""Conversations as token shards: rendered, masked and packed as straight from the definition."""

import json
import random
import re
from itertools import pairwise

import numpy as np
import pytest

from stu.chat.template import TUNED, ChatTemplate
from stu.tokenizer import read_tokenizer
from train.data import cli
from train.data.config import PrepareConfig
from train.data.encode import split_of
from train.data.loader import TokenData
from train.data.prepare import prepare
from train.data.shards import Index, TokenShards
from train.notes import describe_rows

SEQ_LEN = 128
CHATML = """{% for m in messages %}<{{ m.role }}>{% if m.role == 'assistant' %}
{% generation %}{{ m.content }}{{ eos_token }}{% endgeneration %}{% else %}{{ m.content }}
{% endif %}{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"""


def conversations(count, seed=0):
    source = random.Random(seed)
    for number in range(count):
        turns = []
        for _ in range(source.randint(1, 2)):
            turns.append({"role": "user", "content": f"{number}" * source.randint(1, 3)})
            turns.append({"role": "assistant", "content": "größer " * source.randint(0, 2) + "x"})
        yield {"messages": turns, "source": "made"}


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def folder(tmp_path_factory, code_tokenizer):
    """Conversations, their tokenizer, and token shards of them."""
    folder = tmp_path_factory.mktemp("chats")
    code_tokenizer.save(folder)
    write(folder / "chats.jsonl", conversations(300))
    prepare(config(folder))
    return folder


def config(folder, output="data", **settings):
    return PrepareConfig(
        [str(folder / "chats.jsonl")],
        folder / output,
        tokenizer=folder,
        chat_seq_len=SEQ_LEN,
        **{"workers": 1, "validation_fraction": 0.2, "shard_tokens": 1000, **settings},
    )


def rows(folder, split):
    """Return tokens and answers of each row, from the files themselves."""
    index = Index.load(folder)
    files = [folder / shard.file for shard in index.splits[split].shards]
    tokens = np.concatenate([np.fromfile(file, dtype="<u2") for file in files])
    answers = np.fromfile(folder / f"{split}.answers", dtype=np.uint8)
    assert len(tokens) == len(answers) == index.splits[split].num_tokens
    assert len(tokens) % SEQ_LEN == 1
    assert not answers[-1]
    return tokens[:-1].reshape(-1, SEQ_LEN), answers[:-1].reshape(-1, SEQ_LEN)


@pytest.mark.parametrize("source", [None, CHATML])
def test_rows_hold_all_conversations_whole(folder, tmp_path, source):
    data = folder / "data"
    if source:
        (tmp_path / "mine.jinja").write_text(source)
        data = tmp_path / "data"
        prepare(config(folder, data, chat_template=tmp_path / "mine.jinja"))
    assert (data / "chat_template.jinja").read_text() == (source or TUNED)
    tokenizer = read_tokenizer(data)
    template = ChatTemplate(data, tokenizer)
    for split in ("train", "validation"):
        expected = []
        for line in (folder / "chats.jsonl").read_text(encoding="utf-8").splitlines():
            if split_of(line, 0, 0.2) == split:
                tokens, answers = template.conversation(json.loads(line)["messages"])
                expected.append((tokens, [int(answer) for answer in answers]))
        found = []
        for tokens, answers in zip(*rows(data, split), strict=True):
            starts = [*np.flatnonzero(tokens == tokenizer.bos_id).tolist(), SEQ_LEN]
            assert starts[0] == 0
            for start, stop in pairwise(starts):
                found.append((tokens[start:stop].tolist(), answers[start:stop].tolist()))
        unpadded = []
        for tokens, answers in found:
            size = max(len(own) for own, _ in expected if own == tokens[: len(own)])
            assert tokens[size:] == [tokenizer.eos_id] * (len(tokens) - size)
            assert not any(answers[size:])
            unpadded.append((tokens[:size], answers[:size]))
        assert sorted(unpadded) == sorted(expected)
        assert Index.load(data).splits[split].num_documents == len(expected)
    filled = sum(len(tokens) for tokens, _ in expected)
    assert filled > 0.8 * rows(data, "validation")[0].size


def test_answers_are_read_across_shards(folder):
    for split in ("train", "validation"):
        shards = TokenShards(folder / "data", split)
        tokens, answers = rows(folder / "data", split)
        assert shards.read(0, len(shards) - 1).tolist() == tokens.flatten().tolist()
        assert shards.answers[:-1].tolist() == answers.flatten().tolist()


def test_workers_and_a_second_run_give_the_same_bytes(folder, tmp_path):
    prepare(config(folder, tmp_path / "again", workers=2))
    for path in (folder / "data").iterdir():
        assert (tmp_path / "again" / path.name).read_bytes() == path.read_bytes(), path.name


def test_fingerprint_covers_the_answers(folder, tmp_path):
    before = TokenShards(folder / "data", "train").fingerprint()
    marks = TUNED.replace("{{ message.content }}{{ eos_token }}{% endgen", "{{ message.content }}"
                          "{% endgen").replace("{% endgeneration %}", "{% endgeneration %}"
                          "{{ eos_token }}")  # fmt: skip
    (tmp_path / "t.jinja").write_text(marks)
    prepare(config(folder, tmp_path / "data", chat_template=tmp_path / "t.jinja"))
    other = TokenShards(tmp_path / "data", "train")
    assert (
        other.read(0, 500).tolist() == TokenShards(folder / "data", "train").read(0, 500).tolist()
    )
    assert other.fingerprint() != before


def test_conversations_that_are_only_for_validation(folder, tmp_path):
    """Their train split has a token and no documents."""
    path = str(folder / "chats.jsonl")
    held_out = {"name": "held-out", "path": path, "weight": 0, "validation_fraction": 1}
    given = [str(write(tmp_path / "sources.yaml", [[{"name": "chats", "path": path}, held_out]]))]
    given += ["--tokenizer", str(folder), "--chat-seq-len", str(SEQ_LEN), "--workers=1"]
    assert cli.main([*given, "--validation-fraction=0.2", f"--output={tmp_path / 'data'}"]) == 0
    data = TokenData(str(tmp_path / "data"), SEQ_LEN, 1)
    assert len(data.sources[1].train) == 1
    assert describe_rows(data) == []
    assert [len(source.validation) > 1 for source in data.sources] == [True, True]


BAD = [
    ("no json", "line 301: not JSON"),
    (json.dumps({"text": "x"}), "line 301: a row must be"),
    (json.dumps({"messages": []}), "line 301: a row must be"),
    (json.dumps({"messages": [{"role": "user"}]}), r"messages\[0\].content=null: it must be a str"),
    (json.dumps({"messages": [{"role": "user", "content": "x"}]}), "has no text of an assistant"),
    (json.dumps({"messages": [{"role": "assistant", "content": "y" * 199}]}), "tokens, more than"),
]


@pytest.mark.parametrize(("line", "message"), BAD)
def test_rows_that_are_no_conversations(folder, tmp_path, capsys, line, message):
    source = tmp_path / "chats.jsonl"
    source.write_text((folder / "chats.jsonl").read_text() + line + "\n")
    given = [str(source), "--tokenizer", str(folder), "--chat-seq-len", str(SEQ_LEN), "--workers=1"]
    given += ["--validation-fraction=0.2", "--output", str(tmp_path / "data")]
    assert cli.main(given) == 2
    assert re.search(message, capsys.readouterr().err)
    assert cli.main([*given, "--on-error=skip"]) == 0
    printed = capsys.readouterr().out
    assert "could not be read: 1" in printed
    assert re.search(r"\d tokens, \d+ rows, filled up at their ends\n", printed)
    assert "line 301" in (tmp_path / "data" / "skipped.jsonl").read_text()
    expected = (folder / "data" / "train-00000.bin").read_bytes()
    assert (tmp_path / "data" / "train-00000.bin").read_bytes()[: len(expected)] == expected


@pytest.mark.parametrize("name", ["chats.txt", "chats.csv.gz", "chats.parquet"])
def test_files_that_are_no_json_lines(tmp_path, capsys, name):
    (tmp_path / name).write_bytes(b"x")
    given = [str(tmp_path / name), "--tokenizer=bytes", "--chat-seq-len=64", "--workers=1"]
    assert cli.main([*given, "--output", str(tmp_path / "data")]) == 2
    assert f"{name}: conversations are JSON lines, in .jsonl files" in capsys.readouterr().err


@pytest.mark.parametrize("on_error", ["stop", "skip"])
def test_refused_rows_name_their_url(tmp_path, capsys, on_error):
    write(tmp_path / "chats.jsonl", [*conversations(8), {"messages": []}])
    url = f"file://{tmp_path}/chats.jsonl"
    given = [
        url,
        "--tokenizer=bytes",
        "--chat-seq-len=256",
        "--workers=1",
        f"--output={tmp_path}/d",
    ]
    status = cli.main([*given, "--validation-fraction=0.5", f"--on-error={on_error}"])
    assert status == (2 if on_error == "stop" else 0)
    if on_error == "stop":
        assert f"{url} line 9: a row must be" in capsys.readouterr().err
    else:
        (row,) = (tmp_path / "d" / "skipped.jsonl").read_text().splitlines()
        assert (json.loads(row)["file"], json.loads(row)["place"]) == (url, "line 9")


def test_mostly_refused_rows_are_no_conversations(tmp_path, capsys):
    """Though each of them could be read."""
    good, bad = [*conversations(4)], [{"prompt": "2 + 2?", "answer": "4"}] * 5
    given = ["--tokenizer=bytes", "--chat-seq-len=256", "--workers=1", "--validation-fraction=0.5"]
    given += ["--on-error=skip", "--output", str(tmp_path / "data")]
    assert cli.main([str(write(tmp_path / "chats.jsonl", good + bad)), *given]) == 2
    message = r"5 of 9 rows cannot be read \(5 not a conversation\), .*chats\.jsonl line 5: a row"
    assert re.search(message, capsys.readouterr().err)
    assert not (tmp_path / "data").exists()


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["--chat-seq-len=-1"], "--chat-seq-len=-1 is not allowed"),
        (["--chat-seq-len=64"], "--tokenizer=\"sentencepiece\" is not allowed: give the model"),
        (["--chat-seq-len=64", "--tokenizer=bytes", "--part=0/2"], "--part=\"0/2\" is not allowed"),
        (["--chat-seq-len=64", "--tokenizer=bytes", "--text-key=chat"], "leave it out: a row is a"),
        (["--chat-seq-len=64", "--tokenizer=bytes", "--kind=csv"], "it must be jsonl with"),
        (["--chat-template=x"], "it needs --chat-seq-len"),
        (["--chat-seq-len=64", "--tokenizer=bytes", "--chat-template=/x"], "a file, or a fold"),
    ],
)  # fmt: skip
def test_wrong_settings(folder, tmp_path, capsys, given, message):
    source = str(folder / "chats.jsonl")
    assert cli.main([source, "--output", str(tmp_path / "data"), *given]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "data").exists()
