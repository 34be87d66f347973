"""Training on the answers of conversations: the loss, and equality over ranks and micro-batches."""

import json
import random
import shutil
from pathlib import Path

import httpx
import pytest
import torch
from lightning.pytorch.plugins.precision import HalfPrecision

from stu.chat.template import FILE_NAME as CHAT_TEMPLATE
from stu.chat.template import TUNED
from stu.common.errors import UserError
from stu.config import ModelConfig
from stu.model import FlashSTU
from tests import forked
from tests.serve.server_process import serving
from tests.train.conftest import parallel, slow
from tests.train.parallel.test_zero import assert_close
from tests.train.saved import checkpoint, load_checkpoint, losses
from train import cli, report
from train.checkpoint.export import export
from train.checkpoint.import_published import import_published
from train.data.batches import Windows
from train.data.config import PrepareConfig
from train.data.loader import TokenData
from train.data.mixture import save_mixture
from train.data.prepare import prepare
from train.data.shards import INDEX_FILE
from train.record import training_record

SEQ_LEN, SAMPLES, STEPS = 64, 4, 4
CONFIG = json.dumps({"chat_template": "mine"})


@pytest.fixture(scope="module")
def chats(tmp_path_factory, code_tokenizer):
    """Token shards of conversations whose answers differ much in length."""
    folder, source = tmp_path_factory.mktemp("chats"), random.Random(1)
    code_tokenizer.save(folder)
    with (folder / "chats.jsonl").open("w") as file:
        for number in range(120):
            answer = "x+" * source.choice([0, 1, 12]) + "1"
            messages = [{"role": "user", "content": str(number)}]
            messages += [{"role": "assistant", "content": answer}]
            file.write(json.dumps({"messages": messages}) + "\n")
    config = PrepareConfig([str(folder / "chats.jsonl")], folder / "data", tokenizer=folder,
                           chat_seq_len=SEQ_LEN, validation_fraction=0.2, workers=1)  # fmt: skip
    prepare(config)
    return folder / "data"


@pytest.fixture(scope="module")
def arguments(settings, chats):
    """Function that returns the arguments of a run of some ranks with some micro-batches a step."""
    own = {"data.dir": chats, "data.seq_len": SEQ_LEN, "model.config.max_seq_len": SEQ_LEN}
    own |= {"trainer.max_steps": STEPS, "model.z_loss": 1e-3, "checkpoint-every-steps": 2}

    def arguments(run, ranks=1, micro_batches=1, **more):
        given = {**own, **more, "run-dir": run, "trainer.devices": ranks}
        given["trainer.accumulate_grad_batches"] = micro_batches
        given["trainer.val_check_interval"] = STEPS * micro_batches
        given["data.micro_batch_size"] = SAMPLES // (ranks * micro_batches)
        return [*settings, *(f"--{name}={value}" for name, value in given.items())]

    return arguments


@pytest.fixture(scope="module")
def whole(arguments, tmp_path_factory):
    run = tmp_path_factory.mktemp("whole") / "run"
    assert cli.main(arguments(run)) == 0
    return run


def rows(chats, split):
    """Return tokens and answers of all rows, from the files themselves."""
    data = TokenData(str(chats), SEQ_LEN, 1)
    shards = data.sources[0].train if split == "train" else data.sources[0].validation
    tokens = torch.from_numpy(shards.read(0, len(shards)))
    answers = torch.frombuffer(
        bytearray((chats / f"{split}.answers").read_bytes()), dtype=torch.uint8
    )
    return tokens, answers.bool()


def test_loss_is_the_mean_over_answers(whole, arguments, chats):
    config = {
        t.split("=")[0][15:]: t.split("=")[1] for t in arguments(whole) if "model.config" in t
    }
    torch.manual_seed(0)
    model = FlashSTU(ModelConfig(vocab_size=280, **{n: int(v) for n, v in config.items()}))
    data = TokenData(str(chats), SEQ_LEN, SAMPLES)
    ids = next(iter(data.train_dataloader()))["sample_ids"].tolist()
    tokens, answers = rows(chats, "train")
    nats, squares = [], []
    for number in ids:
        row = tokens[number * SEQ_LEN : (number + 1) * SEQ_LEN + 1]
        logits = model(row[None, :-1])[0].double()
        for place in range(SEQ_LEN):
            if answers[number * SEQ_LEN + place + 1]:
                nats.append(-logits[place].log_softmax(-1)[row[place + 1]])
                squares.append(logits[place].logsumexp(-1) ** 2)
    assert len(nats) == sum(answers[n * SEQ_LEN + 1 : (n + 1) * SEQ_LEN + 1].sum() for n in ids)
    mean = torch.stack(nats).mean()
    assert losses(whole)[1] == pytest.approx(mean.item(), rel=1e-6)
    (mean + 1e-3 * torch.stack(squares).mean()).backward()
    norm = torch.nn.utils.get_total_norm([p.grad for p in model.parameters()]).item()
    assert report.read_curves(whole)["train/grad_norm"][1][0] == pytest.approx(norm, rel=1e-5)


@pytest.mark.parametrize(
    ("ranks", "micro_batches", "stage"),
    [(1, 4, None), (2, 2, 2), slow(2, 2, None), slow(2, 1, 3), slow(2, 2, "fsdp"), slow(2, 2, 0)],
)
def test_ranks_and_micro_batches_equal_one(whole, arguments, tmp_path, ranks, micro_batches, stage):
    given = arguments(tmp_path / "run", ranks, micro_batches, **parallel(stage))
    if ranks == 1:
        assert cli.main(given) == 0
    else:
        done = forked.run(forked.program("stu-train"), *given, PYTHONPATH=str(Path.cwd()))
        assert done.returncode == 0, done.stderr[-3000:]
    for step in (2, STEPS):
        expected = load_checkpoint(checkpoint(whole, step))
        assert_close(load_checkpoint(checkpoint(tmp_path / "run", step)), expected)
    for name in ("train/loss", "train/grad_norm", "val/bits_per_byte", "val/loss"):
        expected, actual = (report.read_curves(run)[name] for run in (whole, tmp_path / "run"))
        assert actual[0] == expected[0]
        assert actual[1] == pytest.approx(expected[1], rel=1e-5)


@pytest.mark.slow
def test_divided_sequences_equal_whole_ones(whole, arguments, tmp_path):
    given = arguments(tmp_path / "run", 2, 1, **{"parallel.context": 2})
    given += [f"--data.micro_batch_size={SAMPLES}"]
    done = forked.run(forked.program("stu-train"), *given, PYTHONPATH=str(Path.cwd()))
    assert done.returncode == 0, done.stderr[-3000:]
    expected = load_checkpoint(checkpoint(whole, STEPS))
    assert_close(load_checkpoint(checkpoint(tmp_path / "run", STEPS)), expected)
    for name in ("train/loss", "train/grad_norm", "val/loss"):
        expected, actual = (report.read_curves(run)[name] for run in (whole, tmp_path / "run"))
        assert actual[1] == pytest.approx(expected[1], rel=1e-5)


def test_resume_within_an_epoch_continues_the_weights(whole, arguments, tmp_path):
    resume = checkpoint(whole, 2)
    given = arguments(tmp_path / "run", 1, 2)
    assert cli.main([*given, f"--resume={resume}"]) == 0
    expected = load_checkpoint(checkpoint(whole, STEPS))
    assert_close(load_checkpoint(checkpoint(tmp_path / "run", STEPS)), expected)


def test_batches_know_the_mean_number_of_targets_in_their_step(chats):
    data = TokenData(str(chats), SEQ_LEN, 2)
    stream = data.train_dataloader()
    stream.micro_batches, stream.position = 3, 4
    batches = [batch for batch, _ in zip(stream, range(6), strict=False)]
    for step in (batches[:3], batches[3:]):
        counts = torch.stack([batch["counted"].sum() for batch in step]).double()
        for batch in step:
            # A strategy that trains in 16 bits casts the tensors of a batch.
            batch = HalfPrecision("bf16-true").convert_input(batch)
            assert batch["mean_counted"] == pytest.approx(counts.mean().item(), rel=1e-12)
    whole = Windows(data.sources[0].train, SEQ_LEN)
    assert "counted" not in whole[0]


def test_a_mixture_has_the_template_of_its_conversations(chats, tmp_path):
    for name in ("first", "second"):
        shutil.copytree(chats, tmp_path / name)
        save_mixture(tmp_path, {"web": 1.0, "first": 1.0, "second": 1.0})
    shutil.copytree(chats, tmp_path / "web")
    (tmp_path / "web" / CHAT_TEMPLATE).unlink()
    index = json.loads((tmp_path / "web" / INDEX_FILE).read_text()) | {"chat_seq_len": 0}
    (tmp_path / "web" / INDEX_FILE).write_text(json.dumps(index))
    data = TokenData(str(tmp_path), SEQ_LEN, 1)
    record = training_record(
        {}, ModelConfig(vocab_size=280, num_layers=2, width=16, num_heads=2), data
    )
    assert record["chat_template"].numpy().tobytes() == TUNED.encode()
    (tmp_path / "second" / CHAT_TEMPLATE).write_text("mine")
    with pytest.raises(UserError, match=r"second.*another chat template than that of .*first;"):
        TokenData(str(tmp_path), SEQ_LEN, 1)


def test_a_validation_without_answers_is_refused(chats):
    data = TokenData(str(chats), SEQ_LEN, 1)
    first = int(data.sources[0].validation.answers[1:].argmax())
    with pytest.raises(UserError, match=f"max_validation_tokens={first}.* at least {first + 1},"):
        TokenData(str(chats), SEQ_LEN, 1, max_validation_tokens=first)
    TokenData(str(chats), SEQ_LEN, 1, max_validation_tokens=first + 1)


def test_conversations_of_a_row_can_be_kept_apart(chats):
    batch = next(iter(TokenData(str(chats), SEQ_LEN, 3, documents="apart").train_dataloader()))
    together = next(iter(TokenData(str(chats), SEQ_LEN, 3).train_dataloader()))
    assert torch.equal(batch["counted"], together["counted"])
    for row, lengths in zip(batch["tokens"], batch["document_lengths"], strict=True):
        starts = torch.tensor([0, *lengths]).cumsum(0)[:-1]
        assert (row[starts] == row[0]).all()
        assert sum(lengths) == SEQ_LEN
        assert (row[:-1] == row[0]).sum() == len(lengths) > 1


def test_rows_of_another_length_are_refused(arguments, tmp_path, capsys):
    assert cli.main([*arguments(tmp_path / "run"), "--data.seq_len=32"]) == 2
    assert "data.seq_len=32 is not allowed: it must be 64, the length" in capsys.readouterr().err
    assert cli.main([*arguments(tmp_path / "run"), "--data.packing=best_fit"]) == 2
    assert "conversations were packed by stu-prepare" in capsys.readouterr().err


def test_chat_template_reaches_the_model_directory(whole, tmp_path):
    export(whole, tmp_path / "model")
    assert (tmp_path / "model" / "chat_template.jinja").read_text() == TUNED
    export(tmp_path / "model", tmp_path / "published", layout="published")
    for name, text in {"chat_template.jinja": "mine", "tokenizer_config.json": CONFIG}.items():
        (tmp_path / "published" / name).write_text(text)
        import_published(tmp_path / "published", tmp_path / name, tmp_path / "model")
        assert (tmp_path / name / "chat_template.jinja").read_text() == "mine"
        (tmp_path / "published" / name).unlink()


@pytest.mark.slow
def test_server_answers_as_it_was_taught(settings, tmp_path, code_tokenizer):
    answers = {"add": "def f(x):\n\treturn x + 1", "other": "x"}
    code_tokenizer.save(tmp_path)
    with (tmp_path / "chats.jsonl").open("w") as file:
        for number, (question, answer) in enumerate(20 * list(answers.items())):
            messages = [{"role": "user", "content": question}]
            messages += [{"role": "assistant", "content": answer}]
            file.write(json.dumps({"messages": messages, "number": number}) + "\n")
    prepare(PrepareConfig([str(tmp_path / "chats.jsonl")], tmp_path / "data", tokenizer=tmp_path,
                          chat_seq_len=SEQ_LEN, validation_fraction=0.2, workers=1))  # fmt: skip
    given = {"data.dir": tmp_path / "data", "data.seq_len": SEQ_LEN, "data.micro_batch_size": 8}
    given |= {"model.config.max_seq_len": SEQ_LEN, "trainer.max_steps": 120, "trainer.devices": 1}
    given |= {"trainer.val_check_interval": 120, "run-dir": tmp_path / "run"}
    assert cli.main([*settings, *(f"--{name}={value}" for name, value in given.items())]) == 0
    export(tmp_path / "run", tmp_path / "model")
    with serving(tmp_path / "model") as server:
        for question, answer in answers.items():
            messages = [{"role": "user", "content": question}]
            body = {"model": "model", "messages": messages, "temperature": 0}
            answered = httpx.post(f"{server.url}/v1/chat/completions", json=body, timeout=60).json()
            assert answered["choices"][0]["message"]["content"] == answer
            assert answered["choices"][0]["finish_reason"] == "stop"
