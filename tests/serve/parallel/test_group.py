"""Engines of several processes that divide a model, by gloo, against one process."""

import asyncio
import contextlib
import json
import signal
import subprocess
import sys
from concurrent.futures import Future
from types import SimpleNamespace

import httpx
import psutil
import pytest
import torch

from serve.config import EngineConfig
from serve.devices import device_groups, memory_checked
from serve.llm import LLM
from serve.parallel.follower import Follower
from serve.parallel.followers import Followers
from serve.parallel.loading import make_engine
from serve.parallel.ranks import meeting_place
from serve.sampling_params import Constraint, SamplingParams
from stu.common.errors import UserError
from stu.config import ModelConfig
from stu.model import FlashSTU
from stu.model_dir import load_tokenizer, save_model
from tests import forked
from tests.serve.conftest import generate, read_rows, write_rows
from tests.serve.requests import make_request
from tests.serve.server_process import SECONDS, eventually, serving

SHAPE = {"width": 16, "num_layers": 4, "num_filters": 6, "num_heads": 4, "window_tokens": 7}


@pytest.fixture(scope="module")
def directory(tmp_path_factory, code_tokenizer):
    return save(tmp_path_factory.mktemp("divided") / "model", code_tokenizer)


def save(path, tokenizer, **shape):
    """Write a model directory, and return its path."""
    torch.manual_seed(0)
    shape = {"vocab_size": tokenizer.vocab_size, "max_seq_len": 256, **SHAPE, **shape}
    save_model(path, FlashSTU(ModelConfig(**shape)), tokenizer, {"max_new_tokens": 9})
    return path


@pytest.fixture
def start(directory, monkeypatch):
    """Function of a number of ranks and settings, which returns an engine."""
    monkeypatch.setattr(sys, "executable", forked.python())
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    engines = []

    def make(size, path=directory, **settings):
        config = EngineConfig(**{"cache_gib": 0.01, **settings})
        devices, tokenizer = ",".join(["cpu"] * size), load_tokenizer(path)
        engine = make_engine(path, devices, torch.float32, tokenizer, config, False)
        engines.append(engine)
        return engine

    yield make
    for engine in engines:
        if hasattr(engine, "close"):
            engine.close()


def requests():
    schema = Constraint("regex", "[a-z]{3,20}")
    sampling = SamplingParams(temperature=1, seed=5, logprobs=1)
    return [
        make_request([5, 6, 7], 30),
        make_request([*range(3, 90)], 20, sampling),
        make_request([8], 25, SamplingParams(constraint=schema), stop_at_eos=True),
        make_request([*range(3, 80), 9], 0, prompt_logprobs=1),
        make_request([4, 5], 40, SamplingParams(temperature=1, logit_bias={7: 2.5})),
    ]


def decode(engine):
    """Return the tokens and log probabilities of `requests`, one of which is aborted."""
    wrong = SamplingParams(constraint=Constraint("regex", "("))
    refused = make_request([5], 5, wrong, stop_at_eos=True)
    found, numbers = {}, {}
    for number, request in enumerate(requests()):
        numbers[engine.add(request)] = number
        if number == 1:
            with pytest.raises(UserError, match="regex"):
                engine.add(refused)
    steps = 0
    while engine.has_work:
        if steps == 8:
            engine.abort(max(numbers))
        for output in engine.step():
            tokens, logprobs = found.setdefault(numbers[output.request_id], ([], []))
            tokens += output.new_token_ids
            reported = [*output.logprobs, *output.prompt_logprobs]
            logprobs += [token.logprob for token in reported]
        steps += 1
    engine.check_integrity()
    return found


@pytest.mark.parametrize("size", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_processes_decode_as_one(start, size):
    expected, engine = decode(start(1)), start(size)
    compare(decode(engine), expected)
    refuse_what_cannot_be_sent(engine)
    (child,) = {own.pid for own in followers()} if size == 2 else (0,)
    engine.close()
    assert not child or not psutil.pid_exists(child)


def refuse_what_cannot_be_sent(engine):
    """Each of these requests is refused alone, and the next one is decoded."""
    unsendable = make_request([5], 5)
    object.__setattr__(unsendable.sampling, "seed", 2**64)
    with pytest.raises(OverflowError):
        engine.add(unsendable)
    with pytest.raises(UserError, match="regex is not allowed: it has half of a surrogate pair"):
        Constraint("regex", "\ud800")
    tokens_of(engine, make_request([5], 5))
    engine.check_integrity()


def tokens_of(engine, request):
    engine.add(request)
    found = []
    while engine.has_work:
        for output in engine.step():
            found += output.new_token_ids
    return found


def compare(found, expected):
    assert found.keys() == expected.keys()
    for number, (tokens, logprobs) in found.items():
        assert tokens == expected[number][0]
        assert logprobs == pytest.approx(expected[number][1], abs=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("shape", "settings"),
    [
        ({"layout": "stu"}, {"convolution_cache": "state"}),
        ({"layout": "stu"}, {"convolution_cache": "pages"}),
        ({"layout": "stu", "stu_form": "full", "num_layers": 2}, {}),
        ({"layout": "hyena"}, {}),
        ({"layout": "hyena", "blocks": "plain"}, {"batch_invariant": True}),
        ({"layout": "attention"}, {"overlap": True}),
        ({"layout": "hybrid", "width": 64}, {"weights": "int8"}),
        ({"layout": "hybrid"}, {"speculate": "ngram"}),
    ],
)
def test_all_layouts_decode_over_gloo(start, tmp_path, code_tokenizer, shape, settings):
    path = save(tmp_path / "model", code_tokenizer, **shape)
    expected = decode(start(1, path, **settings))
    compare(decode(start(2, path, **settings)), expected)


@pytest.mark.slow
def test_processes_confirm_the_same_guesses(start):
    request = make_request([3, 4, 5, 6] * 5, 100)
    found, steps = [], []
    for engine in (start(1), start(2, speculate="ngram")):
        engine.add(request)
        tokens = []
        while engine.has_work:
            for output in engine.step():
                tokens += output.new_token_ids
        found.append(tokens)
        steps.append(engine.stats().steps)
    assert found[1] == found[0]
    assert steps[1] < steps[0] / 2


def followers(process=None):
    """Return the processes of other ranks that a process, or this one, has started."""
    children = (process or psutil.Process()).children()
    return [own for own in children if "serve.parallel.follower" in " ".join(own.cmdline())]


def run_steps(engine, count):
    for _ in range(count):
        engine.step()


def test_the_end_of_a_rank_is_an_error_and_the_next_group_works(start):
    engine = start(2)
    engine.add(make_request([5, 6, 7], 30))
    engine.step()
    (child,) = followers()
    forked.real(child.pid).send_signal(signal.SIGKILL)
    with pytest.raises(RuntimeError, match="rank 1 of 2 on cpu ended by SIGKILL"):
        run_steps(engine, 40)
    engine.close()
    request = make_request([5, 6], 9)
    assert tokens_of(start(2), request) == tokens_of(start(1), request)


def test_no_rank_is_left_where_another_cannot_start(directory, monkeypatch):
    started, start_process = [], subprocess.Popen

    def start_one(*arguments, **options):
        if started:
            raise OSError("no process is left")
        started.append(start_process(*arguments, **options))
        return started[0]

    monkeypatch.setattr(sys, "executable", forked.python())
    monkeypatch.setattr(subprocess, "Popen", start_one)
    with pytest.raises(OSError, match="no process is left"):
        Followers(["cpu"] * 3, {"dies_with_parent": True}, False, lambda: None)
    assert started[0].poll() is not None


class Ended(Exception):
    """The end of a follower's loop."""


class Compiling:
    """An engine that compiles."""

    def compile(self, constraint):
        self.last = constraint

    def check_integrity(self):
        raise Ended


def run_at_once(function, argument):
    done = Future()
    done.set_result(function(argument))
    return done


def test_compiled_constraints_are_not_kept_for_clients_that_went_away(monkeypatch):
    monkeypatch.setattr(Follower, "_receive", lambda self: None)
    engine = Compiling()
    monkeypatch.setattr(Follower, "_load", lambda self: engine)
    follower = Follower(None)
    monkeypatch.setattr(follower, "_compiler", SimpleNamespace(submit=run_at_once))
    for number in range(9):
        follower._messages.put({"compile": {"kind": "regex", "source": str(number)}})
    follower._messages.put({"check": True})
    with pytest.raises(Ended):
        follower.run()
    assert list(follower._compiled) == [engine.last] == [Constraint("regex", "8")]


LARGEST = """
import sys, torch
from serve.parallel.ranks import join
rank, port = map(int, sys.argv[1:])
part = torch.full([40], float(rank))
part[rank::2] = torch.nan
found = join(port, rank, 2, "cpu", False).largest(part)
assert found.isnan().all(), found
"""


def test_the_largest_of_several_ranks_keeps_nan():
    """Wherever it is, and whichever rank has it."""
    place = meeting_place(2)
    ranks = [
        subprocess.Popen([forked.python(), "-c", LARGEST, str(rank), str(place.port)])
        for rank in range(2)
    ]
    assert [rank.wait(SECONDS) for rank in ranks] == [0, 0]


@pytest.mark.slow
def test_a_rank_that_chooses_other_tokens_ends(start):
    engine = start(2)
    engine.add(make_request([5, 6, 7], 30))
    engine.step()
    engine._digest += 1
    with pytest.raises(RuntimeError, match="rank 1 of 2 on cpu ended with code 3"):
        run_steps(engine, 3)


PROMPTS = ["def f(x):", "return", "x + 1"]


def test_commands_and_python_decode_on_several_ranks(directory, tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "executable", forked.python())
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    params = SamplingParams(max_new_tokens=9)
    llm = LLM(directory, device="cpu", tensor_parallel=2, cache_gib=0.01)
    found = [output.outputs[0].text for output in llm.generate(PROMPTS, params, use_tqdm=False)]
    llm.close()
    assert followers() == []
    llm = LLM(directory, device="cpu", cache_gib=0.01)
    expected = [output.outputs[0].text for output in llm.generate(PROMPTS, params, use_tqdm=False)]
    assert found == expected
    source, target = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    write_rows(source, [{"prompt": prompt} for prompt in PROMPTS])
    options = "--devices", "cpu", "--tensor-parallel", 2, "--max-new-tokens", 9
    assert generate(directory, source, target, *options) == 0
    rows = sorted(read_rows(target), key=lambda row: row["id"])
    assert [row["completion"] for row in rows] == expected


@pytest.mark.parametrize(
    ("devices", "num_cuda", "size", "groups"),
    [
        ("auto", 0, 2, ["cpu,cpu"]),
        ("auto", 4, 2, ["cuda:0,cuda:1"]),
        ("all", 4, 2, ["cuda:0,cuda:1", "cuda:2,cuda:3"]),
        ("3,1", 4, 2, ["cuda:3,cuda:1"]),
        ("cpu,cpu", 0, 2, ["cpu,cpu", "cpu,cpu"]),
        ("0,1", 4, 1, ["cuda:0", "cuda:1"]),
        ("auto", 1, 2, None),
        ("all", 3, 2, None),
        ("0,0", 2, 2, None),
        ("0,cpu", 2, 2, None),
        ("0,cpu,1", 2, 2, None),
    ],
)
def test_devices_make_up_groups(monkeypatch, devices, num_cuda, size, groups):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: num_cuda)
    if groups is None:
        with pytest.raises(UserError, match="2 different CUDA devices for each engine, or cpu"):
            device_groups(devices, size)
    else:
        assert device_groups(devices, size) == groups


def test_a_device_without_memory_names_the_settings_to_lower():
    with (
        pytest.raises(UserError, match=r"out of memory: lower one of .*max.running") as refused,
        memory_checked(),
    ):
        raise torch.OutOfMemoryError
    assert refused.value.field == "cache_gib"
    with pytest.raises(RuntimeError, match="another"), memory_checked():
        raise RuntimeError("another")


@pytest.mark.parametrize(
    ("device", "count", "message"),
    [
        ("gpu", 1, 'device="gpu" is not allowed: it must be auto, all, or a list'),
        ("gpu", 2, 'device="gpu" is not allowed: it must be auto, all, or a list'),
        ("99", 1, 'device="99" is not allowed: torch sees'),
        ("cpu,cpu", 1, 'device="cpu,cpu" is not allowed: it must be one device'),
        ("cpu,cpu", 2, 'device="cpu,cpu" is not allowed: it must be 2 devices'),
    ],
)
def test_devices_of_python_are_refused_by_name(directory, device, count, message):
    with pytest.raises(UserError, match=message):
        LLM(directory, device=device, tensor_parallel=count)


def test_a_number_of_ranks_that_does_not_divide_the_model_is_refused(directory, tmp_path, capsys):
    with pytest.raises(UserError, match=r"tensor_parallel=3 .* one of 1, 2, 4, which"):
        LLM(directory, device="cpu", tensor_parallel=3)
    write_rows(tmp_path / "in.jsonl", [{"prompt": "x"}])
    paths = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    assert generate(directory, *paths, "--tensor-parallel", 8, "--devices", "cpu") == 2
    assert "--tensor-parallel=8 is not allowed" in capsys.readouterr().err


@pytest.mark.slow
def test_killed_ranks_change_no_stream(directory):
    """200 streams on two groups of two ranks, one of which is killed again and again: all complete,
    with the same text as from a server that nothing disturbs."""
    options = "--devices", "cpu", "--replicas", 2, "--max-running", 8, "--max-waiting", 600

    def texts(server, num_kills):
        num_pieces, killed = 0, []

        async def read(client, seed):
            nonlocal num_pieces
            body = {"prompt": "def f(", "max_tokens": 40, "temperature": 1, "seed": seed}
            body |= {"stream": True, "stop_at_eos": False}
            text = ""
            async with client.stream("POST", "/v1/completions", json=body) as answer:
                async for line in answer.aiter_lines():
                    if line == "data: [DONE]":
                        return text
                    if line:
                        piece = json.loads(line.removeprefix("data: "))
                        assert "error" not in piece, piece
                        text += piece["choices"][0]["text"]
                        num_pieces += 1
            raise AssertionError("the stream ended without [DONE]")

        async def kill(streams):
            while len(killed) < num_kills and not all(stream.done() for stream in streams):
                await asyncio.sleep(0.01)
                if num_pieces <= 500 * (len(killed) + 1):
                    continue
                with contextlib.suppress(psutil.NoSuchProcess):  # of a group that has just ended
                    found = [child for own in server.replicas() for child in followers(own)]
                    (child, *_) = [child for child in found if child not in killed] or [None]
                    if child is not None:
                        forked.real(child.pid).kill()
                        killed.append(child)

        async def run():
            limits = httpx.Limits(max_connections=80)
            async with httpx.AsyncClient(base_url=server.url, timeout=300, limits=limits) as client:
                streams = [asyncio.create_task(read(client, seed)) for seed in range(200)]
                await kill(streams)
                return await asyncio.gather(*streams)

        return asyncio.run(run())

    with serving(directory, *options, "--batch-invariant", "--tensor-parallel", 2) as server:
        eventually(lambda: server.metric("stu:replicas_ready") == 2)
        found = texts(server, num_kills=4)
        assert server.metric("stu:requests_resumed_total") > 0
        assert server.metric("stu:replica_restarts_total") == 4
        assert found == texts(server, num_kills=0)
        assert server.stop() == 0


LEADER = """
import sys, torch
from serve.config import EngineConfig
from serve.parallel.loading import make_engine
from stu.model_dir import load_tokenizer
path = sys.argv[1]
config = EngineConfig(cache_gib=0.01)
engine = make_engine(path, "cpu,cpu", torch.float32, load_tokenizer(path), config)
print("ready", flush=True)
sys.stdin.read()
"""


@pytest.mark.slow
@pytest.mark.parametrize("is_stopped", [False, True])
def test_no_rank_outlives_the_first(directory, is_stopped):
    """Not even one that is stopped, and cannot see that its socket is closed."""
    command = [sys.executable, "-c", LEADER, str(directory)]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen(command, cwd=forked.ROOT, **pipes) as first:
        assert first.stdout.readline() == b"ready\n"
        (other,) = followers(psutil.Process(first.pid))
        if is_stopped:
            other.suspend()
        first.kill()
    other.wait(SECONDS)


@pytest.mark.slow
def test_the_end_of_a_rank_ends_the_first_with_a_reason(directory):
    command = [sys.executable, "-c", LEADER, str(directory)]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen(command, cwd=forked.ROOT, **pipes) as first:
        assert first.stdout.readline() == b"ready\n"
        (other,) = followers(psutil.Process(first.pid))
        other.kill()
        assert b"rank 1 of 2 on cpu ended by SIGKILL" in first.stderr.read()
    assert first.returncode == 3
